"""One trained network at several budgets at once: measured before anybody decides, or made.

It is calibrated once; the widths found for one budget are where the search for the next smaller one begins.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from onnx import inliner
from torch import nn

from dynprune.budgets.fit import Fit
from dynprune.data.loading import Data
from dynprune.data.scores import Scores, evaluate
from dynprune.deploy.export import export
from dynprune.deploy.modules import export_module
from dynprune.deploy.trained import (
    Bench,
    Timer,
    TrainedResult,
    better_of,
    cut_and_write,
    find_widths,
    made,
    prepare,
    prove_cut,
    right_answers,
    tuned,
    with_budget,
    write,
)
from dynprune.errors import DynpruneError
from dynprune.files import artifact
from dynprune.files.nested import wider
from dynprune.listener import SILENT, Listener
from dynprune.repair.nested import Nested, refit_wide
from dynprune.repair.widths import Found
from dynprune.runs.config import CompactConfig, seconds_in
from dynprune.runs.directory import CompactRun
from dynprune.state.copies import copied
from dynprune.state.tensors import named_tensors
from dynprune.training.train import threads
from dynprune.zoo import runs_code

MAY_DIFFER = ("weights", "workers", "threads", "device")  # settings that change no network


@dataclass(frozen=True)
class CurvePoint:
    """One budget: what it leaves, untuned. ms: in onnxruntime at batch 1 on one thread, beside dense_ms in turn."""

    share: float
    macs: int
    params: int
    val_accuracy: float
    accuracy: float
    ms: float
    dense_ms: float
    distance: float


@dataclass(frozen=True)
class Curve:
    """accuracy_before: of the untouched network on the test images. plot: a PNG."""

    points: list[CurvePoint]
    macs: int
    params: int
    val_accuracy_before: float
    accuracy_before: float
    test_data: str
    plot: str


def draw_curve(config: CompactConfig, shares: list[float], path: Path, listener: Listener = SILENT) -> Curve:
    """Accuracy, size and time at several shares of the multiply-accumulates, without tuning. Writes a plot."""
    timer = Timer(listener)
    points = []
    with threads(config.threads), torch.random.fork_rng():
        torch.manual_seed(config.seed)
        bench = prepare(dataclasses.replace(config, budget=(f"macs={max(shares)}",)), timer, listener)
        data, device = bench.data, bench.device
        val_before = float(right_answers(bench.full, data, device).float().mean())
        bench.fitter.time_dense()
        wider = None
        for share in sorted(shares, reverse=True):
            timer("curve", f"{share:g} of the MACs")
            trial = with_budget(bench, share, wider)
            found = find_widths(trial, seconds_in(config.search_time) / len(shares), None, listener)
            wider = dataclasses.replace(trial, fit=Fit(found.widths))
            narrow = made(trial, found.widths)
            timed = bench.fitter.time(found.widths, copied(narrow).cpu())
            points.append(
                CurvePoint(
                    share,
                    bench.graph.macs(found.widths),
                    bench.graph.params(found.widths),
                    float(right_answers(narrow, data, device).float().mean()),
                    evaluate(narrow, data, data.test, device),
                    timed.measured_ms,
                    timed.dense_ms,
                    bench.compaction.distance(narrow),
                )
            )
    graph = bench.graph
    plot = plot_curve(points, bench.before, path)
    return Curve(points, graph.macs({}), graph.params({}), val_before, bench.before, data.reports, plot)


def plot_curve(points: list[CurvePoint], before: float, path: Path) -> str:
    """Test accuracy over multiply-accumulates and over milliseconds."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, field, label in zip(figure.subplots(1, 2), ("macs", "ms"), ("multiply-accumulates", "ms in onnxruntime")):
        axes.plot([getattr(point, field) for point in points], [100 * point.accuracy for point in points], marker="o")
        axes.axhline(100 * before, linestyle="--", label="untouched")
        axes.set(xlabel=label, ylabel="test accuracy, %, untuned")
        axes.grid(alpha=0.3)
        axes.legend()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise DynpruneError(f"Cannot write {path} ({error.strerror}). Choose another --out.") from error
    return str(path)


WIDE = "-wide"  # behind the name of a network: the one that holds it


@dataclass(frozen=True)
class Several:
    """runs: directories with an ONNX file for every share, the smallest first, then those that hold another, and last
    the network as it is. data: as they take it."""

    runs: list[Path]
    data: Data


def compact_several(
    config: CompactConfig,
    shares: Sequence[float],
    folder: Path,
    *,
    inside: Collection[float] = (),
    resume: bool = False,
    listener: Listener = SILENT,
) -> Several:
    """The network of `config` compacted to each share of its multiply-accumulates, searched and tuned for as long as
    `config` says at each, and the network as it is; exported, in run directories in `folder`.

    inside: shares for which the compact network lies inside of a wide one, which is made with it. resume: networks that
    are there are kept. Raises DynpruneError where they are of other weights or settings.
    """
    with threads(config.threads), torch.random.fork_rng():
        torch.manual_seed(config.seed)
        first = dataclasses.replace(config, budget=(f"macs={max(shares)}",))
        bench = prepare(first, Timer(listener), listener)
        if inside:
            refuse_not_nestable(bench)
        if not resume:
            shutil.rmtree(folder, ignore_errors=True)  # of what is replaced, now that this can be made
        whole = CompactRun(folder / "untouched")
        if resume and whole.compact_file.is_file():
            refuse_other(whole, bench.full, trust=runs_code(config.model))
        else:
            write_untouched(bench, whole.path, listener)
        runs, outer, larger = [], [], None
        for number, share in enumerate(sorted(shares, reverse=True)):
            listener.say(f"compact network {number + 1} of {len(shares)}: {share:g} of the multiply-accumulates")
            trial, run = with_budget(bench, share, larger), CompactRun(folder / f"macs-{share:g}")
            wide = CompactRun(folder / (run.path.name + WIDE)) if share in inside else None
            if resume and run.compact_file.is_file() and (wide is None or wide.compact_file.is_file()):
                widths = kept_widths(run, trial.config)
                listener.say(f"{run.path} is there: it stays")
            else:
                widths = two_nested(trial, run, wide, listener) if wide else one_of_several(trial, run.path, listener)
            larger = dataclasses.replace(trial, fit=Fit(widths))
            runs.append(run)
            outer += [wide] if wide else []
    everything = [*reversed(runs), *reversed(outer), whole]
    for run in everything:
        if not run.onnx_file.is_file():
            listener.note(f"exporting {run.path.name} to ONNX and comparing with torch")
            export(run, data=bench.data)
    return Several([run.path for run in everything], bench.data)


def refuse_not_nestable(bench: Bench) -> None:
    """Raises DynpruneError for a network of which no part can lie in another, before anything is searched for or tuned:
    seen on one that is cut and not repaired."""
    head, widths = bench.compaction.head, bench.fit.widths
    if head is None:
        raise DynpruneError(
            f"{bench.config.model} cannot lie in a wider one of its kind: its scores are not made by one linear layer, "
            "of which each of the two would have its own. Use --form cascade."
        )
    narrow = bench.compaction.cut(widths)
    nested = Nested(bench.full, narrow, bench.graph.kept(bench.compaction.selection(widths)), head)
    example = bench.data.example.to(bench.device)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / "narrow.onnx", Path(folder) / "wide.onnx"]
        for path, model in zip(files, (narrow, nested.wide)):
            export_module(Scores(model), (example,), path)
        flat = [inliner.inline_local_functions(onnx.load(path)) for path in files]
    if wider(flat[0], flat[1], "trial") is None:
        raise DynpruneError(
            f"{bench.config.model} cannot lie in a wider one of its kind: its layers mix channels in other ways than "
            "convolutions, linear layers, pooling and BatchNorm do. Use --form cascade."
        )


def two_nested(bench: Bench, run: CompactRun, wide: CompactRun, listener: Listener) -> dict[str, int]:
    """Make a compact network and the wide one that it lies in, tuned in the same steps. Returns the compact one's
    widths."""
    timer, compaction = Timer(listener), bench.compaction
    found = find_widths(bench, seconds_in(bench.config.search_time), timer, listener)
    timer("repair", "cutting and repairing both networks")
    difference, unproven = prove_cut(bench, found.widths)
    narrow, kept = made(bench, found.widths), bench.graph.kept(compaction.selection(found.widths))
    nested = Nested(bench.full, narrow, kept, str(compaction.head))
    if not bench.config.no_repair:
        refit_wide(nested, compaction)
    told = []
    for model in (narrow, nested.wide):
        repaired = evaluate(model, bench.data, bench.data.test, bench.device)
        told.append(dict(accuracy_repaired=repaired, distance=compaction.distance(model)))
    before = copied(narrow), copied(nested.wide)
    steps = tuned(bench, nested, timer, listener)
    narrow, whole = nested.hand_over(), nested.wide
    if steps:
        far = told[1]["distance"], compaction.distance(whole)
        whole, steps = better_of(bench, (before[1], far[0]), (whole, far[1]), steps, listener)
        narrow = narrow if steps else before[0]
    timer("write", "writing, and proving that what was written is what was made")
    same = dict(accuracy_before=bench.before, tune_steps=steps, max_rel_diff=difference, mixed_groups=unproven)
    result = write(CompactRun.create(run.path, bench.config, True), bench, narrow.cpu(), found, told[0] | same, timer)
    outer = write_whole(bench, wide.path, whole, told[1] | same | {"max_rel_diff": 0.0}, timer)
    listener.say(
        f"{100 * result.accuracy:.2f} % on {result.test_data} inside of {100 * outer.accuracy:.2f} % "
        f"({100 * result.accuracy_before:.2f} % before)"
    )
    return result.widths


def one_of_several(bench: Bench, path: Path, listener: Listener) -> dict[str, int]:
    """Make one network, and say how good it is. Returns its widths."""
    result = cut_and_write(bench, path, Timer(listener), overwrite=True, listener=listener)
    assert result is not None, "one process"
    bench.full.to(bench.device)  # writing took it to the CPU
    listener.say(
        f"{100 * result.accuracy:.2f} % on {result.test_data}, {100 * result.accuracy_repaired:.2f} % untuned "
        f"({100 * result.accuracy_before:.2f} % before)"
    )
    return result.widths


def refuse_other(run: CompactRun, full: nn.Module, *, trust: bool) -> None:
    """Raises DynpruneError where the network that is kept is not the one that was given. trust: its code, which the
    settings name."""
    kept = named_tensors(artifact.load(run.compact_file, trust=trust))
    given = named_tensors(full)
    if kept.keys() != given.keys() or not all(torch.equal(kept[name], given[name].cpu()) for name in kept):
        raise DynpruneError(
            f"{run.path} was made of other weights than those given now. Pass --overwrite to begin anew, or --out for "
            "another place."
        )


def kept_widths(run: CompactRun, config: CompactConfig) -> dict[str, int]:
    """The widths of a network that is there. Raises DynpruneError where it was made with other settings."""
    before = run.config
    other = [
        field.name
        for field in dataclasses.fields(config)
        if getattr(before, field.name) != getattr(config, field.name) and field.name not in MAY_DIFFER
    ]
    if other:
        raise DynpruneError(
            f"{run.path} was made with --{other[0].replace('_', '-')} {getattr(before, other[0])}, and now it is "
            f"{getattr(config, other[0])}. Pass --overwrite to begin anew, or --out for another place."
        )
    return artifact.load_with_facts(run.compact_file, trust=runs_code(config.model))[1].widths


def write_untouched(bench: Bench, path: Path, listener: Listener) -> None:
    """A run directory of the network as it is."""
    timer = Timer(listener)
    timer("write", "writing the network as it is")
    told = dict(
        accuracy_before=bench.before,
        accuracy_repaired=bench.before,
        distance=0.0,
        tune_steps=0,
        max_rel_diff=0.0,
        mixed_groups=[],
    )
    write_whole(bench, path, copied(bench.full), told, timer)


def write_whole(bench: Bench, path: Path, model: nn.Module, told: dict, timer: Timer) -> TrainedResult:
    """A run directory of a network of all channels."""
    config = dataclasses.replace(bench.config, budget=("macs=1",), search="none", tune="0", no_repair=True)
    cost = bench.fitter.cost
    found = Found(dict(zip(cost.names, map(int, cost.arms))), 0.0, [(0.0, 0.0)])
    whole = dataclasses.replace(bench, config=config)
    result = write(CompactRun.create(path, config, True), whole, model.cpu(), found, told, timer)
    bench.full.to(bench.device)  # writing took it to the CPU
    return result
