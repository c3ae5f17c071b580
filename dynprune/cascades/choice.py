"""Which networks, and from which margin on an image goes on to the next: chosen on validation images.

An image goes on where the two best classes of a network are closer than a threshold. Every one of the given networks,
every pair and every three of them are weighed, with thresholds at quantiles of the margins seen. Pure arithmetic.
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
MARGIN = 0.99  # a cascade aims this far below the target, so that other images meet it too

# of pairs of networks of which the second holds the first: the MACs that it adds
Added = Mapping[tuple[int, int], int]
NOTHING: Added = {}


@dataclass(frozen=True)
class Goal:
    """target: mean MACs of an image over those of the last network; or accuracy: share of the validation images."""

    target: float | None = None
    accuracy: float | None = None


@dataclass(frozen=True)
class Asked:
    """What a cascade may cost or lose, as a user says it: mean MACs over those of the last network, points of
    validation accuracy below the last network, or percent of the validation images; at most one of them. Without any:
    as accurate as the last network."""

    target: float | None = None
    max_drop: float | None = None
    min_accuracy: float | None = None

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
        return self

    def goal(self, last: float) -> Goal:
        """last: share of the validation images that the last network gets right."""
        if self.target is not None:
            return Goal(target=self.target)
        if self.min_accuracy is not None:
            return Goal(accuracy=self.min_accuracy / 100)
        return Goal(accuracy=last - (self.max_drop or 0.0) / 100 - 1e-9)


@dataclass(frozen=True)
class Plan:
    """A cascade, and what it comes to on the images it was weighed on. chain: which of the networks, in order.
    thresholds: one for each of them but the last. macs: mean of an image."""

    chain: tuple[int, ...]
    thresholds: tuple[float, ...]
    macs: float
    accuracy: float


def steps_taken(chain: Sequence[int], thresholds: Sequence[float], said: Said) -> np.ndarray:
    """(images,): which network of the chain has the last word, from 0."""
    step = np.zeros(said.margin.shape[1], dtype=np.int64)
    for number, (network, threshold) in enumerate(zip(chain, thresholds)):
        step[(step == number) & (said.margin[network] < threshold)] = number + 1
    return step


def costs_of(chain: Sequence[int], macs: Sequence[int], added: Added) -> list[int]:
    """What an image costs in each network of the chain that it reaches. One that goes on from the network before it
    costs what it adds, unless that went on from another itself."""
    costs, goes_on = [macs[chain[0]]], False
    for pair in itertools.pairwise(chain):
        goes_on = not goes_on and pair in added
        costs.append(added[pair] if goes_on else macs[pair[1]])
    return costs


def weigh(
    chain: Sequence[int], thresholds: Sequence[float], said: Said, macs: Sequence[int], added: Added = NOTHING
) -> Plan:
    """What this cascade comes to on these images; the passes of the smaller networks are counted."""
    step = steps_taken(chain, thresholds, said)
    cost = sum(own * float((step >= number).mean()) for number, own in enumerate(costs_of(chain, macs, added)))
    right = said.right[np.array(chain)[step], np.arange(len(step))]
    return Plan(tuple(chain), tuple(map(float, thresholds)), cost, float(right.mean()))


def plans(said: Said, macs: Sequence[int], added: Added = NOTHING) -> Iterator[Plan]:
    """Every cascade of these networks that is weighed, each network alone among them."""
    everyone = range(len(macs))
    of_each = {2: PAIRS, 3: min(64, int(math.sqrt(THREES / max(1, math.comb(len(macs), 3)))))}
    for length in range(1, min(len(macs), LONGEST) + 1):
        for chain in itertools.combinations(everyone, length):
            tried = [quantiles(said.margin[network], of_each[length]) for network in chain[:-1]]
            for thresholds in itertools.product(*tried):
                yield weigh(chain, thresholds, said, macs, added)


def quantiles(margin: np.ndarray, count: int) -> list[float]:
    """Thresholds between margins that were seen: some images go on, and some do not."""
    ordered = np.unique(margin)
    places = np.unique(np.linspace(1, len(ordered) - 1, min(count, len(ordered) - 1)).round().astype(int))
    return [float((ordered[place - 1] + ordered[place]) / 2) for place in places]


def choose(found: Sequence[Plan], goal: Goal, macs: Sequence[int], names: Sequence[str]) -> Plan:
    """The most accurate plan within goal.target, or the cheapest that is as accurate as goal.accuracy. Raises
    DynpruneError where there is none, and where one network alone does it."""
    alone = {plan.chain[0]: plan for plan in found if len(plan.chain) == 1}
    largest = macs[-1]
    if goal.target is not None:
        limit = goal.target * largest
        within = [plan for plan in found if plan.macs <= (limit if len(plan.chain) == 1 else MARGIN * limit)]
        least = min((plan.macs for plan in found if len(plan.chain) > 1), default=math.inf)
        if MARGIN * limit < least < math.inf or not within:
            raise DynpruneError(
                f"--target got {goal.target:g}, but a cascade of these costs {least / MARGIN / largest:.3f} of "
                f"{names[-1]} at least: every image passes {names[0]}. Raise it, or give a smaller first network."
            )
        best = max(within, key=lambda plan: (plan.accuracy, -plan.macs))
    else:
        assert goal.accuracy is not None, "no goal"
        within = [plan for plan in found if plan.accuracy >= goal.accuracy]
        if not within:
            most = max(found, key=lambda plan: plan.accuracy)
            raise DynpruneError(
                f"No cascade of these reaches {100 * goal.accuracy:.2f} % on validation images; the best comes to "
                f"{100 * most.accuracy:.2f} %. Ask for less, or give a more accurate network."
            )
        best = min(within, key=lambda plan: (plan.macs, -plan.accuracy))
    if len(best.chain) == 1:
        own = alone[best.chain[0]]
        raise DynpruneError(
            f"{names[best.chain[0]]} alone is the best of these for this: {100 * own.accuracy:.2f} % on validation "
            f"images at {own.macs / largest:.3f} of {names[-1]}. A cascade would cost more for nothing."
        )
    return best


def frontier(found: Sequence[Plan]) -> list[Plan]:
    """Plans that no other beats in both, cheapest first."""
    kept: list[Plan] = []
    for plan in sorted(found, key=lambda own: (own.macs, -own.accuracy)):
        if not kept or plan.accuracy > kept[-1].accuracy:
            kept.append(plan)
    return kept


def static_at(cost: float, macs: Sequence[float], accuracy: Sequence[float]) -> float:
    """Accuracy of a static network of this cost, read off the straight lines between the networks given; of the first
    or the last beyond them."""
    return float(np.interp(cost, macs, accuracy))


def cost_at(accuracy: float, costs: Sequence[float], accuracies: Sequence[float]) -> float | None:
    """What a static network of this accuracy costs, read off the straight lines between those of the networks given
    that no other beats in both; None where none is as accurate."""
    kept: list[tuple[float, float]] = []
    for cost, own in sorted(zip(costs, accuracies), key=lambda pair: (pair[0], -pair[1])):
        if not kept or own > kept[-1][1]:
            kept.append((cost, own))
    if accuracy > kept[-1][1]:
        return None
    return float(np.interp(accuracy, [own for _, own in kept], [cost for cost, _ in kept]))
