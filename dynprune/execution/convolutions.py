"""Weight gradients of wide convolutions on small maps as matrix products: a third of a training step of VGG-16.

In a training step in bfloat16 on a CPU, oneDNN takes up to five times as long for the weight gradient of 512 channels
on 4x4 or 2x2 positions as for the forward pass. A product per kernel position, of output gradients and of shifted
inputs, computes the same sums in a fraction of that time. Inside `small_maps` convolutions whose shapes profit do so;
all others, and other devices and precisions, run as they always do.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

# measured on two cores with AMX, batches of 32 and 128: 1.2 to 30 times as fast within these bounds
POINTWISE_PLACES = 64  # positions of the output, of kernels of 1x1
FEW_PLACES, WIDE = 16, 128 * 128  # positions, and input times output channels, of other kernels
MORE_PLACES, WIDER = 64, 256  # positions, and channels on either side


def small_maps(device: torch.device, bfloat16: bool) -> AbstractContextManager:
    """Inside, convolutions that profit compute weight gradients as products. Losses that are differentiated twice
    cannot be computed inside."""
    quick = device.type == "cpu" and bfloat16 and torch.cpu._is_amx_tile_supported()
    return SmallMaps() if quick else nullcontext()


class SmallMaps(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.conv2d and not kwargs and len(args) == 7 and torch.is_grad_enabled():
            images, weight, bias, stride, padding, dilation, groups = args
            plain = groups == 1 and stride in (1, (1, 1)) and dilation in (1, (1, 1)) and isinstance(padding, tuple)
            if plain and weight.requires_grad and profits(images, weight, padding):
                dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype
                if dtype == torch.bfloat16:
                    return Convolution.apply(
                        images.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), padding
                    )
        return func(*args, **kwargs or {})


def profits(images: Tensor, weight: Tensor, padding: tuple[int, int]) -> bool:
    """Whether a convolution of stride 1, images (n, c, h, w) and weight (o, c, kh, kw), is wide enough and small
    enough."""
    if images.ndim != 4:
        return False
    outputs, inputs, *kernel = weight.shape
    places = 1
    for size, extent, pad in zip(images.shape[2:], kernel, padding, strict=True):
        places *= max(0, size + 2 * pad - extent + 1)
    if tuple(kernel) == (1, 1):
        return 0 < places <= POINTWISE_PLACES and inputs * outputs >= WIDE
    few = 0 < places <= FEW_PLACES and inputs * outputs >= WIDE
    return few or 0 < places <= MORE_PLACES and min(inputs, outputs) >= WIDER


class Convolution(torch.autograd.Function):
    """conv2d of stride 1 whose weight gradient is a sum of products."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(images, weight)
        ctx.padding = padding
        return F.conv2d(images, weight, bias, padding=padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        images, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        for_images = None
        if wanted[0]:
            for_images, _, _ = torch.ops.aten.convolution_backward(
                gradient, images, weight, None, (1, 1), ctx.padding, (1, 1), False, (0, 0), 1, (True, False, False)
            )
        for_weight = weight_gradient(images, gradient, weight, ctx.padding) if wanted[1] else None
        return for_images, for_weight, gradient.sum((0, 2, 3)) if wanted[2] else None, None


def weight_gradient(images: Tensor, gradient: Tensor, weight: Tensor, padding: tuple[int, int]) -> Tensor:
    """The gradient of a weight (o, c, kh, kw) from inputs (n, c, h, w) and output gradients (n, o, oh, ow)."""
    outputs, inputs, *kernel = weight.shape
    height, width = gradient.shape[2:]
    said = gradient.permute(0, 2, 3, 1).reshape(-1, outputs).t()
    read = images.permute(0, 2, 3, 1)
    if any(padding):
        read = F.pad(read, (0, 0, padding[1], padding[1], padding[0], padding[0]))
    found = images.new_empty((outputs, *kernel, inputs))
    for row in range(kernel[0]):
        for column in range(kernel[1]):
            shifted = read[:, row : row + height, column : column + width].reshape(-1, inputs)
            found[:, row, column] = said @ shifted
    return found.permute(0, 3, 1, 2)
