"""How gates learn from what they decided: REINFORCE and straight-through Gumbel, as functions on tensors.

Takes logits of Bernoulli gates, what was opened, and what it led to; returns losses and samples. Sources: Williams,
"Simple statistical gradient-following algorithms", 1992; Jang, Gu & Poole, and Maddison, Mnih & Teh, ICLR 2017 (for two
outcomes the Gumbel noise becomes logistic); Bengio, Leonard & Courville, 2013 (straight-through).
"""

from __future__ import annotations

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


def advantage_over(loss: Tensor, baseline: Tensor) -> Tensor:
    """How much less each image lost than expected: (batch,). baseline: its loss with every gate open, which no gate
    influences, so that the estimate stays unbiased; the mean gap between the two is taken off as well."""
    gap = loss - baseline
    return gap.mean() - gap


def entropy(logits: list[Tensor]) -> Tensor:
    """Mean entropy of the gates, in nats."""
    every = torch.cat([own.reshape(-1) for own in logits])
    return F.binary_cross_entropy_with_logits(every, torch.sigmoid(every))
