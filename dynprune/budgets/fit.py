"""From a budget to widths, with whatever has to be measured for it.

Takes the full-width network, its channel graph and a `Budget`; returns the widths. Budgets in MACs and parameters need
only arithmetic. For a budget in milliseconds, candidate networks are exported and timed, and the prediction is
corrected until the widths use the budget: `latency.py` says how.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from dynprune.budgets.allocation import CostModel, allocate, constraints_for, narrower, unreachable
from dynprune.budgets.latency import LatencyModel, LayerTable, Report, Stopwatch, silent
from dynprune.budgets.limits import Budget, parse_limit
from dynprune.errors import DynpruneError
from dynprune.structure.calling import Inputs, arguments
from dynprune.structure.channels import ChannelGraph

CANDIDATES = 8
AIM, CLOSE = 0.98, 0.95  # of the budget: what is asked for, since timings scatter, and what is close enough to stop
TOLERANCE = 1.1  # two measurements of one file on a busy machine differ by so much


@dataclass(frozen=True)
class Latency:
    """Medians in ms at batch 1 with one thread in onnxruntime, both networks timed in turn, and what was predicted
    before."""

    dense_ms: float
    predicted_ms: float
    measured_ms: float


@dataclass(frozen=True)
class Fit:
    """widths: of every group. latency: of these widths, None unless a budget is in milliseconds. candidates: how many
    were timed."""

    widths: dict[str, int]
    latency: Latency | None = None
    candidates: int = 0


class Fitter:
    """Finds widths for one network and its budget, as often as it is asked. full: only its shapes matter, not its
    weights. example: inputs of a call. whole: whether time is that of all outputs; else of the class scores."""

    def __init__(
        self,
        full: nn.Module,
        graph: ChannelGraph,
        example: Inputs,
        budget: Budget,
        report: Report = silent,
        *,
        whole: bool = False,
    ):
        self.whole = whole
        self.full, self.graph, self.inputs, self.budget, self.report = full, graph, arguments(example), budget, report
        self.allowed, self.cost = constraints_for(graph, budget), CostModel(graph)
        self.in_ms = [limit for limit in map(parse_limit, budget.limits) if limit.quantity == "latency"]
        self.stopwatch: Stopwatch | None = None

    def fit(self, loss: np.ndarray | None = None) -> Fit:
        """loss: what one more arm of each group is worth, (groups,), if the run has learned it. Raises DynpruneError
        when a budget cannot be met."""
        if not self.in_ms:
            return Fit(self.allocate(self.budget.limits, loss))
        self.time_dense()
        return self.fit_latency(loss)

    def allocate(self, limits: Sequence[str], loss: np.ndarray | None) -> dict[str, int]:
        return allocate(self.graph, limits, self.budget.allocation, self.allowed, cost=self.cost, loss=loss)

    def balanced(self) -> dict[str, int]:
        """Widths that use several limits at once; only of limits that need arithmetic alone."""
        return allocate(self.graph, self.budget.limits, "balanced", self.allowed, cost=self.cost)

    def narrower(self, widths: Mapping[str, int], share: float) -> dict[str, int]:
        """Widths of the same proportions at a share of the MACs."""
        own = np.array([widths[name] for name in self.cost.names], dtype=np.int64)
        return dict(zip(self.cost.names, narrower(self.cost, self.allowed, own, share).tolist()))

    def time_dense(self) -> None:
        """Measure the layers and the dense network, once; from then on the cost model knows milliseconds."""
        if self.stopwatch is not None:
            return
        int8 = self.budget.int8
        self.cost.latency = LatencyModel(
            self.graph, self.cost, self.allowed.smallest, LayerTable(), self.report, int8=int8
        )
        self.report("exporting and timing the dense network", 0, 0)
        self.stopwatch = Stopwatch(self.full, self.graph, self.inputs, whole=self.whole, int8=int8)
        self.cost.dense_ms = self.stopwatch.measure_dense()
        self.cost.latency.correction = self.cost.dense_ms / self.cost.cost("latency", self.cost.arms)

    def fit_latency(self, loss: np.ndarray | None) -> Fit:
        """Propose, measure, correct, until the widths use the budget: the slowest candidate within it, and as predicted
        last."""
        aimed = [
            str(dataclasses.replace(limit, amount=limit.amount * AIM))
            if (limit := parse_limit(text)).quantity == "latency"
            else text
            for text in self.budget.limits
        ]
        tried: dict[tuple, Latency] = {}
        for number in range(CANDIDATES):
            try:
                widths = self.allocate(aimed, loss)
            except DynpruneError:
                widths = self.narrowest_if_only_too_slow()
            key = tuple(widths.items())
            if key in tried:
                break
            self.report("timing candidate networks", number, CANDIDATES)
            tried[key] = timed = self.time(widths)
            assert self.cost.latency is not None
            self.cost.latency.correction *= timed.measured_ms / timed.predicted_ms
            use = self.use(timed)
            if CLOSE <= use <= 1 or use > 1 and list(widths.values()) == self.allowed.smallest.tolist():
                break
        return self.slowest_within(tried)

    def slowest_within(self, tried: Mapping[tuple, Latency]) -> Fit:
        within = {key: timed for key, timed in tried.items() if self.use(timed) <= 1}
        if not within:
            fastest = min(tried.values(), key=lambda timed: timed.measured_ms)
            limit = max(self.in_ms, key=lambda limit: fastest.measured_ms / limit.value(fastest.dense_ms))
            raise unreachable(limit, fastest.measured_ms, fastest.dense_ms, self.allowed)
        best = max(within, key=lambda key: self.use(within[key]))
        return Fit(dict(best), within[best], len(tried))

    def narrowest_if_only_too_slow(self) -> dict[str, int]:
        """The narrowest network, whose predicted time may be wrong; its other costs are exact, and their error
        stands."""
        others = [text for text in self.budget.limits if parse_limit(text).quantity != "latency"]
        if others:
            self.allocate(others, None)
        return dict(zip(self.graph.groups, self.allowed.smallest.tolist()))

    def time(self, widths: Mapping[str, int], model: nn.Module | None = None) -> Latency:
        """Time these widths, or `model`, which has them; `time_dense` comes first."""
        assert self.stopwatch is not None
        dense_ms, measured_ms = self.stopwatch.measure(model or self.stopwatch.candidate(widths))
        return Latency(dense_ms, self.predict(widths), measured_ms)

    def predict(self, widths: Mapping[str, int]) -> float:
        return self.cost.cost(
            "latency",
            np.array([widths.get(name, arms) for name, arms in self.graph.full_widths.items()], dtype=np.int64),
        )

    def use(self, timed: Latency) -> float:
        """Share of the tightest budget in milliseconds that is used; above 1, it is missed."""
        return max(timed.measured_ms / limit.value(timed.dense_ms) for limit in self.in_ms)


def budgets_met(
    graph: ChannelGraph, budget: Sequence[str], widths: Mapping[str, int], latency: Latency | None = None
) -> list[dict[str, object]]:
    """Per budget: its text, the bound, what these widths were predicted to cost, what they do cost, and whether it
    holds.

    MACs and parameters must not be above the bound at all; a measured time may be by 10 %, since two measurements of
    one file differ.
    """
    model = CostModel(graph)
    own = np.array([widths.get(name, arms) for name, arms in graph.full_widths.items()], dtype=np.int64)
    lines = []
    for limit in map(parse_limit, budget):
        if limit.quantity != "latency":
            actual = predicted = model.cost(limit.quantity, own)
            bound = limit.value(model.dense(limit.quantity))
            met = actual <= bound
        elif latency is None:
            continue
        else:
            actual, predicted, bound = latency.measured_ms, latency.predicted_ms, limit.value(latency.dense_ms)
            met = actual <= TOLERANCE * bound
        lines.append({"budget": str(limit), "limit": bound, "predicted": predicted, "actual": actual, "met": bool(met)})
    return lines


def first_missed(lines: list[dict]) -> dict | None:
    return next((line for line in lines if not line["met"]), None)
