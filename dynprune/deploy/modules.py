"""Any module as an ONNX file that is proven to compute the same.

Takes a module and example inputs, as torch.onnx.export takes its `args`; every tensor in them is an input of the file,
every tensor that the module returns an output. Each output is compared with torch's, on the example and, where the
batch is dynamic, on a batch of another size. A file that disagrees is not kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dynprune.errors import DynpruneError
from dynprune.files.onnxfile import open_session, read_opset
from dynprune.files.program import Axes, Program
from dynprune.state.copies import copied
from dynprune.state.tensors import loose_to
from dynprune.structure.calling import Inputs, arguments

# of the largest output: float32 sums in another order differ by about 1e-6 of it, a wrong graph by far more
TOLERANCE = 1e-4


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


def export_module(
    model: nn.Module,
    example_inputs: Inputs,
    path: Path,
    *,
    opset: int | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic: Axes | None = None,
    facts: Mapping[str, str] | None = None,
) -> ModuleExport:
    """Write `model` as ONNX, in eval mode and with its weights inside; see `dynprune.export`. facts: the file's
    metadata."""
    if not path.name or path.is_dir():
        raise DynpruneError(f"path got {path}, which is a folder. Expected a file name such as model.onnx.")
    still = loose_to(copied(model).cpu(), torch.device("cpu")).eval()
    program = Program.of(
        still, arguments(example_inputs), input_names=input_names, output_names=output_names, dynamic=dynamic
    )
    partial = path.with_name(path.name + ".partial")
    with writing(path, partial):
        program.write(partial, opset, dict(facts or {"producer": "dynprune", "network": type(model).__name__}))
        gaps = program.gaps(open_session(partial))
        parities = [
            Parity(name, tuple(value.shape), gap, gap / max(largest, 1e-30))
            for name, value, (gap, largest) in zip(program.answers, program.said, gaps)
        ]
        if wrong := next((entry for entry in parities if not entry.max_rel_diff <= TOLERANCE), None):
            raise DynpruneError(
                f'onnxruntime differs from torch in the output "{wrong.name}" by {wrong.max_abs_diff:.1e}, '
                f"{wrong.max_rel_diff:.1e} of its largest value. No file was written. Try another opset, or no dynamic."
            )
        partial.replace(path)
    shapes_of = {name: tuple(value.shape) for name, value in zip(program.names, program.tensors)}
    return ModuleExport(str(path), read_opset(path), path.stat().st_size, shapes_of, parities, program.axes)


@contextlib.contextmanager
def writing(path: Path, *partial: Path) -> Iterator[None]:
    """Around writing `path`: makes its folder, says what to do where that fails, and leaves no `partial` file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise DynpruneError(f"Cannot write {path} ({error.strerror}). Choose another --out.") from error
    finally:
        for file in partial:
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)
