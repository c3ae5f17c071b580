"""`dynprune bench`: what the compact or gated network saves in onnxruntime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dynprune.data.loading import Data
from dynprune.deploy.bench import BenchResult, bench_files, bench_run
from dynprune.errors import DynpruneError
from dynprune.gates.bench import GatedBenchResult, bench_gated
from dynprune.listener import SILENT, Listener
from dynprune.runs.directory import GateRun, Run, open_any, open_compact

BATCHES = (1, 8, 32)


def bench(
    *targets: str | Path,
    against: str | Path | None = None,
    batches: Sequence[int] = BATCHES,
    threads: int = 1,
    data: str | Data = "",
    listener: Listener = SILENT,
) -> BenchResult | GatedBenchResult:
    """Time networks in onnxruntime, interleaved in one process.

    targets: a run, whose network is timed beside its dense (or ungated) twin, or two ONNX files. against: a run of a
    trained dense network, in place of the twin. batches: batch sizes, the first gives the verdict; a gated network
    takes one image at a time. threads: 0 leaves onnxruntime's choice. data: where the run's data lie now, or the data
    themselves.

    Raises DynpruneError where there is nothing to compare.

    >>> dynprune.bench("runs/mine").verdict
    """
    paths, batches = [Path(target) for target in targets], list(batches)
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
