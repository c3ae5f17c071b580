"""Wide convolutions on small maps as matrix products: a third less time for a training step of VGG-16 on a CPU.

In bfloat16 oneDNN's kernels are slow where weights are large and positions few: of 512 channels on 2x2 positions each
of the three parts of a step (what the layer says, and the gradients of its inputs and of its weights) takes 5 to 12
times as long as the matrix product of the same sums. Inside `small_maps` the parts whose shapes profit are products;
all others, and other devices and precisions, run as they always do.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

# measured on a core with AMX, batches of 32 and 128: 1.1 to 30 times as fast within these bounds
POINTWISE_PLACES = 64  # positions of the output, of kernels of 1x1
FEW_PLACES, WIDE = 16, 128 * 128  # positions, and input times output channels, of other kernels
MORE_PLACES, WIDER = 64, 256  # positions, and channels on either side
WHOLLY = ((16, 256 * 512), (4, 256 * 256))  # the same, for the other two parts of a step


def small_maps(model: nn.Module, bfloat16: bool) -> AbstractContextManager:
    """Inside, convolutions of `model` that profit are products. Losses that are differentiated twice cannot be computed
    inside."""
    quick = bfloat16 and torch.cpu._is_amx_tile_supported() and any(map(may_profit, model.parameters()))
    return SmallMaps() if quick else nullcontext()


def may_profit(weight: Tensor) -> bool:
    """Whether there are sizes of maps for which it does: looking at every call costs a thin network 3 % of a step."""
    return weight.ndim == 4 and weight.device.type == "cpu" and weight.shape[0] * weight.shape[1] >= WIDE


class SmallMaps(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.conv2d and not kwargs and len(args) == 7 and is_quicker(*args):
            images, weight, bias, _, padding = args[:5]
            half = torch.bfloat16
            return Convolution.apply(images.to(half), weight.to(half), None if bias is None else bias.to(half), padding)
        return func(*args, **kwargs or {})


def is_quicker(
    images: Tensor, weight: Tensor, _bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> bool:
    """Whether a call of conv2d learns in bfloat16, and as a product in less time. A compiler has ways of its own."""
    learns = torch.is_grad_enabled() and weight.requires_grad and not torch.compiler.is_compiling()
    plain = groups == 1 and stride in (1, (1, 1)) and dilation in (1, (1, 1)) and isinstance(padding, tuple)
    if not learns or not plain or images.ndim != 4 or not len(images):
        return False
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype
    return dtype == torch.bfloat16 and profits(images, weight, padding)


def places_of(images: Tensor, weight: Tensor, padding: tuple[int, int]) -> int:
    """How many positions an output has, of stride 1: images (n, c, h, w), weight (o, c, kh, kw)."""
    sizes = zip(images.shape[2:], weight.shape[2:], padding, strict=True)
    return math.prod(max(0, size + 2 * pad - extent + 1) for size, extent, pad in sizes)


def profits(images: Tensor, weight: Tensor, padding: tuple[int, int]) -> bool:
    """Whether the weight gradient of a convolution of stride 1 is quicker as a product."""
    outputs, inputs, *kernel = weight.shape
    places = places_of(images, weight, padding)
    if kernel == [1, 1]:
        return 0 < places <= POINTWISE_PLACES and inputs * outputs >= WIDE
    few = 0 < places <= FEW_PLACES and inputs * outputs >= WIDE
    return few or 0 < places <= MORE_PLACES and min(inputs, outputs) >= WIDER


def wholly(images: Tensor, weight: Tensor, padding: tuple[int, int]) -> bool:
    """Whether the other two parts are, too."""
    outputs, inputs, *kernel = weight.shape
    places = places_of(images, weight, padding)
    return kernel != [1, 1] and any(places <= most and inputs * outputs >= wide for most, wide in WHOLLY)


class Convolution(torch.autograd.Function):
    """conv2d of stride 1 whose weight gradient is a sum of products, and the rest of it where that is quicker."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(images, weight)
        ctx.padding, ctx.wholly = padding, wholly(images, weight, padding)
        if ctx.wholly:
            return product(images, weight, bias, padding)
        return F.conv2d(images, weight, bias, padding=padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        images, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        for_images = None
        if wanted[0] and ctx.wholly:
            for_images = input_gradient(images, gradient, weight, ctx.padding)
        elif wanted[0]:
            for_images, _, _ = torch.ops.aten.convolution_backward(
                gradient, images, weight, None, (1, 1), ctx.padding, (1, 1), False, (0, 0), 1, (True, False, False)
            )
        for_weight = weight_gradient(images, gradient, weight, ctx.padding) if wanted[1] else None
        return for_images, for_weight, gradient.sum((0, 2, 3)) if wanted[2] else None, None


def padded(images: Tensor, padding: tuple[int, int]) -> Tensor:
    """Images (n, c, h, w) with zeros around, channels last: (n, h, w, c)."""
    read = images.permute(0, 2, 3, 1)
    return F.pad(read, (0, 0, padding[1], padding[1], padding[0], padding[0])) if any(padding) else read


def rows(values: Tensor) -> Tensor:
    """Channels of every position of every image, (n * h * w, c)."""
    return values.permute(0, 2, 3, 1).reshape(-1, values.shape[1])


def shifts(values: Tensor, kernel: list[int], height: int, width: int) -> Iterator[tuple[int, int, Tensor]]:
    """Of padded values (n, h, w, c) what each position of the kernel meets: (n, height, width, c)."""
    for row, column in itertools.product(range(kernel[0]), range(kernel[1])):
        yield row, column, values[:, row : row + height, column : column + width]


def product(images: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int]) -> Tensor:
    """What the layer says, (n, o, oh, ow), from patches of its inputs."""
    outputs, _, *kernel = weight.shape
    read = padded(images, padding)
    count, height, width = len(read), read.shape[1] - kernel[0] + 1, read.shape[2] - kernel[1] + 1
    patches = torch.cat([part for _, _, part in shifts(read, kernel, height, width)], -1)
    said = F.linear(patches.view(count * height * width, -1), rows(weight).view(outputs, -1), bias)
    return said.view(count, height, width, outputs).permute(0, 3, 1, 2)


def input_gradient(images: Tensor, gradient: Tensor, weight: Tensor, padding: tuple[int, int]) -> Tensor:
    """The gradient of inputs (n, c, h, w) from a weight (o, c, kh, kw) and output gradients (n, o, oh, ow), summed in
    float32 over the positions of the kernel."""
    outputs, inputs, *kernel = weight.shape
    (count, _, height, width), (deep, wide) = gradient.shape, images.shape[2:]
    parts = (rows(gradient) @ rows(weight).view(outputs, -1)).view(count, height, width, *kernel, inputs)
    exact = torch.promote_types(gradient.dtype, torch.float32)
    found = gradient.new_zeros((count, deep + 2 * padding[0], wide + 2 * padding[1], inputs), dtype=exact)
    for row, column, part in shifts(found, kernel, height, width):
        part += parts[:, :, :, row, column]
    inside = found[:, padding[0] : padding[0] + deep, padding[1] : padding[1] + wide]
    return inside.permute(0, 3, 1, 2).to(gradient.dtype)


def weight_gradient(images: Tensor, gradient: Tensor, weight: Tensor, padding: tuple[int, int]) -> Tensor:
    """The gradient of a weight (o, c, kh, kw) from inputs (n, c, h, w) and output gradients (n, o, oh, ow)."""
    outputs, inputs, *kernel = weight.shape
    said = rows(gradient).t()
    found = images.new_empty((outputs, *kernel, inputs))
    for row, column, part in shifts(padded(images, padding), kernel, *gradient.shape[2:]):
        found[:, row, column] = said @ part.reshape(-1, inputs)
    return found.permute(0, 3, 1, 2)
