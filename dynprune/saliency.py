"""Reward of each executed arm, from the gradients that a training step has anyway.

Takes the active model after `backward`, returns one number per slot: the first-order estimate of the change in loss if
the arm were removed, |sum over its own parameters of value * gradient| (Molchanov et al. 2017, 2019). For BatchNorm with
weight g and bias b that sum equals sum(activation * gradient) over the batch, and for a convolution or linear layer the sum
over an output channel's weights and bias does: exact identities, so no activation has to be kept.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dynprune.labels import AxisKey


def taylor(parameters: Mapping[str, Tensor], places: Mapping[AxisKey, Tensor]) -> Tensor:
    """|sum of value * gradient| of each slot of a group, shape (width,), float32.

    parameters: the active model's, by name, with their gradients. places: per axis that makes or scales the group's
    channels, the positions of each slot, int64 of shape (width, multiplicity). A parameter without gradient counts 0.
    """
    total: Tensor | None = None
    for (name, dim), positions in places.items():
        value = parameters[name]
        product = torch.zeros_like(value) if value.grad is None else value.detach() * value.grad
        others = [d for d in range(product.ndim) if d != dim]
        along = product.sum(others) if others else product
        part = along[positions].sum(1)
        total = part if total is None else total + part
    assert total is not None, "a group has at least one axis that makes its channels"
    return total.abs().float()


def normalise(saliency: Tensor) -> Tensor:
    """Rewards in [0, 1]: each saliency over the largest in its group in this step; all 0 if every saliency is 0."""
    return saliency / saliency.max().clamp(min=torch.finfo(saliency.dtype).tiny)
