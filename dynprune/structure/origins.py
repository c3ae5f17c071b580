"""Where a tensor comes from: whether it is one of the network's own, made of one, or a constant.

Takes a module, whose parameters, buffers and constants it knows by name, and is told what functions make of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils.weak import WeakTensorKeyDictionary

from dynprune.state.attributes import attribute_values
from dynprune.structure.labels import tensors_in


def is_filter_bank(module: nn.Module, name: str, tensor: Tensor) -> bool:
    """A filter's first dimension makes the channels; any other tensor may carry them along any dimension. A `weight`
    that is longer than 1 in a single dimension is a scale, whatever its shape: (1, C, 1, 1)."""
    if tensor.ndim < 2:
        return False
    if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear, ParametrizationList)):
        return isinstance(module, ParametrizationList) or name.startswith("weight")
    return (
        name.startswith("weight")
        and hasattr(module, "weight")
        and tensor.size(0) > 1
        and tensor.numel() > max(tensor.shape)
    )


class Origins:
    """tensors: the network's parameters and buffers by name; names: the other way round, by id. filter_banks: those of
    them that are. bank_vectors: labels of vectors that a filter bank was multiplied with."""

    def __init__(self, model: nn.Module):
        self.names: dict[int, str] = {}
        self.tensors: dict[str, Tensor] = {}
        self.filter_banks: set[str] = set()
        for path, module in model.named_modules():
            own = list(module.named_parameters(recurse=False)) + list(module.named_buffers(recurse=False))
            for name, tensor in own:
                full = f"{path}.{name}" if path else name
                self.names.setdefault(id(tensor), full)
                self.tensors[full] = tensor
                if is_filter_bank(module, name, tensor):
                    self.filter_banks.add(full)
        self.bank_vectors: dict[str, list[Tensor]] = {}
        self._bank: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._copies: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._constants: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        for _, value in attribute_values(model):
            if isinstance(value, Tensor):
                self.add_constant(value)

    def name_of(self, value: Any) -> str | None:
        """The name of a parameter or buffer; None for anything else."""
        return self.names.get(id(value))

    # -- copies --------------------------------------------------------------------------------------------------------

    def is_own(self, value: Tensor) -> bool:
        """Whether a value is one of the network's parameters or buffers, or a copy of one."""
        return id(value) in self.names or value in self._copies

    def is_copy(self, value: Tensor) -> bool:
        """Whether a value was computed from one of the network's tensors, every element on its own."""
        return value in self._copies

    def add_copy(self, output: Tensor, value: Tensor) -> None:
        """A function that works on every element by itself made `output` of `value`."""
        if self.is_own(value):
            self._copies[output] = True

    # -- filter banks --------------------------------------------------------------------------------------------------

    def bank_of(self, value: object) -> str | None:
        """The filter bank that a computed weight came from, by name."""
        if not isinstance(value, Tensor):
            return None
        name = self.name_of(value)
        if name is not None:
            return name if name in self.filter_banks else None
        return self._bank.get(value)

    def add_computed(self, output: object, args: tuple, kwargs: dict) -> None:
        """A function of a filter bank gives a computed weight of that bank."""
        if isinstance(output, Tensor):
            bank = next((name for value in tensors_in([args, kwargs]) if (name := self.bank_of(value))), None)
            if bank is not None and output not in self._bank:
                self._bank[output] = bank

    # -- constants -----------------------------------------------------------------------------------------------------

    def knows(self, value: Tensor) -> bool:
        """Whether a value is a constant, or one of the network's own tensors."""
        return value in self._constants or id(value) in self.names

    def add_constant(self, value: Tensor) -> None:
        self._constants[value] = True

    @contextmanager
    def seeing_arrays(self) -> Iterator[None]:
        """torch does not tell function modes of from_numpy. What it makes is a constant: channels that had left torch
        stay anyway."""
        original = torch.from_numpy

        def from_numpy(ndarray: Any) -> Tensor:
            value = original(ndarray)
            self.add_constant(value)
            return value

        torch.from_numpy = from_numpy
        try:
            yield
        finally:
            torch.from_numpy = original
