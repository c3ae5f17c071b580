"""What a budget means for a network, before any training.

Takes the name of a model and a `Budget`, returns the narrowest, chosen and full cost and the chosen widths.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dynprune.budgets.fit import Fit, Fitter, budgets_met
from dynprune.budgets.latency import Report, silent
from dynprune.budgets.limits import Budget
from dynprune.errors import DynpruneError
from dynprune.execution.explore import worth_of_one_more
from dynprune.runs.directory import Run
from dynprune.structure.inspect import build_for_inspection, default_classes, trace_with_option


@dataclass(frozen=True)
class Plan:
    """widths: of every group, None if the budgets cannot be met; problem then says why. smallest_*: of the narrowest
    network that the constraints allow. *latency_ms: onnxruntime at batch 1 with one thread, None unless asked for; the
    dense network is measured, the chosen one too if a budget is in milliseconds, the others are predicted."""

    model: str
    input: str
    satisfiable: bool
    problem: str
    widths: dict[str, int] | None
    full_widths: dict[str, int]
    macs: int | None
    params: int | None
    dense_macs: int
    dense_params: int
    smallest_macs: int
    smallest_params: int
    latency_ms: float | None
    dense_latency_ms: float | None
    smallest_latency_ms: float | None
    budgets: list[dict]


def plan(
    name: str,
    budget: Budget,
    *,
    shape: str = "",
    classes: int = 0,
    latency: bool = False,
    learned_by: Run | None = None,
    report: Report = silent,
) -> Plan:
    """Trace the network and allocate widths. Raises DynpruneError for constraints that make no sense, such as an
    unknown layer.

    latency: predict milliseconds even if no budget asks for them. learned_by: a run whose bandit says what a channel of
    each layer is worth.
    """
    model, size = build_for_inspection(name, classes or default_classes(name), shape)
    example = torch.randn(1, *size, generator=torch.Generator().manual_seed(0))
    graph = trace_with_option(model, example)
    fitter = Fitter(model, graph, example, budget, report)
    loss = None if learned_by is None else loss_per_arm(learned_by, fitter)
    smallest = dict(zip(graph.groups, fitter.allowed.smallest.tolist()))
    if latency or fitter.in_ms:
        fitter.time_dense()
    found, problem = Fit({}), ""
    try:
        found = fitter.fit(loss)
    except DynpruneError as error:
        problem = str(error)
    chosen = found.widths or None
    timed = fitter.stopwatch is not None
    return Plan(
        name,
        "x".join(map(str, size)),
        not problem,
        problem,
        chosen,
        graph.full_widths,
        None if problem else graph.macs(found.widths),
        None if problem else graph.params(found.widths),
        graph.macs({}),
        graph.params({}),
        graph.macs(smallest),
        graph.params(smallest),
        found.latency.measured_ms if found.latency else fitter.predict(found.widths) if timed and not problem else None,
        fitter.cost.dense_ms if timed else None,
        fitter.predict(smallest) if timed else None,
        [] if problem else budgets_met(graph, budget.limits, found.widths, found.latency),
    )


def loss_per_arm(run: Run, fitter: Fitter) -> np.ndarray:
    """What the run's bandit found one more arm of each group to be worth."""
    tensors, _ = run.read_checkpoint()
    values = []
    for group in fitter.graph:
        saliency, slots = tensors.get(f"explorer.saliency.{group.name}"), tensors.get(f"slots.{group.name}")
        if saliency is None or slots is None or saliency.shape != (group.arms,) or not 0 < slots.numel() <= group.arms:
            raise DynpruneError(
                f"--from {run.path} has learned nothing about {group.name}. Expected a run of the "
                f"same network, --model {run.config.model} there."
            )
        values.append(worth_of_one_more(saliency, len(slots)))
    if not any(values):
        raise DynpruneError(
            f"--from {run.path} did not explore, so it has learned nothing. Expected a run of --policy cucb."
        )
    return np.array(values)
