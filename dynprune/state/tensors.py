"""All that a network computes with, as named tensors and plain values, and back.

Takes a module; returns its parameters and buffers (those that its state dict leaves out too, and each once, under its
first name), the tensors and arrays in its attributes, the plain values in those of the user's own modules, and extra
state where that is plain. `fill` puts them into another instance of the same network, built in another process. Nothing
is pickled.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from dynprune.errors import DynpruneError
from dynprune.state.attributes import Path, attribute_values, replace, set_value, value_at

PLAIN = (bool, int, float, str)
LIBRARIES = {"torch", "torchvision", "timm", "transformers", "dynprune"}
LOOSE = "loose."  # how the keys of tensors from attributes begin


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; one that has several names goes by its first."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def loose_tensors(model: nn.Module) -> dict[Path, Tensor]:
    """Tensors and numeric arrays in the attributes of the model's modules, by their paths."""
    found: dict[Path, Tensor] = {}
    for path, value in attribute_values(model):
        if isinstance(value, Tensor) and value.layout is torch.strided and not value.is_quantized:
            found[path] = value.detach()
        elif isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
            found[path] = torch.from_numpy(value.copy())
    return found


def loose_to(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with the tensors in its attributes on `device`, in place: Module.to leaves them behind."""
    for path, value in list(attribute_values(model)):
        if isinstance(value, Tensor) and value.device != device and value.device.type != "meta":
            replace(model, path, value.to(device))
    return model


def is_library(module: nn.Module) -> bool:
    """Whether a module's class comes with torch or another library of networks: what it remembers follows from how it
    is built."""
    return type(module).__module__.partition(".")[0] in LIBRARIES


def plain_values(model: nn.Module) -> dict[Path, object]:
    """Numbers, texts and truth values in the attributes of modules of the user's own. Some may have been drawn when
    they were built."""
    own = {name for name, module in model.named_modules() if not is_library(module)}
    return {path: value for path, value in attribute_values(model) if path[0] in own and isinstance(value, PLAIN)}


def paths_of(model: nn.Module) -> set[Path]:
    """Where the model has values beside its parameters and buffers."""
    return {path for path, _ in attribute_values(model)}


def carry_over(trained: nn.Module, full: nn.Module, sizes: Collection[Path]) -> None:
    """Give the full-width network the attributes that training changed in its narrow copy, but for the sizes that
    differ between them, by their paths, and for what the copy has made as it ran."""
    for path, value in {**loose_tensors(trained), **plain_values(trained)}.items():
        with contextlib.suppress(LookupError, AttributeError, ValueError):
            if path not in sizes and type(value_at(full, path)) is type(value_at(trained, path)):
                set_value(full, path, value)


def state_of(
    model: nn.Module, left_out: list[str] | None = None, *, within: Collection[Path] | None = None
) -> tuple[dict[str, Tensor], dict]:
    """Named tensors, and what else there is as JSON: under "loose" the paths of tensors in attributes, under "plain"
    plain values with their paths, under "extra" the extra state of modules. left_out: is told of extra state that is no
    plain value. within: the paths that count, those of a network that has not run yet: what it has noted down since
    then, such as a log, is no state."""
    tensors = named_tensors(model)
    loose: dict[str, list] = {}
    for number, (path, value) in enumerate(loose_tensors(model).items()):
        if within is not None and path not in within:
            continue
        key = f"{LOOSE}{number}"
        while key in tensors:
            key += "'"
        tensors[key], loose[key] = value, list(path)
    extra = {}
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            value = module.get_extra_state()
            if as_json(value):
                extra[name] = value
            elif left_out is not None:
                left_out.append(name)
    return tensors, {
        "loose": loose,
        "plain": [
            [list(path), value] for path, value in plain_values(model).items() if within is None or path in within
        ],
        "extra": extra,
    }


def as_json(value: object) -> bool:
    """Whether a value comes back from JSON as it was."""
    try:
        return json.loads(json.dumps(value, allow_nan=False)) == value
    except (TypeError, ValueError, RecursionError):
        return False


@torch.no_grad()
def fill(model: nn.Module, tensors: Mapping[str, Tensor], facts: Mapping) -> None:
    """Give `model` the state that `state_of` described. Raises ValueError for tensors that are absent, left over, or of
    other shapes, and for values of another kind; files by strangers can name any. Modules of libraries get no plain
    values."""
    own, loose = named_tensors(model), facts.get("loose", {})
    missing, unknown = own.keys() - tensors.keys(), tensors.keys() - own.keys() - loose.keys()
    if missing or unknown:
        raise ValueError(f"tensors {'missing' if missing else 'unknown'}: {', '.join(sorted(missing or unknown)[:3])}")
    for name, value in own.items():  # all, before anything is written
        given = tensors[name]
        if value.shape != given.shape and value.numel():
            raise ValueError(f"{name} has shape {list(given.shape)}, expected {list(value.shape)}")
    for name, value in own.items():
        given = tensors[name]
        if value.shape != given.shape:  # a buffer that was empty until the network ran, such as an observer's range
            value.data = given.to(value)
        else:
            value.data.copy_(given)
    for key, path in loose.items():
        set_value(model, tuple(path), tensors[key])
    known = plain_values(model)
    for path, value in facts.get("plain", []):
        if tuple(path) in known:  # an attribute that the code no longer has does not matter any more
            if type(known[tuple(path)]) is not type(value):
                raise ValueError(f"{'.'.join(map(str, path))} is another kind of value")
            set_value(model, tuple(path), value)
    for name, value in facts.get("extra", {}).items():
        model.get_submodule(name).set_extra_state(value)


def check_facts(facts: object) -> Mapping:
    """The JSON part of a state, if it is one. Raises ValueError."""
    if not isinstance(facts, dict) or not facts.keys() <= {"loose", "plain", "extra"}:
        raise ValueError("state")
    loose, plain, extra = facts.get("loose", {}), facts.get("plain", []), facts.get("extra", {})
    if not (
        isinstance(loose, dict)
        and isinstance(plain, list)
        and isinstance(extra, dict)
        and all(is_path(path) for path in loose.values())
        and all(isinstance(entry, list) and len(entry) == 2 and is_path(entry[0]) for entry in plain)
    ):
        raise ValueError("state")
    return facts


def is_path(path: object) -> bool:
    return (
        isinstance(path, list)
        and len(path) >= 2
        and isinstance(path[0], str)
        and all(isinstance(key, (str, int)) for key in path)
    )


def unfilled(model: nn.Module) -> bool:
    """Whether the model has tensors in its attributes, which `to_empty` does not reach."""
    return any(isinstance(value, (Tensor, np.ndarray)) for _, value in attribute_values(model))


def in_precision(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model with its real numbers in `dtype`, in place; complex ones keep theirs, which Module.to would cut to
    their real part."""
    model._apply(lambda value: value.to(dtype) if value.is_floating_point() else value)
    # what is kept in attributes meets the rest; below that, it stays as exact as its author made it
    if dtype == torch.float64:
        for path, value in list(attribute_values(model)):
            if isinstance(value, Tensor) and value.is_floating_point():
                replace(model, path, value.to(dtype))
    return model


def refuse_strange(model: nn.Module, name: str) -> None:
    """Refuse tensors that no file of ours can hold: sparse or quantised ones."""
    for key, value in named_tensors(model).items():
        if value.layout is not torch.strided or value.is_quantized:
            raise DynpruneError(
                f'"{name}" holds {key} as a '
                f"{'quantised' if value.is_quantized else str(value.layout).partition('.')[2]} "
                f"tensor. Expected ordinary ones."
            )
