"""The bandit over widths: within the budget, better than where it began, the same again with the same seed."""

import itertools

import numpy as np
import pytest
import torch

from dynprune.budgets.allocation import CostModel, allocate, constraints, meets
from dynprune.budgets.limits import parse_limit
from dynprune.repair.widths import POLICIES, Moves, search
from dynprune.structure.tracing import trace
from dynprune.zoo import build


@pytest.fixture(scope="module")
def graph():
    return trace(build("resnet20", 10, 0), torch.zeros(1, 3, 32, 32))


def moves_for(graph, *budget):
    cost = CostModel(graph)
    bounds = [(limit, limit.value(cost.dense(limit.quantity))) for limit in map(parse_limit, budget)]
    return Moves(cost, bounds, constraints(graph, align="4"))


def far_from(wanted):
    """A distance with one best point, as of widths in a network whose groups matter differently."""
    return lambda widths: 0.1 + sum((np.log(widths[name] / wanted[name])) ** 2 for name in wanted)


def run(graph, policy, seed=0, budget=("0.3",), pulls=150):
    moves, ticks = moves_for(graph, *budget), itertools.count()
    wanted = {name: 8 + 4 * (number * 7 % 5) for number, name in enumerate(graph.groups)}
    start = allocate(graph, budget)
    found = search(
        start, moves, far_from(wanted), seconds=2 * pulls, policy=policy, seed=seed, clock=lambda: float(next(ticks))
    )
    return start, found, moves, far_from(wanted)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("budget", [("0.3",), ("macs=0.5", "params=0.3")])
def test_widths_get_better_within_the_budget(graph, policy, budget):
    start, found, moves, distance = run(graph, policy, budget=budget)
    widths = np.array(list(found.widths.values()))
    assert meets(moves.cost, moves.bounds, widths) and (widths % moves.allowed.steps == 0).all()
    assert (widths >= moves.allowed.smallest).all() and (widths <= moves.allowed.largest).all()
    assert found.distance == distance(found.widths) <= distance(start)
    lows = [low for _, low in found.curve]
    assert lows == sorted(lows, reverse=True) and lows[-1] == found.distance and lows[0] == distance(start)
    if policy != "greedy":
        assert found.distance < 0.8 * distance(start)


def test_the_same_seed_finds_the_same(graph):
    assert run(graph, "bandit", seed=3)[1] == run(graph, "bandit", seed=3)[1]
    assert run(graph, "bandit", seed=3)[1].curve != run(graph, "bandit", seed=4)[1].curve


def test_nothing_is_tried_twice_and_the_best_is_kept(graph):
    """Where no move helps, the search begins again near the best widths, until the time is up."""
    tried, ticks, start = [], itertools.count(), allocate(graph, ["0.3"])

    def distance(widths):
        tried.append(tuple(widths.values()))
        return 0.5 if len(tried) == 700 else 1.0

    found = search(start, moves_for(graph, "0.3"), distance, seconds=2000, clock=lambda: float(next(ticks)))
    assert len(tried) == len(set(tried)) > 700
    assert tuple(found.widths.values()) == tried[699] and found.distance == 0.5


def test_a_search_with_nothing_to_try_ends_by_itself(graph):
    start, ticks = allocate(graph, ["0.3"]), itertools.count()
    moves = moves_for(graph, "0.3")
    moves.allowed.largest[:] = moves.allowed.smallest[:] = list(start.values())
    found = search(start, moves, lambda _: 1.0, seconds=10**9, clock=lambda: float(next(ticks)))
    assert found.widths == start and len(found.curve) == 1
