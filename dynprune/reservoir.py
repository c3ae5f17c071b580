"""The full-width store, and the narrow model whose slots it fills.

Takes a full-width module, its ChannelGraph and one selection per group. `active` is an ordinary dense module at the
selected widths: the only thing that runs forward and backward, with static shapes. `full` is never run: it keeps the
parameters and BatchNorm statistics of every arm. When a selection changes, `swap` writes the tensors of the slots that
changed back to `full` and loads the newcomers, in place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from dynprune.channels import ChannelGraph, Selection
from dynprune.labels import AxisKey
from dynprune.surgery import slim


class Reservoir:
    """Full-width tensors and the active model over them.

    slots: per group, the arm in each slot, int64 of shape (width,). Slots keep their places for the life of the object.
    """

    def __init__(self, full: nn.Module, graph: ChannelGraph, selection: Selection, template: Selection | None = None):
        self.full, self.graph = full, graph
        self.slots = {name: np.array(arms) for name, arms in selection.items()}
        self.template = {name: np.sort(arms) for name, arms in (template or selection).items()}
        self.places = graph.slot_places(self.template)
        self.active = slim(full, graph.kept(self.slots, self.template))
        self._store = dict(full.named_parameters()) | dict(full.named_buffers())
        self._live = dict(self.active.named_parameters()) | dict(self.active.named_buffers())

    @property
    def widths(self) -> dict[str, int]:
        return {name: len(arms) for name, arms in self.slots.items()}

    @torch.no_grad()
    def write_back(self, names: set[str] | None = None) -> None:
        """Copy the active tensors (or only those named) into their places in the full ones."""
        kept = by_tensor(self.graph.kept(self.slots, self.template))
        for name in self._store if names is None else names:
            scatter(self._store[name], kept.get(name, {}), self._live[name])

    @torch.no_grad()
    def swap(self, selection: Mapping[str, np.ndarray], optimizer: torch.optim.Optimizer | None = None) -> int:
        """Make the active model execute `selection`; returns the number of arms exchanged.

        Arms that stay keep their slots. A newcomer brings its parameters and statistics from the reservoir, and its
        momentum starts at zero: what it was when the arm left no longer fits (measured: worth a point of accuracy).
        """
        changed: dict[str, np.ndarray] = {}
        updated = dict(self.slots)
        for name, arms in selection.items():
            leaving = np.flatnonzero(~np.isin(self.slots[name], arms))
            if len(leaving):
                changed[name] = leaving
                updated[name] = self.slots[name].copy()
                updated[name][leaving] = np.setdiff1d(arms, self.slots[name])
        if not changed:
            return 0
        touched = {tensor for name in changed for tensor, _ in self.graph.groups[name].members}
        self.write_back(touched)
        self.slots = updated
        kept = by_tensor(self.graph.kept(self.slots, self.template))
        for name in touched:
            self._live[name].copy_(gather(self._store[name], kept[name]))
        if optimizer is not None:
            self._forget_momentum(changed, optimizer)
        return sum(len(slots) for slots in changed.values())

    def _forget_momentum(self, changed: Mapping[str, np.ndarray], optimizer: torch.optim.Optimizer) -> None:
        for name, slots in changed.items():
            for (tensor, dim), places in self.places[name].items():
                live = self._live[tensor]
                where = torch.from_numpy(places[slots].reshape(-1)).to(live.device)
                for value in optimizer.state.get(live, {}).values():
                    if isinstance(value, Tensor) and value.shape == live.shape:
                        value.index_fill_(dim, where, 0)


def by_tensor(kept: Mapping[AxisKey, np.ndarray]) -> dict[str, dict[int, Tensor]]:
    result: dict[str, dict[int, Tensor]] = {}
    for (name, dim), positions in kept.items():
        result.setdefault(name, {})[dim] = torch.from_numpy(positions)
    return result


def gather(full: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    """The kept positions of `full` along each given dimension."""
    for dim, positions in kept.items():
        full = full.index_select(dim, positions.to(full.device))
    return full


def scatter(full: Tensor, kept: Mapping[int, Tensor], values: Tensor) -> None:
    """The inverse of `gather`, in place: write `values` to the kept positions of `full`."""
    if not kept:
        full.copy_(values)
        return
    index = []
    for dim in range(full.ndim):
        positions = kept.get(dim, torch.arange(full.shape[dim]))
        index.append(positions.to(full.device).view([-1 if d == dim else 1 for d in range(full.ndim)]))
    full.index_put_(tuple(index), values.to(full.device))


@torch.no_grad()
def scale_for_narrow_fan_in(full: nn.Module, graph: ChannelGraph, widths: Mapping[str, int]) -> None:
    """Scale each filter bank's initial weights by sqrt(full fan-in / narrow fan-in), in place.

    Initial weights are drawn for the full fan-in, but the narrow one runs: at half the width their squared norm would be
    half of what a thin network starts with, which doubles the effective learning rate (measured: worth two points).
    """
    parameters = dict(full.named_parameters())
    for op in {op.weight: op for op in graph.ops}.values():
        key = (op.weight, 1)
        if key in graph.axes and op.weight in parameters:
            parameters[op.weight].mul_(math.sqrt(graph.shapes[op.weight][1] / graph.axis_size(key, widths)))
