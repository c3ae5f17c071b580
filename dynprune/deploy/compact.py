"""From a trained run to a compact file: the active model after the last step, written down and proven.

Takes a run directory, keeps the settled selection (or less, with a least rate), and proves on real images that the
file, read back, computes what was executed: the full-width network in which the removed arms' consumers see zeros.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from dynprune import zoo
from dynprune.budgets.fit import Fit, Fitter, Latency, budgets_met, first_missed
from dynprune.budgets.latency import Report, silent
from dynprune.data.loading import Data, load_data
from dynprune.data.scores import evaluate, exact_scores, fitting
from dynprune.errors import DynpruneError
from dynprune.execution.reservoir import Reservoir
from dynprune.files import artifact
from dynprune.runs.config import TrainConfig
from dynprune.runs.directory import Run
from dynprune.state.copies import copied, same_randomness
from dynprune.state.tensors import named_tensors, paths_of
from dynprune.structure.channels import Selection
from dynprune.structure.surgery import slim
from dynprune.structure.tracing import exact_part, masked, trace
from dynprune.training.checkpoint import fit_in, part, slots_in
from dynprune.training.session import Session
from dynprune.training.train import Progress, train

TOLERANCE = 1e-5  # largest difference over largest output; in float64 only a real disagreement reaches it
UNCHANGED = 1e-3  # the same of one network on two machines, some of whose functions may know no float64


@dataclass(frozen=True)
class CompactResult:
    """accuracy: of the compact file on the test images; accuracy_executed: of the model that training executed.
    max_rel_diff: between the masked original and the compact copy, over the groups where these can be equal;
    mixed_groups: the others, whose channels a norm takes statistics over."""

    path: str
    macs: int
    params: int
    size_bytes: int
    dense_macs: int
    dense_params: int
    dense_size_bytes: int
    budgets: list[dict]
    budget_met: bool
    accuracy: float
    accuracy_executed: float
    test_data: str
    max_rel_diff: float
    mixed_groups: list[str]
    arms_dropped_by_rate: int
    widths: dict[str, int]


def compact(
    run: Run,
    *,
    min_rate: float = 0.0,
    bn_images: int = 0,
    finetune_epochs: int = 0,
    finetune_lr: float = 0.01,
    data: Data | None = None,
    report: Callable[[Progress], None] = lambda _: None,
    work: Report = silent,
) -> CompactResult:
    """Write RUN/compact.safetensors. Raises DynpruneError, and writes nothing, when the proof fails.

    min_rate: drop arms that ran in less than this share of the steps; each group keeps its most used arm.
    bn_images: re-estimate BatchNorm statistics on so many training images. finetune_epochs: train on at the final
    widths.
    """
    check_options(min_rate, bn_images, finetune_epochs, finetune_lr)
    config = run.config
    tensors, facts = run.read_checkpoint()
    if not all(isinstance(facts.get(key), kind) for key, kind in (("step", int), ("steps", int), ("classes", list))):
        raise DynpruneError(
            f"{run.checkpoint_file} lacks a header entry. Expected a checkpoint written by dynprune train."
        )
    if facts["step"] < facts["steps"]:
        raise DynpruneError(
            f"{run.path} stopped at step {facts['step']} of {facts['steps']}. Finish it first: "
            f"dynprune train --resume --out {run.path}"
        )
    data = data or load_data(config.source)
    if facts["classes"] != data.classes:
        raise DynpruneError(
            f"{run.checkpoint_file} knows {len(facts['classes'])} classes, --data now gives "
            f"{len(data.classes)}. Use the run's data."
        )
    full = zoo.build(config.model, len(data.classes), size=data.size)
    data = fitting(full, data)
    graph = trace(full, data.example)
    slots, template = slots_in(tensors, facts, full, graph)
    executed = Reservoir(copied(full), graph, slots, template)
    refuse_changed(run, executed.active, data, facts.get("scores", []))
    selection, dropped = often_enough(executed, tensors, facts["step"], min_rate)
    reservoir = Reservoir(full, graph, selection, selection if dropped else executed.template)
    # a norm over channels sees those that are hidden, so mixed groups cannot be proven this way
    proven = exact_part(graph, selection)
    unproven = sorted(set(selection) - set(proven))
    difference = largest_difference(masked(full, graph, proven), slim(full, graph.kept(proven)), data)
    if not difference < TOLERANCE:
        raise DynpruneError(
            f"The compact model differs from what was executed by {difference:.1e} of the largest "
            f"output, more than {TOLERANCE:g}. Nothing was written. Please report the model's name."
        )
    if finetune_epochs:
        reservoir = finetune(run, config, data, reservoir, finetune_epochs, finetune_lr, report)
    model = reservoir.active.cpu()
    if bn_images:
        reestimate_batchnorm(model, data, config, bn_images)
    latency = measured_latency(config, data, reservoir, model, fit_in(facts, "fit"), work)
    return write(
        run,
        config,
        data,
        reservoir,
        model,
        executed,
        difference,
        dropped,
        unproven,
        latency,
        changed=bool(dropped or finetune_epochs or bn_images),
    )


def measured_latency(
    config: TrainConfig, data: Data, reservoir: Reservoir, model: nn.Module, fit: Fit, work: Report
) -> Latency | None:
    """Where a budget is in milliseconds: what the compact model takes beside its dense twin, and what was predicted of
    its widths."""
    fitter = Fitter(reservoir.full, reservoir.graph, data.example, config.allowed, work)
    if config.policy == "dense" or not fitter.in_ms:
        return None
    fitter.time_dense()
    timed = fitter.time(reservoir.widths, model)
    return (
        dataclasses.replace(timed, predicted_ms=fit.latency.measured_ms * timed.dense_ms / fit.latency.dense_ms)
        if fit.latency
        else timed
    )


def write(
    run: Run,
    config: TrainConfig,
    data: Data,
    reservoir: Reservoir,
    model: nn.Module,
    executed: Reservoir,
    difference: float,
    dropped: int,
    unproven: list[str],
    latency: Latency | None,
    *,
    changed: bool,
) -> CompactResult:
    """Save the file, read it back as a stranger would, and measure that. changed: it is not just what training
    executed."""
    graph, widths = reservoir.graph, reservoir.widths
    met = [] if config.policy == "dense" else budgets_met(graph, config.budget, widths, latency)
    if missed := first_missed(met):
        raise missed_budget(missed)
    accuracy = evaluate(model, data, data.test)
    facts = facts_of(config, data, reservoir, accuracy)
    loaded = save_and_read_back(run, data, reservoir, model, facts)
    params, dense_params = (sum(p.numel() for p in network.parameters()) for network in (loaded, reservoir.full))
    result = CompactResult(
        str(run.compact_file),
        facts.macs,
        params,
        run.compact_file.stat().st_size,
        facts.dense_macs,
        dense_params,
        sum(t.numel() * t.element_size() for t in named_tensors(reservoir.full).values()),
        met,
        all(line["met"] for line in met),
        accuracy,
        evaluate(executed.active, data, data.test) if changed else accuracy,
        data.reports,
        difference,
        unproven,
        dropped,
        widths,
    )
    run.record("compact", asdict(result))
    return result


def missed_budget(missed: dict) -> DynpruneError:
    """What to say of a budget that the compact model misses."""
    if missed["budget"].startswith("latency"):
        return DynpruneError(
            f"The compact model takes {missed['actual']:.3g} ms, above the budget {missed['budget']} "
            f"({missed['limit']:.3g} ms; predicted {missed['predicted']:.3g}). Nothing was written. If the machine is "
            f"busy, compact again when it is quiet; if it is another machine than the one that planned the widths, "
            f"train with a smaller latency budget."
        )
    return DynpruneError(
        f"The compact model costs {missed['actual']}, above the budget {missed['budget']} ({missed['limit']:.0f}). "
        f"Nothing was written. This is a mistake of dynprune: please report it."
    )


def facts_of(config: TrainConfig, data: Data, reservoir: Reservoir, accuracy: float) -> artifact.Facts:
    """What the compact file says of itself."""
    graph, widths = reservoir.graph, reservoir.widths
    return artifact.Facts(
        asdict(config),
        data.classes,
        list(data.size),
        list(data.mean),
        list(data.std),
        artifact.kept_as_json(graph.kept(reservoir.slots, reservoir.template)),
        widths,
        graph.macs(widths),
        graph.params(widths),
        graph.macs({}),
        graph.params({}),
        accuracy,
        resize=asdict(data.preprocess.resize),
        white=data.depth.white,
    )


def save_and_read_back(
    run: Run, data: Data, reservoir: Reservoir, model: nn.Module, facts: artifact.Facts
) -> nn.Module:
    """Write the compact file, and return the network that a stranger gets from it. Raises DynpruneError, and leaves
    the file that was there before, if that one computes something else or cannot be written."""
    before = run.compact_file.with_name("compact.unproven.safetensors")
    try:
        artifact.save(before, model, facts, within=paths_of(reservoir.full))
        loaded = artifact.load(before, zoo.build(run.config.model, len(data.classes), size=data.size))
        if not largest_difference(model, loaded, data) < TOLERANCE:
            raise DynpruneError(
                "The compact file, read back, gives other outputs than the model that was saved. "
                "Nothing was kept. Please report the model's name."
            )
        before.replace(run.compact_file)
        run.onnx_file.unlink(missing_ok=True)  # an export of an earlier compact model would be measured in its name
    except OSError as error:
        raise DynpruneError(
            f"Cannot write {run.compact_file} ({error.strerror}). The file that was there before is unchanged."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            before.unlink(missing_ok=True)
    return loaded


def refuse_changed(run: Run, active: nn.Module, data: Data, scores: object) -> None:
    """Raises DynpruneError if the network that a checkpoint brings back computes something else than the one that was
    trained. scores: of that one, on the example."""
    if not isinstance(scores, list) or not all(type(value) in (int, float) for value in scores):
        raise DynpruneError(
            f"{run.checkpoint_file} garbles a header entry (scores). Expected a checkpoint written by dynprune train."
        )
    now, then = exact_scores(active, data.example).reshape(-1), torch.tensor(scores, dtype=torch.float64)
    if scores and not (
        now.shape == then.shape and float((now - then).abs().max()) <= UNCHANGED * float(then.abs().max())
    ):
        raise DynpruneError(
            f"{run.checkpoint_file} gives back a network that computes something else than the one "
            f"that was trained. Did the code of "
            f'"{run.config.model}" change, or a file that it reads? Nothing was written.'
        )


def check_options(min_rate: float, bn_images: int, finetune_epochs: int, finetune_lr: float) -> None:
    """Refuse options that make no sense; `run` asks before it trains."""
    if not 0 <= min_rate < 1:
        raise DynpruneError(f"--min-rate got {min_rate}. Expected a share in [0, 1).")
    for flag, value in (("--bn-images", bn_images), ("--finetune-epochs", finetune_epochs)):
        if value < 0:
            raise DynpruneError(f"{flag} got {value}. Expected 0 or more.")
    if not finetune_lr > 0:
        raise DynpruneError(f"--finetune-lr got {finetune_lr}. Expected more than 0.")


def often_enough(executed: Reservoir, tensors: dict[str, Tensor], steps: int, min_rate: float) -> tuple[Selection, int]:
    """The settled selection without the arms that ran in less than `min_rate` of the steps, and how many those are."""
    counts, selection, dropped = part(tensors, "explorer.executed."), {}, 0
    for name, slots in executed.slots.items():
        if name not in counts or counts[name].shape != (executed.graph.groups[name].arms,):
            raise DynpruneError(
                f"The checkpoint does not say how often the arms of {name} were executed. Expected "
                f"one written by dynprune train."
            )
        rates = counts[name].numpy()[slots] / max(1, steps)
        keep = rates >= min_rate
        keep[rates.argmax()] = True
        selection[name] = slots[keep]
        dropped += int((~keep).sum())
    return (selection if dropped else executed.slots), dropped


@torch.no_grad()
def largest_difference(a: nn.Module, b: nn.Module, data: Data, images: int = 32) -> float:
    """Largest difference of two models' outputs over the largest output, on validation images, in float64 and eval
    mode."""
    batch = next(iter(data.eval_batches(data.val, images)))[0][:images]
    with same_randomness(0):
        one, other = (exact_scores(model, batch) for model in (a, b))
    return float((one - other).abs().max() / one.abs().max().clamp(min=1e-30))


def finetune(
    run: Run,
    config: TrainConfig,
    data: Data,
    reservoir: Reservoir,
    epochs: int,
    lr: float,
    report: Callable[[Progress], None],
) -> Reservoir:
    """Train the compact widths on, in RUN/finetune, with the run's recipe from a lower learning rate without
    warm-up."""
    settings = dataclasses.replace(config, epochs=epochs, lr=lr, warmup=0.0, policy="static")
    session = Session(settings, data, fit=Fit(reservoir.widths))
    execution = session.execution
    execution.install(execution.new_reservoir(reservoir.full, reservoir.slots, reservoir.template))
    session.installed()
    train(settings, Run.create(run.path / "finetune", settings, overwrite=True), report=report, session=session)
    return session.reservoir


@torch.no_grad()
def reestimate_batchnorm(model: nn.Module, data: Data, config: TrainConfig, images: int) -> None:
    """Replace running statistics by their average over training batches that together hold about `images` images."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain average over the batches
        model.train()
        for batch, _ in islice(
            data.train_batches(config.batch_size, config.seed, 0), max(1, images // config.batch_size)
        ):
            model(batch)
    finally:
        model.eval()
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
