"""Several processes, started by torchrun: each runs its part of every batch, all hold the same weights and choose the
same arms.

Takes the narrow model's gradients, returns their mean over the processes. Only the active model's gradients travel, in
one buffer, so communication shrinks with the budget. Rewards are read off these mean gradients, so every process's
bandit sees the same numbers and nothing else has to be agreed on. BatchNorm takes its statistics over the whole batch,
as one process would. Plain torch.distributed: nccl on GPUs, gloo on CPUs.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dynprune.errors import DynpruneError


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is. local: its number on this machine, which picks its GPU."""

    rank: int = 0
    count: int = 1
    local: int = 0

    @property
    def several(self) -> bool:
        return self.count > 1

    @property
    def first(self) -> bool:
        """The one that writes files and reports."""
        return self.rank == 0

    def part(self, batch_size: int) -> slice:
        """This process's images of a batch."""
        if batch_size % self.count:
            raise DynpruneError(
                f"--batch-size {batch_size} cannot be shared equally by {self.count} processes. "
                f"Choose a multiple of {self.count}."
            )
        own = batch_size // self.count
        return slice(self.rank * own, (self.rank + 1) * own)


ALONE = Ranks()


def join(environment: Mapping[str, str], device: str) -> Ranks:
    """Join the processes that torchrun started; alone if it did not. device: "auto", "cpu", "cuda"."""
    if int(environment.get("WORLD_SIZE", 1)) < 2:
        return ALONE
    ranks = Ranks(int(environment["RANK"]), int(environment["WORLD_SIZE"]), int(environment.get("LOCAL_RANK", 0)))
    on_gpu = device.startswith("cuda") or device == "auto" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(ranks.local)
    dist.init_process_group("nccl" if on_gpu else "gloo", rank=ranks.rank, world_size=ranks.count)
    return ranks


def joined() -> Ranks:
    """The processes that the user's own program has joined; alone if it did not."""
    if not (dist.is_available() and dist.is_initialized()):
        return ALONE
    return Ranks(dist.get_rank(), dist.get_world_size())


def meet(ranks: Ranks) -> None:
    """Wait until all processes are here, so that none ends while another still writes."""
    if ranks.several:
        dist.barrier()


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def average(parameters: Iterable[Tensor], extra: Tensor, ranks: Ranks) -> tuple[Tensor, int]:
    """Replace every parameter's gradient by its mean over the processes. extra: a few more numbers to average, (n,).

    Returns the mean of `extra` and how many bytes this process sent to be added up. A parameter without gradient has
    none anywhere.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    buffer = torch.cat([*(gradient.reshape(-1).to(extra.dtype) for gradient in gradients), extra])
    dist.all_reduce(buffer)
    buffer /= ranks.count
    start = 0
    for gradient in gradients:
        gradient.copy_(buffer[start : start + gradient.numel()].view(gradient.shape))
        start += gradient.numel()
    return buffer[start:], buffer.numel() * buffer.element_size()


def agree(numbers: list[int], ranks: Ranks, device: torch.device) -> list[int]:
    """The first process's whole numbers, on all: for what only one can measure."""
    if not ranks.several:
        return numbers
    values = torch.tensor(numbers, dtype=torch.int64, device=device)
    dist.broadcast(values, 0)
    return values.tolist()


@torch.no_grad()
def same_everywhere(model: nn.Module, ranks: Ranks) -> None:
    """Give all processes the first one's tensors, where each computed them by itself."""
    if ranks.several:
        for value in [*model.parameters(), *model.buffers()]:
            own = value.contiguous()
            dist.broadcast(own, 0)
            value.copy_(own)


# -- BatchNorm over the whole batch ------------------------------------------------------------------------------------


class NormOverRanks(torch.autograd.Function):
    """BatchNorm with mean and variance over all processes' equal parts of the batch: weight * (x - mean) /
    sqrt(variance + eps) + bias.

    Forward and backward each exchange two numbers per channel. The gradient is that of one process with the whole
    batch: dx = weight / sigma * (dy - mean(dy) - xhat * mean(dy * xhat)) (Ioffe & Szegedy, 2015), the means over all
    processes. PyTorch's own kernels do the passes over x: statistics by its training form, the rest by its inference
    form, corrected by one line per channel.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, count: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        exact = torch.promote_types(x.dtype, torch.float32)
        # with a weight in float32, bfloat16 inputs get their statistics in float32
        ones = x.new_ones(x.size(1), dtype=exact)
        _, mean, scale = torch.native_batch_norm(x, ones, torch.zeros_like(ones), None, None, True, 0.0, eps)
        mean = mean.double()
        moments = torch.stack([mean, scale.double().pow(-2) - eps + mean.square()])
        dist.all_reduce(moments)
        moments /= count
        mean = moments[0]
        variance = (moments[1] - mean.square()).clamp(min=0)
        mean, variance = mean.to(exact), variance.to(exact)
        y = torch.native_batch_norm(x, weight, bias, mean, variance, False, 0.0, eps)[0]
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.eps, ctx.count = eps, count
        ctx.mark_non_differentiable(mean, variance)
        return y, mean, variance

    @staticmethod
    def backward(ctx, gradient: Tensor, _mean: object, _variance: object) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance = ctx.saved_tensors
        empty = mean.new_empty(0)
        gradient = gradient.contiguous(
            memory_format=torch.channels_last
            if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
            else torch.contiguous_format
        )
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, mean, variance, empty, empty, False, ctx.eps, [True, True, True]
        )
        means = torch.stack([dbias, dweight]).to(mean.dtype)  # sums of dy and of dy * xhat
        dist.all_reduce(means)
        means /= ctx.count * x.numel() // x.size(1)
        scale = (variance + ctx.eps).rsqrt()
        outer = scale if weight is None else scale * weight.to(scale.dtype)
        slope = -outer * means[1] * scale
        offset = -outer * means[0] - slope * mean
        shape = [1, -1] + [1] * (x.ndim - 2)
        dx = dx.add_(torch.addcmul(offset.to(x.dtype).view(shape), x, slope.to(x.dtype).view(shape)))
        return dx, None if weight is None else dweight, None if weight is None else dbias, None, None


def norm_over_ranks(norm: nn.modules.batchnorm._BatchNorm, count: int, x: Tensor) -> Tensor:
    """BatchNorm's forward in training, with statistics over `count` processes; otherwise the module's own."""
    if not (norm.training or norm.running_mean is None):
        return type(norm).forward(norm, x)
    y, mean, variance = NormOverRanks.apply(x, norm.weight, norm.bias, norm.eps, count)
    if norm.training and norm.track_running_stats and norm.running_mean is not None:
        assert norm.running_var is not None and norm.num_batches_tracked is not None  # all three, or none
        with torch.no_grad():
            norm.num_batches_tracked += 1
            share = norm.momentum if norm.momentum is not None else 1 / float(norm.num_batches_tracked)
            samples = count * x.numel() // x.size(1)
            norm.running_mean.lerp_(mean.to(norm.running_mean), share)
            norm.running_var.lerp_((variance * samples / max(1, samples - 1)).to(norm.running_var), share)
    return y


def share_norms(model: nn.Module, ranks: Ranks) -> None:
    """Let the model's BatchNorms take their statistics over all processes, in place."""
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            vars(norm)["forward"] = functools.partial(norm_over_ranks, norm, ranks.count)


@contextlib.contextmanager
def norms_shared(model: nn.Module, ranks: Ranks) -> Iterator[None]:
    """Context: `share_norms` where there are several processes, and as it was afterwards."""
    if ranks.several:
        share_norms(model, ranks)
    try:
        yield
    finally:
        for norm in model.modules() if ranks.several else ():
            vars(norm).pop("forward", None)


@contextlib.contextmanager
def learning_together(model: nn.Module, ranks: Ranks) -> Iterator[Callable[[], None]]:
    """Context of training one model in several processes: BatchNorm over whole batches. Gives what makes gradients
    equal after a backward pass."""
    none = torch.empty(0, device=next(model.parameters()).device)

    def equal_gradients() -> None:
        if ranks.several:
            average(model.parameters(), none, ranks)

    with norms_shared(model, ranks):
        yield equal_gradients


def lost_contact(error: BaseException) -> bool:
    """Whether an exception says that another process is gone."""
    text = f"{type(error).__name__} {error}".lower()
    return isinstance(error, dist.DistBackendError | dist.DistNetworkError) or any(
        sign in text
        for sign in (
            "connection closed by peer",
            "connection reset",
            "broken pipe",
            "gloo",
            "nccl",
            "timed out waiting",
        )
    )
