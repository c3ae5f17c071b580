"""Latency of ONNX files and of modules in onnxruntime, measured side by side.

Takes networks and batch sizes or inputs, runs them in turn in one process (A B A B ...), so that a drift of the
machine's speed meets all alike, and keeps every raw sample. Reports medians, 95th percentiles and the ratio.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import onnxruntime
from torch import Tensor, nn

from dynprune import zoo
from dynprune.budgets.fit import TOLERANCE
from dynprune.budgets.latency import FASTER, interleaved
from dynprune.budgets.limits import parse_limit
from dynprune.data.loading import Data, load_data
from dynprune.data.scores import Scores
from dynprune.deploy.answers import accuracy_of
from dynprune.deploy.export import check_classes, load_compact
from dynprune.deploy.modules import export_module
from dynprune.deploy.quantize import as_fast_as_int8, beside, is_of
from dynprune.errors import DynpruneError
from dynprune.files import artifact
from dynprune.files.onnxfile import open_session, size_bytes, write_onnx
from dynprune.files.program import feed, leaves
from dynprune.machine import environment
from dynprune.runs.directory import CompactDirectory, Run
from dynprune.structure.calling import Inputs, arguments

SECONDS_PER_BATCH_SIZE = 3.0  # for all files together; within these numbers of RUNS of each
RUNS = (7, 2000)
PRECISE = 0.003  # of a median: known so well, a measurement ends before its seconds are over
LARGEST_INPUT = 2**26  # numbers, 256 MiB


@dataclass(frozen=True)
class Latency:
    """One file at one batch size. samples_ms: every run, in order."""

    p50_ms: float
    p95_ms: float
    images_per_second: float
    samples_ms: list[float]


@dataclass(frozen=True)
class BenchRow:
    """dense_int8, compact_int8: the same files in int8, where the run has them; speedup_int8_p50: compact int8 over
    dense float32."""

    batch: int
    dense: Latency
    compact: Latency
    speedup_p50: float
    dense_int8: Latency | None = None
    compact_int8: Latency | None = None
    speedup_int8_p50: float | None = None


@dataclass(frozen=True)
class BenchResult:
    """dense is the first file, compact the second; accuracies are shares of the test images, None where unknown.
    budgets: of the run, with what was predicted and measured; empty for files that belong to none. int8: of both files
    in int8, where the run has them: paths, bytes and accuracy on test images (None of a twin with random weights)."""

    dense_path: str
    compact_path: str
    threads: int
    rows: list[BenchRow]
    speedup_p50: float
    dense_p50_ms: float
    compact_p50_ms: float
    dense_bytes: int
    compact_bytes: int
    dense_macs: int | None
    compact_macs: int | None
    dense_params: int | None
    compact_params: int | None
    accuracy_onnx: float | None
    dense_accuracy_onnx: float | None
    test_data: str | None
    verdict: str
    budgets: list[dict]
    environment: dict
    int8: dict[str, object] | None = None

    def without_samples(self) -> dict:
        """As a dict for --json; the raw samples stay in the run's bench.json."""
        result = asdict(self)
        for row in result["rows"]:
            for side in ("dense", "compact", "dense_int8", "compact_int8"):
                if row[side]:
                    row[side]["runs"] = len(row[side].pop("samples_ms"))
        return result


def bench_run(
    run: CompactDirectory,
    *,
    batches: list[int],
    threads: int,
    against: Run | None = None,
    data: Data | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> BenchResult:
    """The run's compact ONNX file against its dense twin, which is exported once and kept in the run directory.

    against: a run of `--policy dense` on the same data; its file is then the dense side, with its accuracy.
    """
    if not run.onnx_file.is_file():
        raise DynpruneError(f"{run.path} has no ONNX file yet. Run: dynprune export {run.path} --onnx")
    _, facts = load_compact(run)
    data = data or load_data(run.config.source)
    check_classes(run.compact_file, facts, data.classes)
    data = data.with_channels(facts.input_size[0])
    if against is not None:
        check_comparable(run, against)
    with tempfile.TemporaryDirectory(prefix="dynprune-") as elsewhere:
        dense_file = dense_twin(run, facts, data, report, Path(elsewhere)) if against is None else against.onnx_file
        if against is not None and not dense_file.is_file():
            raise DynpruneError(f"{against.path} has no ONNX file. Run compact and export there first.")
        if against is not None and (sizes := list(map(input_size, (dense_file, run.onnx_file))))[0] != sizes[1]:
            raise DynpruneError(
                f"--against {against.path} takes images of {sizes[0]}, {run.path} of {sizes[1]}. Train it with the "
                "same --image-size."
            )
        int8 = int8_pair(run, dense_file, data, Path(elsewhere), report)
        rows = measure([dense_file, run.onnx_file, *int8], batches, threads, report)
        report("accuracy of the ONNX file on the test data")
        accuracy = accuracy_of(run.onnx_file, data, data.test)
        dense_accuracy = accuracy_of(dense_file, data, data.test) if against is not None else None
        told = int8_facts(int8, data, against) if int8 else None
        return record(run, facts, dense_file, rows, threads, accuracy, dense_accuracy, data, against, told)


def int8_pair(
    run: CompactDirectory, dense_file: Path, data: Data, elsewhere: Path, report: Callable[[str], None]
) -> list[Path]:
    """Dense and compact file in int8, where `export --int8` wrote the second; else none. The dense one is made where it
    lacks, and kept beside its float32 file if that is the run's own."""
    own = beside(run.onnx_file, "int8")
    if not own.is_file():
        return []
    if not is_of(own, run.onnx_file):
        report(f"{own} is of an earlier export and left out; export --int8 again")
        return []
    twin = beside(dense_file, "int8")
    if not is_of(twin, dense_file):
        if dense_file.parent != run.path or not os.access(run.path, os.W_OK):
            twin = elsewhere / twin.name
        report("quantising the dense file")
        as_fast_as_int8(dense_file, twin, data)
    return [twin, own]


def int8_facts(pair: list[Path], data: Data, against: Run | None) -> dict[str, object]:
    dense, compact = pair
    return {
        "dense_path": str(dense),
        "compact_path": str(compact),
        "dense_bytes": size_bytes(dense),
        "compact_bytes": size_bytes(compact),
        "accuracy": accuracy_of(compact, data, data.test),
        "dense_accuracy": accuracy_of(dense, data, data.test) if against is not None else None,
    }


def record(
    run: CompactDirectory,
    facts: artifact.Facts,
    dense_file: Path,
    rows: list[BenchRow],
    threads: int,
    accuracy: float,
    dense_accuracy: float | None,
    data: Data,
    against: Run | None,
    int8: dict[str, object] | None = None,
) -> BenchResult:
    """Sum up what was measured, and keep it in the run directory."""
    widths = facts.widths
    odd = [name for name, width in widths.items() if width % 4]
    dense_macs, dense_params = facts.dense_macs, facts.dense_params
    if against is not None:
        other = load_compact(against)[1]
        dense_macs, dense_params = other.macs, other.params
    result = summarise(
        dense_file,
        run.onnx_file,
        rows,
        threads,
        (dense_macs, facts.macs),
        (dense_params, facts.params),
        accuracy,
        dense_accuracy,
        data.reports,
        odd,
        budgets_of(run, facts, rows, threads, against),
        int8,
    )
    run.keep("bench.json", json.dumps(asdict(result)))
    run.record("bench", result.without_samples())
    return result


def budgets_of(
    run: CompactDirectory, facts: artifact.Facts, rows: list[BenchRow], threads: int, against: Run | None
) -> list[dict]:
    """What the run's budgets allow, what `compact` counted or measured, and what is measured now. Milliseconds are
    those of batch 1 on one thread, and beside the dense twin; other timings say nothing about them."""
    single = next((row for row in rows if row.batch == 1), None) if threads == 1 and against is None else None
    lines = []
    for limit in map(parse_limit, facts.limits):
        if limit.quantity != "latency":
            dense, actual = (
                (facts.dense_macs, facts.macs) if limit.quantity == "macs" else (facts.dense_params, facts.params)
            )
            lines.append(
                {
                    "budget": str(limit),
                    "limit": limit.value(dense),
                    "predicted": actual,
                    "actual": actual,
                    "met": actual <= limit.value(dense),
                }
            )
        elif single is not None:
            dense_side, compact_side = single.dense, single.compact
            if run.config.int8:
                if single.dense_int8 is None or single.compact_int8 is None:
                    continue  # what the budget is about was not exported
                dense_side, compact_side = single.dense_int8, single.compact_int8
            bound = limit.value(dense_side.p50_ms)
            known = recorded_ms(run, str(limit))
            lines.append(
                {
                    "budget": str(limit),
                    "limit": bound,
                    "predicted": known,
                    "actual": compact_side.p50_ms,
                    "met": compact_side.p50_ms <= TOLERANCE * bound,
                }
            )
    return lines


def recorded_ms(run: CompactDirectory, budget: str) -> float:
    """What `compact` measured for a latency budget; nan if that is not on record."""
    try:
        return next(float(line["actual"]) for line in run.results["compact"]["budgets"] if line["budget"] == budget)
    except (KeyError, TypeError, ValueError, StopIteration):
        return math.nan


def check_comparable(run: CompactDirectory, against: Run) -> None:
    """A dense run may only be compared if it learned from the same images: with another split it has seen our test
    data."""
    ours, theirs = run.config, against.config
    if theirs.policy != "dense":
        raise DynpruneError(
            f"--against got {against.path}, a run of policy {theirs.policy}. Expected one of dynprune "
            f"train --policy dense."
        )
    differing = [
        name for name in ("data", "data_root", "val_fraction", "seed") if getattr(ours, name) != getattr(theirs, name)
    ]
    if differing:
        raise DynpruneError(
            f"--against {against.path} has another {', '.join(differing)}, so its test images may be "
            f"among those it was trained on. Train it with the same settings."
        )


def bench_files(
    dense: Path, compact: Path, *, batches: list[int], threads: int, report: Callable[[str], None] = lambda _: None
) -> BenchResult:
    """Any two ONNX files with one image-like input; the first is called dense, the second compact."""
    rows = measure([dense, compact], batches, threads, report)
    result = summarise(dense, compact, rows, threads, (None, None), (None, None), None, None, None, [], [])
    sizes = [input_size(path) for path in (dense, compact)]
    return (
        result
        if sizes[0] == sizes[1]
        else replace(
            result,
            verdict=f"{result.verdict}; they are not the same "
            f"work: {dense.name} takes images of "
            f"{sizes[0]}, {compact.name} of {sizes[1]}",
        )
    )


def input_size(path: Path) -> str:
    """The size of one image that a file takes, such as 3x224x224."""
    return "x".join(map(str, open_session(path).get_inputs()[0].shape[1:]))


def summarise(
    dense: Path,
    compact: Path,
    rows: list[BenchRow],
    threads: int,
    macs: tuple[int | None, int | None],
    params: tuple[int | None, int | None],
    accuracy: float | None,
    dense_accuracy: float | None,
    test_data: str | None,
    odd: list[str],
    budgets: list[dict],
    int8: dict[str, object] | None = None,
) -> BenchResult:
    first = rows[0]
    return BenchResult(
        str(dense),
        str(compact),
        threads,
        rows,
        first.speedup_p50,
        first.dense.p50_ms,
        first.compact.p50_ms,
        size_bytes(dense),
        size_bytes(compact),
        *macs,
        *params,
        accuracy,
        dense_accuracy,
        test_data,
        verdict(first, macs, odd),
        budgets,
        {**environment(), "threads": threads},
        int8,
    )


def verdict(row: BenchRow, macs: tuple[int | None, int | None], odd: list[str]) -> str:
    """One honest line for the first batch size: how much faster, or not faster and the likely reason; and in int8."""
    line = verdict_float32(row, macs, odd)
    if row.compact_int8 is None or row.dense_int8 is None:
        return line
    own, dense = row.compact.p50_ms / row.compact_int8.p50_ms, row.dense.p50_ms / row.compact_int8.p50_ms
    if own < FASTER:
        return f"{line}; int8 is not faster than float32 on the compact network ({own:.2f}x)"
    return f"{line}; with int8 {dense:.1f}x ({row.compact_int8.p50_ms:.3g} ms)"


def verdict_float32(row: BenchRow, macs: tuple[int | None, int | None], odd: list[str]) -> str:
    times = f"p50 {row.dense.p50_ms:.3g} ms to {row.compact.p50_ms:.3g} ms"
    if row.speedup_p50 >= FASTER:
        return f"{row.speedup_p50:.1f}x faster at batch {row.batch} ({times})"
    if odd:
        why = f"widths that 4 does not divide leave onnxruntime's blocked layout ({', '.join(odd[:3])})"
    elif macs[0] and macs[1] and macs[0] > 1.5 * macs[1]:
        why = "the layers are so small that moving data and starting operators takes the time, not multiplying"
    elif macs[0] and macs[1]:
        why = "both files do about the same work"
    else:
        why = "how much work each file does is not known"
    return f"not faster at batch {row.batch} ({times}): {why}"


def dense_twin(
    run: CompactDirectory, facts: artifact.Facts, data: Data, report: Callable[[str], None], elsewhere: Path
) -> Path:
    """The full-width network with random weights, as ONNX: as fast as a trained one. It is kept in the run directory
    or, where that takes no files, in `elsewhere`."""
    place = (
        run.dense_onnx_file
        if run.dense_onnx_file.is_file() or os.access(run.path, os.W_OK)
        else elsewhere / run.dense_onnx_file.name
    )
    if not place.is_file():
        report("exporting the dense twin")
        model = Scores(zoo.build(facts.model, len(facts.classes), 0, size=facts.input_size).eval())
        partial = place.with_name("dense.onnx.partial")
        try:
            write_onnx(model, data.example, partial, None, {"producer": "dynprune", "weights": "random"})
            partial.replace(place)
        except OSError as error:
            raise DynpruneError(
                f"Cannot write {place} ({error.strerror}). The dense twin needs a place in the run directory."
            ) from error
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
    return place


def input_for(session: onnxruntime.InferenceSession, path: Path, batch: int) -> dict[str, np.ndarray]:
    """Random values for the session's one input; only the first dimension may be left open."""
    inputs = session.get_inputs()
    if (
        len(inputs) != 1
        or inputs[0].type != "tensor(float)"
        or any(not isinstance(size, int) for size in inputs[0].shape[1:])
    ):
        raise DynpruneError(
            f"{path} has inputs {[(i.name, i.type, i.shape) for i in inputs]}. Expected one float "
            f"input with a fixed image size."
        )
    if isinstance(inputs[0].shape[0], int) and inputs[0].shape[0] != batch:
        raise DynpruneError(f"{path} has a fixed batch of {inputs[0].shape[0]}. Pass --batch {inputs[0].shape[0]}.")
    if math.prod(inputs[0].shape[1:]) * batch > LARGEST_INPUT:
        raise DynpruneError(
            f"{path} wants an input of {batch}x{'x'.join(map(str, inputs[0].shape[1:]))} numbers. "
            f"Expected at most {LARGEST_INPUT:,}."
        )
    values = np.random.default_rng(0).standard_normal((batch, *inputs[0].shape[1:])).astype(np.float32)
    try:
        return {inputs[0].name: values}
    except UnicodeDecodeError as error:
        raise DynpruneError(
            f"{path} names its input in bytes that are not text. Is the file damaged? Export it again."
        ) from error


def latency_of(samples: list[float], batch: int) -> Latency:
    """What the milliseconds of every run come to."""
    median = float(np.percentile(samples, 50))
    return Latency(median, float(np.percentile(samples, 95)), 1000 * batch / median, samples)


def measure(files: list[Path], batches: list[int], threads: int, report: Callable[[str], None]) -> list[BenchRow]:
    """Time files in turn at every batch size: dense and compact, and the two in int8 where they are given."""
    for path in files:
        if not path.is_file():
            raise DynpruneError(f"No file {path}. Expected an ONNX file.")
    if not batches or min(batches) < 1:
        raise DynpruneError(f"--batch got {batches}. Expected numbers of images, such as 1 or 1,8,32.")
    sessions, rows = [open_session(path, threads) for path in files], []
    for batch in batches:
        report(f"timing batch {batch}")
        rows.append(timed(sessions, [input_for(session, path, batch) for session, path in zip(sessions, files)], batch))
    return rows


def timed(
    sessions: Sequence[onnxruntime.InferenceSession], feeds: Sequence[dict[str, np.ndarray]], batch: int
) -> BenchRow:
    """Networks in turn: dense and compact, and the two in int8 where there are four."""
    samples = interleaved(list(zip(sessions, feeds)), SECONDS_PER_BATCH_SIZE, RUNS, PRECISE)
    dense, compact, *int8 = (latency_of(kept, batch) for kept in samples)
    row = BenchRow(batch, dense, compact, dense.p50_ms / compact.p50_ms)
    if not int8:
        return row
    own = dense.p50_ms / int8[1].p50_ms
    return replace(row, dense_int8=int8[0], compact_int8=int8[1], speedup_int8_p50=own)


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
    tensors = [value.detach().cpu() for _, value in leaves(arguments(inputs))]
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
        row = timed(sessions, feeds, next((len(value) for value in tensors if value.ndim), 1))
        nothing = (None, None)
        return summarise(paths[0], paths[1], [row], threads, nothing, nothing, None, None, None, [], [])


def feed_of(
    session: onnxruntime.InferenceSession, path: Path, tensors: Sequence[Tensor], names: Sequence[str]
) -> dict[str, np.ndarray]:
    """The tensors under the names of a file's inputs. names: of the tensors where they are known, since a file may
    leave out what its network does not use; else they come in the file's order."""
    if names:
        return feed(session, names, tensors)
    wanted = [entry.name for entry in session.get_inputs()]
    if len(wanted) != len(tensors):
        raise DynpruneError(
            f"{path.name} takes {len(wanted)} inputs ({', '.join(wanted)}), inputs holds {len(tensors)} tensors. "
            "Expected as many, in the same order."
        )
    return feed(session, wanted, tensors)
