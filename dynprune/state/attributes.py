"""What a network holds beside its state dict: constants in plain attributes, lists and dicts, non-persistent buffers.

Takes a module and walks the attributes of its submodules, through lists, tuples, dicts, plain objects and modules that
were never registered. Yields each number, text, tensor and array with its path: (module, attribute, key, key, ...).
`tensors.py` stores them, `copies.py` copies them.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dynprune.errors import DynpruneError

Path = tuple  # ("block1.norm", "scales", 0): module, attribute, and what leads on from there
DEPTH = 8
OWN = frozenset(vars(nn.Module())) - {"training"}  # nn.Module's bookkeeping: parameters, buffers, hooks
OPAQUE = (
    type,
    types.ModuleType,
    types.FunctionType,
    types.MethodType,
    types.BuiltinFunctionType,
    torch.dtype,
    torch.device,
    torch.Generator,
)


def attribute_values(model: nn.Module) -> Iterator[tuple[Path, object]]:
    """Every value in the attributes of `model` and its submodules that is no parameter or buffer of theirs, with its
    path."""
    registered = {id(module) for module in model.modules()}
    held = {id(value) for value in [*model.parameters(), *model.buffers()]}
    seen: set[int] = set()
    for name, module in model.named_modules():
        for attribute, value in list(vars(module).items()):
            if attribute not in OWN and attribute != "training":
                yield from walk(value, (name, attribute), registered, held, seen)


def walk(
    value: object, path: Path, registered: set[int], held: set[int], seen: set[int]
) -> Iterator[tuple[Path, object]]:
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        yield path, value
        return
    if (
        id(value) in held
        or id(value) in registered
        or id(value) in seen
        or isinstance(value, OPAQUE)
        or len(path) > DEPTH
    ):
        return
    seen.add(id(value))
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        yield path, value
    elif isinstance(value, dict):
        for key, entry in list(value.items()):
            if isinstance(key, (str, int)):
                yield from walk(entry, (*path, key), registered, held, seen)
    elif isinstance(value, (list, tuple)):
        for index, entry in enumerate(value):
            yield from walk(entry, (*path, index), registered, held, seen)
    elif isinstance(value, nn.Module):  # kept out of sight in a list, say: its tensors are in no state dict
        for store in ("_parameters", "_buffers", "_modules"):
            yield from walk(getattr(value, store), (*path, store), registered, held, seen)
        for attribute, entry in list(vars(value).items()):
            if attribute not in OWN:
                yield from walk(entry, (*path, attribute), registered, held, seen)
    elif hasattr(value, "__dict__"):
        for attribute, entry in list(vars(value).items()):
            yield from walk(entry, (*path, attribute), registered, held, seen)


def value_at(model: nn.Module, path: Path) -> Any:
    """The value that a path leads to. Raises LookupError or AttributeError where it leads nowhere."""
    value: Any = model.get_submodule(path[0])
    for key in path[1:]:
        value = step(value, key)
    return value


def step(value: Any, key: Any) -> Any:
    if isinstance(value, (list, tuple, dict)):
        return value[key]
    return vars(value)[key]


def set_value(model: nn.Module, path: Path, new: Any) -> None:
    """Put a value where a path leads. Tensors and arrays are filled in place; a tuple on the way is replaced by a new
    one."""
    before = value_at(model, path)
    if isinstance(before, Tensor):
        if before.shape != new.shape:
            raise ValueError(f"{'.'.join(map(str, path))} has shape {list(new.shape)}, expected {list(before.shape)}")
        before.data.copy_(new)
    elif isinstance(before, np.ndarray):
        if before.shape != tuple(new.shape):
            raise ValueError(f"{'.'.join(map(str, path))} has shape {list(new.shape)}, expected {list(before.shape)}")
        before[...] = new.numpy() if isinstance(new, Tensor) else new
    else:
        replace(model, path, new)


def replace(model: nn.Module, path: Path, new: object) -> None:
    if len(path) < 2:
        raise DynpruneError(f"{path} leads to a module, not to a value.")
    parent: Any = model.get_submodule(path[0]) if len(path) == 2 else value_at(model, path[:-1])
    if isinstance(parent, tuple):
        entries = [new if index == path[-1] else entry for index, entry in enumerate(parent)]
        replace(model, path[:-1], parent._make(entries) if hasattr(parent, "_make") else type(parent)(entries))
    elif isinstance(parent, (list, dict)):
        parent[path[-1]] = new
    else:
        vars(parent)[path[-1]] = new
