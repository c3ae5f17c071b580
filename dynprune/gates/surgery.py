"""What gates hardly ever open is closed for good, and cut: a gated network gets smaller before it decides anything.

Takes a gated network and images; closes the units that fewer than one image in a hundred opens (a constant in place of
their logit), and makes the narrower gated network that computes the same. Of a gate of single channels little can be
skipped image by image, yet what no image needs costs nothing after the cut, whatever the layer and the runtime.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from dynprune.gates.gating import GatedNetwork, Predictor, Site, statistics
from dynprune.structure.surgery import slim
from dynprune.structure.tracing import trace

RARE = 0.01  # share of the images; a unit that opens for fewer is closed for good
CLOSED = -1e4  # the logit of a unit that is closed for good, far below any shift


@torch.no_grad()
def close_rare(model: GatedNetwork, opened: Mapping[str, Tensor]) -> int:
    """Close for good what is rarely open; the best unit of each group stays. opened: per group 0 or 1, (images, units).
    Returns how many are closed."""
    count = 0
    for site, predictor in deciding(model):
        rates = [opened[gate.group].float().mean(0) for gate in site.decides]
        rare = torch.cat([(own < RARE) & (torch.arange(len(own)) != int(own.argmax())) for own in rates]).to(
            predictor.spread.bias.device
        )
        predictor.spread.weight[rare], predictor.spread.bias[rare] = 0.0, CLOSED
        count += int(rare.sum())
    return count


def closed_for_good(model: GatedNetwork) -> dict[str, Tensor]:
    """Per group, which units can be cut because no image opens them, (units,) of bool; never all of a group."""
    found = {}
    for site, predictor in deciding(model):
        closed = ((predictor.spread.weight == 0) & (predictor.spread.bias <= CLOSED)).cpu()
        for gate, own in zip(site.decides, closed.split([len(gate.sizes) for gate in site.decides])):
            found[gate.group] = own & ~(own.all() & (torch.arange(len(own)) == 0))
    return found


@torch.no_grad()
def cut_closed(model: GatedNetwork, example: Tensor) -> GatedNetwork:
    """A narrower gated network without the units that are closed for good, which opens and computes the same; in eval
    mode.

    Its costs are shares of the same ungated network. With nothing to cut, the network itself.
    """
    closed = closed_for_good(model)
    if not any(bool(own.any()) for own in closed.values()):
        return model
    sizes = {gate.group: torch.tensor(gate.sizes) for gate in model.gates}
    kept = model.graph.kept(
        {group: np.flatnonzero(~own.repeat_interleave(sizes[group]).numpy()) for group, own in closed.items()}
    )
    network = slim(model.network, kept).eval()
    small = GatedNetwork(
        network,
        trace(network, example),
        example,
        block=model.block,
        hidden=model.hidden,
        cuts=[gate.group for gate in model.gates if gate.cuts],
    )
    left = {group: tuple(sizes[group][~own].tolist()) for group, own in closed.items()}
    if {gate.group: gate.sizes for gate in small.gates} != left:
        return model  # a structure in which the rest no longer forms the same groups: nothing is lost but time
    theirs = {site.op.weight: predictor for site, predictor in deciding(small)}
    for site, predictor in deciding(model):
        units = torch.cat([~closed[gate.group] for gate in site.decides])
        narrow_predictor(predictor, theirs[site.op.weight], inputs_kept(model, site, kept), units)
    small.shift.copy_(model.shift)
    small.dense_macs = model.dense_macs
    return small.eval()


def inputs_kept(model: GatedNetwork, site: Site, kept: Mapping) -> Tensor:
    """Which of the pooled inputs of a site are left, as positions."""
    width, groups = model.graph.shapes[site.op.weight][1], site.op.groups
    own = torch.from_numpy(np.asarray(kept.get((site.op.weight, 1), np.arange(width))))
    return torch.cat([own + number * width for number in range(groups)])


def narrow_predictor(predictor: Predictor, small: Predictor, inputs: Tensor, units: Tensor) -> None:
    """Fill `small` with these inputs and units of `predictor`. An input that is gone was 0; what a 0 gave goes into the
    bias."""
    mean, deviation = statistics(predictor.norm)
    gone = torch.ones(len(mean), dtype=torch.bool)
    gone[inputs] = False
    zero = -mean / deviation
    for name in ("running_mean", "running_var"):
        getattr(small.norm, name).copy_(getattr(predictor.norm, name)[inputs])
    small.hidden.weight.copy_(predictor.hidden.weight[:, inputs])
    small.hidden.bias.copy_(predictor.hidden.bias + predictor.hidden.weight[:, gone] @ zero[gone])
    small.out.weight.copy_(predictor.out.weight[units])
    for name in ("weight", "bias", "running_mean", "running_var"):
        getattr(small.spread, name).copy_(getattr(predictor.spread, name)[units])


def deciding(model: GatedNetwork) -> Iterable[tuple[Site, Predictor]]:
    """The sites that decide, each with its predictor."""
    return [(site, model.predictor(site)) for site in model.sites.values() if site.decides]


def all_units(model: GatedNetwork, opened: Tensor) -> Tensor:
    """What a cut network opened, (images, units left), as units of the whole one, (images, units)."""
    left = ~torch.cat([closed_for_good(model)[gate.group] for gate in model.gates])
    if opened.shape[1] == len(left):
        return opened
    whole = opened.new_zeros(len(opened), len(left))
    whole[:, left] = opened
    return whole
