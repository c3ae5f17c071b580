"""What the sizes that a network remembers (`numbers.py`) count: the labels with which they must shrink.

Takes the record of a run on labels and the layer that runs; writes what it learns of the sizes into the record.
"""

from __future__ import annotations

from collections import deque

from torch import Tensor

from dynprune.structure.labels import labels_along, varies
from dynprune.structure.layers import RunningLayer
from dynprune.structure.numbers import Number, Source
from dynprune.structure.record import Record

RECENT = 8  # shapes that a remembered size may be compared with


class Sizes:
    """recent: labels of the values whose shapes were asked for last."""

    def __init__(self, record: Record, running: RunningLayer):
        self.record, self.running = record, running
        self.recent: deque[Tensor] = deque(maxlen=RECENT)

    def count(self, number: object, labels: Tensor) -> bool:
        """Note that `number`, if it is a remembered one, must shrink with these labels (1-D). Returns whether it is."""
        if not isinstance(number, Number) or labels.numel() != int(number):
            return False
        tie, tie_along = self.record.labels.tie, self.record.labels.tie_along
        if number.multiplier > 1 and number.divisor == 1 and labels.numel() % number.multiplier == 0:
            tie_along(labels.view(number.multiplier, -1), 0)  # only multiples can be remembered
        for (source, _), known in self.record.numbers.items():
            if source == number.source:
                if known.numel() == labels.numel():  # one attribute used twice: what it counts must shrink alike
                    tie(known, labels)
                elif known.numel() % labels.numel() == 0:
                    tie(known.view(-1, labels.numel()), labels.expand(known.numel() // labels.numel(), -1))
                elif labels.numel() % known.numel() == 0:
                    tie(labels.view(-1, known.numel()), known.expand(labels.numel() // known.numel(), -1))
                else:
                    return False
        self.record.numbers.setdefault((number.source, number.formula), labels.clone())
        return True

    def compared(self, number: Number) -> None:
        """A remembered size turned out to equal another whole number. If the shape of a value was just asked for and
        its channels are as many, they were compared with each other, so the size must shrink with them. It is a guess
        that a trial can refute."""
        for labels in reversed(self.recent):
            for dim in range(labels.ndim):
                if (
                    labels.size(dim) == int(number)
                    and varies(labels, dim)
                    and (along := labels_along(labels, dim)) is not None
                ):
                    key = (number.source, number.formula)
                    known = key in self.record.numbers
                    if self.count(number, along) and not known:
                        self.record.guessed.add(key)
                    return

    def count_in_layer(self, attribute: str, labels: Tensor) -> None:
        """The running layer remembers under this name how many channels it has: labels, (channels,)."""
        module = self.running.module
        if (
            module is not None
            and type(vars(module).get(attribute)) is int
            and vars(module)[attribute] == labels.numel()
        ):
            source = Source(self.running.stack[-1], attribute, -1)
            self.record.numbers.setdefault((source, (1, 1, 0)), labels.clone())
