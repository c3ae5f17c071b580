"""Copies of networks and inputs, so that nothing we try leaves a trace on what the user handed in.

`copied` is copy.deepcopy for modules that deepcopy refuses: tensors that were computed are detached, and what cannot be
copied (a lock, an open file) is shared. `cloned` gives inputs that a network may write into. `same_randomness` hands
the random generators of torch, numpy and Python back as they were.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from dynprune.state.attributes import OPAQUE, OWN, attribute_values, replace

Module = TypeVar("Module", bound=nn.Module)


def copied(model: Module, memo: dict[int, object] | None = None) -> Module:
    """A deep copy. memo: copies to use for some objects, by their id, as in copy.deepcopy."""
    memo = dict(memo or {})
    for _, value in attribute_values(model):  # old-style weight_norm leaves computed tensors, for example
        if isinstance(value, Tensor) and value.grad_fn is not None and id(value) not in memo:
            memo[id(value)] = value.detach().clone()
    try:
        return copy.deepcopy(model, dict(memo))
    except Exception:
        for value in uncopyable(model):
            memo.setdefault(id(value), value)
        return copy.deepcopy(model, memo)


def doubled(model: Module) -> Module:
    """A copy on the CPU whose real numbers are in float64, those in its attributes too."""
    twin = copied(model).cpu().double()
    for path, value in list(attribute_values(twin)):
        if isinstance(value, Tensor) and value.is_floating_point():
            replace(twin, path, value.cpu().double())
        elif isinstance(value, np.ndarray) and value.dtype.kind == "f":
            replace(twin, path, value.astype(np.float64))
    return twin


def uncopyable(model: nn.Module) -> Iterator[object]:
    """The objects in the attributes of the model's modules that deepcopy refuses: as few and as deep inside as can be
    told."""
    modules = {id(module): module for module in model.modules()}
    held = {id(value): value for value in [*model.parameters(), *model.buffers()]}
    for module in model.modules():
        for attribute, value in vars(module).items():
            if attribute not in OWN:
                yield from refused(value, {**modules, **held}, set())
            elif attribute.endswith("_hooks"):
                yield from refused(value, {**modules, **held}, set())


def refused(value: object, known: dict[int, object], seen: set[int]) -> Iterator[object]:
    if (
        value is None
        or isinstance(value, (bool, int, float, str, Tensor, *OPAQUE))
        or id(value) in known
        or id(value) in seen
    ):
        return
    seen.add(id(value))
    try:
        copy.deepcopy(value, dict(known))  # modules and their tensors stand for themselves
        return
    except Exception:
        pass
    inner = (
        list(value.values())
        if isinstance(value, dict)
        else list(value)
        if isinstance(value, (list, tuple, set))
        else list(getattr(value, "__dict__", {}).values())
    )
    found = [part for entry in inner for part in refused(entry, known, seen)]
    if found and isinstance(value, (dict, list, tuple, set)):
        yield from found
    elif found:
        try:
            copy.deepcopy(value, {**known, **{id(part): part for part in found}})
            yield from found
        except Exception:
            yield value
    else:
        yield value


def cloned(tree: Any) -> Any:
    """Inputs of their own: every tensor in nested lists, tuples, dicts and plain objects is cloned, the containers are
    new."""
    if isinstance(tree, Tensor):
        return tree.detach().clone()
    if isinstance(tree, dict):
        new = copy.copy(tree)
        for key, value in tree.items():
            new[key] = cloned(value)
        return new
    if isinstance(tree, tuple):
        return type(tree)(*map(cloned, tree)) if hasattr(tree, "_fields") else type(tree)(map(cloned, tree))
    if isinstance(tree, list):
        return [cloned(value) for value in tree] if type(tree) is list else type(tree)(map(cloned, tree))
    if hasattr(tree, "__dict__") and not isinstance(tree, (nn.Module, *OPAQUE)) and not callable(tree):
        new = copy.copy(tree)
        new.__dict__.update({name: cloned(value) for name, value in vars(tree).items()})
        return new
    return tree


@contextmanager
def same_randomness(seed: int | None = None) -> Iterator[None]:
    """Whatever is drawn inside, the generators of torch, numpy and Python are afterwards where they were. seed: where
    to begin inside."""
    python, arrays = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            if seed is not None:
                torch.manual_seed(seed)
                np.random.seed(seed % 2**32)
                random.seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)


def generator(*numbers: int) -> torch.Generator:
    """A random generator that is a function of the given numbers."""
    mixed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator().manual_seed(mixed)
