"""What gates save, image by image: the cost that each image paid, and milliseconds over real images in onnxruntime and
in torch.

Takes a gated run with its ONNX file; times every image on the gated network, on the same network without gates, and on
a static compact network that costs what the gated one costs on average, in turn. Reports medians, 95th percentiles and
ratios.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch

from dynprune.budgets.allocation import allocate
from dynprune.budgets.latency import FASTER, Report, run_ms, silent
from dynprune.data.loading import Data, load_data, some
from dynprune.data.scores import Scores
from dynprune.deploy.export import check_classes
from dynprune.errors import DynpruneError
from dynprune.files.disk import write_text
from dynprune.files.onnxfile import open_session, write_onnx
from dynprune.files.onnxfile import run as execute
from dynprune.gates.export import load_run, run_both
from dynprune.gates.gating import GatedNetwork
from dynprune.gates.stats import GateStats, gate_stats
from dynprune.gates.training import TOLERANCE
from dynprune.machine import environment
from dynprune.runs.directory import GateRun
from dynprune.structure.surgery import slim

IMAGES, REPEATS = 200, 3  # test images that are timed, and how often each; the median of an image's repeats counts
TORCH_IMAGES = 30


@dataclass(frozen=True)
class GatedRow:
    """One network over the images. macs: mean executed per image; of the gated one, what its gates open (in torch; ONNX
    forms may do more)."""

    network: str
    macs: int
    p50_ms: float
    p95_ms: float
    mean_ms: float
    speedup_p50: float
    samples_ms: list[float]


@dataclass(frozen=True)
class GatedBenchResult:
    """rows: onnxruntime, one image at a time; torch_rows: the same in torch. accuracy_onnx: of the gated ONNX file on
    the timed images.
    accuracy: of the gated network on all test images. slow, quick: milliseconds of the tenth of the images that cost
    most and least."""

    run: str
    target: float
    met: bool
    threads: int
    images: int
    rows: list[GatedRow]
    torch_rows: list[GatedRow]
    speedup_p50: float
    speedup_over_static: float
    accuracy: float
    accuracy_onnx: float
    forms: dict[str, int]
    slow_ms: float
    quick_ms: float
    stats: GateStats
    test_data: str
    verdict: str
    environment: dict

    def without_samples(self) -> dict:
        """As a dict for --json; the raw samples stay in the run's bench.json."""
        result = asdict(self)
        for row in [*result["rows"], *result["torch_rows"]]:
            row["samples_ms"] = len(row["samples_ms"])
        return result


def bench_gated(
    run: GateRun,
    *,
    threads: int,
    data: Data | None = None,
    report: Callable[[str], None] = lambda _: None,
    work: Report = silent,
) -> GatedBenchResult:
    """Time the run's gated ONNX file over real test images, beside the ungated network and a static one of the same
    mean cost."""
    for path in (run.onnx_file, run.ungated_onnx_file):
        if not path.is_file():
            raise DynpruneError(f"{run.path} has no {path.name} yet. Run: dynprune export {run.path} --onnx")
    model, facts, gates = load_run(run)
    data = data or load_data(run.config.source)
    check_classes(run.gated_file, facts, data.classes)
    data = data.with_channels(facts.input_size[0])
    stats = gate_stats(model, data, data.test, report)
    static_macs = static_network(run, model, stats.share, data)
    images = [
        (image[None], int(label))
        for batch, labels in data.eval_batches(some(data.test, IMAGES))
        for image, label in zip(batch, labels)
    ]
    sessions = [open_session(path, threads) for path in (run.ungated_onnx_file, run.onnx_file, run.static_onnx_file)]
    folded = run.results.get("export", {}).get("fold_normalization") is True
    mean, std = (np.asarray(v, dtype=np.float32).reshape(1, -1, 1, 1) for v in (facts.mean, facts.std))
    right = 0
    samples: list[list[float]] = [[], [], []]
    for number, (image, label) in enumerate(images):
        work("timing real images in onnxruntime", number, len(images))
        plain = image.numpy()
        feeds = [plain * std + mean if folded else plain] * 2 + [plain]
        scores, _ = run_both(sessions[1], feeds[1])
        right += int(scores.argmax() == label)
        if number == 0:
            for session, feed in zip(sessions, feeds):
                execute(session, {session.get_inputs()[0].name: feed})
        repeats = [
            [run_ms(session, {session.get_inputs()[0].name: feed}) for session, feed in zip(sessions, feeds)]
            for _ in range(REPEATS)
        ]
        for kept, own in zip(samples, np.median(repeats, axis=0)):
            kept.append(float(own))
    rows = rows_of(
        ("ungated", "gated", "static, same mean cost"),
        (model.dense_macs, round(stats.share * model.dense_macs), static_macs),
        samples,
    )
    report("timing torch")
    torch_rows = rows_of(
        ("ungated", "gated"),
        (model.dense_macs, round(stats.share * model.dense_macs)),
        in_torch(model, [image for image, _ in images[:TORCH_IMAGES]], threads),
    )
    ranked = np.sort(samples[1])
    tenth = max(1, len(ranked) // 10)
    result = GatedBenchResult(
        str(run.path),
        gates.target,
        stats.share <= TOLERANCE * gates.target,
        threads,
        len(images),
        rows,
        torch_rows,
        rows[1].speedup_p50,
        rows[2].p50_ms / rows[1].p50_ms,
        stats.accuracy,
        right / len(images),
        run.results.get("export", {}).get("forms", {}),
        float(ranked[-tenth:].mean()),
        float(ranked[:tenth].mean()),
        stats,
        data.reports,
        verdict(rows, stats),
        {**environment(), "threads": threads},
    )
    write_text(run.path / "bench.json", json.dumps(asdict(result)))
    run.record("bench", result.without_samples())
    return result


def static_network(run: GateRun, model: GatedNetwork, share: float, data: Data) -> int:
    """Write a uniformly narrower network of the gated one's mean cost as ONNX, its weights cut from it; returns its
    multiply-accumulates."""
    graph = model.graph
    try:
        widths = allocate(graph, (f"macs={min(share, 1.0):.6f}",))
    except DynpruneError as error:
        raise DynpruneError(
            f"No static network of the gated one's mean cost can be built to compare with: {error}"
        ) from error
    small = slim(model.network, graph.kept({name: np.arange(width) for name, width in widths.items()}))
    partial = run.static_onnx_file.with_name("static.onnx.partial")
    try:
        write_onnx(
            Scores(small).eval(), data.example, partial, None, {"producer": "dynprune", "weights": "cut, not trained"}
        )
        partial.replace(run.static_onnx_file)
    except OSError as error:
        raise DynpruneError(
            f"Cannot write {run.static_onnx_file} ({error.strerror}). The static network needs a "
            f"place in the run directory."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    return graph.macs(widths)


@torch.no_grad()
def in_torch(model: GatedNetwork, images: list[torch.Tensor], threads: int) -> list[list[float]]:
    """Milliseconds of each image: without gates, and computing only what is open."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    samples: list[list[float]] = [[], []]
    try:
        for number, image in enumerate([images[0], *images]):
            for kept, network in zip(samples, (model.network, model)):
                started = time.perf_counter()
                network(image)
                if number:
                    kept.append(1000 * (time.perf_counter() - started))
    finally:
        torch.set_num_threads(before)
    return samples


def rows_of(names: tuple[str, ...], macs: tuple[int, ...], samples: list[list[float]]) -> list[GatedRow]:
    first = float(np.percentile(samples[0], 50))
    return [
        GatedRow(
            name,
            count,
            float(np.percentile(kept, 50)),
            float(np.percentile(kept, 95)),
            float(np.mean(kept)),
            first / float(np.percentile(kept, 50)),
            kept,
        )
        for name, count, kept in zip(names, macs, samples)
    ]


def verdict(rows: list[GatedRow], stats: GateStats) -> str:
    """One honest line: how much faster than without gates, beside the static network; or why not."""
    ungated, gated, static = rows
    times = f"p50 {ungated.p50_ms:.3g} ms to {gated.p50_ms:.3g} ms; static at the same mean cost {static.p50_ms:.3g} ms"
    if gated.speedup_p50 >= FASTER:
        return f"{gated.speedup_p50:.2f}x faster than without gates ({times})"
    return (
        f"not faster than without gates ({times}): at {100 * stats.share:.0f} % of the multiplications the layers "
        f"are so small that deciding, gathering and what gates cannot skip (normalisation, concatenation) take "
        f"the time"
    )
