"""`dynprune bench`: what the compact or gated network saves in onnxruntime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from dynprune.data.loading import Data
from dynprune.deploy.bench import BenchResult, bench_files, bench_modules, bench_run
from dynprune.errors import DynpruneError
from dynprune.gates.bench import GatedBenchResult, bench_gated
from dynprune.listener import SILENT, Listener
from dynprune.runs.directory import GateRun, Run, open_any, open_compact
from dynprune.structure.calling import Inputs

BATCHES = (1, 8, 32)


def bench(
    *targets: str | Path | nn.Module | Inputs,
    inputs: Inputs | None = None,
    against: str | Path | None = None,
    batches: Sequence[int] = BATCHES,
    threads: int = 1,
    data: str | Data = "",
    listener: Listener = SILENT,
) -> BenchResult | GatedBenchResult:
    """Time networks in onnxruntime, interleaved in one process.

    targets: a run, whose network is timed beside its dense (or ungated) twin; two ONNX files; or two networks, modules
    or files, and the inputs that both take, as torch.onnx.export takes its `args`. against: a run of a
    trained dense network, in place of the twin. batches: batch sizes, the first gives the verdict; a gated network
    takes one image at a time. threads: 0 leaves onnxruntime's choice. data: where the run's data lie now, or the data
    themselves.

    Raises DynpruneError where there is nothing to compare.

    >>> dynprune.bench("runs/mine").verdict
    >>> dynprune.bench(model, small, torch.zeros(1, 3, 640, 640)).speedup_p50
    """
    networks: list[Any] = list(targets)
    if len(networks) == 3 and inputs is None:
        inputs = networks.pop()
    if inputs is not None or any(isinstance(target, nn.Module) for target in networks):
        return of_modules(networks, inputs, threads, listener)
    if not all(isinstance(target, str | Path) for target in targets):
        raise DynpruneError(f"bench got {', '.join(type(target).__name__ for target in targets)}. Expected paths.")
    paths, batches = [Path(target) for target in targets if isinstance(target, str | Path)], list(batches)
    if len(paths) == 2:
        return bench_files(*paths, batches=batches, threads=threads, report=listener.note)
    if len(paths) != 1 or paths[0].suffix == ".onnx":
        raise DynpruneError(f"bench got {len(paths)} file(s). Expected one run directory, or two ONNX files.")
    found = open_any(paths[0])
    if isinstance(found, GateRun) and against is None:
        if batches not in ([1], list(BATCHES)):
            raise DynpruneError(
                f"--batch got {','.join(map(str, batches))}. A gated network takes one image at a "
                f"time: leave --batch out."
            )
        return bench_gated(found, threads=threads, data=found.images(data), report=listener.note, work=listener.work)
    found = open_compact(paths[0])
    return bench_run(
        found,
        batches=batches,
        threads=threads,
        against=Run.open(Path(against)) if against else None,
        data=found.images(data),
        report=listener.note,
    )


def of_modules(targets: Sequence, inputs: Inputs | None, threads: int, listener: Listener) -> BenchResult:
    pair = [Path(target) if isinstance(target, str) else target for target in targets]
    if len(pair) != 2 or not all(isinstance(target, nn.Module | Path) for target in pair):
        raise DynpruneError(f"bench got {len(pair)} networks. Expected two modules or ONNX files, and their inputs.")
    if inputs is None:
        raise DynpruneError("bench got modules without inputs. Expected bench(first, second, inputs).")
    if absent := [str(target) for target in pair if isinstance(target, Path) and not target.is_file()]:
        raise DynpruneError(f"No file {absent[0]}. Expected an ONNX file.")
    return bench_modules(pair[0], pair[1], inputs, threads=threads, report=listener.note)
