"""Train a compact network for some seconds to say what the untouched one says.

Takes a compact network, a lesson and batches of training examples; changes the compact one in place. The lesson is the
divergence from what the untouched network says, of class scores softened (Hinton, Vinyals & Dean, 2015), beside a loss
of its own: the labels' or the user's. The learning rate rises at first, then falls to zero within the time that is
given, so that every length is a whole schedule.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynprune.errors import DynpruneError
from dynprune.execution.quick import quick_layers
from dynprune.repair.says import SCORES, Said, Says, apart, are_scores
from dynprune.structure.merging import merged

STEEPEST = 1.0  # norm of the gradient of losses that have no bound on their slope
RATE = 0.03  # peak learning rate, of batches of 128
ENOUGH = 150  # steps for that rate; in fewer, so much less: 0.03 undid in 30 steps a point of what repair gave
WARMUP = 0.2  # share of the time in which the rate rises: begun in full, it undoes in 100 steps what repair gave
WEIGHT = 0.9  # of what the untouched network says; the labels have the rest
BatchNorm = nn.modules.batchnorm._BatchNorm
SETTLED = BatchNorm | nn.modules.dropout._DropoutNd


class Memory:
    """What was said of each of so many images, (images, classes), once it was asked for."""

    def __init__(self, images: int):
        self.heard = torch.zeros(images, dtype=torch.bool)
        self.said: Tensor | None = None

    def __call__(self, rows: Tensor, ask: Callable[[Tensor], Tensor]) -> Tensor:
        """What is said of these rows, (batch, classes). ask: says it of places in the batch."""
        fresh = (~self.heard[rows]).nonzero().flatten()
        if len(fresh):
            told = ask(fresh).float()
            if self.said is None:
                self.said = told.new_zeros((len(self.heard), told.shape[1]))
            self.said[rows[fresh]] = told
            self.heard[rows[fresh]] = True
        assert self.said is not None
        return self.said[rows]


@dataclass
class Lesson:
    """What a step of tuning asks of a network. teacher: the untouched one; it stays as it is. run: calls a model with a
    batch, and may be a loss itself. says: what of the answer matters. own: the loss of what `run` returned and a batch,
    a mean over examples; None where there is none. weight: of what the teacher says beside it. scaled: whether `own` is
    on a scale of its own, to which what the teacher says is brought. whole: whether the network is in train mode, as a
    loss may ask for; else only its BatchNorms are. memory: of class scores, where images come again as they were; a
    batch then ends with its rows in the memory, and every other part of it has one entry per image."""

    teacher: nn.Module
    run: Callable[[nn.Module, Any], object]
    says: Says = SCORES
    own: Callable[[object, Any], Tensor | None] = lambda _output, _batch: None
    weight: float = WEIGHT
    scaled: bool = False
    whole: bool = True
    memory: Memory | None = None
    scale: float = field(default=0.0, init=False)
    quick: nn.Module | None = field(default=None, init=False)  # the teacher, without its BatchNorms

    def __call__(self, narrow: nn.Module, batch: Any) -> tuple[Tensor, bool]:
        """The loss of a batch, and whether its slope has a bound."""
        scores = self.says.scores
        if self.quick is None:
            self.quick = merged(self.teacher, lambda model: self.taught(model, batch))
        taught = self.taught(self.quick, batch) if self.memory is None else [self.remembered(self.quick, batch)]
        said, output = self.says.of(narrow, lambda model: self.run(model, batch))
        own = self.own(output, batch)
        bounded = scores and are_scores(said[0])
        if own is None:
            return apart(said, taught, scores=scores), bounded
        if not self.weight or len(said) != len(taught):
            return own, False
        told = apart(said, taught, scores=scores)
        if self.scaled:
            self.scale = self.scale or ratio(own, told, narrow)
            told = told * self.scale
        return self.weight * told + (1 - self.weight) * own, bounded and not self.scaled

    @torch.no_grad()
    def taught(self, teacher: nn.Module, batch: Any) -> Said:
        """What a teacher says of a batch."""
        cards = {value.device for value in teacher.parameters() if value.is_cuda}
        with torch.random.fork_rng(list(cards)):  # chance is the same for both
            return self.says.of(teacher, lambda model: self.run(model, batch))[0]

    def remembered(self, teacher: nn.Module, batch: Sequence[Tensor]) -> Tensor:
        """The same for class scores; only of images that it has not been asked about before it is asked."""
        assert self.memory is not None
        return self.memory(batch[-1], lambda places: self.taught(teacher, [part[places] for part in batch])[0])

    def begin(self, narrow: nn.Module) -> None:
        """The mode in which it learns."""
        narrow.train(self.whole)
        for module in () if self.whole else narrow.modules():
            if isinstance(module, BatchNorm):
                module.train()


def ratio(own: Tensor, told: Tensor, narrow: nn.Module) -> float:
    """How much steeper one loss is than the other."""
    parameters = [value for value in narrow.parameters() if value.requires_grad]

    def steepness(loss: Tensor) -> float:
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        return math.sqrt(sum(float(own.float().square().sum()) for own in gradients if own is not None))

    return steepness(own) / max(steepness(told), 1e-12)


def of_labels(output: Tensor, labels: Tensor | None) -> Tensor | None:
    """Cross-entropy where there are labels and class scores."""
    return F.cross_entropy(output.float(), labels) if labels is not None and are_scores(output) else None


def learning(model: nn.Module) -> nn.Module:
    """In train mode, as a loss may ask for, but with BatchNorms and dropouts that change nothing."""
    model.train()
    for module in model.modules():
        if isinstance(module, SETTLED):
            module.eval()
    return model


def rate_at(done: float, peak: float) -> float:
    """The learning rate when a share of the time is over: a straight line to zero, held down while it rises."""
    return peak * (1 - done) * min(1.0, done / WARMUP)


def peak_of(lr: float | None, most: float, expected: float) -> float:
    """The peak learning rate: what is given, or `most` where enough steps fit into the time."""
    return lr if lr else most * min(1.0, expected / ENOUGH)


def tune(
    narrow: nn.Module,
    lesson: Lesson,
    batches: Iterator[Any],
    seconds: float,
    *,
    lr: float | None = None,
    most: float = RATE,
    weight_decay: float = 5e-4,
    bfloat16: bool = False,
    report: Callable[[float, float, int], None] = lambda *_: None,
    clock: Callable[[], float] = time.perf_counter,
    average: Callable[[], object] = lambda: None,
    settle: Callable[[], object] = lambda: None,
) -> int:
    """Train `narrow` in place, SGD with Nesterov momentum, until the seconds are over. Returns the number of steps.

    Raises DynpruneError where the loss does not stay finite; then `narrow` is of no use.

    batches: endless; on the networks' device; of several processes, each one's part. lr: peak rate; without one `most`,
    or less where few steps fit into the time, which the steps so far tell. report: seconds so far, loss, steps.
    average: called after each backward pass, so that several processes can make their gradients equal. settle: after
    each step, to put back what is not to change.
    """
    device = next(narrow.parameters()).device
    optimizer = torch.optim.SGD(
        narrow.parameters(),
        lr or most,
        0.9,
        weight_decay=weight_decay,
        nesterov=True,
        fused=device.type in ("cpu", "cuda"),
    )
    lesson.begin(narrow)
    once = not lesson.scaled  # a user's own loss may be differentiated twice
    began, steps = clock(), 0
    for batch in batches:
        done = (clock() - began) / seconds
        if done >= 1:
            break
        peak = peak_of(lr, most, steps / done if steps else 0.0)
        for group in optimizer.param_groups:
            group["lr"] = rate_at(done, peak)
        precision = torch.autocast(device.type, torch.bfloat16, enabled=bfloat16)
        with precision, quick_layers(narrow, bfloat16=bfloat16) if once else nullcontext():
            loss, bounded = lesson(narrow, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average()
        if not bounded:  # a squared difference has no bound on its slope, as a divergence has
            torch.nn.utils.clip_grad_norm_(narrow.parameters(), STEEPEST)
        optimizer.step()
        settle()
        steps += 1
        if not math.isfinite(now := float(loss.detach())):
            raise DynpruneError(
                f"The loss became {now} after {steps} steps of tuning at rate {peak:g}. Choose a smaller --tune-lr, "
                "or --tune 0."
            )
        report(done * seconds, now, steps)
    narrow.eval()
    return steps
