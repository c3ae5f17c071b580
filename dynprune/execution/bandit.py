"""CUCB and its rivals, as functions on tensors: which arms of a group to execute.

Takes the state of one group (how often each arm was played, its mean reward), returns arm numbers. One *round* is one
selection, held for some steps; its reward is the mean over those steps, in [0, 1].
Source: Chen, Wang & Yuan, "Combinatorial Multi-Armed Bandit", ICML 2013. Theirs is the index with c = 1; we scale the
bonus, since a bonus far above the differences between rewards swaps a third of the channels every round.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Bandit:
    """State of one group. counts: rounds each arm was played, float64, shape (arms,); means: of its rewards."""

    counts: Tensor
    means: Tensor
    rounds: int = 0

    @classmethod
    def new(cls, arms: int) -> Bandit:
        return cls(torch.zeros(arms, dtype=torch.float64), torch.zeros(arms, dtype=torch.float64))


def upper_confidence(counts: Tensor, means: Tensor, rounds: int, bonus: float) -> Tensor:
    """Index of every arm: mean + bonus * sqrt(3 ln t / (2 T)), infinite for an arm never played. Shape (arms,).

    rounds: t, the rounds played so far plus one, so that ln t is defined in the first.
    """
    radius = torch.sqrt(3 * math.log(max(rounds, 1)) / (2 * counts.clamp(min=1)))
    return torch.where(counts == 0, torch.inf, means + bonus * radius)


def select(index: Tensor, width: int) -> Tensor:
    """Choose the `width` arms with the highest upper confidence index.

    An arm never played has an infinite index, so it comes first. Ties go to the lower arm.

    index: float, shape (arms,).
    Returns sorted int64 arm numbers, shape (width,).
    Source: the top-k oracle of CUCB, Chen, Wang & Yuan, ICML 2013, section 3.
    """
    return torch.sort(torch.sort(index, descending=True, stable=True).indices[:width]).values


def select_random(arms: int, width: int, generator: torch.Generator) -> Tensor:
    """`width` arms by chance, sorted: what a bandit has to beat."""
    return torch.sort(torch.randperm(arms, generator=generator)[:width]).values


def play(bandit: Bandit, width: int, bonus: float) -> Tensor:
    """The selection of the next round."""
    return select(upper_confidence(bandit.counts, bandit.means, bandit.rounds + 1, bonus), width)


def settle(bandit: Bandit, width: int) -> Tensor:
    """The selection to keep: highest mean reward, no bonus; arms never played come last. Ties go to the lower arm."""
    return select(torch.where(bandit.counts == 0, -torch.inf, bandit.means), width)


def update(bandit: Bandit, arms: Tensor, rewards: Tensor) -> None:
    """Add one round: `rewards` in [0, 1] of the executed `arms`, both of shape (width,)."""
    bandit.counts[arms] += 1
    bandit.means[arms] += (rewards.double() - bandit.means[arms]) / bandit.counts[arms]
    bandit.rounds += 1
