"""Sizes that a network remembers: integers that know which attribute they came from.

Many networks compute channel counts once in `__init__` (`self.width`, `self.splits = [32, 16]`) and use them to slice,
split or view in `forward`. A smaller copy must remember smaller sizes. `remembered(model)` replaces, for the time of a
trace, the integers in the attributes of the user's own modules by `Number`s; those stay traceable through + - * //, so
that when one of them cuts a channel dimension the label tracer knows which attribute to repair, and how.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn


class Source(NamedTuple):
    """An integer attribute of a module, or an entry of a list or tuple there. entry -1: the attribute itself."""

    module: str
    attribute: str
    entry: int

    @property
    def path(self) -> tuple:
        """As `state.attributes` names it."""
        return (self.module, self.attribute, self.entry) if self.entry >= 0 else (self.module, self.attribute)


class Number(int):
    """An int equal to (multiplier * attribute + offset) / divisor, where `source` names the attribute.

    compared: told of every comparison with another whole number that it equals, as in `assert x.shape[1] ==
    self.width`.
    """

    source: Source
    multiplier: int
    divisor: int
    offset: int
    compared: Callable[[Number], None] | None

    def __new__(
        cls,
        value: int,
        source: Source,
        multiplier: int = 1,
        divisor: int = 1,
        offset: int = 0,
        compared: Callable[[Number], None] | None = None,
    ) -> Number:
        self = super().__new__(cls, value)
        self.source, self.multiplier, self.divisor, self.offset, self.compared = (
            source,
            multiplier,
            divisor,
            offset,
            compared,
        )
        return self

    @property
    def formula(self) -> tuple[int, int, int]:
        return self.multiplier, self.divisor, self.offset

    def __reduce__(self):  # copies and pickles are plain ints
        return int, (int(self),)

    def __add__(self, other):
        total = int(self) + other
        return (
            Number(total, self.source, self.multiplier, self.divisor, self.offset + self.divisor * other, self.compared)
            if type(other) is int
            else total
        )

    __radd__ = __add__

    def __sub__(self, other):
        return self + -other if type(other) is int else int(self) - other

    def __mul__(self, other):
        product = int(self) * other
        return (
            Number(product, self.source, self.multiplier * other, self.divisor, self.offset * other, self.compared)
            if type(other) is int
            else product
        )

    __rmul__ = __mul__

    def __floordiv__(self, other):
        quotient = int(self) // other
        exact = type(other) is int and int(self) % other == 0
        return (
            Number(quotient, self.source, self.multiplier, self.divisor * other, self.offset, self.compared)
            if exact
            else quotient
        )

    def __eq__(self, other):
        same = int(self) == other
        if same and type(other) is int and self.compared:
            self.compared(self)
        return same

    def __ne__(self, other):
        return not self == other

    __hash__ = int.__hash__


def number_name(source: Source, formula: tuple[int, int, int]) -> str:
    """How a remembered number is named among the tensors: '#["module", "attribute", entry, multiplier, divisor,
    offset]'."""
    return "#" + json.dumps([*source, *formula])


def is_number(name: str) -> bool:
    return name.startswith('#["') and name.endswith("]")  # a tensor's name ends with that of an attribute


def parse_number(name: str) -> tuple[Source, tuple[int, int, int]]:
    module, attribute, entry, *formula = json.loads(name[1:])
    if not (
        isinstance(module, str)
        and isinstance(attribute, str)
        and len(formula) == 3
        and all(type(part) is int for part in (entry, *formula))
    ):
        raise ValueError(f"{name[:80]} names no number")
    return Source(module, attribute, entry), (formula[0], formula[1], formula[2])


def named_as_before(name: str) -> str:
    """The name of a number in files of schema 1, "#module:attribute:entry:multiplier:divisor:offset", as it is now."""
    found = re.fullmatch(r"#([^:]*):([^:]+):(-?\d+):(\d+):(\d+):(-?\d+)", name)
    return (
        number_name(Source(found[1], found[2], int(found[3])), (int(found[4]), int(found[5]), int(found[6])))
        if found
        else name
    )


def attribute_for(formula: tuple[int, int, int], wanted: int) -> int:
    """The attribute's value at which (multiplier * attribute + offset) / divisor is `wanted`."""
    multiplier, divisor, offset = formula
    return (wanted * divisor - offset) // multiplier


@contextmanager
def remembered(model: nn.Module, compared: Callable[[Number], None] | None = None) -> Iterator[None]:
    """Within the context, integers above 1 in the attributes of modules from outside torch.nn are Numbers, and so is
    the shape that a LayerNorm without weights remembers. compared: see Number."""
    replaced: list[tuple[nn.Module, str, object]] = []
    try:
        for path, module in model.named_modules():
            for attribute, value in list(vars(module).items()):
                if type(module).__module__.startswith("torch.nn.") and not (
                    attribute == "normalized_shape" and module.weight is None
                ):
                    continue
                new = as_numbers(value, path, attribute, compared)
                if new is not value:
                    replaced.append((module, attribute, value))
                    module.__dict__[attribute] = new
        yield
    finally:
        for module, attribute, value in replaced:
            module.__dict__[attribute] = value


def as_numbers(value: Any, path: str, attribute: str, compared: Callable[[Number], None] | None = None) -> Any:
    if attribute.startswith("_"):
        return value
    if type(value) is int and value > 1:
        return Number(value, Source(path, attribute, -1), compared=compared)
    if type(value) in (list, tuple) and value and all(type(v) is int for v in value):
        return type(value)(
            Number(v, Source(path, attribute, i), compared=compared) if v > 1 else v for i, v in enumerate(value)
        )
    return value


def set_number(model: nn.Module, source: Source, value: int) -> None:
    """Set the attribute, or the entry of its list or tuple. Raises AttributeError unless a whole number is there
    already."""
    module = model.get_submodule(source.module)
    before = getattr(module, source.attribute)
    if not isinstance(before if source.entry < 0 else before[source.entry], int):
        raise AttributeError(f"{source.attribute} is not a whole number")
    if source.entry < 0:
        setattr(module, source.attribute, value)
        return
    entries = list(getattr(module, source.attribute))
    entries[source.entry] = value
    setattr(module, source.attribute, type(getattr(module, source.attribute))(entries))
