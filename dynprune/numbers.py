"""Sizes that a network remembers: integers that know which attribute they came from.

Many networks compute channel counts once in `__init__` (`self.width`, `self.splits = [32, 16]`) and use them to slice, split or
view in `forward`. A smaller copy must remember smaller sizes. `remembered(model)` replaces, for the time of a trace, the
integers in the attributes of the user's own modules by `Number`s; those stay traceable through + - * //, so that when one of
them cuts a channel dimension the label tracer knows which attribute to repair, and how.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import nn


class Source(NamedTuple):
    """An integer attribute of a module, or an entry of a list or tuple there. index -1: the attribute itself."""

    module: str
    attribute: str
    index: int


class Number(int):
    """An int equal to (multiplier * attribute + offset) / divisor, where `source` names the attribute."""

    source: Source
    multiplier: int
    divisor: int
    offset: int

    def __new__(cls, value: int, source: Source, multiplier: int = 1, divisor: int = 1, offset: int = 0) -> Number:
        self = super().__new__(cls, value)
        self.source, self.multiplier, self.divisor, self.offset = source, multiplier, divisor, offset
        return self

    def __reduce__(self):  # copies and pickles are plain ints
        return int, (int(self),)

    def __add__(self, other):
        total = int(self) + other
        return Number(total, self.source, self.multiplier, self.divisor, self.offset + self.divisor * other) if type(other) is int else total

    __radd__ = __add__

    def __sub__(self, other):
        return self + -other if type(other) is int else int(self) - other

    def __mul__(self, other):
        product = int(self) * other
        return Number(product, self.source, self.multiplier * other, self.divisor, self.offset * other) if type(other) is int else product

    __rmul__ = __mul__

    def __floordiv__(self, other):
        quotient = int(self) // other
        exact = type(other) is int and int(self) % other == 0
        return Number(quotient, self.source, self.multiplier, self.divisor * other, self.offset) if exact else quotient


def attribute_for(formula: tuple[int, int, int], wanted: int) -> int:
    """The attribute's value at which (multiplier * attribute + offset) / divisor is `wanted`."""
    multiplier, divisor, offset = formula
    return (wanted * divisor - offset) // multiplier


@contextmanager
def remembered(model: nn.Module) -> Iterator[None]:
    """Within the context, integers above 1 in the attributes of modules from outside torch.nn are Numbers."""
    replaced: list[tuple[nn.Module, str, object]] = []
    try:
        for path, module in model.named_modules():
            if type(module).__module__.startswith("torch.nn."):
                continue
            for attribute, value in list(vars(module).items()):
                new = as_numbers(value, path, attribute)
                if new is not value:
                    replaced.append((module, attribute, value))
                    module.__dict__[attribute] = new
        yield
    finally:
        for module, attribute, value in replaced:
            module.__dict__[attribute] = value


def as_numbers(value: object, path: str, attribute: str) -> object:
    if attribute.startswith("_"):
        return value
    if type(value) is int and value > 1:
        return Number(value, Source(path, attribute, -1))
    if type(value) in (list, tuple) and value and all(type(v) is int for v in value):
        return type(value)(Number(v, Source(path, attribute, i)) if v > 1 else v for i, v in enumerate(value))
    return value


def set_number(model: nn.Module, source: Source, value: int) -> None:
    """Set the attribute, or the entry of its list or tuple. Raises AttributeError unless a whole number is there already."""
    module = model.get_submodule(source.module)
    before = getattr(module, source.attribute)
    if not isinstance(before if source.index < 0 else before[source.index], int):
        raise AttributeError(f"{source.attribute} is not a whole number")
    if source.index < 0:
        setattr(module, source.attribute, value)
        return
    entries = list(getattr(module, source.attribute))
    entries[source.index] = value
    setattr(module, source.attribute, type(getattr(module, source.attribute))(entries))
