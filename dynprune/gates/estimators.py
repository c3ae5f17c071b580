"""How gates learn from what they decided: REINFORCE and straight-through Gumbel, as functions on tensors.

Takes logits of Bernoulli gates, what was opened, and what it led to; returns losses and samples. Sources: Williams,
"Simple statistical gradient-following algorithms", 1992; Jang, Gu & Poole, and Maddison, Mnih & Teh, ICLR 2017 (for two
outcomes the Gumbel noise becomes logistic); Bengio, Leonard & Courville, 2013 (straight-through).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 0.67  # of Gumbel gates: what Maddison et al. found best for two outcomes


def sample(logits: Tensor) -> Tensor:
    """Open each gate with probability sigmoid(logit)."""
    return (torch.rand_like(logits) < torch.sigmoid(logits.detach())).to(logits.dtype)


def straight_through(logits: Tensor) -> Tensor:
    """Open gates as `sample` does; backward as if they were the sigmoid of the noisy logit."""
    noise = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
    noisy = logits + torch.log(noise) - torch.log1p(-noise)
    soft = torch.sigmoid(noisy / TEMPERATURE)
    return (noisy > 0).to(logits.dtype) + soft - soft.detach()


def reinforce(logits: list[Tensor], opened: list[Tensor], advantage: Tensor) -> Tensor:
    """Loss whose gradient is the policy gradient: minus the advantage times the log-probability of what was opened.

    logits, opened: per gate, (batch, units). advantage: (batch,), how much better than expected the outcome was; not
    followed backward.
    """
    likelihood = sum(
        -F.binary_cross_entropy_with_logits(own, choice.detach(), reduction="none").sum(1)
        for own, choice in zip(logits, opened)
    )
    return -(advantage.detach() * likelihood).mean()


def leave_one_out(logits: Sequence[list[Tensor]], opened: Sequence[list[Tensor]], losses: Sequence[Tensor]) -> Tensor:
    """`reinforce` of two samples of the same images, each the baseline of the other: the mean of both losses.

    The other sample says how hard an image is with as much closed, and does not depend on what this one drew, so the
    estimate stays unbiased (Kool, van Hoof & Welling, 2019). logits, opened: per sample and gate, (batch, units);
    losses: per sample, (batch,).
    """
    gap = losses[1] - losses[0]
    return (reinforce(logits[0], opened[0], gap) + reinforce(logits[1], opened[1], -gap)) / 2


def entropy(logits: list[Tensor]) -> Tensor:
    """Mean entropy of the gates, in nats."""
    every = torch.cat([own.reshape(-1) for own in logits])
    return F.binary_cross_entropy_with_logits(every, torch.sigmoid(every))
