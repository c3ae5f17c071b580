"""What a budget means for a network, before any training.

Takes the model and the budget settings, returns the narrowest, chosen and full cost and the chosen widths.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dynprune.budget import budgets_met, constraints, widths_for
from dynprune.config import TrainConfig
from dynprune.errors import DynpruneError
from dynprune.inspect import build_for_inspection, default_classes
from dynprune.tracing import trace


@dataclass(frozen=True)
class Plan:
    """widths: of every group, None if the budgets cannot be met; problem then says why. smallest_*: of the narrowest network that
    the constraints allow. latency_ms is None: it is measured by `bench` on the exported file."""

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
    budgets: list[dict]


def plan(config: TrainConfig, *, shape: str = "", classes: int = 0) -> Plan:
    """Trace the network and allocate widths. Raises DynpruneError for constraints that make no sense, such as an unknown layer."""
    model, size = build_for_inspection(config.model, classes or default_classes(config.model), shape)
    graph = trace(model, torch.randn(1, *size, generator=torch.Generator().manual_seed(0)))
    allowed = constraints(graph, align=config.align, min_width=config.min_width, max_width_share=config.max_width_share, keep=config.keep)
    smallest = dict(zip(graph.groups, allowed.smallest.tolist()))
    widths, problem = None, ""
    try:
        widths = widths_for(graph, config)
    except DynpruneError as error:
        problem = str(error)
    return Plan(config.model, "x".join(map(str, size)), widths is not None, problem, widths, graph.full_widths,
                None if widths is None else graph.macs(widths), None if widths is None else graph.params(widths), graph.macs({}), graph.params({}),
                graph.macs(smallest), graph.params(smallest), None, [] if widths is None else budgets_met(graph, config.budget, widths))
