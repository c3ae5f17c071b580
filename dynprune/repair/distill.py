"""Train a compact network for some seconds to say what the untouched one says.

Takes both and batches of training images; changes the compact one in place. The loss is the divergence from the
untouched network's softened scores (Hinton, Vinyals & Dean, 2015), beside the labels. The learning rate rises at first,
then falls to zero within the time that is given, so that every length is a whole schedule.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynprune.errors import DynpruneError

TEMPERATURE = 2.0
STEEPEST = 1.0  # norm of the gradient of outputs that are no class scores
RATE = 0.03  # peak learning rate, of batches of 128
WARMUP = 0.2  # share of the time in which the rate rises: begun in full, it undoes in 100 steps what repair gave
WEIGHT = 0.9  # of what the untouched network says; the labels have the rest


def divergence(scores: Tensor, teacher: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """How far scores are from the teacher's, both softened, mean over images, on the scale of cross-entropy.

    scores, teacher: (images, classes). Of other outputs: the mean squared difference over the teacher's variance.
    """
    if not are_scores(scores):
        return (scores - teacher).square().mean() / teacher.var().clamp(min=1e-12)
    return (
        F.kl_div(
            F.log_softmax(scores / temperature, 1),
            F.log_softmax(teacher / temperature, 1),
            log_target=True,
            reduction="batchmean",
        )
        * temperature**2
    )


def are_scores(output: Tensor) -> bool:
    """Whether an output is (images, classes)."""
    return output.ndim == 2 and output.shape[1] > 1


def loss_of(scores: Tensor, labels: Tensor | None, teacher: Tensor, weight: float = WEIGHT) -> Tensor:
    """Distillation beside the labels; alone where there are none, or where the outputs are no class scores."""
    told = divergence(scores, teacher)
    if labels is None or not are_scores(scores):
        return told
    return weight * told + (1 - weight) * F.cross_entropy(scores, labels)


def rate_at(done: float, peak: float) -> float:
    """The learning rate when a share of the time is over: a straight line to zero, held down while it rises."""
    return peak * (1 - done) * min(1.0, done / WARMUP)


def tune(
    narrow: nn.Module,
    teacher: nn.Module,
    batches: Iterator[tuple[Tensor, Tensor | None]],
    seconds: float,
    *,
    lr: float = RATE,
    weight_decay: float = 5e-4,
    weight: float = WEIGHT,
    bfloat16: bool = False,
    scores: Callable[[object], Tensor],
    report: Callable[[float, float, int], None] = lambda *_: None,
    clock: Callable[[], float] = time.perf_counter,
    average: Callable[[], object] = lambda: None,
) -> int:
    """Train `narrow` in place, SGD with Nesterov momentum, until the seconds are over. Returns the number of steps.

    Raises DynpruneError where the loss does not stay finite; then `narrow` is of no use.

    batches: endless; on the networks' device; of several processes, each one's part. report: seconds so far, loss,
    steps. average: called after each backward pass, so that several processes can make their gradients equal.
    """
    device = next(narrow.parameters()).device
    optimizer = torch.optim.SGD(
        narrow.parameters(), lr, 0.9, weight_decay=weight_decay, nesterov=True, fused=device.type in ("cpu", "cuda")
    )
    narrow.train()
    began, steps = clock(), 0
    for images, labels in batches:
        done = (clock() - began) / seconds
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate_at(done, lr)
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            with torch.no_grad():
                said = scores(teacher(images))
            output = scores(narrow(images))
        loss = loss_of(output.float(), labels, said.float(), weight)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average()
        if not are_scores(output):  # a squared difference has no bound on its slope, as a divergence has
            torch.nn.utils.clip_grad_norm_(narrow.parameters(), STEEPEST)
        optimizer.step()
        steps += 1
        if not math.isfinite(now := float(loss.detach())):
            raise DynpruneError(
                f"The loss became {now} after {steps} steps of tuning at rate {lr:g}. Choose a smaller --tune-lr, "
                "or --tune 0."
            )
        report(done * seconds, now, steps)
    narrow.eval()
    return steps
