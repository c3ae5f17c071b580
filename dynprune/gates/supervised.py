"""Gates that are told what to open: what each unit is worth to the loss of each image, per multiply-accumulate.

With every gate open, the loss of an image changes with a gate by the sum of activation times gradient behind it: to
first order what closing it would cost (Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019,
there over many images). Those units of a batch that are worth most are its answers, as many as the cost allows, over
all images: one that needs more gets more. Predictors learn these answers as a classification; that of true activations
of a network as it was is Li et al., "Fire Together Wire Together", CVPR 2022.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dynprune.gates.gating import Choices, GatedNetwork, Site, statistics_kept

HALVINGS = 14  # of the rank up to which units open: one in 16,000 of them


def worth(model: GatedNetwork, images: Tensor, losses: Callable[[object], Tensor]) -> tuple[Choices, list[Tensor]]:
    """What was decided (everything is open), and what each unit is worth to each image, per gate (batch, units).

    losses: the network's output to the loss of each image, (batch,).
    """
    opened: list[Tensor] = []

    def all_open(scores: Tensor, _site: Site) -> Tensor:
        opened.append(torch.ones_like(scores).requires_grad_())
        return opened[-1]

    with torch.enable_grad(), statistics_kept(model):
        output, choices = model.run(images, all_open)
        gradients = torch.autograd.grad(losses(output).sum(), opened, allow_unused=True)
    every_unit = torch.cat(
        [torch.zeros_like(own) if gradient is None else gradient.abs() for own, gradient in zip(opened, gradients)], 1
    )
    return choices, list(every_unit.split([len(gate.sizes) for gate in choices.gates], 1))


def unit_costs(model: GatedNetwork, choices: Choices) -> list[Tensor]:
    """What one more open unit adds to the share of an image that opens everything, per gate (units,)."""
    units = [torch.ones(1, len(gate.sizes), dtype=torch.float64, requires_grad=True) for gate in choices.gates]
    with torch.enable_grad():
        gradients = torch.autograd.grad(model.executed_share(choices, units).sum(), units)
    return [own[0].clamp(min=1e-12) for own in gradients]


@torch.no_grad()
def answers(model: GatedNetwork, choices: Choices, by_gate: list[Tensor], share: float) -> list[Tensor]:
    """Which units of which images to open, per gate (batch, units) of 0 and 1: those worth most for what they cost, as
    many as keep the mean share."""
    per_cost = [own.double().cpu() / cost for own, cost in zip(by_gate, unit_costs(model, choices))]
    order = torch.cat([own.flatten() for own in per_cost]).sort(descending=True).values

    def opened(count: int) -> list[Tensor]:
        least = order[min(count, len(order)) - 1] if count else torch.tensor(torch.inf)
        return [(own >= least).float() for own in per_cost]

    low, high = 0, len(order)
    for _ in range(HALVINGS):
        if low >= high:
            break
        middle = (low + high + 1) // 2
        within = float(model.executed_share(choices, opened(middle)).mean()) <= share
        low, high = (middle, high) if within else (low, middle - 1)
    return [own.to(given.device) for own, given in zip(opened(low), by_gate)]


def loss(logits: list[Tensor], wanted: list[Tensor]) -> Tensor:
    """Mean cross-entropy of the gates with their answers; both per gate, (batch, units)."""
    return F.binary_cross_entropy_with_logits(torch.cat(logits, 1), torch.cat(wanted, 1))
