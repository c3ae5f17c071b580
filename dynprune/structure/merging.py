"""BatchNorm merged into the layer before it, in a network that answers and does not learn: fewer passes over memory.

Takes a network in eval mode and how it is called; returns which BatchNorms directly follow which layers, or a copy
without them that answers the same. The copy is compared with the network before it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from dynprune.state.copies import copied
from dynprune.structure.labels import tensors_in

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, *TRANSPOSED)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
ALIKE = 1e-3  # difference over the largest value: of one rounding or another, not of another network

Run = Callable[[nn.Module], object]


def merged(model: nn.Module, run: Run) -> nn.Module:
    """A copy that answers as `model` does, without the BatchNorms that directly follow a layer; `model` itself where
    there are none. run: calls a model with examples and returns what it says: tensors, or a nest of them."""
    found = mergeable(model, run)
    return merge(copied(model), found) if found else model


def mergeable(model: nn.Module, run: Run) -> dict[str, str]:
    """Of each layer, by its name, the name of the BatchNorm that can be merged into it; none where a copy without them
    would answer anything else."""
    found = followed(model, run)
    if not found:
        return {}
    twin = merge(copied(model), found)
    with torch.no_grad(), torch.autocast(next(model.parameters()).device.type, enabled=False):
        try:
            return found if alike(run(model), run(twin)) else {}
        except AttributeError:  # code that looks at a BatchNorm's own numbers
            return {}


def alike(one: object, other: object) -> bool:
    ones, others = list(tensors_in(one)), list(tensors_in(other))
    return len(ones) == len(others) and all(
        one.shape == other.shape and float((one - other).abs().max()) <= ALIKE * float(one.abs().max())
        for one, other in zip(ones, others)
        if one.is_floating_point() and one.numel()
    )


@torch.no_grad()
def followed(model: nn.Module, run: Run) -> dict[str, str]:
    """Layers, each called once, whose output goes straight into a BatchNorm that is called once and does not learn."""
    names = {module: name for name, module in model.named_modules()}
    calls: dict[nn.Module, int] = {}
    said: list[tuple[nn.Module, Tensor]] = []
    pairs: dict[nn.Module, nn.Module] = {}

    def after_layer(module: nn.Module, _given: tuple, output: Tensor) -> None:
        calls[module] = calls.get(module, 0) + 1
        said.append((module, output))

    def before_norm(module: nn.Module, given: tuple) -> None:
        calls[module] = calls.get(module, 0) + 1
        for layer, output in reversed(said):
            if given and given[0] is output:
                if type(layer) is not nn.Linear or output.ndim == 2 and module.weight is not None:
                    pairs[layer] = module
                break

    hooks = [module.register_forward_hook(after_layer) for module in names if takes(module)]
    hooks += [module.register_forward_pre_hook(before_norm) for module in names if is_settled(module)]
    try:
        run(model)
    finally:
        for hook in hooks:
            hook.remove()
    return {names[layer]: names[norm] for layer, norm in pairs.items() if calls[layer] == calls[norm] == 1}


def takes(module: nn.Module) -> bool:
    """Whether a BatchNorm can be merged into it: its weights are what they are, and arms lie in one dimension."""
    grouped = isinstance(module, TRANSPOSED) and module.groups > 1
    return type(module) in LAYERS and not grouped and is_plain(module)


def is_settled(module: nn.Module) -> bool:
    return type(module) in NORMS and not module.training and module.running_mean is not None and is_plain(module)


def is_plain(module: nn.Module) -> bool:
    return not module._forward_hooks and not module._forward_pre_hooks


@torch.no_grad()
def merge(model: nn.Module, pairs: dict[str, str]) -> nn.Module:
    """The same model, its BatchNorms merged into the layers before them, in place. pairs: of `mergeable`."""
    for name, norm_name in pairs.items():
        layer: Any = model.get_submodule(name)
        norm: Any = model.get_submodule(norm_name)
        numbers = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        if isinstance(layer, nn.Linear):
            layer.weight, layer.bias = fuse_linear_bn_weights(layer.weight, layer.bias, *numbers)
        else:
            transposed = isinstance(layer, TRANSPOSED)
            layer.weight, layer.bias = fuse_conv_bn_weights(layer.weight, layer.bias, *numbers, transposed)
        model.set_submodule(norm_name, nn.Identity())
    return model
