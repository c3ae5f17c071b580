"""How long a run is: a number of steps, or as many as fit into a time.

A `Pace` says at which place of its schedule a step stands. Where `--time` is given, a `Clock` measures the steps while
they are made and moves the end, so that the schedule is whole when the time is over; the learning rate goes on from
where it stood. Checkpoints keep both, so a resumed run is at the same place.
"""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass, field

LOOKS = 50  # how often in a run its end is moved
LEAST = 1e-6  # seconds of a step, so that there is always a number of them


@dataclass
class Pace:
    """planned: steps of the schedule as it was laid out; steps: how many there will be. From the step `at` on, where
    the schedule stood at `place` (in planned steps), the rest of it is spread evenly."""

    planned: int
    steps: int
    place: float = 0.0
    at: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.place < self.planned and 0 <= self.at < self.steps):
            raise ValueError("a pace that leads nowhere")

    def of(self, step: int) -> float:
        """Where a step stands, in planned steps: its own number, where the end was not moved."""
        if self.planned == self.steps and self.place == self.at:
            return step
        return self.place + (self.planned - self.place) * (step - self.at) / (self.steps - self.at)

    def end_at(self, steps: int, now: int) -> None:
        """From the step `now` on, spread the rest of the schedule over what remains of so many steps."""
        self.place, self.at, self.steps = self.of(now), now, steps


@dataclass
class Clock:
    """The time that a run is given, in seconds, and where it goes.

    total: for everything; `before` of it were over when the first step began, `after` is for what the last step is
    followed by. judging: of one validation. narrow, wide: of a step, before and after layers grow. every: steps from
    one look to the next. began: when the time began, as `time.perf_counter` tells it; not known of a run that goes on.
    """

    total: float
    before: float
    after: float
    judging: float
    narrow: float
    wide: float
    every: int = 1
    began: float | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        values = [getattr(self, name) for name in self.facts()]
        if not all(isinstance(value, int | float) and 0 <= value < math.inf for value in values) or self.every < 1:
            raise ValueError("a clock of other numbers")
        self.go_on(0)

    def facts(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {own.name: getattr(self, own.name) for own in dataclasses.fields(self) if own.name != "began"}

    def start(self, step: int) -> None:
        """The first step of this process comes now."""
        if self.began is not None:
            self.before = time.perf_counter() - self.began
        self.go_on(step)

    def go_on(self, step: int) -> None:
        """Steps are made and measured from this one on."""
        self.since, self.first, self.judged = time.perf_counter(), step, 0.0

    def judge(self, seconds: float) -> None:
        """A validation, with what is saved after it, took so long."""
        self.judging = seconds
        self.judged += seconds

    def measure(self, step: int, growth_step: int) -> None:
        """How long the steps since the last look took."""
        if step > self.first:
            each = max(LEAST, (time.perf_counter() - self.since - self.judged) / (step - self.first))
            if step < growth_step:  # what slows these steps down slows the later ones, too
                self.wide, self.narrow = self.wide * each / self.narrow, each
            elif self.first >= growth_step:
                self.wide = each
        self.go_on(step)

    def left(self, spent: float) -> float:
        """Seconds for steps and validations. spent: by the run so far, in all its sittings."""
        return self.total - self.before - self.after - spent

    def affords(self, seconds: float, growing: float, per_epoch: int) -> int:
        """How many steps fit into so many seconds, one at least; a share `growing` comes before layers grow."""
        each = growing * self.narrow + (1 - growing) * self.wide + self.judging / per_epoch
        return max(1, int(seconds / each))
