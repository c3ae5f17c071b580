"""The static network that gates have to beat: of the same mean cost, from the same network, with the same training.

Takes a finished session of gates; compacts the network that was gated (choice of arms, widths, repair) to the mean cost
that its gates came to, and trains it on the same images, for as many steps, with the same distillation. A network that
was new has a thin one beside it, trained from scratch. Test images are only reported.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dynprune.budgets.fit import Fit, Fitter
from dynprune.budgets.limits import Budget
from dynprune.data.loading import Data
from dynprune.errors import DynpruneError, Stopped
from dynprune.gates.session import GateSession, base_network
from dynprune.gates.training import GateResult
from dynprune.repair.images import enough, sample_images
from dynprune.repair.trained import FEWEST, Compaction
from dynprune.runs.config import GateConfig, Recipe, TrainConfig, own
from dynprune.runs.directory import GateRun, Run
from dynprune.structure.tracing import trace
from dynprune.training.begin import searched
from dynprune.training.recipe import use_bfloat16
from dynprune.training.session import Session
from dynprune.training.train import Progress, threads, train
from dynprune.units import percent

SEARCH = 30.0  # seconds for its widths, and no more than a quarter of what the gates took


def beside(
    session: GateSession,
    result: GateResult,
    run: GateRun,
    *,
    report: Callable[[Progress], None] = lambda _: None,
    say: Callable[[str], None] = lambda _: None,
    note: Callable[[str], None] = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
) -> GateResult:
    """The result with the static network's accuracy, or as it was where there can be none, which `say`
    explains. Raises Stopped where it is stopped; the gates are kept."""
    config, data, share = session.config, session.data, result.stats.share
    if session.ungated or share >= 1:
        return result
    limit = f"macs={min(0.999, share):.4f}"
    began = time.perf_counter()
    try:
        if session.trained:
            note("a static network of this cost: calibrating")
            with threads(config.threads), torch.random.fork_rng():
                small, teacher = compacted(config, data, limit, min(SEARCH, result.seconds / 4), session.device)
            settings = settings_like(config, policy="dense")
            static = Session(settings, data, full=small, teacher=teacher if config.distill else None)
        else:
            settings = settings_like(config, policy="static", budget=(limit,))
            static = Session(settings, data)
    except DynpruneError as error:
        say(f"no static network of this mean cost could be put beside it: {error}")
        return result
    note("a static network of this cost: training")
    with tempfile.TemporaryDirectory(prefix="static-", dir=run.path) as folder:  # a number is wanted, not a network
        held = Run.create(Path(folder) / "run", static.config, overwrite=False)
        try:
            trained = train(static.config, held, session=static, report=report, stop=stop)
        except Stopped as stopped:
            raise Stopped(
                f"Stopped while the static network beside them was trained. The gates are finished and kept in "
                f"{run.path}. For that network: dynprune gate --resume --out {run.path}"
            ) from stopped
    macs = static.graph.macs(static.widths)
    result = dataclasses.replace(
        result,
        static_accuracy=trained.accuracy,
        static_macs=macs,
        static_seconds=time.perf_counter() - began,
        verdict=verdict(result, trained.accuracy, macs, len(data.test)),
    )
    run.record("gate", dataclasses.asdict(result))
    return result


def verdict(result: GateResult, accuracy: float, macs: int, images: int) -> str:
    """One line: whether gates pay."""
    gates, lead = result.accuracy, result.accuracy - accuracy
    middle = min(max((gates + accuracy) / 2, 1 / images), 1 - 1 / images)
    unsure = 2 * math.sqrt(2 * middle * (1 - middle) / images)  # two standard errors of a difference
    said = (
        f"no difference that {images:,} test images could show"
        if abs(lead) < unsure
        else "gates pay here"
        if lead > 0
        else "gates do not pay here: take a static network (compact --weights), or a cascade"
    )
    return (
        f"a static network of this cost ({percent(macs / result.dense_macs)} of the MACs): {percent(accuracy)}; gates: "
        f"{percent(gates)}. {said[0].upper()}{said[1:]}"
    )


def settings_like(config: GateConfig, **changes: Any) -> TrainConfig:
    """The recipe of a run of gates, for a network without them."""
    shared: dict[str, Any] = {name: getattr(config, name) for name in own(Recipe) if name != "weights"}
    return TrainConfig(**{**shared, "distill": config.distill, "checkpoint_every": "never", **changes}).validate()


def compacted(
    config: GateConfig, data: Data, limit: str, seconds: float, device: torch.device
) -> tuple[nn.Module, nn.Module]:
    """The network that was gated, cut to a budget and repaired, and itself; both in eval mode, on the CPU.

    device: where it is calibrated.
    """
    network, _ = base_network(config, data.classes, data.size)
    network = network.eval()
    if len(data.train) < FEWEST:
        raise DynpruneError(f"it is calibrated on {FEWEST} training images, and there are {len(data.train)}.")
    graph, budget = trace(network, data.example), Budget((limit,), align="fine")
    fitter = Fitter(network, graph, data.example, budget)
    fit = fitter.fit()
    network = network.to(device)
    images = sample_images(network, data, enough(graph.macs({})), config.seed, device)
    half = use_bfloat16(config.precision, device)
    compaction = Compaction(network, graph, images, seed=config.seed, bfloat16=half)
    found: Fit = searched(compaction, fitter, fit, budget, seconds)[0] if seconds > 0 else fit
    return compaction.repaired(found.widths).cpu(), network.cpu()
