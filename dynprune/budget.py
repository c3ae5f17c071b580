"""From a budget to widths.

Takes a ChannelGraph and the share of the dense MACs that may be executed, returns the width of every group. The cost of
any widths is exact: it is read off the graph's table (`ChannelGraph.macs`).
"""

from __future__ import annotations

from dynprune.channels import ChannelGraph
from dynprune.errors import DynpruneError


def alignment(arms: int, align: int) -> int:
    """Widths of a group are multiples of this.

    `align` if given, else 16, falling back to 8 and 4 where the group has fewer than 4 such steps: onnxruntime's blocked
    layout works in 16 channels (8 with AVX2), and a width that 4 does not divide leaves it and can be slower than no
    pruning at all.
    """
    if align:
        return min(align, arms)
    return next((step for step in (16, 8, 4) if arms >= 4 * step or step == 4 and arms >= 8), 1)


def smallest_widths(graph: ChannelGraph, align: int) -> dict[str, int]:
    return {group.name: alignment(group.arms, align) for group in graph}


def uniform_widths(graph: ChannelGraph, budget: float, align: int = 0) -> dict[str, int]:
    """The same share of every group, as large as the budget and the alignment allow.

    The share is found by bisection with widths rounded down; what is left of the budget then goes, one step at a time, to
    the group that is furthest below the share. Raises DynpruneError when even the smallest widths cost more.
    """
    dense = graph.macs({})
    limit = budget * dense
    if budget >= 1:
        return graph.full_widths
    if not graph.groups:
        raise DynpruneError("No channel of this network can be removed, so no budget below 1 can be met. See what pins them: dynprune inspect.")
    steps = smallest_widths(graph, align)
    smallest = graph.macs(steps) / dense
    if smallest > budget:
        raise DynpruneError(f"--budget {budget:g} is below what this network can reach: its narrowest form executes {smallest:.4f} of the "
                            f"dense MACs. Choose at least {smallest + 5e-5:.4f}" + (", or a smaller --align." if max(steps.values()) > 1 else "."))

    def at(share: float) -> dict[str, int]:
        return {g.name: min(g.arms, max(steps[g.name], int(share * g.arms) // steps[g.name] * steps[g.name])) for g in graph}

    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if graph.macs(at(middle)) <= limit else (low, middle)
    widths = at(low)
    blocked: set[str] = set()
    while len(blocked) < len(graph):
        name = max((n for n in widths if n not in blocked), key=lambda n: low - widths[n] / graph.groups[n].arms)
        wider = {**widths, name: min(graph.groups[name].arms, widths[name] + steps[name])}
        if wider[name] == widths[name] or graph.macs(wider) > limit:
            blocked.add(name)
        else:
            widths = wider
    return widths
