"""How wide every group stays: a bandit over widths, on frozen weights.

Takes what a width costs and a function that says how far the network of some widths is from the untouched one; returns
widths within the budget. A *move* makes one group wider and another one narrower, so that the budget is used as before;
a *pull* cuts and repairs the network of the moved widths and measures its distance. Nothing is trained between two
pulls, so rewards stand still but for the moves that were kept: what CUCB (Chen, Wang & Yuan, ICML 2013) assumes. An arm
of this bandit is "this group wider" or "that group narrower"; a pull plays one of each kind, the pair of the highest
indices that leads to widths not tried yet, and its reward counts for both (ours).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from dynprune.budgets.allocation import Constraints, CostModel, fill, meets
from dynprune.budgets.limits import Limit
from dynprune.execution import bandit
from dynprune.state.copies import generator

POLICIES = ("bandit", "random", "greedy")
BONUS = 0.05  # scale of the exploration bonus
GAIN = 5.0  # reward = 1/2 + GAIN * relative fall of the distance, between 0 and 1
MEMORY = 8  # rewards that a mean looks back on: kept moves change what the next ones are worth
STEP, LEAST_STEP = 0.25, 0.05  # share of a group's width by which it moves; halved where nothing helps any more
KICK, KICK_TRIALS = 3, 50  # moves by chance from widths that no move makes better; how often that is tried


@dataclass
class Found:
    """widths: of every group. distance: of the network with them. curve: after every pull, seconds so far and the least
    distance so far."""

    widths: dict[str, int]
    distance: float
    curve: list[tuple[float, float]] = field(default_factory=list)


@dataclass
class Moves:
    """Which widths a move leads to. Widths are int64 of shape (groups,)."""

    cost: CostModel
    bounds: list[tuple[Limit, float]]
    allowed: Constraints
    step: float = STEP

    def apply(self, widths: np.ndarray, wider: int, narrower: int) -> np.ndarray | None:
        """Widths with one group wider and another narrower by as much as the budget asks for; None where that cannot
        be."""
        moved, steps = widths.copy(), self.allowed.steps
        by = max(1, round(self.step * widths[wider] / steps[wider])) * steps[wider]
        moved[wider] = min(self.allowed.largest[wider], widths[wider] + by)
        if wider == narrower or moved[wider] == widths[wider]:
            return None
        while not self.meets(moved):
            if moved[narrower] - steps[narrower] < self.allowed.smallest[narrower]:
                return None
            moved[narrower] -= steps[narrower]
        return fill(self.cost, self.bounds, self.allowed, moved)

    def meets(self, widths: np.ndarray) -> bool:
        return meets(self.cost, self.bounds, widths)


def search(
    start: dict[str, int],
    moves: Moves,
    distance: Callable[[dict[str, int]], float],
    *,
    seconds: float,
    policy: str = "bandit",
    worth: np.ndarray | None = None,
    seed: int = 0,
    report: Callable[[float, float, int], None] = lambda *_: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Found:
    """Move from widths to better ones until the time is up or nothing is left to try.

    distance: of the network of these widths, after repair. policy: bandit, random (any move), or greedy (by `worth`
    alone). worth: what one more arm of each group is expected to be worth for what it costs, (groups,); in that order
    the bandit tries what it has not tried. report: seconds, least distance, pulls.
    """
    names, groups = list(start), len(start)
    widths, began, first_step = np.array(list(start.values()), dtype=np.int64), clock(), moves.step
    near, curve, tried, failed = distance(start), [], {tuple(widths.tolist())}, 0
    best, best_widths = near, widths
    curve.append((clock() - began, best))
    state = bandit.Bandit.new(2 * groups)  # wider, then narrower
    prior = np.zeros(groups) if worth is None else np.asarray(worth, dtype=np.float64)
    rng = generator(seed)
    while clock() - began < seconds:
        index = index_of(policy, state, prior, rng)
        move = next_move(moves, widths, index, tried)
        if move is None:
            moves.step /= 2
            if moves.step < LEAST_STEP / 2:  # no neighbour is better: begin again a few moves from the best widths
                moves.step = first_step
                aside = kicked(moves, best_widths, tried, rng)
                if aside is None:
                    break
                widths, near, failed = aside, distance(dict(zip(names, aside.tolist()))), 0
                tried.add(tuple(aside.tolist()))
                state = bandit.Bandit.new(2 * groups)
                if near < best:
                    best, best_widths = near, widths
                curve.append((clock() - began, best))
            continue
        wider, narrower, moved = move
        tried.add(tuple(moved.tolist()))
        here = distance(dict(zip(names, moved.tolist())))
        reward = min(1.0, max(0.0, 0.5 + GAIN * (near - here) / max(near, 1e-30)))
        played = torch.tensor([wider, groups + narrower])
        state.counts[played] = state.counts[played].clamp(max=MEMORY - 1)
        bandit.update(state, played, torch.full((2,), reward))
        if here < near:
            near, widths, failed = here, moved, 0
            if near < best:
                best, best_widths = near, widths
        else:
            failed += 1
        if failed >= 2 * groups:
            moves.step, failed = max(LEAST_STEP, moves.step / 2), 0
        curve.append((clock() - began, best))
        report(curve[-1][0], best, len(curve) - 1)
    return Found(dict(zip(names, best_widths.tolist())), best, curve)


def kicked(moves: Moves, widths: np.ndarray, tried: set[tuple], rng: torch.Generator) -> np.ndarray | None:
    """Widths a few moves by chance from these, not tried yet; None where there seem to be none."""
    for _ in range(KICK_TRIALS):
        moved = widths
        for _ in range(KICK):
            wider, narrower = torch.randint(len(widths), (2,), generator=rng).tolist()
            after = moves.apply(moved, wider, narrower)
            moved = moved if after is None else after
        if tuple(moved.tolist()) not in tried:
            return moved
    return None


def index_of(policy: str, state: bandit.Bandit, worth: np.ndarray, rng: torch.Generator) -> np.ndarray:
    """How much every arm, "wider" then "narrower", calls for being played, (2 * groups,)."""
    chance = torch.rand(len(state.counts), generator=rng, dtype=torch.float64)
    expected = torch.from_numpy(np.concatenate([worth, -worth]))
    expected = expected / expected.abs().max().clamp(min=1e-30)
    if policy == "random":
        return chance.numpy()
    if policy == "greedy":
        return (expected + 1e-6 * chance).numpy()
    index = bandit.upper_confidence(state.counts, state.means, state.rounds + 1, BONUS)
    return torch.where(state.counts == 0, 1e3 + expected, index).add(1e-6 * chance).numpy()


def next_move(
    moves: Moves, widths: np.ndarray, index: np.ndarray, tried: set[tuple]
) -> tuple[int, int, np.ndarray] | None:
    """The move of the highest sum of indices that leads to widths not tried yet: who gets wider, who narrower, and the
    widths."""
    groups = len(widths)
    sums = index[:groups, None] + index[None, groups:]
    for place in np.argsort(-sums, axis=None, kind="stable"):
        wider, narrower = divmod(int(place), groups)
        moved = moves.apply(widths, wider, narrower)
        if moved is not None and tuple(moved.tolist()) not in tried:
            return wider, narrower, moved
    return None
