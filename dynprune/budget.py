"""From budgets to widths.

Takes a ChannelGraph and what the user allows (shares or numbers of MACs and parameters), returns the width of every group.
The cost of any widths is exact: it is read off the graph's table, once compiled into arrays (`CostModel`), so that an
allocation can ask for it thousands of times.

Two allocations. *uniform* keeps the same share of every group. *balanced* lets the share fall with a group's parameters per
MAC, just enough to use several budgets at once: late layers, which hold the parameters, get narrower than early ones, which
take the time.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dynprune.channels import ChannelGraph
from dynprune.config import TrainConfig
from dynprune.errors import DynpruneError
from dynprune.limits import Limit, parse_limit

class CostModel:
    """Exact MACs and parameters of any widths, in a few array operations.

    The size of a tensor is a product over its dimensions, each of them affine in the widths.
    """

    def __init__(self, graph: ChannelGraph):
        self.names = list(graph.groups)
        self.arms = np.array([group.arms for group in graph], dtype=np.int64)
        rows: dict[tuple[str, int], int] = {}
        coefficients, constants = [np.zeros(len(self.names), dtype=np.int64)], [1]  # row 0: a dimension of size 1
        tensors, fixed = [], []
        positions = dict.fromkeys(graph.shapes, 0)
        for op in graph.ops:
            if op.weight in positions:
                positions[op.weight] += op.positions
        self.macs_weight, self.params_weight = [], []
        for name, shape in graph.shapes.items():
            if name.startswith("#"):
                continue
            moving = []
            for dim in range(len(shape)):
                if (name, dim) not in graph.axes:
                    continue
                counts = np.bincount(graph.axes[name, dim].group + 1, minlength=len(self.names) + 1)
                rows[name, dim] = len(constants)
                coefficients.append(np.array([graph.groups[g].members[name, dim].shape[1] if (name, dim) in graph.groups[g].members else 0
                                              for g in self.names]) if counts[1:].any() else np.zeros(len(self.names), dtype=np.int64))
                constants.append(int(counts[0]))
                moving.append(dim)
            tensors.append(([rows[name, dim] for dim in moving] + [0] * 3)[:3])
            assert len(moving) <= 3, f"{name} has {len(moving)} dimensions with arms"
            fixed.append(math.prod(size for dim, size in enumerate(shape) if dim not in moving))
            self.macs_weight.append(positions[name])
            self.params_weight.append(name in graph.parameters)
        self.coefficients, self.constants = np.array(coefficients), np.array(constants)
        self.tensors, self.fixed = np.array(tensors), np.array(fixed, dtype=np.int64)
        self.weights = {"macs": np.array(self.macs_weight, dtype=np.int64), "params": np.array(self.params_weight, dtype=np.int64)}

    def sizes(self, widths: np.ndarray) -> np.ndarray:
        """Sizes of every tensor's moving dimensions, (tensors, 3)."""
        return (self.coefficients @ widths + self.constants)[self.tensors]

    def cost(self, quantity: str, widths: np.ndarray) -> int:
        return int((self.sizes(widths).prod(1) * self.fixed) @ self.weights[quantity])

    def slopes(self, quantity: str, widths: np.ndarray) -> np.ndarray:
        """Change in cost per arm of each group, (groups,)."""
        sizes = self.sizes(widths)
        total = np.zeros(len(self.names))
        for dim in range(3):
            others = np.delete(sizes, dim, axis=1).prod(1) * self.fixed * self.weights[quantity]
            total += others @ self.coefficients[self.tensors[:, dim]]
        return total


def alignment(arms: int, align: int) -> int:
    """Widths of a group are multiples of this.

    `align` if given, else 16, falling back to 8 and 4 where the group has fewer than 4 such steps: onnxruntime's blocked
    layout works in 16 channels (8 with AVX2), and a width that 4 does not divide leaves it and can be slower than no
    pruning at all.
    """
    if align:
        return min(align, arms)
    return next((step for step in (16, 8, 4) if arms >= 4 * step or step == 4 and arms >= 8), 1)


@dataclass(frozen=True)
class Constraints:
    """What widths are allowed. steps: multiples; smallest, largest: bounds. All int64 of shape (groups,)."""

    steps: np.ndarray
    smallest: np.ndarray
    largest: np.ndarray


def constraints(graph: ChannelGraph, *, align: int = 0, min_width: int = 1, max_width_share: float = 1.0, keep: Sequence[str] = ()) -> Constraints:
    """The user's wishes per group. keep: names or patterns (`layer1.*`) of groups or layers whose channels are never narrowed."""
    steps = np.array([alignment(group.arms, align) for group in graph], dtype=np.int64)
    arms = np.array([group.arms for group in graph], dtype=np.int64)
    smallest = np.minimum(arms, np.maximum(steps, -(-min_width // steps) * steps))
    largest = np.where(max_width_share < 1, np.maximum(smallest, (max_width_share * arms).astype(np.int64) // steps * steps), arms)
    for pattern in keep:
        held = [any(fnmatch.fnmatchcase(name, pattern) for name in (group.name, *group.makers)) for group in graph]
        if not any(held):
            known = ", ".join(list(graph.groups)[:12]) + (", ..." if len(graph) > 12 else "")
            raise DynpruneError(f'--keep got "{pattern}", which matches no layer with removable channels. Groups: {known}.')
        smallest, largest = np.where(held, arms, smallest), np.where(held, arms, largest)
    return Constraints(steps, smallest, largest)


def allocate(graph: ChannelGraph, budget: Sequence[str], allocation: str = "uniform", allowed: Constraints | None = None) -> dict[str, int]:
    """Widths per group that meet every budget. Raises DynpruneError, naming what is reachable, when even the narrowest network costs more."""
    limits = [parse_limit(text) for text in budget]
    model = CostModel(graph)
    bounds = [(limit, limit.value(model.cost(limit.quantity, model.arms))) for limit in limits]
    allowed = allowed or constraints(graph)
    if all(model.cost(limit.quantity, allowed.largest) <= bound for limit, bound in bounds):
        return dict(zip(model.names, allowed.largest.tolist()))
    refuse_unreachable(model, bounds, allowed)
    widths = uniform(model, bounds, allowed) if allocation == "uniform" else balanced(model, bounds, allowed)
    return dict(zip(model.names, fill(model, bounds, allowed, widths).tolist()))


def widths_for(graph: ChannelGraph, config: TrainConfig) -> dict[str, int]:
    """The widths that a run's settings ask for."""
    if config.policy == "dense":
        return graph.full_widths
    allowed = constraints(graph, align=config.align, min_width=config.min_width, max_width_share=config.max_width_share, keep=config.keep)
    return allocate(graph, config.budget, config.allocation, allowed)


def refuse_unreachable(model: CostModel, bounds: list[tuple[Limit, float]], allowed: Constraints) -> None:
    if not model.names:
        raise DynpruneError("No channel of this network can be removed, so no budget below 1 can be met. See what pins them: dynprune inspect.")
    for limit, bound in bounds:
        least, dense = model.cost(limit.quantity, allowed.smallest), model.cost(limit.quantity, model.arms)
        if least > bound:
            reachable = f"{least}" if limit.absolute else f"{math.ceil(least / dense * 1e4) / 1e4:.4f}"
            ease = ", or a smaller --align" if allowed.steps.max() > 1 else ""
            raise DynpruneError(f"--budget {limit} is below what this network can reach: its narrowest form has {least} {limit.quantity}, "
                                f"{least / dense:.4f} of {dense}. Choose at least {reachable}{ease}.")


def meets(model: CostModel, bounds: list[tuple[Limit, float]], widths: np.ndarray) -> bool:
    return all(model.cost(limit.quantity, widths) <= bound for limit, bound in bounds)


def uniform(model: CostModel, bounds: list[tuple[Limit, float]], allowed: Constraints) -> np.ndarray:
    """The largest share, found by bisection, at which every group's width (rounded down) meets the budgets."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if meets(model, bounds, round_widths(model, allowed, np.full(len(model.arms), middle))) else (low, middle)
    return round_widths(model, allowed, np.full(len(model.arms), low))


def balanced(model: CostModel, bounds: list[tuple[Limit, float]], allowed: Constraints) -> np.ndarray:
    """Shares that fall with a group's parameters per MAC: share = a * density^-b, with the least b >= 0 that meets every budget.

    With one budget, or where the MACs bind first, b is 0 and this is `uniform`. A smooth family of shares is deliberate: maximising
    a sum of log(width) under a product of neighbouring widths, greedily or exactly, alternates wide and narrow layers.
    """
    macs, params = (model.slopes(quantity, model.arms) for quantity in ("macs", "params"))
    density = (params / max(params.mean(), 1e-30) + 1e-9) / (macs / max(macs.mean(), 1e-30) + 1e-9)
    mac_bounds = [pair for pair in bounds if pair[0].quantity == "macs"]

    def widest(b: float, within: list[tuple[Limit, float]]) -> np.ndarray:
        shape = density ** -b
        low, high = 0.0, 1.0 / shape.min()
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if meets(model, within, round_widths(model, allowed, middle * shape)) else (low, middle)
        return round_widths(model, allowed, low * shape)

    low, high = 0.0, 2.0
    if not mac_bounds or meets(model, bounds, widest(0.0, mac_bounds)):
        return widest(0.0, bounds)
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if meets(model, bounds, widest(middle, mac_bounds)) else (middle, high)
    return widest(high, bounds)


def round_widths(model: CostModel, allowed: Constraints, shares: np.ndarray) -> np.ndarray:
    """Widths of these shares of the arms, rounded down to what is allowed."""
    widths = (np.minimum(shares, 1.0) * model.arms).astype(np.int64) // allowed.steps * allowed.steps
    return np.clip(widths, allowed.smallest, allowed.largest)


def fill(model: CostModel, bounds: list[tuple[Limit, float]], allowed: Constraints, widths: np.ndarray) -> np.ndarray:
    """Spend what is left: widen one step at a time the group that is relatively narrowest, as long as every budget holds."""
    widths, open_groups = widths.copy(), allowed.largest > widths
    while open_groups.any():
        candidate = int(np.where(open_groups, widths / model.arms, np.inf).argmin())
        wider = widths.copy()
        wider[candidate] = min(allowed.largest[candidate], (widths[candidate] // allowed.steps[candidate] + 1) * allowed.steps[candidate])
        if meets(model, bounds, wider):
            widths = wider
        else:
            open_groups[candidate] = False
        open_groups &= widths < allowed.largest
    return widths


def budgets_met(graph: ChannelGraph, budget: Sequence[str], widths: Mapping[str, int]) -> list[dict[str, object]]:
    """Per budget: its text, the bound, the cost of these widths, and whether it holds."""
    model = CostModel(graph)
    own = np.array([widths.get(name, arms) for name, arms in zip(model.names, model.arms.tolist())], dtype=np.int64)
    lines = []
    for text in budget:
        limit = parse_limit(text)
        bound, cost = limit.value(model.cost(limit.quantity, model.arms)), model.cost(limit.quantity, own)
        lines.append({"budget": str(limit), "limit": bound, "actual": cost, "met": cost <= bound})
    return lines
