"""A convolution or linear layer as a matrix product: rows of input, one matrix of weights.

Takes a layer, what it was given, and which of its output's positions are wanted; returns the input patches behind these
positions, so that `patches @ matrix + bias` is what the layer says there. Grouped and depthwise convolutions are one
product per group. A few thousand positions serve for a fit, so no unfolded activation is ever held.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Conv = nn.modules.conv._ConvNd
Layer = nn.Linear | Conv
BLOCK = 512  # columns of a Gram matrix that are multiplied at a time
SCALED = 1e-3  # of the largest output: a layer that differs more from its matrix product does something of its own


def is_layer(module: nn.Module) -> bool:
    """Whether the module multiplies its input with one weight of its own."""
    return isinstance(module, Layer) and isinstance(module._parameters.get("weight"), nn.Parameter)


def layer_at(model: nn.Module, name: str) -> Layer:
    """The layer of this name, which is one."""
    layer = model.get_submodule(name)
    assert isinstance(layer, Layer), name
    return layer


def groups_of(layer: Layer) -> int:
    return 1 if isinstance(layer, nn.Linear) else layer.groups


def matrix_of(layer: Layer, weight: Tensor | None = None) -> Tensor:
    """The weight as (groups, inputs of a group, outputs of a group); an input is a channel at a place of the kernel."""
    weight = layer.weight.detach() if weight is None else weight
    if isinstance(layer, nn.Linear):
        return weight.t()[None]
    groups = layer.groups
    if layer.transposed:
        return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1).permute(0, 1, 3, 2).flatten(1, 2)
    return weight.reshape(groups, weight.shape[0] // groups, -1).transpose(1, 2)


def gram_of(rows: Tensor) -> Tensor:
    """rowsᵀ rows of every group, (groups, columns, columns). rows: (groups, places, columns). Of wide ones the half
    below the diagonal is mirrored, not multiplied."""
    columns = rows.shape[2]
    if columns < 2 * BLOCK:
        return rows.transpose(1, 2) @ rows
    gram = rows.new_empty(rows.shape[0], columns, columns)
    for start in range(0, columns, BLOCK):
        own = slice(start, min(start + BLOCK, columns))
        gram[:, own, start:] = rows[:, :, own].transpose(1, 2) @ rows[:, :, start:]
        gram[:, own.stop :, own] = gram[:, own, own.stop :].transpose(1, 2)
    return gram


def weight_from(layer: Layer, matrix: Tensor) -> Tensor:
    """The inverse of `matrix_of`: a tensor of the weight's shape."""
    shape = layer.weight.shape
    if isinstance(layer, nn.Linear):
        return matrix[0].t()
    if layer.transposed:
        taps = math.prod(shape[2:])
        return matrix.unflatten(1, (-1, taps)).permute(0, 1, 3, 2).reshape(shape)
    return matrix.transpose(1, 2).reshape(shape)


def by_position(layer: Layer, values: Tensor) -> Tensor:
    """The layer's output, or anything of its shape, as rows: (examples * positions, channels)."""
    if isinstance(layer, nn.Linear):
        return values.reshape(-1, values.shape[-1])
    return values.movedim(1, -1).reshape(-1, values.shape[1])


def rows_of(layer: Layer, values: Tensor, at: Tensor) -> Tensor:
    """Some rows of `by_position`, without making the others: (rows, channels)."""
    if isinstance(layer, nn.Linear) or values.movedim(1, -1).is_contiguous():
        return by_position(layer, values).index_select(0, at)
    values = values.flatten(2)
    return values[at // values.shape[2], :, at % values.shape[2]]


def size_of(layer: Layer, output: Tensor) -> tuple[int, ...]:
    """Of the output behind its channels; empty for a linear layer."""
    return () if isinstance(layer, nn.Linear) else tuple(output.shape[2:])


def positions_of(layer: Layer, output: Tensor) -> int:
    """Places at which one example's output is computed."""
    return math.prod(output.shape[1:-1]) if isinstance(layer, nn.Linear) else math.prod(output.shape[2:])


def patches(layer: Layer, x: Tensor, size: Sequence[int], at: Tensor) -> Tensor:
    """What the layer multiplies at the given places of its output.

    x: the layer's input, with a batch dimension. size: of the output behind its channels (empty for a linear layer).
    at: int64, numbers of rows as `by_position` counts them. Returns (groups, rows, inputs of a group).
    """
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1]).index_select(0, at)[None]
    places, inside, x = read_places(layer, x, size)
    channels, taps = x.shape[1], places.shape[1]
    positions, inputs = math.prod(size), math.prod(x.shape[2:])
    position = at % positions
    if x.movedim(1, -1).is_contiguous():
        flat = x.movedim(1, -1).reshape(-1, channels)
        rows = flat.index_select(0, (places[position] + (at // positions * inputs)[:, None]).reshape(-1))
        rows = rows.view(len(at), taps, channels)
    else:
        rows = x.flatten(2)[(at // positions)[:, None], :, places[position]]
    if inside is not None:
        rows = rows * inside[position][:, :, None]
    rows = rows.view(len(at), taps, layer.groups, -1).permute(2, 0, 3, 1).flatten(2)
    return rows.contiguous()  # or every group would be copied at each product


def read_places(layer: Conv, x: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor | None, Tensor]:
    """Which places of the (padded) input each output position reads, (positions, taps); which of them lie inside it
    (None: all do); and that input."""
    kernel, dims = layer.kernel_size, len(size)
    if not layer.transposed:
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    total, valid = torch.zeros(1, 1, dtype=torch.int64), None
    for d in range(dims):
        out, tap = torch.arange(size[d])[:, None], torch.arange(kernel[d])[None]
        if layer.transposed:  # an output gathers from inputs whose stride meets it
            assert not isinstance(layer.padding, str)  # words are for other convolutions
            reach = out + layer.padding[d] - tap * layer.dilation[d]
            place = reach.div(layer.stride[d], rounding_mode="floor")
            fits = (reach % layer.stride[d] == 0) & (place >= 0) & (place < x.shape[2 + d])
            place = place.clamp(0, x.shape[2 + d] - 1)
        else:
            place, fits = out * layer.stride[d] + tap * layer.dilation[d], None
        # (positions so far, taps so far) x (positions, taps) along this dimension
        total = (total[:, None, :, None] * x.shape[2 + d] + place[None, :, None, :]).flatten(2).flatten(0, 1)
        if fits is not None:
            valid = (
                fits if valid is None else (valid[:, None, :, None] & fits[None, :, None, :]).flatten(2).flatten(0, 1)
            )
    return total.to(x.device), None if valid is None else valid.to(x.device), x


def explains(layer: Layer, x: Tensor, output: Tensor, at: Tensor) -> bool:
    """Whether the output really is the product of patches and weights: classes derived from torch's may pad, or scale
    their weights, in a way of their own."""
    try:
        rows = patches(layer, x, size_of(layer, output), at)
    except (RuntimeError, IndexError):
        return False
    said = torch.cat(list(rows @ matrix_of(layer)), dim=-1) + (0 if layer.bias is None else layer.bias)
    there = rows_of(layer, output, at)
    return said.shape == there.shape and bool((said - there).abs().max() <= SCALED * there.abs().max() + 1e-6)
