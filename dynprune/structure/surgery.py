"""Slices to a smaller module, on a copy.

Takes a module and, per tensor dimension, the positions to keep; returns a deep copy of the module whose tensors are
indexed and whose own numbers (`in_channels`, `num_features`, ...) are repaired. Names, class, hooks and training flags
stay, the input is untouched, and the copy can be traced again.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from dynprune.state.copies import copied
from dynprune.structure.numbers import attribute_for, parse_number, set_number
from dynprune.structure.record import AxisKey

# per module, what `slim` kept of the one that it was cut from: files name it, and the module itself need not know
CUT: WeakKeyDictionary[nn.Module, dict[AxisKey, np.ndarray]] = WeakKeyDictionary()


def narrow(tensor: Tensor, kept: Mapping[int, np.ndarray]) -> Tensor:
    """The tensor with only the kept positions along each given dimension, contiguous, in the same memory format."""
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    layout = layouts.get(tensor.ndim, torch.contiguous_format)
    if not tensor.is_contiguous(memory_format=layout) or tensor.is_contiguous():
        layout = torch.contiguous_format
    for dim, positions in kept.items():
        tensor = tensor.index_select(dim, torch.as_tensor(positions, device=tensor.device))
    return tensor.contiguous(memory_format=layout)


def slim(model: nn.Module, kept: Mapping[AxisKey, np.ndarray]) -> nn.Module:
    """A copy of `model` that holds only the kept positions. Shared tensors stay shared."""
    memo: dict[int, object] = {}
    by_tensor: dict[str, dict[int, np.ndarray]] = {}
    for (name, dim), positions in kept.items():
        if dim >= 0:
            by_tensor.setdefault(name, {})[dim] = positions
    for name, dims in by_tensor.items():  # narrow tensors enter deepcopy's memo, so the full ones are never copied
        old = get_tensor(model, name)
        new = narrow(old.detach(), dims)
        memo[id(old)] = nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
    small = copied(model, memo)
    for (name, dim), positions in kept.items():
        if dim < 0:
            source, formula = parse_number(name)
            set_number(small, source, attribute_for(formula, len(positions)))
    for (_, original), (_, module) in zip(model.named_modules(), small.named_modules()):
        repair_numbers(original, module)
    with suppress(TypeError):  # a class of the user's own may forbid being a key
        CUT[small] = composed(cut_of(model), kept)
    return small


def cut_of(model: nn.Module) -> Mapping[AxisKey, np.ndarray]:
    """The positions that a module has kept of the full-width network, empty where it was not cut by `slim`."""
    try:
        return CUT.get(model, {})
    except TypeError:
        return {}


def composed(first: Mapping[AxisKey, np.ndarray], second: Mapping[AxisKey, np.ndarray]) -> dict[AxisKey, np.ndarray]:
    """Positions that are kept when what was cut by `first` is cut by `second`."""
    both = {key: first[key][positions] if key in first else positions for key, positions in second.items()}
    return {**first, **both}


def get_tensor(model: nn.Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(path), leaf)


def own_weight(module: nn.Module) -> Tensor | None:
    """The tensor that a layer's weight is, or is computed from. Asking for a computed weight would compute it, which in
    training mode changes what a spectral norm remembers."""
    if (weight := module._parameters.get("weight")) is not None:
        return weight
    parametrized = vars(module)["_modules"].get("parametrizations")
    stores = [parametrized["weight"]._parameters] if parametrized is not None and "weight" in parametrized else []
    # the older norms
    stores += [{name: module._parameters[name] for name in ("weight_orig", "weight_v") if name in module._parameters}]
    found = [value for store in stores for value in store.values() if value is not None]
    return max(found, key=Tensor.numel, default=None)


def repair_numbers(original: Any, module: nn.Module) -> None:
    """Make the sizes that a layer remembers agree with its narrowed tensors. original: the layer it was copied from."""
    if isinstance(module, nn.RNNBase):
        module.input_size, module.hidden_size = (
            get_tensor(module, "weight_ih_l0").shape[1],
            get_tensor(module, "weight_hh_l0").shape[0] // (original.weight_hh_l0.shape[0] // original.hidden_size),
        )
        return
    if isinstance(module, nn.RNNCellBase):
        module.input_size, module.hidden_size = (
            module.weight_ih.shape[1],
            module.weight_hh.shape[0] // (original.weight_hh.shape[0] // original.hidden_size),
        )
        return
    if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
        module.num_features = module.running_mean.shape[0]
    weight, before = own_weight(module), own_weight(original)
    if weight is None or before is None or weight.shape == before.shape:
        return
    if isinstance(module, nn.modules.conv._ConvNd):
        depthwise = original.groups > 1 and original.groups == original.in_channels
        into, out = (0, 1) if module.transposed else (1, 0)
        if depthwise:
            multiplier = original.out_channels // original.groups
            module.groups = weight.shape[0] if module.transposed else weight.shape[0] // multiplier
            module.in_channels, module.out_channels = module.groups, module.groups * multiplier
        else:
            module.in_channels = weight.shape[into] * (1 if module.transposed else module.groups)
            module.out_channels = weight.shape[out] * (module.groups if module.transposed else 1)
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = weight.shape[0]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = weight.shape[0]
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        module.normalized_shape = tuple(weight.shape)
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = weight.shape[0]
