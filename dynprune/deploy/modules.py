"""Any module as ONNX, and any two modules timed in onnxruntime.

Takes a module and example inputs, as torch.onnx.export takes its `args`; every tensor in them is an input of the file,
every tensor that the module returns an output. Each output is compared with torch's, on the example and, where the
batch is dynamic, on a batch of another size. A file that disagrees is not kept.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from dynprune.budgets.latency import interleaved
from dynprune.deploy.bench import RUNS, SECONDS_PER_BATCH_SIZE, BenchResult, BenchRow, latency_of, summarise
from dynprune.deploy.export import TOLERANCE, writing
from dynprune.errors import DynpruneError
from dynprune.files.onnxfile import open_session, read_opset, run_all, write_program
from dynprune.state.copies import copied, same_randomness
from dynprune.state.tensors import loose_to
from dynprune.structure.calling import Inputs, arguments, call, knows
from dynprune.structure.tracing import first_line

Axes = Mapping[str, Mapping[int, str] | Sequence[int]]


@dataclass(frozen=True)
class Parity:
    """One output. shape: on the example. max_abs_diff, max_rel_diff: between torch and onnxruntime, the second over the
    largest value."""

    name: str
    shape: tuple[int, ...]
    max_abs_diff: float
    max_rel_diff: float


@dataclass(frozen=True)
class ModuleExport:
    """inputs: names and shapes on the example. dynamic: input name, dimension and name of what may vary."""

    path: str
    opset: int
    size_bytes: int
    inputs: dict[str, tuple[int, ...]]
    outputs: list[Parity]
    dynamic: dict[str, dict[int, str]]


class Flat(nn.Module):
    """A module that takes the tensors of its example inputs one by one, and returns a tuple of tensors."""

    def __init__(self, model: nn.Module, inputs: tuple):
        super().__init__()
        self.model, self.inputs = model, inputs

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = iter(tensors)
        return tuple(value for _, value in leaves(call(self.model, put(self.inputs, given))))


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


def export_module(
    model: nn.Module,
    example_inputs: Inputs,
    path: Path,
    *,
    opset: int | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic: Axes | None = None,
) -> ModuleExport:
    """Write `model` as ONNX, in eval mode and with its weights inside; see `dynprune.export`."""
    if not path.name or path.is_dir():
        raise DynpruneError(f"path got {path}, which is a folder. Expected a file name such as model.onnx.")
    model, inputs = (
        loose_to(copied(model).cpu(), torch.device("cpu")).eval(),
        put(arguments(example_inputs), on_cpu(arguments(example_inputs))),
    )
    found = input_leaves(model, inputs)
    if not found:
        raise DynpruneError("example_inputs holds no tensor. Expected what the model takes.")
    names = named([name for name, _ in found], input_names, "input_names")
    tensors = [value for _, value in found]
    said = outputs_of(model, inputs, tensors)
    answers = named([name or "output" for name, _ in said], output_names, "output_names")
    axes = batch_axes(names, tensors) if dynamic is None else given_axes(dynamic, names, tensors)
    flat, other = Flat(model, inputs).eval(), larger(names, tensors, axes)
    partial = path.with_name(path.name + ".partial")
    with writing(path, partial):
        shared = {word: torch.export.Dim(word) for own in axes.values() for word in own.values()}
        shapes = tuple({dim: shared[word] for dim, word in axes.get(name, {}).items()} for name in names)
        facts = {"producer": "dynprune", "network": type(model).__name__}
        write_program(flat, tuple(other), partial, opset, facts, names, answers, (shapes,))
        session, parities = open_session(partial), []
        compared = [
            compare(model, inputs, session, names, values) for values in ((tensors, other) if axes else (tensors,))
        ]
        for number, name in enumerate(answers):
            gap, largest = (max(entry[number][i] for entry in compared) for i in (0, 1))
            parities.append(Parity(name, tuple(said[number][1].shape), gap, gap / max(largest, 1e-30)))
        if wrong := next((entry for entry in parities if not entry.max_rel_diff <= TOLERANCE), None):
            raise DynpruneError(
                f'onnxruntime differs from torch in the output "{wrong.name}" by {wrong.max_abs_diff:.1e}, '
                f"{wrong.max_rel_diff:.1e} of its largest value. No file was written. Try another opset, or no dynamic."
            )
        partial.replace(path)
    shapes_of = {name: tuple(value.shape) for name, value in zip(names, tensors)}
    return ModuleExport(str(path), read_opset(path), path.stat().st_size, shapes_of, parities, axes)


def on_cpu(tree: Any) -> Iterator[Tensor]:
    return (value.detach().cpu() for _, value in leaves(tree))


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


def larger(names: Sequence[str], tensors: Sequence[Tensor], axes: Mapping[str, Mapping[int, str]]) -> list[Tensor]:
    """The inputs, twice as large along what may vary: a size of 1 would be taken for a constant."""
    result = []
    for name, value in zip(names, tensors):
        for dim in axes.get(name, {}):
            value = torch.cat([value, value.flip(dim)], dim)
        result.append(value.contiguous())
    return result


def compare(
    model: nn.Module,
    inputs: tuple,
    session: onnxruntime.InferenceSession,
    names: Sequence[str],
    tensors: Sequence[Tensor],
) -> list[tuple[float, float]]:
    """Per output, the largest difference between torch and onnxruntime, and the largest value; infinite where shapes
    differ."""
    ours = [value.numpy() for _, value in outputs_of(model, inputs, tensors)]
    taken = {entry.name for entry in session.get_inputs()}  # what the network does not use is not in the file
    theirs = run_all(session, {name: value.numpy() for name, value in zip(names, tensors) if name in taken})
    found = []
    for one, other in zip(ours, theirs, strict=True):
        if one.shape != other.shape:
            found.append((np.inf, 1.0))
        elif not one.size:
            found.append((0.0, 0.0))
        else:
            gap = np.abs(one.astype(np.float64) - other.astype(np.float64)).max()
            found.append((float(gap), float(np.abs(one).max())))
    return found


def bench_modules(
    dense: nn.Module | Path,
    compact: nn.Module | Path,
    inputs: Inputs,
    *,
    threads: int,
    report: Callable[[str], None] = lambda _: None,
) -> BenchResult:
    """Time two networks on the same inputs, in turn in one process; modules are exported first. Files need inputs of
    the names that `export` would give them, in order."""
    given = arguments(inputs)
    tensors = [value.detach().cpu() for _, value in leaves(given)]
    with tempfile.TemporaryDirectory(prefix="dynprune-") as folder:
        paths, names = [], []
        for number, network in enumerate((dense, compact)):
            path = network if isinstance(network, Path) else Path(folder) / f"{('first', 'second')[number]}.onnx"
            if isinstance(network, nn.Module):
                report(f"exporting the {('first', 'second')[number]} network")
                names.append(list(export_module(network, inputs, path, dynamic={}).inputs))
            else:
                names.append([])
            paths.append(path)
        sessions = [open_session(path, threads) for path in paths]
        feeds = [feed_of(session, path, tensors, own) for session, path, own in zip(sessions, paths, names)]
        report("timing both in turn")
        samples = interleaved(list(zip(sessions, feeds)), SECONDS_PER_BATCH_SIZE, RUNS)
        batch = next((len(value) for value in tensors if value.ndim), 1)
        first, second = (latency_of(own, batch) for own in samples)
        rows = [BenchRow(batch, first, second, first.p50_ms / second.p50_ms)]
        nothing = (None, None)
        return summarise(paths[0], paths[1], rows, threads, nothing, nothing, None, None, None, [], [])


def feed_of(
    session: onnxruntime.InferenceSession, path: Path, tensors: Sequence[Tensor], names: Sequence[str]
) -> dict[str, np.ndarray]:
    """The tensors under the names of a file's inputs. names: of the tensors where they are known, since a file may
    leave out what its network does not use; else they come in the file's order."""
    wanted = session.get_inputs()
    if names:
        taken = {entry.name for entry in wanted}
        return {name: value.numpy() for name, value in zip(names, tensors, strict=True) if name in taken}
    if len(wanted) != len(tensors):
        raise DynpruneError(
            f"{path.name} takes {len(wanted)} inputs ({', '.join(entry.name for entry in wanted)}), inputs holds "
            f"{len(tensors)} tensors. Expected as many, in the same order."
        )
    return {entry.name: value.numpy() for entry, value in zip(wanted, tensors)}
