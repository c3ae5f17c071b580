"""Any module as one ONNX program of tensors.

Takes a module and the arguments of a call; names every tensor that goes in and comes out, writes the file, and compares
what onnxruntime says with what the module says. Nested tuples, lists and dicts are taken apart and put together again.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from dynprune.errors import DynpruneError
from dynprune.files.onnxfile import run_all, write_program
from dynprune.state.copies import same_randomness
from dynprune.structure.calling import call, knows
from dynprune.structure.tracing import first_line

Axes = Mapping[str, Mapping[int, str] | Sequence[int]]


class Flat(nn.Module):
    """A module that takes the tensors of a call's arguments one by one, and returns a tuple of tensors."""

    def __init__(self, model: nn.Module, inputs: tuple):
        super().__init__()
        self.model, self.inputs = model, inputs

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = iter(tensors)
        return tuple(value for _, value in leaves(call(self.model, put(self.inputs, given))))


@dataclass(frozen=True)
class Program:
    """A module in eval mode and the arguments of a call, on the CPU. names, tensors: of what goes in; answers, said: of
    what comes out. axes: per input, the dimensions that may vary, by name."""

    model: nn.Module
    inputs: tuple
    names: list[str]
    tensors: list[Tensor]
    answers: list[str]
    said: list[Tensor]
    axes: dict[str, dict[int, str]]
    plain: bool

    @classmethod
    def of(
        cls,
        model: nn.Module,
        inputs: tuple,
        *,
        input_names: Sequence[str] | None = None,
        output_names: Sequence[str] | None = None,
        dynamic: Axes | None = None,
    ) -> Program:
        """inputs: as `structure.calling.call` takes them. dynamic: see `dynprune.export`. Raises DynpruneError for
        names that do not fit, and for a model that fails on these inputs."""
        inputs = on_cpu(inputs)
        found = input_leaves(model, inputs)
        if not found:
            raise DynpruneError("example_inputs holds no tensor. Expected what the model takes.")
        names = named([name for name, _ in found], input_names, "input_names")
        tensors = [value for _, value in found]
        said = outputs_of(model, inputs, tensors)
        answers = named([name or "output" for name, _ in said], output_names, "output_names")
        axes = batch_axes(names, tensors) if dynamic is None else given_axes(dynamic, names, tensors)
        plain = all(isinstance(value, Tensor) for value in inputs) and [name for name, _ in said] == [""]
        return cls(model, inputs, names, tensors, answers, [value for _, value in said], axes, plain)

    def write(self, path: Path, opset: int | None, facts: dict[str, str]) -> None:
        """One checked file; weights inside, `facts` as metadata."""
        shared = {word: torch.export.Dim(word) for own in self.axes.values() for word in own.values()}
        shapes = tuple({dim: shared[word] for dim, word in self.axes.get(name, {}).items()} for name in self.names)
        larger = tuple(self.larger())
        if self.plain:
            write_program(self.model, larger, path, opset, facts, self.names, self.answers, shapes)
        else:
            flat = Flat(self.model, self.inputs).eval()
            write_program(flat, larger, path, opset, facts, self.names, self.answers, (shapes,))

    def larger(self) -> list[Tensor]:
        """The inputs, twice as large along what may vary: a size of 1 would be taken for a constant."""
        result = []
        for name, value in zip(self.names, self.tensors):
            for dim in self.axes.get(name, {}):
                value = torch.cat([value, value.flip(dim)], dim)
            result.append(value.contiguous())
        return result

    def feed(self, session: onnxruntime.InferenceSession) -> dict[str, np.ndarray]:
        """The example as onnxruntime takes it."""
        return feed(session, self.names, self.tensors)

    def gaps(self, session: onnxruntime.InferenceSession) -> list[tuple[float, float]]:
        """Per output, what `gap` says of the example and, where something may vary, of one that is twice as large."""
        compared = []
        for tensors in (self.tensors, self.larger()) if self.axes else (self.tensors,):
            ours = [value.numpy() for _, value in outputs_of(self.model, self.inputs, tensors)]
            theirs = run_all(session, feed(session, self.names, tensors))
            compared.append([gap(one, other) for one, other in zip(ours, theirs, strict=True)])
        return [(max(own[0] for own in entries), max(own[1] for own in entries)) for entries in zip(*compared)]


def feed(
    session: onnxruntime.InferenceSession, names: Sequence[str], tensors: Sequence[Tensor]
) -> dict[str, np.ndarray]:
    """Tensors by name; what the network does not use is not in the file."""
    taken = {entry.name for entry in session.get_inputs()}
    return {name: value.numpy() for name, value in zip(names, tensors, strict=True) if name in taken}


def gap(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """The largest difference between two arrays, and the largest value of the first; infinite where shapes differ."""
    if one.shape != other.shape:
        return np.inf, 1.0
    if not one.size:
        return 0.0, 0.0
    difference = np.abs(one.astype(np.float64) - other.astype(np.float64)).max()
    return float(difference), float(np.abs(one).max())


def leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested tuples, lists and dicts, with the way to them in words."""
    if isinstance(tree, Tensor):
        yield name, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from leaves(value, f"{name}.{key}" if name else str(key))
    elif isinstance(tree, tuple | list):
        for number, value in enumerate(tree):
            own = getattr(tree, "_fields", range(len(tree)))[number]
            yield from leaves(value, f"{name}.{own}" if name else str(own))


def put(tree: Any, tensors: Iterator[Tensor]) -> Any:
    """The same nesting with other tensors, in the order of `leaves`."""
    if isinstance(tree, Tensor):
        return next(tensors)
    if isinstance(tree, dict):
        return {key: put(value, tensors) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(put(value, tensors) for value in tree))
    if isinstance(tree, tuple | list):
        return type(tree)(put(value, tensors) for value in tree)
    return tree


def on_cpu(tree: Any) -> Any:
    """The same nesting, its tensors on the CPU and without a way to gradients."""
    return put(tree, (value.detach().cpu() for _, value in leaves(tree)))


def input_leaves(model: nn.Module, inputs: tuple) -> list[tuple[str, Tensor]]:
    """The tensors of the arguments, named as `forward` names them."""
    named = inputs[-1] if inputs and isinstance(inputs[-1], dict) and knows(model, inputs[-1]) else {}
    given = inputs[:-1] if named or inputs and inputs[-1] == {} else inputs
    try:
        parameters = list(inspect.signature(model.forward).parameters)
    except (TypeError, ValueError):
        parameters = []
    words = [parameters[i] if i < len(parameters) else f"input_{i}" for i in range(len(given))]
    return [entry for word, value in [*zip(words, given), *named.items()] for entry in leaves(value, word)]


def named(found: list[str], given: Sequence[str] | None, what: str) -> list[str]:
    """The names of tensors, each once."""
    if given is not None and len(given) != len(found):
        raise DynpruneError(f"{what} got {len(given)} names. Expected {len(found)}: {', '.join(found[:8])}.")
    names = list(given) if given is not None else found
    return [name if names.count(name) == 1 else f"{name}_{names[:i].count(name)}" for i, name in enumerate(names)]


@torch.no_grad()
def outputs_of(model: nn.Module, inputs: tuple, tensors: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
    """What a model returns for these tensors in the place of those in `inputs`, with its names."""
    try:
        with same_randomness(0):
            found = list(leaves(call(model, put(inputs, iter([value.clone() for value in tensors])))))
    except Exception as error:
        shapes = ", ".join("x".join(map(str, value.shape)) for value in tensors)
        raise DynpruneError(
            f"The model fails on inputs of shape {shapes} ({type(error).__name__}: {first_line(error)[:200]})."
        ) from error
    if not found:
        raise DynpruneError("The model returns no tensor. Expected tensors, or tuples, lists and dicts of them.")
    return [(f"output_{name}" if name.isdigit() else name, value) for name, value in found]


def batch_axes(names: Sequence[str], tensors: Sequence[Tensor]) -> dict[str, dict[int, str]]:
    """The first dimension of every input that has as many entries as the first input."""
    count = next((len(value) for value in tensors if value.ndim), 0)
    return {name: {0: "batch"} for name, value in zip(names, tensors) if value.ndim and len(value) == count}


def given_axes(dynamic: Axes, names: Sequence[str], tensors: Sequence[Tensor]) -> dict[str, dict[int, str]]:
    """As torch.onnx.export's `dynamic_axes`, checked."""
    sizes = dict(zip(names, tensors))
    found = {}
    for name, own in dynamic.items():
        if name not in sizes:
            raise DynpruneError(f'dynamic got "{name}". Expected inputs of the network: {", ".join(names)}.')
        found[name] = dict(own) if isinstance(own, Mapping) else {dim: f"{name}_{dim}" for dim in own}
        if not all(isinstance(dim, int) and 0 <= dim < sizes[name].ndim for dim in found[name]):
            raise DynpruneError(
                f"dynamic got {sorted(found[name])} for {name}, which has {sizes[name].ndim} dimensions."
            )
    return found
