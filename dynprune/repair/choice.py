"""Which arms to give up: those whose absence the rest can make up for.

Takes the moments of a trained network's layers; returns, per group, the order in which arms go and the loss that each
then costs. That is what remains after every layer that reads the arm has been refitted to say the same with what stays:

    ½ tr(S W_a ((A⁻¹)_aa)⁻¹ W_aᵀ)

with A the Gram matrix of the reader's inputs, S that of its output's gradients, W_a the weights that read the arm. Then
A⁻¹ and W are updated, and the next arm goes. It is the optimal brain surgeon (Hassibi & Stork, 1993) on Kronecker
factors, for whole arms; several readers add up (ours).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dynprune.execution.saliency import magnitude
from dynprune.repair.calibration import Calibration, Moments
from dynprune.repair.patches import Conv, Layer, groups_of, layer_at, matrix_of
from dynprune.state.copies import generator
from dynprune.structure.channels import ChannelGraph

DAMPING = 0.01  # of A's mean diagonal, added to it
STEPS = 32  # in which a group's arms go; a wide one loses several at once
SHRINK = 0.8  # share of a group's arms at which what is known of those that are gone is dropped
CHOICES = ("repairable", "magnitude", "random")


@dataclass(frozen=True)
class Order:
    """arms: of one group, from the first to go to the last, int64. losses: what each costs when it goes, as the
    criterion counts it."""

    arms: np.ndarray
    losses: np.ndarray

    def kept(self, width: int) -> np.ndarray:
        """The sorted arms that stay at a width."""
        return np.sort(self.arms[len(self.arms) - width :])


@dataclass
class Reader:
    """A layer that reads one group's arms, as far as it reads them; changes as arms go. inverse: the part of A⁻¹ that
    belongs to the group, (columns, columns). weights: the layer's, times a root of S, (channels, columns). columns: of
    every arm, (arms, columns of an arm)."""

    inverse: Tensor
    weights: Tensor
    columns: Tensor

    def losses(self, arms: Tensor) -> Tensor:
        """What each of these arms costs if it alone goes, (arms,)."""
        own = self.columns[arms]
        weights = self.weights[:, own].permute(1, 2, 0)
        blocks = self.inverse[own[:, :, None], own[:, None, :]]
        return 0.5 * (torch.linalg.inv(blocks) * (weights @ weights.transpose(1, 2))).sum((1, 2))

    def remove(self, arms: Tensor) -> None:
        own = self.columns[arms].reshape(-1)
        rows = self.inverse[own]
        factor = torch.linalg.solve(rows[:, own], rows)
        self.weights -= self.weights[:, own] @ factor
        self.inverse -= rows.T @ factor

    def forget_all_but(self, arms: Tensor) -> None:
        """Drop the columns of arms that are gone: what is left is updated the quicker."""
        places = self.columns[arms].reshape(-1)
        self.inverse, self.weights = self.inverse[places][:, places], self.weights[:, places]
        columns = torch.full_like(self.columns, -1)
        columns[arms] = torch.arange(len(places)).view(len(arms), -1)
        self.columns = columns


@dataclass
class LooseReader:
    """A layer with so many columns that they count as independent: nothing makes up for an arm. each: ½ Σ A_jj W_jᵀ S
    W_j of every arm, (arms,)."""

    each: Tensor

    def losses(self, arms: Tensor) -> Tensor:
        return self.each[arms]

    def remove(self, arms: Tensor) -> None:
        pass

    def forget_all_but(self, arms: Tensor) -> None:
        pass


def orders(
    model: nn.Module, graph: ChannelGraph, calibration: Calibration, choice: str = "repairable", seed: int = 0
) -> dict[str, Order]:
    """The order of arms of every group. Where no layer with moments reads a group, the largest stay.

    choice: repairable, magnitude, or random (to compare with).
    """
    size = magnitude(dict(model.named_parameters()), graph)
    if choice == "random":
        size = {
            name: torch.rand(len(own), generator=generator(seed, number), dtype=torch.float64)
            for number, (name, own) in enumerate(size.items())
        }
    by_size = {name: Order(own.argsort().numpy(), own.sort().values.numpy()) for name, own in size.items()}
    if choice != "repairable":
        return by_size
    readers = readers_of(model, graph, calibration)
    return {
        group.name: order_of(group.arms, readers[group.name]) if readers[group.name] else by_size[group.name]
        for group in graph
    }


def order_of(arms: int, readers: list[Reader | LooseReader]) -> Order:
    """Arms one after another, the cheapest first."""
    left, order, costs, held = torch.arange(arms), [], [], arms
    while len(left):
        if len(left) < SHRINK * held:
            held = len(left)
            for reader in readers:
                reader.forget_all_but(left)
        losses = torch.stack([reader.losses(left) for reader in readers]).sum(0)
        going = losses.argsort(stable=True)[: max(1, arms // STEPS)]
        order += left[going].tolist()
        costs += losses[going].tolist()
        if len(going) < len(left):
            for reader in readers:
                reader.remove(left[going])
        stays = torch.ones(len(left), dtype=torch.bool)
        stays[going] = False
        left = left[stays]
    return Order(np.array(order), np.array(costs))


def readers_of(
    model: nn.Module, graph: ChannelGraph, calibration: Calibration
) -> dict[str, list[Reader | LooseReader]]:
    """Per group, the layers that read its arms; each layer's Gram matrix is inverted once."""
    by_layer: dict[str, list[str]] = {}
    for group in graph:
        for tensor, dim in group.reads:
            layer = tensor.removesuffix(".weight")
            if layer in calibration.moments and layer != tensor and dim == input_dim(layer_at(model, layer)):
                by_layer.setdefault(layer, []).append(group.name)
    readers: dict[str, list[Reader | LooseReader]] = {name: [] for name in graph.groups}
    for layer, names in by_layer.items():
        module = layer_at(model, layer)
        for number in range(groups_of(module)):
            columns = {
                name: columns_of(module, graph.groups[name].members[f"{layer}.weight", input_dim(module)], number)
                for name in dict.fromkeys(names)
            }
            read(
                module, calibration.moments[layer], number, {k: v for k, v in columns.items() if v is not None}, readers
            )
    return readers


def read(layer: Layer, moments: Moments, number: int, columns: Mapping[str, Tensor], readers: dict[str, list]) -> None:
    """Add one group of a layer's filters to the readers of the groups whose arms it reads, with their columns."""
    if not columns:
        return
    weights, root = matrix_of(layer)[number].T.double().cpu(), root_of(moments.gradients[number])
    gram = moments.inputs[number].double().cpu()
    if gram.ndim == 1:
        each = 0.5 * gram[:-1] * (root @ weights).square().sum(0)
        for name, own in columns.items():
            readers[name].append(LooseReader(each[own].sum(1)))
        return
    inverse = torch.cholesky_inverse(factor(gram, DAMPING)).float()  # what is updated many times is in float32
    weights = (root @ weights).float()
    for name, own in columns.items():
        places = own.reshape(-1)
        readers[name].append(
            Reader(inverse[places][:, places], weights[:, places], torch.arange(len(places)).view(own.shape))
        )


def root_of(gradients: Tensor) -> Tensor:
    """Lᵀ with S = L Lᵀ; a little is added to S, which need not have full rank."""
    return factor(gradients.double().cpu(), 1e-6).T


def factor(matrix: Tensor, share: float) -> Tensor:
    """The Cholesky factor of a Gram matrix with this share of its mean diagonal added to the diagonal; more where sums
    in float32 have left it with negative eigenvalues."""
    mean = matrix.diagonal().mean().clamp(min=1e-30)
    assert matrix.isfinite().all()  # or no share would ever be enough
    while True:
        found, failed = torch.linalg.cholesky_ex(matrix + share * mean * torch.eye(len(matrix), dtype=matrix.dtype))
        if not failed:
            return found
        share *= 10


def input_dim(layer: Layer) -> int:
    return 0 if isinstance(layer, Conv) and layer.transposed else 1


def columns_of(layer: Layer, positions: np.ndarray, number: int) -> Tensor | None:
    """Columns of `matrix_of(layer)[number]` that read each arm, (arms, columns); None where that part reads none.

    positions: of every arm along the weight's input dimension, (arms, multiplicity).
    """
    channels = layer.weight.shape[input_dim(layer)] // (groups_of(layer) if input_dim(layer) == 0 else 1)
    taps = matrix_of(layer).shape[1] // channels
    own = torch.from_numpy(positions)
    if input_dim(layer) == 0:  # a transposed convolution holds the inputs of all its groups there
        inside = own // channels == number
        counts = inside.sum(1)
        if not counts[0] or (counts != counts[0]).any():
            return None
        own = (own[inside] % channels).view(len(own), -1)
    return (own[:, :, None] * taps + torch.arange(taps)).flatten(1)
