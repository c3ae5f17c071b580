"""torch.compile where it pays: a trial decides before the run is bound to it.

Takes a model and a batch, times a forward and backward pass of a copy, eager and compiled, and compares what the
remaining steps would save with what compiling costs. Widths are fixed, so shapes are static and nothing recompiles.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from statistics import median

import torch
from torch import Tensor, nn

TRIALS = 5
Facts = dict[str, float | bool | str]


def try_compiling(
    model: nn.Module,
    x: Tensor,
    *,
    autocast: Callable[[], AbstractContextManager],
    steps_left: int,
    note: Callable[[str], None],
) -> tuple[Callable | None, Facts]:
    """The compiled model if that pays for itself within `steps_left`, else None; and what was measured either way."""
    note("trying torch.compile")
    trial = copy.deepcopy(model).train()
    eager_ms = trial_ms(trial, x, autocast)
    started = time.perf_counter()
    try:
        compiled = compiled_form(trial, x)
        step_ms(compiled, x, autocast)
        compile_s = time.perf_counter() - started - eager_ms / 1000
        compiled_ms = trial_ms(compiled, x, autocast)
    except Exception as error:  # no compiler, or a network that it cannot take: the run goes on without
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        note(f"torch.compile is not used: {reason}")
        return None, {"used": False, "error": reason}
    saved_s = (eager_ms - compiled_ms) / 1000 * steps_left
    pays = saved_s > compile_s
    note(
        f"torch.compile: {compile_s:.0f} s to compile, {eager_ms:.1f} ms to {compiled_ms:.1f} ms per pass, would "
        f"save {saved_s:.0f} s; {'used' if pays else 'not used'}"
    )
    facts: Facts = {
        "used": pays,
        "compile_s": compile_s,
        "eager_ms": eager_ms,
        "compiled_ms": compiled_ms,
        "saved_s": saved_s,
    }
    return (compiled_form(model, x) if pays else None), facts


def compiled_form(model: nn.Module, x: Tensor) -> Callable:
    """On a GPU with CUDA graphs, which remove the launch gaps between small kernels."""
    return torch.compile(model, dynamic=False, mode="reduce-overhead" if x.is_cuda else "default")


def trial_ms(forward: Callable, x: Tensor, autocast: Callable[[], AbstractContextManager]) -> float:
    step_ms(forward, x, autocast)
    return median(step_ms(forward, x, autocast) for _ in range(TRIALS))


def step_ms(forward: Callable, x: Tensor, autocast: Callable[[], AbstractContextManager]) -> float:
    """One forward and backward pass, waited for."""
    started = time.perf_counter()
    with autocast():
        output = forward(x)
    (output if isinstance(output, Tensor) else output[0]).float().mean().backward()
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return 1000 * (time.perf_counter() - started)
