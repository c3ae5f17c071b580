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

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynprune.errors import DynpruneError
from dynprune.repair.following import follow
from dynprune.repair.patches import (
    Layer,
    by_position,
    explains,
    groups_of,
    layer_at,
    matrix_of,
    patches,
    positions_of,
    size_of,
)
from dynprune.repair.shares import WHOLE, Share
from dynprune.state.copies import generator

ROWS, ROWS_PER_COLUMN = 4096, 16  # places of a layer's output that are looked at: so many, and for wide layers more
MOST_ROWS = 16384  # but for those with so many columns that this is not three for each
LEAST_ROWS, MOST_NUMBERS = 4, 2**25  # rows for each column at least; numbers in the patches of a grouped layer at most
MOST_COLUMNS = 8192  # of a Gram matrix; beyond, columns count as independent


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
    layer: Layer, images: int, positions: int, seed: int, scale: float = 1.0, share: Share = WHOLE
) -> Tensor:
    """Sorted numbers (image * positions + position) of the places that are looked at, as many of every image.

    images: of this process. scale: of how many there are, for a quicker look.
    """
    columns = matrix_of(layer).shape[1] + 1
    most = min(max(ROWS, ROWS_PER_COLUMN * columns), max(MOST_ROWS, 3 * columns))
    wanted = scale * min(most, max(LEAST_ROWS * columns, MOST_NUMBERS // (groups_of(layer) * columns)))
    every = images * share.count
    each = min(positions, max(1, math.ceil(wanted / every)))
    if each == positions:
        return torch.arange(images * positions)
    chance = share.own(torch.rand(every, positions, generator=generator(seed, every, positions)))
    place = chance.topk(each, dim=1).indices.sort(dim=1).values
    return (place + torch.arange(images)[:, None] * positions).reshape(-1)


def own_loss(output: Tensor, seed: int, share: Share = WHOLE) -> Tensor:
    """A loss whose gradients, squared and averaged, say how much every output matters, summed over images.

    Of class scores (images, classes): cross-entropy with a class drawn from them. Of other outputs: a random
    projection, as of a squared error.
    """
    if output.ndim == 2 and output.shape[1] > 1:
        chance = torch.empty(len(output) * share.count, output.shape[1]).exponential_(generator=generator(seed))
        drawn = (output.detach().softmax(1) / share.own(chance).to(output.device)).argmax(1)
        return F.cross_entropy(output, drawn, reduction="sum")
    shape = (len(output) * share.count, *output.shape[1:])
    return (output * share.own(torch.randn(shape, generator=generator(seed))).to(output)).sum()


def calibrate(
    model: nn.Module,
    batches: Iterable[Tensor],
    scores: Callable[[object], Tensor],
    *,
    seed: int = 0,
    share: Share = WHOLE,
) -> Calibration:
    """Moments of every layer that runs once and is a plain product of its input with its weight.

    model: in eval mode; it stays as it is. batches: of inputs, (images, ...), this process's share of them. scores: the
    tensor in the model's output that matters.
    """
    batches = list(batches)
    result = Calibration({}, {})
    with ExitStack() as context:
        for parameter in model.parameters():
            context.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)
        images = sum(map(len, batches))
        for name in follow(model, (batches[0][:2],)):
            layer = layer_at(model, name)
            context.callback(layer.register_forward_hook(watching(name, result, seed, images, share)).remove)
        for number, inputs in enumerate(batches):
            with torch.enable_grad():
                own_loss(scores(model(inputs.detach().requires_grad_(True))), seed + number, share).backward()
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


def watching(name: str, result: Calibration, seed: int, images: int, share: Share) -> Callable:
    """The hook that adds what one layer reads and the gradients of what it says; `images` will come in all."""

    def hook(layer: Layer, inputs: tuple, output: Tensor) -> None:
        if name in result.left:
            return
        x, groups = inputs[0].detach(), groups_of(layer)
        at = sample_rows(layer, len(x), positions_of(layer, output), seed, len(x) / images, share).to(x.device)
        if name not in result.moments and not share.everywhere(explains(layer, x, output.detach(), at[:256]), x.device):
            result.left[name] = "says something else than the product of its input with its weight"
            return
        rows = patches(layer, x, size_of(layer, output), at)
        rows = torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], dim=2)
        squares = rows.transpose(1, 2) @ rows if rows.shape[2] <= MOST_COLUMNS else rows.square().sum(1)
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
