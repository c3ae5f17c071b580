"""torch.compile where it pays: a trial decides before the run is bound to it.

Takes a training session, times a forward and backward pass of a copy of its model, eager and compiled, and compares what the
remaining steps would save with what compiling costs. Widths are fixed, so shapes are static and nothing recompiles.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from dynprune.train import Session

TRIALS = 5


def try_compiling(session: Session, note: Callable[[str], None]) -> dict[str, float | bool | str]:
    """Compile the session's forward pass if its remaining steps pay for it; says what it measured either way."""
    note("trying torch.compile")
    model = copy.deepcopy(session.model).train()
    x, _ = next(iter(session.data.train_batches(session.config.batch_size, session.config.seed, 0)))
    x = x.to(session.device, memory_format=torch.channels_last)
    eager_ms = trial_ms(session, model, x)
    try:
        return decide(session, model, x, eager_ms, note)
    except Exception as error:  # no compiler, or a network that it cannot take: the run goes on without
        reason = str(error).partition("\n")[0]
        note(f"torch.compile is not used: {type(error).__name__}: {reason}")
        return {"used": False, "error": f"{type(error).__name__}: {reason}"}


def decide(session: Session, model: nn.Module, x: torch.Tensor, eager_ms: float, note: Callable[[str], None]) -> dict[str, float | bool]:
    """Compile a copy, time it, and take the compiled form if the remaining steps pay for it."""
    started = time.perf_counter()
    compiled = compiled_form(session, model)
    step_ms(session, compiled, x)
    compile_s = time.perf_counter() - started - eager_ms / 1000
    compiled_ms = trial_ms(session, compiled, x)
    saved_s = (eager_ms - compiled_ms) / 1000 * (session.steps - session.step)
    pays = saved_s > compile_s
    if pays:
        session.forward = compiled_form(session, session.model)
    note(f"torch.compile: {compile_s:.0f} s to compile, {eager_ms:.1f} ms to {compiled_ms:.1f} ms per pass, would save {saved_s:.0f} s; "
         f"{'used' if pays else 'not used'}")
    return {"used": pays, "compile_s": compile_s, "eager_ms": eager_ms, "compiled_ms": compiled_ms, "saved_s": saved_s}


def compiled_form(session: Session, model: nn.Module) -> Callable:
    """On a GPU with CUDA graphs, which remove the launch gaps between small kernels."""
    return torch.compile(model, dynamic=False, mode="reduce-overhead" if session.device.type == "cuda" else "default")


def trial_ms(session: Session, forward: Callable, x: torch.Tensor) -> float:
    step_ms(session, forward, x)
    return median(step_ms(session, forward, x) for _ in range(TRIALS))


def step_ms(session: Session, forward: Callable, x: torch.Tensor) -> float:
    """One forward and backward pass, waited for."""
    started = time.perf_counter()
    with session.autocast():
        output = forward(x)
    (output if isinstance(output, torch.Tensor) else output[0]).float().mean().backward()
    if session.device.type == "cuda":
        torch.cuda.synchronize(session.device)
    return 1000 * (time.perf_counter() - started)
