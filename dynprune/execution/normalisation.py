"""BatchNorm of few channels on a CPU, as BatchNorm of many: on two cores a third less time for thin resnets' steps.

torch's kernels take the channels of a position at once, and are slow where these are no whole vectors: 8 channels take
longer than 16, and on two cores longer than on one. In memory, channels last, several positions lie beside one another
as if they were more channels. Inside `few_channels` their statistics are taken so, and then joined: the mean of the
parts' variances and the variance of their means. What comes out is BatchNorm (Ioffe & Szegedy, 2015), to the rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

# measured on a core with AVX-512 and on two, on 8x8 to 112x112 positions: 1.1 to 9 times as fast below these channels
VECTOR = 16  # channels, and multiples of it, that torch is quick at
FEW, FEW_ON_SEVERAL, FEW_IN_FLOAT32 = 32, 128, 16
TOGETHER, LANES = 64, 32  # channels that are made at least, and a divisor of theirs
MOST_TOGETHER = 64  # positions
PLACES = 1024  # positions of all images from which on it pays


def few_channels(model: nn.Module) -> AbstractContextManager:
    """Inside, BatchNorms of `model` that profit take several positions at once. Losses that are differentiated twice
    cannot be computed inside."""
    on_cpu = any(
        isinstance(module, nn.BatchNorm2d) and module.weight is not None and module.weight.device.type == "cpu"
        for module in model.modules()
    )
    return FewChannels() if on_cpu else nullcontext()


class FewChannels(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return (batch_norm if func is F.batch_norm else func)(*args, **kwargs or {})


def batch_norm(
    images: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """F.batch_norm."""
    together = positions_together(images, weight, bias, running_mean) if training and eps > 0 else 0
    if not together or weight is None or bias is None:
        return F.batch_norm(images, running_mean, running_var, weight, bias, training, momentum, eps)
    said, mean, var = Normalisation.apply(images, weight, bias, eps, together)
    if running_mean is not None and running_var is not None:
        count = images.numel() // images.shape[1]
        with torch.no_grad():
            running_mean.lerp_(mean, momentum)
            running_var.lerp_(var * (count / (count - 1)), momentum)
    return said


def positions_together(images: Tensor, *parameters: Tensor | None) -> int:
    """How many positions are taken at once in training; 0 where BatchNorm should be as it is."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return 0
    if torch._C._autograd._top_saved_tensors_default_hooks(False):
        return 0  # torch.utils.checkpoint would compute it again without, and find other tensors
    if images.ndim != 4 or images.device.type != "cpu" or images.dtype not in (torch.bfloat16, torch.float32):
        return 0
    channels = images.shape[1]
    several = torch.get_num_threads() > 1
    few = FEW_IN_FLOAT32 if images.dtype == torch.float32 else FEW_ON_SEVERAL if several else FEW
    if not 0 < channels < few or channels % VECTOR == 0:
        return 0
    exact = all(value is None or value.dtype == torch.float32 for value in parameters)
    places = images.numel() // channels
    if not exact or places < PLACES or not images.is_contiguous(memory_format=torch.channels_last):
        return 0
    together = 1
    while together * channels < TOGETHER or together * channels % LANES:
        together *= 2
        if places % together or together > MOST_TOGETHER:
            return 0
    return together


def rows(values: Tensor, together: int) -> Tensor:
    """Images (n, c, h, w) as (n * h * w / together, together * c)."""
    return values.permute(0, 2, 3, 1).reshape(-1, together * values.shape[1])


def images_of(values: Tensor, shape: torch.Size) -> Tensor:
    """The way back, of rows in memory of their own; shape: (n, c, h, w). No view of them: layers that change their
    inputs in place refuse views that a function returns."""
    _, channels, height, width = shape
    strides = (height * width * channels, 1, width * channels, channels)
    return values.new_empty(0).set_(values.untyped_storage(), values.storage_offset(), shape, strides)


def scaled(read: Tensor, channels: tuple[Tensor, Tensor, Tensor, Tensor], eps: float, together: int) -> Tensor:
    """Rows, less a mean, over the root of a variance, times a weight, plus a bias: each of every channel, (c,)."""
    mean, var, weight, bias = (value.repeat(together) for value in channels)
    return F.batch_norm(read, mean, var, weight, bias, False, 0.0, eps)


class Normalisation(torch.autograd.Function):
    """What it says (n, c, h, w), and each channel's mean and biased variance, (c,)."""

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, weight: Tensor, bias: Tensor, eps: float, together: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        channels, read = images.shape[1], rows(images, together)
        scratch = weight.new_zeros(together * channels), weight.new_ones(together * channels)  # say: in float32
        means, variances = (
            value.view(together, channels) for value in torch.ops.aten.batch_norm_update_stats(read, *scratch, 0.0)
        )
        mean = means.mean(0)
        var = variances.mean(0) + (means - mean).square_().mean(0)
        said = scaled(read, (mean, var, weight, bias), eps, together)
        ctx.save_for_backward(images, weight, mean, var)
        ctx.eps, ctx.together = eps, together
        ctx.mark_non_differentiable(mean, var)
        return images_of(said, images.shape), mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        images, weight, mean, var = ctx.saved_tensors
        together, channels, count = ctx.together, images.shape[1], images.numel() // images.shape[1]
        read = rows(images, together)
        # as if the statistics were constants; the sums are those that their own gradients need
        found, *sums = torch.ops.aten.native_batch_norm_backward(
            rows(gradient, together),
            read,
            weight.repeat(together),
            mean.repeat(together),
            var.repeat(together),
            None,
            None,
            False,
            ctx.eps,
            (True, True, True),
        )
        for_weight, for_bias = (value.view(together, channels).sum(0) for value in sums)
        scale = weight * (var + ctx.eps).rsqrt() / -count
        found.add_(scaled(read, (mean, var, scale * for_weight, scale * for_bias), ctx.eps, together))
        return images_of(found, images.shape), for_weight, for_bias, None, None
