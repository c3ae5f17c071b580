"""Reward of each executed arm, from the gradients that a training step has anyway.

Takes the active model after `backward`, returns one number per slot: the first-order estimate of the change in loss if
the arm were removed, |sum over its own parameters of value * gradient| (Molchanov et al. 2017, 2019). For BatchNorm
with weight g and bias b that sum equals sum(activation * gradient) over the batch, and for a convolution or linear
layer the sum over an output channel's weights and bias does: exact identities, so no activation has to be kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dynprune.structure.channels import ChannelGraph
from dynprune.structure.record import AxisKey


@dataclass(frozen=True)
class Ledger:
    """Where the entries lie whose value * gradient is an arm's saliency, prepared once for all groups of a run.

    Groups whose arms are scaled by a norm need only their one-dimensional parameters: before a norm, a filter's own sum
    is zero (its scale does not matter). Those of all groups are added up by one indexed sum; filters, where there is no
    norm, one by one.
    vectors, slots: names of one-dimensional parameters, and the slot of each of their entries (`total` for entries of
    no group).
    filters: (name, dimension, positions, first slot) of the others. first: each group's first slot; group: the group of
    each slot.
    """

    vectors: list[str]
    slots: Tensor
    filters: list[tuple[str, int, Tensor, int]]
    first: dict[str, int]
    group: Tensor
    total: int


def prepare(
    shapes: Mapping[str, torch.Size],
    places: Mapping[str, Mapping[AxisKey, np.ndarray]],
    made: Mapping[str, tuple[AxisKey, ...]],
    device: torch.device | str,
) -> Ledger:
    """shapes: of the active model's parameters. places: per group and axis, the positions of each slot, (width,
    multiplicity).
    made: per group, the axes along which parameters produce or scale its channels."""
    first, total, owners = {}, 0, []
    slots_of: dict[str, np.ndarray] = {}
    filters = []
    for number, (name, axes) in enumerate(places.items()):
        width = len(next(iter(axes.values())))
        first[name] = total
        own = [key for key in made[name] if key in axes]
        scaled = any(len(shapes[tensor]) == 1 and tensor.endswith("weight") for tensor, _ in own)
        for tensor, dim in own:
            if len(shapes[tensor]) == 1:
                slots = slots_of.setdefault(tensor, np.full(shapes[tensor][0], -1))
                slots[axes[tensor, dim]] = total + np.arange(width)[:, None]
            elif not scaled:
                filters.append((tensor, dim, torch.from_numpy(axes[tensor, dim]).to(device), total))
        owners.append(np.full(width, number))
        total += width
    slots = np.concatenate([*slots_of.values(), np.zeros(0, dtype=np.int64)])
    group = np.concatenate([*owners, np.zeros(0, dtype=np.int64)])
    return Ledger(
        list(slots_of),
        torch.from_numpy(np.where(slots < 0, total, slots)).to(device),
        filters,
        first,
        torch.from_numpy(group).to(device),
        total,
    )


def taylor(parameters: Mapping[str, Tensor], ledger: Ledger) -> Tensor:
    """|sum of value * gradient| of every slot of every group, float32 of shape (total,), whatever the parameters'
    precision.

    parameters: the active model's, by name, with their gradients. A parameter without gradient counts 0.
    """
    device = ledger.group.device
    total = torch.zeros(ledger.total + 1, device=device)
    values = [parameters[name] for name in ledger.vectors]
    if values:
        products = torch._foreach_mul(
            [v.detach() for v in values], [torch.zeros_like(v) if v.grad is None else v.grad for v in values]
        )
        total.index_add_(0, ledger.slots, torch.cat(products).float())
    for name, dim, positions, first in ledger.filters:
        value = parameters[name]
        if value.grad is not None:
            along = (value.detach() * value.grad).sum([d for d in range(value.ndim) if d != dim]).float()
            total[first : first + len(positions)] += along[positions].sum(1)
    return total[:-1].abs()


@torch.no_grad()
def magnitude(parameters: Mapping[str, Tensor], graph: ChannelGraph) -> dict[str, Tensor]:
    """How large the weights are that belong to each arm, those that make it and those that read it: per group, float64
    of shape (arms,).

    Of each tensor the squares along the arm are summed and divided by their mean over the group's arms, so that large
    tensors do not decide alone; then the mean over tensors is taken. What a trained network says of its channels
    without any data (Li et al. 2017; over groups, Fang et al. 2023).
    """
    found = {}
    for group in graph:
        shares = []
        for (tensor, dim), positions in group.members.items():
            if tensor in parameters:
                value = parameters[tensor].detach().double().cpu()
                squares = (
                    value.square()
                    .movedim(dim, 0)
                    .reshape(value.shape[dim], -1)
                    .sum(1)[torch.from_numpy(positions)]
                    .sum(1)
                )
                shares.append(squares / squares.mean().clamp(min=1e-30))
        found[group.name] = torch.stack(shares).mean(0) if shares else torch.zeros(group.arms, dtype=torch.float64)
    return found


def normalise(saliency: Tensor, ledger: Ledger) -> Tensor:
    """Rewards in [0, 1]: each saliency over the largest in its group in this step; all 0 if every saliency is 0."""
    groups = len(ledger.first)
    largest = torch.zeros(groups, device=saliency.device).scatter_reduce_(0, ledger.group, saliency, "amax")
    return saliency / largest.clamp(min=torch.finfo(saliency.dtype).tiny)[ledger.group]
