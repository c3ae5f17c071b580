"""Which networks, and from which margin on an image goes on to the next: chosen on validation images.

An image goes on where the two best classes of a network are closer than a threshold. Every one of the given networks,
every pair and every three of them are weighed, with thresholds at quantiles of the margins seen. What a network costs
is a number, of multiply-accumulates or of milliseconds. Pure arithmetic.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dynprune.cascades.networks import Said
from dynprune.errors import DynpruneError

LONGEST = 3  # networks in a chain
PAIRS, THREES = 256, 60_000  # thresholds that are tried for a pair, and pairs of them for all threes together
# a cascade aims this far below the target, so that other images meet it too; and another time, which is less exact
MARGIN = {"macs": 0.99, "latency": 0.97}
UNITS = {"macs": "multiply-accumulates", "latency": "milliseconds"}

# of pairs of networks of which the second goes on from the first, or costs other than by itself: what it adds
Added = Mapping[tuple[int, int], float]
NOTHING: Added = {}


@dataclass(frozen=True)
class Goal:
    """target: mean cost of an image over that of the last network; or accuracy: share of the validation images. cost:
    in what."""

    target: float | None = None
    accuracy: float | None = None
    cost: str = "macs"


@dataclass(frozen=True)
class Asked:
    """What a cascade may cost or lose, as a user says it: mean cost over that of the last network, points of
    validation accuracy below the last network, or percent of the validation images; at most one of them. Without any:
    as accurate as the last network. cost: macs, or latency, milliseconds in onnxruntime at batch 1."""

    target: float | None = None
    max_drop: float | None = None
    min_accuracy: float | None = None
    cost: str = "macs"

    def validate(self) -> Asked:
        given = {"--target": self.target, "--max-drop": self.max_drop, "--min-accuracy": self.min_accuracy}
        asked = [name for name, value in given.items() if value is not None]
        if len(asked) > 1:
            raise DynpruneError(f"A cascade got {' and '.join(asked)}. Expected one of them.")
        if self.target is not None and not 0 < self.target <= 1:
            raise DynpruneError(f"--target got {self.target:g}. Expected a share of the last network's cost in (0, 1].")
        if self.min_accuracy is not None and not 0 < self.min_accuracy <= 100:
            raise DynpruneError(f"--min-accuracy got {self.min_accuracy:g}. Expected percent in (0, 100].")
        if self.max_drop is not None and not 0 <= self.max_drop < 100:
            raise DynpruneError(f"--max-drop got {self.max_drop:g}. Expected points from 0 to 100.")
        if self.cost not in UNITS:
            raise DynpruneError(f'--cost got "{self.cost}". Expected one of: {", ".join(UNITS)}.')
        return self

    def goal(self, last: float) -> Goal:
        """last: share of the validation images that the last network gets right."""
        if self.target is not None:
            return Goal(self.target, cost=self.cost)
        if self.min_accuracy is not None:
            return Goal(accuracy=self.min_accuracy / 100, cost=self.cost)
        return Goal(accuracy=last - (self.max_drop or 0.0) / 100 - 1e-9, cost=self.cost)


@dataclass(frozen=True)
class Plan:
    """A cascade, and what it comes to on the images it was weighed on. chain: which of the networks, in order.
    thresholds: one for each of them but the last. cost: mean of an image."""

    chain: tuple[int, ...]
    thresholds: tuple[float, ...]
    cost: float
    accuracy: float


def steps_taken(chain: Sequence[int], thresholds: Sequence[float], said: Said) -> np.ndarray:
    """(images,): which network of the chain has the last word, from 0."""
    step = np.zeros(said.margin.shape[1], dtype=np.int64)
    for number, (network, threshold) in enumerate(zip(chain, thresholds)):
        step[(step == number) & (said.margin[network] < threshold)] = number + 1
    return step


def costs_of(chain: Sequence[int], costs: Sequence[float], added: Added) -> list[float]:
    """What an image costs in each network of the chain that it reaches. One that goes on from the network before it
    costs what it adds, unless that went on from another itself."""
    found, goes_on = [costs[chain[0]]], False
    for pair in itertools.pairwise(chain):
        goes_on = not goes_on and pair in added
        found.append(added[pair] if goes_on else costs[pair[1]])
    return found


def weigh(
    chain: Sequence[int], thresholds: Sequence[float], said: Said, costs: Sequence[float], added: Added = NOTHING
) -> Plan:
    """What this cascade comes to on these images; the passes of the smaller networks are counted."""
    step = steps_taken(chain, thresholds, said)
    cost = sum(own * float((step >= number).mean()) for number, own in enumerate(costs_of(chain, costs, added)))
    right = said.right[np.array(chain)[step], np.arange(len(step))]
    return Plan(tuple(chain), tuple(map(float, thresholds)), cost, float(right.mean()))


def plans(said: Said, costs: Sequence[float], added: Added = NOTHING) -> Iterator[Plan]:
    """Every cascade of these networks that is weighed, each network alone among them."""
    everyone = range(len(costs))
    of_each = {2: PAIRS, 3: min(64, int(math.sqrt(THREES / max(1, math.comb(len(costs), 3)))))}
    for length in range(1, min(len(costs), LONGEST) + 1):
        for chain in itertools.combinations(everyone, length):
            tried = [quantiles(said.margin[network], of_each[length]) for network in chain[:-1]]
            for thresholds in itertools.product(*tried):
                yield weigh(chain, thresholds, said, costs, added)


def quantiles(margin: np.ndarray, count: int) -> list[float]:
    """Thresholds between margins that were seen: some images go on, and some do not."""
    ordered = np.unique(margin)
    places = np.unique(np.linspace(1, len(ordered) - 1, min(count, len(ordered) - 1)).round().astype(int))
    return [float((ordered[place - 1] + ordered[place]) / 2) for place in places]


def choose(found: Sequence[Plan], goal: Goal, costs: Sequence[float], names: Sequence[str]) -> Plan:
    """The most accurate plan within goal.target, or the cheapest that is as accurate as goal.accuracy. Raises
    DynpruneError where there is none, and where one network alone does it."""
    alone = {plan.chain[0]: plan for plan in found if len(plan.chain) == 1}
    largest, margin = costs[-1], MARGIN[goal.cost]
    if goal.target is not None:
        limit = goal.target * largest
        within = [plan for plan in found if plan.cost <= (limit if len(plan.chain) == 1 else margin * limit)]
        least = min((plan.cost for plan in found if len(plan.chain) > 1), default=math.inf)
        if margin * limit < least < math.inf or not within:
            raise DynpruneError(
                f"--target got {goal.target:g}, but a cascade of these costs {least / margin / largest:.3f} of "
                f"{names[-1]}'s {UNITS[goal.cost]} at least: every image passes a first network. Raise it, or give a "
                "smaller first network."
            )
        best = max(within, key=lambda plan: (plan.accuracy, -plan.cost))
    else:
        assert goal.accuracy is not None, "no goal"
        within = [plan for plan in found if plan.accuracy >= goal.accuracy]
        if not within:
            most = max(found, key=lambda plan: plan.accuracy)
            raise DynpruneError(
                f"No cascade of these reaches {100 * goal.accuracy:.2f} % on validation images; the best comes to "
                f"{100 * most.accuracy:.2f} %. Ask for less, or give a more accurate network."
            )
        best = min(within, key=lambda plan: (plan.cost, -plan.accuracy))
    if len(best.chain) == 1:
        own = alone[best.chain[0]]
        raise DynpruneError(
            f"{names[best.chain[0]]} alone is the best of these for this: {100 * own.accuracy:.2f} % on validation "
            f"images at {own.cost / largest:.3f} of {names[-1]}'s {UNITS[goal.cost]}. A cascade would cost more for "
            "nothing."
        )
    return best


def frontier(found: Sequence[Plan]) -> list[Plan]:
    """Plans that no other beats in both, cheapest first."""
    kept: list[Plan] = []
    for plan in sorted(found, key=lambda own: (own.cost, -own.accuracy)):
        if not kept or plan.accuracy > kept[-1].accuracy:
            kept.append(plan)
    return kept


def best_of(costs: Sequence[float], accuracies: Sequence[float]) -> tuple[list[float], list[float]]:
    """Costs and accuracies of the networks that no other beats in both, cheapest first."""
    kept: list[tuple[float, float]] = []
    for cost, own in sorted(zip(costs, accuracies), key=lambda pair: (pair[0], -pair[1])):
        if not kept or own > kept[-1][1]:
            kept.append((cost, own))
    return [cost for cost, _ in kept], [own for _, own in kept]


def static_at(cost: float, costs: Sequence[float], accuracies: Sequence[float]) -> float:
    """Accuracy of a static network of this cost, read off the straight lines between those of the networks given that
    no other beats in both; of the first or the last beyond them."""
    return float(np.interp(cost, *best_of(costs, accuracies)))


def cost_at(accuracy: float, costs: Sequence[float], accuracies: Sequence[float]) -> float | None:
    """What a static network of this accuracy costs, read off the straight lines between those of the networks given
    that no other beats in both; None where none is as accurate."""
    costs, accuracies = best_of(costs, accuracies)
    return None if accuracy > accuracies[-1] else float(np.interp(accuracy, accuracies, costs))
