"""What a run on labels leaves behind: a record, which `channels.py` turns into groups of arms.

It says which labels sit along which dimension of which tensor (`axes`), which labels must live and die together
(`labels`), which are pinned and by what (`pins`), and how many multiplications each weight takes part in (`ops`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from dynprune.structure.labels import Labels
from dynprune.structure.numbers import Source

AxisKey = tuple[str, int]  # (tensor name, dimension); dimension -1: a remembered number
NumberKey = tuple[Source, tuple[int, int, int]]  # a remembered number: where it is kept, and the formula of its use


@dataclass(frozen=True)
class Op:
    """One use of a weight: it costs `positions` x (elements of the weight) multiplications per example.

    kind: linear, or a convolution function's name. size: of the input behind its channels (of a linear layer: its
    positions).
    stride, padding, dilation: per spatial dimension. groups: of the full-width convolution.
    """

    layer: str
    weight: str
    positions: int
    kind: str = "linear"
    size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1


@dataclass(frozen=True)
class Pin:
    """Why some labels cannot be removed: the function that mixed them, the layer that called it, and the labels."""

    op: str
    layer: str
    labels: Tensor


@dataclass(frozen=True)
class Cut:
    """A function whose sizes depend on a channel dimension (split, slice, view), and the labels that passed through it.

    When a compact copy does not behave, these are the suspects.
    """

    op: str
    layer: str
    labels: Tensor


@dataclass
class Record:
    """axes: labels along a dimension of a parameter or buffer, one per entry. reads: those whose slices multiply the
    channels of an input. elements: labels of each element of a parameter that is used as a value. numbers: labels that
    a remembered size counts; guessed: those of them that a trial may refute. mixed: labels that a statistic runs over,
    and by what. opaque: parameters that a function without a rule took, with its name and layer. used: names of all
    parameters and buffers that were met. outputs: what the network returned."""

    labels: Labels = field(default_factory=Labels)
    axes: dict[AxisKey, Tensor] = field(default_factory=dict)
    reads: set[AxisKey] = field(default_factory=set)
    elements: dict[str, Tensor] = field(default_factory=dict)
    numbers: dict[NumberKey, Tensor] = field(default_factory=dict)
    guessed: set[NumberKey] = field(default_factory=set)
    pins: list[Pin] = field(default_factory=list)
    cuts: list[Cut] = field(default_factory=list)
    mixed: list[Pin] = field(default_factory=list)
    opaque: dict[str, tuple[str, str]] = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    outputs: list[Tensor] = field(default_factory=list)
