"""From budgets to widths.

Takes a ChannelGraph and what the user allows (shares or numbers of MACs, parameters, milliseconds), returns the width
of every group. The cost of any widths in MACs and parameters is exact: it is read off the graph's table, once compiled
into arrays (`CostModel`), so that an allocation can ask for it thousands of times. Milliseconds are predicted by
`latency.LatencyModel`.

Three allocations. *uniform* keeps the same share of every group. *balanced* lets the share fall with a group's
parameters per MAC, just enough to use several budgets at once: late layers, which hold the parameters, get narrower
than early ones, which take the time. *learned* starts from the balanced widths and moves them by what the bandit
learned: wider where an arm is worth more loss for what it costs.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from dynprune.budgets.limits import Budget, Limit, parse_limit
from dynprune.errors import DynpruneError
from dynprune.structure.channels import ChannelGraph
from dynprune.structure.numbers import is_number
from dynprune.structure.record import AxisKey


class Milliseconds(Protocol):
    """What predicts latency: `total` takes the size of every axis and returns milliseconds, `correction` times what the
    layers took by themselves."""

    correction: float

    def total(self, sizes: np.ndarray) -> float: ...


class CostModel:
    """MACs and parameters (exact) and milliseconds (predicted) of any widths, in a few array operations.

    The size of a tensor is a product over its dimensions, each of them affine in the widths.
    rows: the number of each axis in `axis_sizes`. latency: where milliseconds come from, None as long as nobody asks
    for them.
    """

    def __init__(self, graph: ChannelGraph):
        self.names = list(graph.groups)
        self.latency: Milliseconds | None = None
        self.dense_ms = math.nan
        self.arms = np.array([group.arms for group in graph], dtype=np.int64)
        self.rows: dict[AxisKey, int] = {}
        coefficients, constants = [np.zeros(len(self.names), dtype=np.int64)], [1]  # row 0: a dimension of size 1
        tensors, fixed = [], []
        positions = dict.fromkeys(graph.shapes, 0)
        for op in graph.ops:
            if op.weight in positions:
                positions[op.weight] += op.positions
        self.macs_weight, self.params_weight = [], []
        for name, shape in graph.shapes.items():
            if is_number(name):
                continue
            moving = []
            for dim in range(len(shape)):
                if (name, dim) not in graph.axes:
                    continue
                counts = np.bincount(graph.axes[name, dim].group + 1, minlength=len(self.names) + 1)
                self.rows[name, dim] = len(constants)
                coefficients.append(
                    np.array(
                        [
                            graph.groups[g].members[name, dim].shape[1] if (name, dim) in graph.groups[g].members else 0
                            for g in self.names
                        ]
                    )
                    if counts[1:].any()
                    else np.zeros(len(self.names), dtype=np.int64)
                )
                constants.append(int(counts[0]))
                moving.append(dim)
            tensors.append(([self.rows[name, dim] for dim in moving] + [0] * 3)[:3])
            assert len(moving) <= 3, f"{name} has {len(moving)} dimensions with arms"
            fixed.append(math.prod(size for dim, size in enumerate(shape) if dim not in moving))
            self.macs_weight.append(positions[name])
            self.params_weight.append(name in graph.parameters)
        self.coefficients, self.constants = np.array(coefficients), np.array(constants)
        self.tensors, self.fixed = np.array(tensors), np.array(fixed, dtype=np.int64)
        self.weights = {
            "macs": np.array(self.macs_weight, dtype=np.int64),
            "params": np.array(self.params_weight, dtype=np.int64),
        }

    def axis_sizes(self, widths: np.ndarray) -> np.ndarray:
        """Size of every axis that arms lie along, int64 of shape (axes,); `rows` says where."""
        return self.coefficients @ widths + self.constants

    def sizes(self, widths: np.ndarray) -> np.ndarray:
        """Sizes of every tensor's moving dimensions, (tensors, 3)."""
        return self.axis_sizes(widths)[self.tensors]

    def cost(self, quantity: str, widths: np.ndarray) -> float:
        if quantity == "latency":
            assert self.latency is not None, "nothing was measured that tells milliseconds"
            return self.latency.total(self.axis_sizes(widths))
        return int((self.sizes(widths).prod(1) * self.fixed) @ self.weights[quantity])

    def dense(self, quantity: str) -> float:
        """Cost of the full-width network; milliseconds as measured, if they were."""
        return (
            self.dense_ms if quantity == "latency" and not math.isnan(self.dense_ms) else self.cost(quantity, self.arms)
        )

    def slopes(self, quantity: str, widths: np.ndarray) -> np.ndarray:
        """Change in cost per arm of each group, (groups,). Of milliseconds: the average slope down to three quarters of
        the width."""
        if quantity == "latency":
            narrower = np.maximum(1, widths * 3 // 4)
            here = self.cost(quantity, widths)
            return np.array(
                [
                    (here - self.cost(quantity, np.where(np.arange(len(widths)) == g, narrower, widths)))
                    / max(1, widths[g] - narrower[g])
                    for g in range(len(widths))
                ]
            )
        sizes = self.sizes(widths)
        total = np.zeros(len(self.names))
        for dim in range(3):
            others = np.delete(sizes, dim, axis=1).prod(1) * self.fixed * self.weights[quantity]
            total += others @ self.coefficients[self.tensors[:, dim]]
        return total


def alignment(arms: int, align: str = "auto") -> int:
    """Widths of a group are multiples of this.

    A number if one is given. "auto": what onnxruntime's blocked layout works in, 16 channels with AVX-512 and 8
    without, falling back to 8 and 4 where the group has fewer than 4 such steps: a width that 4 does not divide leaves
    the layout and can be slower than no pruning at all. "fine": the same, but at least 16 steps of 8 or 16: for widths
    that are searched, which gain more by that than the layout loses.
    """
    if align not in ("auto", "fine"):
        return min(int(align), arms)
    block, steps = 8 if torch.backends.cpu.get_cpu_capability() == "AVX2" else 16, 4 if align == "auto" else 16
    return next((step for step in (16, 8, 4) if step <= block and (arms >= steps * step or step == 4 and arms >= 8)), 1)


@dataclass(frozen=True)
class Constraints:
    """What widths are allowed. steps: multiples; smallest, largest: bounds. All int64 of shape (groups,)."""

    steps: np.ndarray
    smallest: np.ndarray
    largest: np.ndarray


def constraints(
    graph: ChannelGraph,
    *,
    align: str = "auto",
    min_width: int = 1,
    max_width_share: float = 1.0,
    keep: Sequence[str] = (),
) -> Constraints:
    """The user's wishes per group. keep: names or patterns (`layer1.*`) of groups or layers whose channels are never
    narrowed."""
    steps = np.array([alignment(group.arms, align) for group in graph], dtype=np.int64)
    arms = np.array([group.arms for group in graph], dtype=np.int64)
    smallest = np.minimum(arms, np.maximum(steps, -(-min_width // steps) * steps))
    largest = np.where(
        max_width_share < 1, np.maximum(smallest, (max_width_share * arms).astype(np.int64) // steps * steps), arms
    )
    for pattern in keep:
        held = [any(fnmatch.fnmatchcase(name, pattern) for name in (group.name, *group.makers)) for group in graph]
        if not any(held):
            known = ", ".join(list(graph.groups)[:12]) + (", ..." if len(graph) > 12 else "")
            raise DynpruneError(
                f'--keep got "{pattern}", which matches no layer with removable channels. Groups: {known}.'
            )
        smallest, largest = np.where(held, arms, smallest), np.where(held, arms, largest)
    return Constraints(steps, smallest, largest)


def allocate(
    graph: ChannelGraph,
    budget: Sequence[str],
    allocation: str = "uniform",
    allowed: Constraints | None = None,
    *,
    cost: CostModel | None = None,
    loss: np.ndarray | None = None,
) -> dict[str, int]:
    """Widths per group that meet every budget. Raises DynpruneError, naming what is reachable, when even the narrowest
    network costs more.

    cost: with a latency model if a budget is in milliseconds. loss: for "learned", the loss that one more arm of each
    group is worth, (groups,).
    """
    model, allowed = cost or CostModel(graph), allowed or constraints(graph)
    bounds = [(limit, limit.value(model.dense(limit.quantity))) for limit in map(parse_limit, budget)]
    if meets(model, bounds, allowed.largest):
        return dict(zip(model.names, allowed.largest.tolist()))
    refuse_unreachable(model, bounds, allowed)
    if allocation == "uniform":
        widths = uniform(model, bounds, allowed)
    elif allocation == "balanced" or loss is None:
        widths = round_widths(model, allowed, balanced(model, bounds, allowed))
    else:
        widths = round_widths(model, allowed, learned(model, bounds, allowed, loss))
    return dict(zip(model.names, fill(model, bounds, allowed, widths).tolist()))


def constraints_for(graph: ChannelGraph, budget: Budget) -> Constraints:
    """Which widths a budget allows."""
    return constraints(
        graph, align=budget.align, min_width=budget.min_width, max_width_share=budget.max_width_share, keep=budget.keep
    )


def refuse_unreachable(model: CostModel, bounds: list[tuple[Limit, float]], allowed: Constraints) -> None:
    if not model.names:
        raise DynpruneError(
            "No channel of this network can be removed, so no budget below 1 can be met. See what "
            "pins them: dynprune inspect."
        )
    for limit, bound in bounds:
        least, dense = model.cost(limit.quantity, allowed.smallest), model.dense(limit.quantity)
        if least > bound:
            raise unreachable(limit, least, dense, allowed)


def unreachable(limit: Limit, least: float, dense: float, allowed: Constraints) -> DynpruneError:
    """The error that names what can be reached. least, dense: cost of the narrowest network and of the full one."""
    if limit.quantity == "latency":
        narrowest, whole, reachable = (
            f"takes {least:.3g} ms",
            f"{dense:.3g} ms",
            f"{math.ceil(least * 1000) / 1000:g}ms",
        )
    else:
        narrowest, whole, reachable = f"has {least} {limit.quantity}", f"{dense}", f"{least}"
    if not limit.absolute:
        reachable = f"{math.ceil(least / dense * 1e4) / 1e4:.4f}"
    ease = ", or a smaller --align" if allowed.steps.max() > 1 else ""
    return DynpruneError(
        f"--budget {limit} is below what this network can reach: its narrowest form {narrowest}, "
        f"{least / dense:.4f} of {whole}. Choose at least {reachable}{ease}."
    )


def meets(model: CostModel, bounds: list[tuple[Limit, float]], widths: np.ndarray) -> bool:
    return all(model.cost(limit.quantity, widths) <= bound for limit, bound in bounds)


def uniform(model: CostModel, bounds: list[tuple[Limit, float]], allowed: Constraints) -> np.ndarray:
    """The largest share, found by bisection, at which every group's width (rounded down) meets the budgets."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (
            (middle, high)
            if meets(model, bounds, round_widths(model, allowed, np.full(len(model.arms), middle)))
            else (low, middle)
        )
    return round_widths(model, allowed, np.full(len(model.arms), low))


def balanced(
    model: CostModel, bounds: list[tuple[Limit, float]], allowed: Constraints, shape: np.ndarray | None = None
) -> np.ndarray:
    """Shares that fall with a group's parameters per MAC: share = a * shape * density^-b, with the least b >= 0 whose
    widths meet every budget. Float, shape (groups,), not yet rounded to widths.

    With one budget, or where the others bind before the parameters do, b is 0; with a flat `shape` (the default) this
    is then `uniform`. A smooth family of shares is deliberate: maximising a sum of log(width) under a product of
    neighbouring widths, greedily or exactly, alternates wide and narrow layers.
    """
    shape = np.ones(len(model.arms)) if shape is None else shape
    macs, params = (model.slopes(quantity, model.arms) for quantity in ("macs", "params"))
    density = (params / max(params.mean(), 1e-30) + 1e-9) / (macs / max(macs.mean(), 1e-30) + 1e-9)
    others = [pair for pair in bounds if pair[0].quantity != "params"]

    def widest(b: float, within: list[tuple[Limit, float]]) -> np.ndarray:
        shares = shape * density**-b
        low, high = 0.0, 1.0 / shares.min()
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (
                (middle, high) if meets(model, within, round_widths(model, allowed, middle * shares)) else (low, middle)
            )
        return low * shares

    low, high = 0.0, 2.0
    if not others or meets(model, bounds, round_widths(model, allowed, widest(0.0, others))):
        return widest(0.0, bounds)
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (
            (low, middle)
            if meets(model, bounds, round_widths(model, allowed, widest(middle, others)))
            else (middle, high)
        )
    return widest(high, bounds)


DAMPING, FARTHEST = (
    0.5,
    2.0,
)  # of `learned`: exponent of an arm's worth, and how far widths may move from the balanced ones


def learned(model: CostModel, bounds: list[tuple[Limit, float]], allowed: Constraints, loss: np.ndarray) -> np.ndarray:
    """The super-arm of the whole network: widths by estimated loss per cost, a bounded step away from the balanced
    ones.

    The oracle that CUCB asks for would choose the widths that lose least under the budgets. With the cost linear in the
    widths it is a fractional knapsack, solved by filling in the order of loss per cost (Dantzig, 1957). Costs are
    products of neighbouring widths, though, and that greedy choice exploits it: it makes a layer narrow where its
    neighbour is wide. So costs are linearised once, at the balanced widths, and the choice is kept near them by an
    entropy term, which makes it a step of exponentiated gradient (Kivinen & Warmuth, 1997) on the logarithm of an arm's
    worth: width_g ~ balanced_g * (loss_g / price_g)^0.5, at most twice and at least half, scaled until the budgets are
    used. The combination is ours.

    loss: estimated loss that one more arm of each group is worth, (groups,), positive. Returns shares as `balanced`
    does.
    """
    reference = balanced(model, bounds, allowed)
    widths = round_widths(model, allowed, reference)
    price = np.maximum(sum(model.slopes(limit.quantity, widths) / bound for limit, bound in bounds), 1e-30)
    worth = np.log(np.maximum(loss, 1e-30)) - np.log(price)
    worth -= np.average(worth, weights=widths * price)
    factor = np.clip(np.exp(DAMPING * worth), 1 / FARTHEST, FARTHEST)
    return balanced(model, bounds, allowed, reference * factor)


def narrower(model: CostModel, allowed: Constraints, widths: np.ndarray, share: float) -> np.ndarray:
    """Widths of much the same proportions that cost at most this share of the MACs of `widths`. Where even the
    narrowest cost more, the narrowest."""
    bounds = [(Limit("macs", bound := share * model.cost("macs", widths), True), bound)]
    within = Constraints(allowed.steps, np.minimum(allowed.smallest, widths), widths)
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (
            (middle, high)
            if meets(model, bounds, round_widths(model, within, middle * widths / model.arms))
            else (low, middle)
        )
    return fill(model, bounds, within, round_widths(model, within, low * widths / model.arms))


def round_widths(model: CostModel, allowed: Constraints, shares: np.ndarray) -> np.ndarray:
    """Widths of these shares of the arms, rounded down to what is allowed."""
    widths = (np.minimum(shares, 1.0) * model.arms).astype(np.int64) // allowed.steps * allowed.steps
    return np.clip(widths, allowed.smallest, allowed.largest)


def fill(model: CostModel, bounds: list[tuple[Limit, float]], allowed: Constraints, widths: np.ndarray) -> np.ndarray:
    """Spend what is left: widen one step at a time the group that is relatively narrowest, as long as every budget
    holds."""
    widths, open_groups = widths.copy(), allowed.largest > widths
    while open_groups.any():
        candidate = int(np.where(open_groups, widths / model.arms, np.inf).argmin())
        wider = widths.copy()
        wider[candidate] = min(
            allowed.largest[candidate], (widths[candidate] // allowed.steps[candidate] + 1) * allowed.steps[candidate]
        )
        if meets(model, bounds, wider):
            widths = wider
        else:
            open_groups[candidate] = False
        open_groups &= widths < allowed.largest
    return widths
