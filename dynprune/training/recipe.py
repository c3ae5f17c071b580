"""Settings to what they mean for torch: device, precision, optimizer, learning rate."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from dynprune.errors import DynpruneError
from dynprune.execution.quick import quick_layers
from dynprune.runs.config import Recipe
from dynprune.structure.tracing import first_line


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device that a setting names; without a number, each process of a machine takes its own GPU."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        device = torch.device("cuda", local_rank) if device.type == "cuda" and device.index is None else device
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise DynpruneError(
            f'--device got "{name}", which is not usable here ({first_line(error)}). Try --device cpu.'
        ) from error
    return device


def use_bfloat16(precision: str, device: torch.device) -> bool:
    """auto: where the processor has bfloat16 instructions. Elsewhere autocast would be slower than float32."""
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and any(
        getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )


@contextlib.contextmanager
def quick_step(model: nn.Module, device: torch.device, bfloat16: bool) -> Iterator[None]:
    """Inside, a model's training step computes in whatever way is quickest, in bfloat16 where that is wanted."""
    precision = torch.autocast(device.type, torch.bfloat16) if bfloat16 else contextlib.nullcontext()
    with precision, quick_layers(model, bfloat16=bfloat16):
        yield


def make_optimizer(config: Recipe, parameters: Sequence[nn.Parameter], device: torch.device) -> torch.optim.Optimizer:
    """The optimizer of the recipe, in its fused form: one kernel for all parameters."""
    fused = device.type in ("cpu", "cuda") and not any(parameter.is_complex() for parameter in parameters)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, config.lr, weight_decay=config.weight_decay, fused=fused)
    return torch.optim.SGD(
        parameters,
        config.lr,
        config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.momentum > 0,
        fused=fused,
    )


def learning_rate(config: Recipe, step: float, steps: int) -> float:
    """Linear warm-up to the peak, then the schedule down to zero at the last step. step: where the schedule stands,
    which need not be a whole number."""
    warmup = round(config.warmup * steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return (
        config.lr
        * {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[config.schedule]
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
