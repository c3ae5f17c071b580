"""How training begins where the network is trained already: which arms, how wide, and refitted to what it said.

Takes the settings and the untouched network; returns what `Session` needs to begin with a repaired network in place of
one that was merely cut.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dynprune.budgets.fit import Fit, Fitter
from dynprune.budgets.limits import Budget
from dynprune.data.loading import Data
from dynprune.execution.reservoir import Reservoir
from dynprune.repair.images import enough, sample_images
from dynprune.repair.scores import features, fit_to_labels, scores_layer
from dynprune.repair.shares import WHOLE, Share
from dynprune.repair.trained import Compaction
from dynprune.repair.widths import Found
from dynprune.state.copies import generator
from dynprune.structure.channels import ChannelGraph
from dynprune.structure.tracing import evaluating


@dataclass
class Beginning:
    """A trained network, calibrated. compaction: what was learned of it."""

    compaction: Compaction

    @property
    def worth(self) -> dict[str, Tensor]:
        """Of every arm of a group, a share that is the larger the longer it should stay, (arms,)."""
        found = {}
        for name, order in self.compaction.orders.items():
            count = len(order.arms)
            share = torch.arange(1, count + 1, dtype=torch.float64) / count
            found[name] = torch.empty(count, dtype=torch.float64).index_copy_(0, torch.from_numpy(order.arms), share)
        return found

    def repair(self, reservoir: Reservoir) -> None:
        """Refit the active model, in place, at its selection."""
        kept = reservoir.graph.kept(reservoir.slots, reservoir.template)
        with evaluating(reservoir.active):
            self.compaction.repair(reservoir.active, kept)


def begin_trained(
    full: nn.Module,
    graph: ChannelGraph,
    data: Data,
    seed: int,
    device: torch.device,
    share: Share = WHOLE,
    bfloat16: bool = False,
) -> Beginning:
    """Calibrate the untouched network, which is in eval mode on the device and stays as it is. share: of the images,
    where several processes calibrate together. bfloat16: see `Compaction`."""
    images = sample_images(full, data, enough(graph.macs({})), seed, device, share)
    return Beginning(Compaction(full, graph, images, seed=seed, bfloat16=bfloat16))


def probed(
    full: nn.Module,
    anew: Collection[str],
    graph: ChannelGraph,
    data: Data,
    seed: int,
    device: torch.device,
    share: Share = WHOLE,
) -> str:
    """Fit scores that begin anew to labels of training images, so that what follows can tell which channels they need.

    full: in eval mode on the device; its last layer changes. anew: layers that begin anew. Returns the layer's name, or
    "" where nothing was done: the scores must come from one linear layer, and only that may be new.
    """
    layer = scores_layer(full, (data.example.to(device, next(full.parameters()).dtype),))
    count = min(2 * enough(graph.macs({})), len(data.train)) // share.count * share.count
    if layer is None or set(anew) != {layer} or not count:
        return ""
    order = torch.randperm(len(data.train), generator=generator(seed, 9))[:count]
    labels: list[Tensor] = []

    def calls() -> Iterator[tuple]:
        for images, own in data.eval_batches(data.train.take(share.own(order))):
            labels.append(own)
            yield (images.to(device, next(full.parameters()).dtype, memory_format=torch.channels_last),)

    rows = features(full, full.get_submodule(layer), calls())
    fit_to_labels(full, layer, rows, torch.cat(labels).to(device), share)
    return layer


def searched(
    compaction: Compaction,
    fitter: Fitter,
    fit: Fit,
    budget: Budget,
    seconds: float,
    *,
    policy: str = "bandit",
    report: Callable[[float, float, int], None] = lambda *_: None,
) -> tuple[Fit, Found]:
    """Better widths than those that were allocated, and how they were found.

    Where a budget is in milliseconds, they were predicted; widths that turn out to take longer are not used. Of several
    limits uniform widths meet one and are far below the others, so balanced ones may be the better start.
    """
    start = fit.widths
    if len(budget.limits) > 1 and not fitter.in_ms:
        start = min((start, fitter.balanced()), key=compaction.pull)
    found = compaction.find_widths(start, budget, seconds, cost=fitter.cost, policy=policy, report=report)
    if not fitter.in_ms:
        return Fit(found.widths), found
    timed = fitter.time(found.widths)
    if fitter.use(timed) > 1:
        return fit, Found(fit.widths, found.curve[0][1], found.curve)
    return Fit(found.widths, timed, fit.candidates), found
