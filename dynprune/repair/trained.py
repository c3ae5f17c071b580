"""The whole way: a trained network and some images in, a compact network out.

    moments of every layer ─▶ order of arms ─▶ widths by a bandit ─▶ cut ─▶ repair ─▶ tuning for some seconds

Each step is a file of this room. Takes modules and tensors; knows no settings and no files.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynprune.budgets.allocation import CostModel, allocate, constraints_for
from dynprune.budgets.limits import Budget, Limit, parse_limit
from dynprune.data.scores import logits
from dynprune.errors import DynpruneError
from dynprune.repair.calibration import calibrate
from dynprune.repair.choice import orders
from dynprune.repair.distill import are_scores, tune
from dynprune.repair.refit import ROUNDS, Targets, repair, targets_of
from dynprune.repair.scores import refit_scores, scores_layer
from dynprune.repair.shares import WHOLE, Share
from dynprune.repair.widths import Found, Moves, search
from dynprune.state.copies import copied
from dynprune.structure.channels import ChannelGraph, Selection
from dynprune.structure.record import AxisKey
from dynprune.structure.surgery import slim

FEWEST = 32  # images without which nothing can be calibrated
PULL_SCALE = 0.25  # of the places that a repair within the search looks at
PULL_ROUNDS = 2  # of the regression behind a rectifier, there


@dataclass
class Images:
    """Inputs, each (images, ...), that no other shares. moments: batches for calibration. repair: for the final repair;
    pull: the part of them that the search uses. judge: by which distances are measured. share: which part of all
    images these are."""

    moments: list[Tensor]
    repair: Tensor
    pull: Tensor
    judge: Tensor
    share: Share = WHOLE


class Compaction:
    """One trained network, calibrated once, to be cut at any widths."""

    def __init__(
        self, model: nn.Module, graph: ChannelGraph, images: Images, *, choice: str = "repairable", seed: int = 0
    ):
        """model: in eval mode; it stays as it is."""
        self.model, self.graph, self.images, self.seed = model, graph, images, seed
        share = images.share
        self.calibration = calibrate(model, images.moments, logits, seed=seed, share=share)
        self.orders = orders(model, graph, self.calibration, choice, seed)
        self.calibration.moments.clear()  # the largest thing there is, and of no more use
        self.targets = targets_of(model, images.repair, seed=seed, share=share)
        self.quick = targets_of(model, images.pull, seed=seed, scale=PULL_SCALE, share=share)
        self.fitted = [*images.moments, *images.repair.split(128)]
        self.head = scores_layer(model, images.judge[:2], logits)
        with torch.no_grad():
            self.said = logits(model(images.judge)).float()
            self.taught = torch.cat([logits(model(part)).float() for part in self.fitted]) if self.head else self.said

    def selection(self, widths: dict[str, int]) -> Selection:
        return {name: self.orders[name].kept(width) for name, width in widths.items()}

    def cut(self, widths: dict[str, int]) -> nn.Module:
        """A copy with these widths, as cut."""
        return slim(self.model, self.graph.kept(self.selection(widths))).eval()

    def repaired(self, widths: dict[str, int], targets: Targets | None = None, rounds: int = ROUNDS) -> nn.Module:
        """A copy with these widths, refitted; with `targets` in a hurry, as the search does."""
        narrow = self.cut(widths)
        kept = self.graph.kept(self.selection(widths))
        if targets:
            repair(narrow, kept, targets, rounds=rounds)
        else:
            self.repair(narrow, kept)
        return narrow

    def repair(self, narrow: nn.Module, kept: Mapping[AxisKey, np.ndarray]) -> None:
        """Refit a network that holds the `kept` positions, which is in eval mode, in place."""
        repair(narrow, kept, self.targets)
        if self.head:
            refit_scores(narrow, self.head, self.fitted, self.taught, self.images.share)

    @torch.no_grad()
    def distance(self, narrow: nn.Module) -> float:
        """How far what a network says is from what the untouched one says."""
        return distance_between(logits(narrow(self.images.judge)).float(), self.said, self.images.share)

    def pull(self, widths: dict[str, int]) -> float:
        return self.distance(self.repaired(widths, self.quick, rounds=PULL_ROUNDS))

    def worth(self, cost: CostModel, bounds: list[tuple[Limit, float]], widths: dict[str, int]) -> np.ndarray:
        """The logarithm of what one more arm of each group is expected to be worth for what it costs, (groups,)."""
        own = np.array([widths[name] for name in cost.names], dtype=np.int64)
        price = sum(cost.slopes(limit.quantity, own) / bound for limit, bound in bounds)
        loss = [
            self.orders[name].losses[max(0, len(self.orders[name].losses) - widths[name] - 1)] for name in cost.names
        ]
        worth = np.log(np.maximum(loss, 1e-30)) - np.log(np.maximum(price, 1e-30))
        return worth - worth.mean()

    def find_widths(
        self,
        start: dict[str, int],
        budget: Budget,
        seconds: float,
        *,
        cost: CostModel | None = None,
        policy: str = "bandit",
        report: Callable[[float, float, int], None] = lambda *_: None,
    ) -> Found:
        """Better widths than `start` within the budget; see `widths.search`."""
        cost = cost or CostModel(self.graph)
        bounds = [(limit, limit.value(cost.dense(limit.quantity))) for limit in map(parse_limit, budget.limits)]
        in_ms = any(limit.quantity == "latency" for limit, _ in bounds)  # which says itself what a width costs
        fine = budget if in_ms or budget.align != "auto" else replace(budget, align="fine")
        moves = Moves(cost, bounds, constraints_for(self.graph, fine))
        worth = self.worth(cost, bounds, start)
        return search(
            start,
            moves,
            self.pull,
            seconds=seconds,
            policy=policy,
            worth=worth,
            seed=self.seed,
            report=report,
            clock=self.images.share.clock(self.said.device),
        )


def distance_between(said: Tensor, before: Tensor, share: Share = WHOLE) -> float:
    """Of class scores (images, classes): the mean Kullback-Leibler divergence, in nats. Of other outputs: the mean
    squared difference over the variance."""
    if are_scores(said):
        divergence = F.kl_div(said.log_softmax(1), before.log_softmax(1), log_target=True, reduction="batchmean")
        value = float(share.total(divergence) / share.count)
    else:
        mean = share.total(before.mean()) / share.count
        gap, spread = share.total(torch.stack([(said - before).square().mean(), (before - mean).square().mean()]))
        value = float(gap / spread.clamp(min=1e-12))
    return value if math.isfinite(value) else math.inf


@dataclass
class Compacted:
    """A compact network made from a trained one. model: in eval mode. selection: the arms that it kept; with `graph`
    what `dynprune.save` takes. distance: from the untouched network after repair and before tuning, on images that
    nothing was fitted to; distance_at_start: of the widths that the search began with. left: layers that were not
    refitted, and why. seconds: by phase."""

    model: nn.Module
    graph: ChannelGraph
    selection: Selection
    widths: dict[str, int]
    macs: int
    params: int
    distance: float
    distance_at_start: float
    pulls: int
    tune_steps: int
    left: dict[str, str]
    seconds: dict[str, float]


def compact_module(
    model: nn.Module,
    graph: ChannelGraph,
    batches: Iterable,
    budget: Budget,
    *,
    images: int,
    search_seconds: float,
    policy: str,
    choice: str,
    tune_seconds: float,
    tune_lr: float,
    bfloat16: bool,
    seed: int,
    report: Callable[[str], None],
) -> Compacted:
    """The whole way for a module and batches of the user's own; see `dynprune.compact`."""
    seconds: dict[str, float] = {}
    refuse_not_finite(model)
    model = copied(model).eval()
    device = next(model.parameters()).device
    began = time.perf_counter()
    report("collecting images")
    taken, labels = collect(batches, 4 * images, device)
    if len(taken) < FEWEST:
        raise DynpruneError(f"data gave {len(taken)} images. Expected at least {FEWEST}; a few hundred are better.")
    part = len(taken) // 4
    moments, refitted, judge = taken.split([part, len(taken) - 2 * part, part])
    cost = CostModel(graph)
    start = allocate(graph, budget.limits, budget.allocation, constraints_for(graph, budget), cost=cost)
    report(f"calibrating on {len(taken)} images")
    sample = Images(list(moments.split(128)), refitted, refitted[: max(16, min(256, len(refitted) // 2))], judge)
    compaction = Compaction(model, graph, sample, choice=choice, seed=seed)
    refuse_labels(labels, compaction.said)
    seconds["calibrate"], began = time.perf_counter() - began, time.perf_counter()
    at_start = compaction.pull(start)
    found = Found(start, at_start, [(0.0, at_start)])
    if policy != "none" and search_seconds and graph.groups:
        report(f"searching widths for {search_seconds:g} s")
        found = compaction.find_widths(start, budget, search_seconds, cost=cost, policy=policy)
    seconds["search"], began = time.perf_counter() - began, time.perf_counter()
    report("cutting and repairing")
    narrow = compaction.repaired(found.widths)
    distance, steps = compaction.distance(narrow), 0
    seconds["repair"], began = time.perf_counter() - began, time.perf_counter()
    if tune_seconds:
        report(f"tuning for {tune_seconds:g} s")
        again = endless(batches, device, taken)
        steps = tune(narrow, model, again, tune_seconds, lr=tune_lr, bfloat16=bfloat16, scores=logits)
    seconds["tune"] = time.perf_counter() - began
    return Compacted(
        narrow,
        graph,
        compaction.selection(found.widths),
        found.widths,
        graph.macs(found.widths),
        graph.params(found.widths),
        distance,
        at_start,
        len(found.curve) - 1,
        steps,
        compaction.targets.left | compaction.calibration.left,
        seconds,
    )


def refuse_not_finite(model: nn.Module) -> None:
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.is_floating_point() and not value.isfinite().all():
            raise DynpruneError(f"{name} holds numbers that are not finite. Expected trained weights.")


def refuse_labels(labels: Tensor | None, said: Tensor) -> None:
    """Labels that are no classes of the network's."""
    if labels is not None and are_scores(said) and len(labels) and not 0 <= int(labels.max()) < said.shape[1]:
        raise DynpruneError(
            f"data gave the label {int(labels.max())}, and the network has {said.shape[1]} classes. Expected labels "
            f"from 0 to {said.shape[1] - 1}, or images alone."
        )


def parts_of(batch: object) -> tuple[Tensor, Tensor | None]:
    """Images, and labels where a batch has them."""
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, tuple | list) and batch and isinstance(batch[0], Tensor):
        labels = batch[1] if len(batch) > 1 and isinstance(batch[1], Tensor) else None
        return batch[0], labels if labels is not None and labels.ndim == 1 and not labels.is_floating_point() else None
    raise DynpruneError(
        f"data gave a {type(batch).__name__}. Expected batches of images, or (images, labels), as a DataLoader gives."
    )


def collect(batches: Iterable, wanted: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The first images, as one tensor, and their labels where there are any."""
    found: list[Tensor] = []
    labels: list[Tensor] = []
    for batch in batches:
        images, own = parts_of(batch)
        found.append(images.to(device))
        labels += [] if own is None else [own]
        if sum(map(len, found)) >= wanted:
            break
    return torch.cat(found)[:wanted] if found else torch.empty(0), torch.cat(labels) if labels else None


def endless(batches: Iterable, device: torch.device, taken: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Batches again and again; of an iterator that is used up, the images that were taken from it."""
    while True:
        empty = True
        for batch in batches:
            images, labels = parts_of(batch)
            empty = False
            yield images.to(device), None if labels is None else labels.to(device)
        if empty:
            yield from ((part, None) for part in taken.split(64))
