"""What a trained network's layers read, and how much it matters what they say.

Takes the untouched network and batches of inputs; returns per layer two Gram matrices: of its input patches, and of the
loss's gradients at its output. Nothing else is kept, so what this takes depends on the network and not on the number of
images. The loss needs no labels: classes are drawn from the network's own scores, so that the gradients' Gram matrix is
the Fisher information's factor (Martens & Grosse, 2015; for convolutions Grosse & Martens, 2016).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dynprune.errors import DynpruneError
from dynprune.repair.examples import count_of
from dynprune.repair.following import listen
from dynprune.repair.patches import (
    Layer,
    by_position,
    explains,
    gram_of,
    groups_of,
    layer_at,
    matrix_of,
    patches,
    positions_of,
    size_of,
)
from dynprune.repair.says import SCORES, Says, own_loss
from dynprune.repair.shares import WHOLE, Share
from dynprune.state.copies import generator
from dynprune.structure import calling
from dynprune.structure.labels import tensors_in

ROWS, ROWS_PER_COLUMN = 4096, 16  # places of a layer's output that are looked at: so many, and for wide layers more
MOST_ROWS = 16384  # but for those with so many columns that this is not three for each
LEAST_ROWS, MOST_NUMBERS = 4, 2**25  # rows for each column at least; numbers in the patches of a grouped layer at most
WIDE, WIDE_SHARE = 1024, 0.5  # columns beyond which moments take so much of these rows: they cost columns squared
MOST_COLUMNS = 8192  # of a Gram matrix; beyond, columns count as independent
MORE, WORK = 8, 2**33  # a thorough look: so many times as many places where a Gram matrix takes no more products


@dataclass
class Moments:
    """Of one layer. inputs: mean of u uᵀ over places, u a patch with a 1 appended, (groups, columns + 1, columns + 1);
    of layers with more than MOST_COLUMNS columns only the diagonal, (groups, columns + 1). gradients: sum of g gᵀ over
    places, mean over images, g the loss's gradient at the output, (groups, channels, channels)."""

    inputs: Tensor
    gradients: Tensor
    rows: int = 0


@dataclass
class Calibration:
    """moments: of every layer that is a plain product. left: the other layers, and why."""

    moments: dict[str, Moments]
    left: dict[str, str]


def sample_rows(
    layer: Layer,
    images: int,
    positions: int,
    seed: int,
    scale: float = 1.0,
    share: Share = WHOLE,
    thorough: bool = False,
) -> Tensor:
    """Sorted numbers (image * positions + position) of the places that are looked at, as many of every image.

    images: of this process. scale: of how many there are, for a quicker look. thorough: more where they cost little.
    """
    groups, columns = groups_of(layer), matrix_of(layer).shape[1] + 1
    most = min(max(ROWS, ROWS_PER_COLUMN * columns), max(MOST_ROWS, 3 * columns))
    fit = MOST_NUMBERS // (groups * columns)
    wanted = scale * min(most, max(LEAST_ROWS * columns, fit))
    if thorough:
        wanted = max(wanted, min(MORE * wanted, fit, WORK / (groups * columns**2)))
    every = images * share.count
    each = min(positions, max(1, math.ceil(wanted / every)))
    if each == positions:
        return torch.arange(images * positions)
    chance = share.own(torch.rand(every, positions, generator=generator(seed, every, positions)))
    place = chance.topk(each, dim=1).indices.sort(dim=1).values
    return (place + torch.arange(images)[:, None] * positions).reshape(-1)


def calibrate(
    model: nn.Module,
    batches: Iterable[tuple],
    says: Says = SCORES,
    *,
    few: tuple | None = None,
    listed: bool = False,
    seed: int = 0,
    share: Share = WHOLE,
) -> Calibration:
    """Moments of every layer that runs once and is a plain product of its input with its weight.

    model: in eval mode; it stays as it is. batches: arguments of calls, this process's share of the examples. says:
    what of its answers matters. few: a small call, the first batch if there is none. listed: see `Reader.listed`.
    """
    batches = list(batches)
    result = Calibration({}, {})
    with ExitStack() as context:
        for parameter in model.parameters():
            context.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(not differentiable(batches[0]))
        images = sum(count_of(batch, listed) for batch in batches)
        few = few or batches[0]
        story = listen(model, few, partial(calling.call, model, few))
        result.left |= story.left()
        for name in story.ran.keys() - result.left.keys():
            layer = layer_at(model, name)
            context.callback(layer.register_forward_hook(watching(name, result, seed, images, share)).remove)
        for number, inputs in enumerate(batches):
            with torch.enable_grad():
                given = with_gradient(inputs)
                said, _ = says.of(model, partial(calling.call, inputs=given))
                own_loss(said, seed + number, share, scores=says.scores).backward()
        for parameter in model.parameters():
            parameter.grad = None
    for moments in result.moments.values():
        moments.inputs = share.total(moments.inputs) / max(1, moments.rows * share.count)
        moments.gradients = share.total(moments.gradients) / (images * share.count)
    for name, moments in result.moments.items():
        if not (moments.inputs.isfinite().all() and moments.gradients.isfinite().all()):
            raise DynpruneError(
                f"On the calibration images, what {name} reads or its gradient is not finite. Expected a network that "
                "computes finite numbers on these images: are they normalised as it was trained?"
            )
    return result


def differentiable(inputs: object) -> bool:
    """Whether gradients can reach the inputs; where they are whole numbers, parameters must ask for them."""
    return any(value.is_floating_point() for value in tensors_in(inputs))


def with_gradient(inputs: Any) -> Any:
    """The same arguments, of which gradients are wanted."""
    if isinstance(inputs, Tensor):
        return inputs.detach().requires_grad_(True) if inputs.is_floating_point() else inputs
    if isinstance(inputs, dict):
        return {key: with_gradient(own) for key, own in inputs.items()}
    if isinstance(inputs, tuple | list):
        return type(inputs)(with_gradient(own) for own in inputs)
    return inputs


def watching(name: str, result: Calibration, seed: int, images: int, share: Share) -> Callable:
    """The hook that adds what one layer reads and the gradients of what it says; `images` will come in all."""

    def hook(layer: Layer, inputs: tuple, output: Tensor) -> None:
        if name in result.left:
            return
        x, groups = inputs[0].detach(), groups_of(layer)
        scale = len(x) / images * (WIDE_SHARE if matrix_of(layer).shape[1] > WIDE else 1)
        at = sample_rows(layer, len(x), positions_of(layer, output), seed, scale, share).to(x.device)
        if name not in result.moments and not share.everywhere(explains(layer, x, output.detach(), at[:256]), x.device):
            result.left[name] = "says something else than the product of its input with its weight"
            return
        rows = patches(layer, x, size_of(layer, output), at)
        rows = torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], dim=2)
        squares = gram_of(rows) if rows.shape[2] <= MOST_COLUMNS else rows.square().sum(1)
        if name not in result.moments:
            channels = matrix_of(layer).shape[2]
            result.moments[name] = Moments(torch.zeros_like(squares), x.new_zeros(groups, channels, channels))
        own = result.moments[name]
        own.inputs += squares
        own.rows += rows.shape[1]

        def backward(gradient: Tensor) -> None:
            by_group = by_position(layer, gradient).unflatten(1, (groups, -1)).movedim(1, 0)
            own.gradients += by_group.transpose(1, 2) @ by_group

        if output.requires_grad:
            output.register_hook(backward)

    return hook
