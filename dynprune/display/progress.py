"""What is being done, on stderr: a live line in a terminal, lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text

from dynprune.units import duration, percent

if TYPE_CHECKING:  # it imports torch
    from dynprune.training.train import Progress


class HowFar(ProgressColumn):
    """Share done and time left of a phase, or the time it has taken where its length is not known."""

    def render(self, task: Task) -> Text:
        spent = task.elapsed or 0.0
        if not task.total:
            return Text(duration(spent))
        share = task.completed / task.total
        left = f"  {duration(spent / share - spent)} left" if share > 0 and not task.fields.get("told") else ""
        return Text(f"{100 * share:.0f} %{left}")


class Display:
    """Progress on stderr: a live line in a terminal, one line per epoch or step elsewhere. verbose: every phase leaves
    a line, with the time since the start."""

    def __init__(self, console: Console | None = None, verbose: bool = False):
        self.console, self.verbose, self.started = console or Console(stderr=True), verbose, time.monotonic()
        self.bar = Bar(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            HowFar(),
            console=self.console,
            transient=True,
        )
        self.task = self.bar.add_task("", total=None)
        self.phase = ""
        self.val_accuracy: float | None = None

    @classmethod
    def silent(cls) -> Display:
        """For all but the first of several processes, and for --quiet."""
        return cls(Console(stderr=True, quiet=True))

    @contextmanager
    def live(self) -> Iterator[Display]:
        if self.console.is_terminal:
            with self.bar:
                yield self
        else:
            yield self

    def show(self, phase: str, text: str, done: int, total: int, told: bool = False) -> None:
        """Update the live line; another phase begins its own time. told: `text` says how long it takes."""
        if phase != self.phase:
            self.phase = phase
            self.bar.reset(self.task)
        self.bar.tasks[0].total = total or None  # `update` takes None for no change
        self.bar.update(self.task, description=text, completed=done, told=told)

    def step(self, event: Progress) -> None:
        """Show a training step; each finished epoch leaves a line."""
        if event.epoch_ended:
            self.val_accuracy = event.val_accuracy
            self.say(f"epoch {event.epoch}/{event.epochs}  {self.describe(event)}")
        if self.console.is_terminal:
            text = f"epoch {event.epoch}/{event.epochs}  {self.describe(event)}"
            self.show("training", text, event.step, event.steps, told=True)

    def describe(self, event: Progress) -> str:
        accuracy = f"  val {percent(self.val_accuracy)}" if self.val_accuracy is not None else ""
        share, left = percent(event.macs_share), duration(event.seconds_left)
        return f"loss {event.loss:.3f}{accuracy}  {share} of MACs  {event.phase}  {left} left"

    def note(self, text: str) -> None:
        """What is being done now: shown live, or as a line where there is no terminal."""
        if self.console.is_terminal:
            self.show(text, text, 0, 0)
        if not self.console.is_terminal or self.verbose:
            self.leave(text)

    def live_note(self, text: str) -> None:
        """Like `note`, for things too small for a line of their own."""
        if self.console.is_terminal or self.verbose:
            self.note(text)

    def work(self, text: str, done: int, total: int) -> None:
        """Work in `total` parts (0: not known): a bar where there is a terminal, one line at its start elsewhere."""
        if self.console.is_terminal:
            self.show(text, text, done, total)
        if done == 0 and (not self.console.is_terminal or self.verbose):
            self.leave(text)

    def leave(self, text: str) -> None:
        """A line that stays."""
        self.say(f"{duration(time.monotonic() - self.started)}  {text}" if self.verbose else text)

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
