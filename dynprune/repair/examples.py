"""Batches of the user's own as arguments of a call: read, moved, joined and cut into parts.

Takes example inputs, as torch.onnx.export takes its `args`, and batches as a DataLoader gives them; returns arguments
that `structure.calling.call` takes. What runs along the first dimension of every tensor are the examples; a lone list
of tensors may hold one example in each, as torchvision's detectors take images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynprune.errors import DynpruneError
from dynprune.structure.calling import arguments
from dynprune.structure.labels import tensors_in


@dataclass(frozen=True)
class Reader:
    """How a batch becomes arguments. example: of a call. inputs: the user's own way, if there is one."""

    example: tuple
    inputs: Callable[[Any], Any] | None = None

    def __call__(self, batch: Any) -> tuple:
        """The arguments in a batch. Raises DynpruneError, saying what was expected."""
        if self.inputs is not None:
            return arguments(self.inputs(batch))
        *positional, last = self.example
        closed = last == {} if isinstance(last, dict) else False  # says that a dict before it is an argument itself
        named = last if isinstance(last, dict) and all(isinstance(key, str) for key in last) else {}
        count = len(self.example) - bool(named or closed)
        if closed and count == 1 and isinstance(batch, Mapping):
            return (dict(batch), {})
        if named and not positional and isinstance(batch, Mapping):
            missing = sorted(named.keys() - set(batch))
            if missing:
                raise DynpruneError(
                    f"data gave a batch without {', '.join(missing)}, which the example inputs have. Pass inputs=, "
                    "a function that makes the inputs of a batch."
                )
            return ({name: batch[name] for name in named},)
        if not named:
            if isinstance(batch, Tensor) and count == 1:
                return (batch,)
            if (
                isinstance(batch, tuple | list)
                and len(batch) >= count
                and all(kind_of(own) == kind_of(example) for own, example in zip(batch, self.example[:count]))
            ):
                given = [list(own) if isinstance(own, tuple) and isinstance(example, list) else own
                         for own, example in zip(batch[:count], self.example)]  # fmt: skip
                return (*given, *self.example[count:])
        wanted = f"{count} inputs" if count != 1 else "images"
        raise DynpruneError(
            f"data gave a {type(batch).__name__}. Expected batches of {wanted}, or {wanted} and labels behind them in "
            "a tuple, as a DataLoader gives; or inputs=, a function that makes the inputs of a batch."
        )

    def labels(self, batch: Any) -> Tensor | None:
        """Class labels, (examples,), where a batch has them behind its one input, or by the name "labels"."""
        labels = None
        if isinstance(batch, Mapping):
            labels = batch.get("labels")
        elif self.inputs is None and isinstance(batch, tuple | list) and len(batch) > 1 and len(self.example) == 1:
            labels = batch[1]
        return labels if isinstance(labels, Tensor) and labels.ndim == 1 and not labels.is_floating_point() else None

    def listed(self, inputs: tuple) -> bool:
        """Whether the inputs are a lone list with one example in each of its tensors."""
        if len(inputs) != 1 or not isinstance(inputs[0], list) or not isinstance(self.example[0], list):
            return False
        before = self.example[0]
        return len(inputs[0]) != len(before) or (len(before) == 1 and before[0].ndim == 3)


def kind_of(value: object) -> type:
    return Tensor if isinstance(value, Tensor) else list if isinstance(value, tuple | list) else type(value)


def like(value: tuple | list, parts: list) -> Any:
    """Other entries in a tuple, named tuple or list."""
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)


def moved(value: Any, device: torch.device) -> Any:
    """A batch on a device, whatever it is made of; itself where it is there already."""
    if all(own.device == device for own in tensors_in(value)):
        return value
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: moved(own, device) for key, own in value.items()}
    if isinstance(value, tuple | list):
        return like(value, [moved(own, device) for own in value])
    return value.to(device) if hasattr(value, "to") else value


def count_of(inputs: Any, listed: bool = False) -> int:
    """How many examples there are."""
    if listed:
        return len(inputs[0])
    found = [value for value in tensors_in(inputs) if value.ndim]
    if not found:
        raise DynpruneError(
            "The inputs hold no tensor with a first dimension. Expected one example in each of its rows."
        )
    return len(found[0])


def joined(parts: list[tuple], listed: bool = False) -> tuple:
    """Several calls' inputs as those of one call. Raises DynpruneError where their tensors differ in shape."""
    if listed:
        return ([image for part in parts for image in part[0]],)
    counts = [count_of(part) for part in parts]

    def join(values: list) -> Any:
        first = values[0]
        if isinstance(first, Tensor):
            if first.ndim == 0 or any(len(value) != count for value, count in zip(values, counts)):
                return first  # the same for all
            if len({value.shape[1:] for value in values}) > 1:
                shapes = " and ".join(str(list(value.shape[1:])) for value in values[:2])
                raise DynpruneError(
                    f"data gave inputs of the shapes {shapes}. Expected one shape, so that layers see the same places "
                    "of all examples: resize or crop them."
                )
            return torch.cat(values)
        if isinstance(first, Mapping):
            return {key: join([value[key] for value in values]) for key in first}
        if isinstance(first, tuple | list):
            return like(first, [join(list(own)) for own in zip(*values, strict=True)])
        return first

    return join(parts)


def part_of(inputs: tuple, start: int, stop: int, listed: bool = False) -> tuple:
    """The examples from start to stop."""
    if listed:
        return (inputs[0][start:stop],)
    count = count_of(inputs)

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[start:stop] if value.ndim and len(value) == count else value
        if isinstance(value, Mapping):
            return {key: cut(own) for key, own in value.items()}
        if isinstance(value, tuple | list):
            return like(value, [cut(own) for own in value])
        return value

    return cut(inputs)


def endless(batches: Iterable, device: torch.device, taken: Callable[[], Iterable]) -> Iterator:
    """Batches again and again, on the device; of an iterator that is used up, those that `taken` makes."""
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield moved(batch, device)
        if empty:
            yield from taken()
