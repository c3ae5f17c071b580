"""When arms are chosen: explore slowly at the start, settle, then train what was chosen.

Takes the policy and the number of steps, and is asked at each step whether the selection changes. While it explores, a
selection is held for some steps (a *round*), the rewards of its arms are averaged and given to the bandit of each
group. After the exploring steps the best arms stay for good: at every step a new selection would destroy training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dynprune.execution import bandit
from dynprune.execution.bandit import Bandit
from dynprune.execution.saliency import Ledger, normalise, taylor
from dynprune.state.copies import generator
from dynprune.structure.channels import ChannelGraph

REMEMBERED = 256  # selections
ROUNDS_PER_ARM = 3  # a short run shortens the hold until every arm can be played about this often


@dataclass(frozen=True)
class Exploration:
    """How arms are tried out. policy: cucb, random, static or dense. explore: share of the steps that explore; hold:
    steps per round.
    bonus: scale of the exploration bonus. paper: as published, a new selection at every step to the end, with a bonus
    of 1. moves: whether widths move half-way through. seed: of random selections."""

    policy: str = "cucb"
    explore: float = 0.005
    hold: int = 20
    bonus: float = 0.1
    paper: bool = False
    moves: bool = False
    seed: int = 0


class Explorer:
    """The policy of one run. widths: of every group, to begin with. Nothing is explored when every arm runs, or by a
    static network.

    magnitudes: of every arm of a trained network, (arms,) per group. They count as the reward of one round in which all
    arms were played, on the scale of the first rewards that are seen, so that the bandit starts from what the weights
    say and tries out what lies near the boundary. Of an untrained network nothing is known: every arm is played once
    first.
    saliency: the mean Taylor saliency of every arm in the rounds that executed it, not normalised, so that groups can
    be compared. picked: the step of each selection and the arms in it, (all arms,) of 0 and 1; of long explorations
    every second, fourth, ... one.
    """

    def __init__(
        self,
        how: Exploration,
        graph: ChannelGraph,
        widths: Mapping[str, int],
        steps: int,
        magnitudes: Mapping[str, Tensor] | None = None,
    ):
        self.policy, self.bonus, self.seed = how.policy, 1.0 if how.paper else how.bonus, how.seed
        self.widths = dict(widths)
        self.bandits = {group.name: Bandit.new(group.arms) for group in graph}
        self.told_rounds = 1 if magnitudes else 0  # of each arm's count, those that no step has played
        for name, sizes in (magnitudes or {}).items():
            bandit.update(self.bandits[name], torch.arange(len(sizes)), sizes / sizes.max().clamp(min=1e-30))
        explores = how.policy in ("cucb", "random") and any(widths[g.name] < g.arms for g in graph)
        rounds_needed = max((math.ceil(g.arms / widths[g.name]) for g in graph), default=1)
        exploring = (
            min(steps - 1, max(round(how.explore * steps), rounds_needed)) if explores and how.explore > 0 else 0
        )
        if how.paper and explores:
            exploring = steps - 1  # the last step runs what has settled, so that something is left to keep
        self.hold = 1 if how.paper else max(1, min(how.hold, exploring // (ROUNDS_PER_ARM * rounds_needed)))
        self.rounds = exploring // self.hold
        self.steps = self.rounds * self.hold
        self.sums = torch.zeros(
            2, sum(self.widths.values())
        )  # of this round's rewards, and of the saliencies that they come from
        self.uncounted = 0
        self.saliency = {group.name: torch.zeros(group.arms, dtype=torch.float64) for group in graph}
        self.reallocation_step = self.rounds // 2 * self.hold if how.moves else 0
        self.executed = {group.name: torch.zeros(group.arms, dtype=torch.int64) for group in graph}
        self.picked: dict[int, Tensor] = {}
        self.picked_every = 1  # of so many selections one is kept

    def first(self) -> dict[str, np.ndarray]:
        """The selection to start with. Without exploring, the arms that look best, or the lower ones of an untrained
        network."""
        return (
            self.select(0)
            if self.rounds
            else {name: bandit.settle(self.bandits[name], width).numpy() for name, width in self.widths.items()}
        )

    def changes_at(self, step: int) -> bool:
        return 0 < step <= self.steps and step % self.hold == 0

    def round_is_over(self, step: int) -> bool:
        """Whether a round has ended after so many steps, and its rewards were not given to the bandits yet."""
        if not self.changes_at(step):
            return False
        state = next(iter(self.bandits.values()), None)
        return state is None or state.rounds - self.told_rounds < step // self.hold

    def explores_at(self, step: int) -> bool:
        return step < self.steps

    def select(self, step: int) -> dict[str, np.ndarray]:
        """The selection that runs from `step` on. Sorted arms per group, shape (width,)."""
        selection = {}
        for number, (name, width) in enumerate(self.widths.items()):
            state = self.bandits[name]
            if self.policy == "random":
                arms = bandit.select_random(len(state.counts), width, generator(self.seed, step, number))
            elif self.explores_at(step):
                arms = bandit.play(state, width, self.bonus)
            else:
                arms = bandit.settle(state, width)
            selection[name] = arms.numpy()
        self.remember(step, selection)
        return selection

    def remember(self, step: int, selection: Mapping[str, np.ndarray]) -> None:
        """Keep what was picked, to be looked at; thinned out so that it never grows beyond REMEMBERED."""
        if step // self.hold % self.picked_every:
            return
        chosen = [torch.zeros(len(state.counts), dtype=torch.uint8) for state in self.bandits.values()]
        for own, name in zip(chosen, self.bandits):
            own[torch.from_numpy(selection[name])] = 1
        self.picked[step] = torch.cat(chosen)
        if len(self.picked) > REMEMBERED:
            self.picked_every *= 2
            self.picked = {at: arms for at, arms in self.picked.items() if at // self.hold % self.picked_every == 0}

    def more(self, step: int, slots: Mapping[str, np.ndarray], widths: Mapping[str, int]) -> dict[str, np.ndarray]:
        """Selections of larger widths that keep the arms in `slots`: those of the others join that look best, the lower
        ones where nothing is known of them, or any with the random policy."""
        selection = {}
        for number, (name, width) in enumerate(widths.items()):
            state = self.bandits[name]
            if self.policy == "random":
                worth = torch.rand(len(state.counts), generator=generator(self.seed, step, number), dtype=torch.float64)
            else:
                worth = torch.where(state.counts == 0, -torch.inf, state.means)
            worth[torch.from_numpy(slots[name])] = torch.inf
            selection[name] = bandit.select(worth, width).numpy()
        return selection

    def reward(self, parameters: Mapping[str, Tensor], ledger: Ledger) -> None:
        """Add this step's rewards, after `backward`. They stay on the device until the round ends."""
        saliency = taylor(parameters, ledger)
        rewards = torch.stack([normalise(saliency, ledger), saliency])
        self.sums = self.sums.to(rewards.device) + rewards

    def end_round(self, slots: Mapping[str, np.ndarray]) -> None:
        """Give the bandits the mean rewards of the round that just ended; slots: the arms it executed, in slot
        order."""
        first = 0
        means = self.sums.cpu() / self.hold
        for name, arms in slots.items():
            own = slice(first, first + len(arms))
            chosen, state = torch.from_numpy(arms), self.bandits[name]
            if self.told_rounds and bool((state.counts == self.told_rounds).all()):
                # on the scale of rewards, or whatever was played would look worse
                state.means *= float(means[0, own].mean()) / state.means[chosen].mean().clamp(min=1e-30)
            bandit.update(state, chosen, means[0, own])
            self.saliency[name][chosen] += (means[1, own].double() - self.saliency[name][chosen]) / (
                state.counts[chosen] - self.told_rounds
            )
            first += len(arms)
        self.sums.zero_()

    def loss_per_arm(self) -> np.ndarray:
        """The loss that one more arm of each group is estimated to be worth. Shape (groups,)."""
        return np.array([worth_of_one_more(self.saliency[name], width) for name, width in self.widths.items()])

    def change_widths(self, widths: Mapping[str, int]) -> None:
        """Go on with other widths; what was learned of each arm stays."""
        self.widths = {name: widths[name] for name in self.widths}
        self.sums = torch.zeros(2, sum(self.widths.values()), device=self.sums.device)

    def count(self, slots: Mapping[str, np.ndarray]) -> None:
        """Note that the arms in `slots` were executed in the steps since the last count."""
        for name, arms in slots.items():
            self.executed[name][torch.from_numpy(arms)] += self.uncounted
        self.uncounted = 0

    def state(self) -> dict[str, Tensor]:
        """Everything that changes, as named tensors."""
        tensors = {}
        for name, state in self.bandits.items():
            tensors[f"counts.{name}"], tensors[f"means.{name}"] = state.counts, state.means
            tensors[f"rounds.{name}"] = torch.tensor(state.rounds)
            tensors[f"executed.{name}"], tensors[f"saliency.{name}"] = self.executed[name], self.saliency[name]
        if self.picked:
            tensors["picked"] = torch.stack(list(self.picked.values()))
            tensors["picked_at"] = torch.tensor([*self.picked, self.picked_every])
        return {**tensors, "sums": self.sums.cpu()}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        if tensors["sums"].shape != self.sums.shape:
            raise ValueError("rewards of other widths")
        self.sums = tensors["sums"].clone()
        self.picked, self.picked_every = picked_in(tensors, sum(len(state.counts) for state in self.bandits.values()))
        for name, state in self.bandits.items():
            for kind in ("counts", "means", "executed", "saliency"):
                if tensors[f"{kind}.{name}"].shape != state.counts.shape:
                    raise ValueError(f"{kind} of another number of arms in {name}")
            state.counts, state.means = tensors[f"counts.{name}"].clone(), tensors[f"means.{name}"].clone()
            state.rounds = int(tensors[f"rounds.{name}"])
            self.executed[name], self.saliency[name] = (
                tensors[f"executed.{name}"].clone(),
                tensors[f"saliency.{name}"].clone(),
            )


def picked_in(tensors: Mapping[str, Tensor], arms: int) -> tuple[dict[int, Tensor], int]:
    """What was picked when, (arms,) each, from named tensors; nothing where an earlier version wrote them."""
    if "picked" not in tensors:
        return {}, 1
    *steps, every = tensors["picked_at"].tolist()
    if tensors["picked"].shape != (len(steps), arms) or every < 1:
        raise ValueError("picks of another number of arms")
    return dict(zip(steps, tensors["picked"].clone())), every


def worth_of_one_more(saliency: Tensor, width: int) -> float:
    """The mean saliency of the lower half of the `width` best arms. saliency: of every arm, (arms,)."""
    best = torch.sort(saliency, descending=True).values[:width]
    return float(best[width // 2 :].mean())
