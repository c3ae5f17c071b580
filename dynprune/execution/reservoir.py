"""The full-width store, and the narrow model whose slots it fills.

Takes a full-width module, its ChannelGraph and one selection per group. `active` is an ordinary dense module at the
selected widths: the only thing that runs forward and backward, with static shapes. `full` is never run: it keeps the
parameters and BatchNorm statistics of every arm. When a selection changes, `swap` exchanges only the slots that
changed.

Both sides are flat: the narrowed tensors of the active model are views into a few buffers, the full ones into others,
so a swap is a few gathers and scatters, however many layers it touches. What always moves together is moved together: a
buffer's rows are *blocks*, the elements of a tensor behind its last channel dimension (the nine taps of a 3x3 filter),
and tensors with blocks of one size and one type share a buffer. Which block of the active buffer belongs to which of
the full one is kept on the host, so a GPU is never waited for.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dynprune.execution.momentum import FRESH
from dynprune.state.tensors import carry_over, loose_to, named_tensors
from dynprune.structure.channels import ChannelGraph, Selection
from dynprune.structure.numbers import is_number, parse_number
from dynprune.structure.record import AxisKey
from dynprune.structure.surgery import slim

SWAP_BLOCKS = 2**15  # exchanged at once: enough to keep copies few, little enough not to show in peak memory
# what is there before the first step: a fused SGD fails where some parameters get their first gradient later
OPTIMIZER_STATE = {
    torch.optim.SGD: ("momentum_buffer",),
    torch.optim.Adam: ("exp_avg", "exp_avg_sq"),
    torch.optim.AdamW: ("exp_avg", "exp_avg_sq"),
}


@dataclass
class State:
    """What the optimizer keeps of every element. live: like `Buffers.live`. store: of all arms, like `Buffers.store`;
    None where newcomers begin anew."""

    live: Tensor
    store: Tensor | None


@dataclass
class Buffers:
    """Tensors with blocks of one size and one type. store: full-width, (blocks, size); live: narrow; states: the
    optimizer's, by name."""

    store: Tensor
    live: Tensor
    states: dict[str, State]


@dataclass
class Span:
    """One narrowed tensor. start: its first block in the active buffer; origin: in the full one; source: the block of
    the full buffer that each of its blocks holds now, int32 where that reaches, of the narrow shape's leading
    dimensions; full_strides: blocks per step along each of them there."""

    buffers: Buffers
    start: int
    origin: int
    source: np.ndarray
    full_strides: tuple[int, ...]

    @property
    def rows(self) -> slice:
        """Its blocks in the active buffer."""
        return slice(self.start, self.start + self.source.size)


@dataclass
class Move:
    """Places along one dimension of a tensor that get other arms. gained: how far each arm lies from the one it
    replaces."""

    span: Span
    dim: int
    places: np.ndarray
    gained: np.ndarray

    @property
    def blocks(self) -> int:
        return self.span.source.size // self.span.source.shape[self.dim] * len(self.places)

    def targets(self) -> np.ndarray:
        """The blocks concerned in the active buffer."""
        shape = self.span.source.shape
        strides = tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))
        return self.span.start + positions(
            [self.places if d == self.dim else np.arange(n) for d, n in enumerate(shape)], strides
        )

    def sources(self) -> np.ndarray:
        return self.span.source.take(self.places, axis=self.dim)

    def advance(self) -> None:
        shape = [-1 if d == self.dim else 1 for d in range(self.span.source.ndim)]
        self.span.source[(slice(None),) * self.dim + (self.places,)] += (
            (self.gained * self.span.full_strides[self.dim]).reshape(shape).astype(self.span.source.dtype)
        )


class Reservoir:
    """Full-width tensors and the active model over them.

    slots: per group, the arm in each slot, int64 of shape (width,). Slots keep their places for the life of the object.
    device: where the active model runs; store_device: where the full tensors rest (host memory is pinned for a GPU).
    """

    def __init__(
        self,
        full: nn.Module,
        graph: ChannelGraph,
        selection: Selection,
        template: Selection | None = None,
        *,
        device: torch.device | str = "cpu",
        store_device: torch.device | str | None = None,
    ):
        self.full, self.graph = full, graph
        self.optimizer: torch.optim.Optimizer | None = None
        self.slots = {name: np.array(arms) for name, arms in selection.items()}
        self.template = {name: np.sort(arms) for name, arms in (template or selection).items()}
        self.places = graph.slot_places(self.template)
        kept = graph.kept(self.slots, self.template)
        self.active = loose_to(slim(full, kept).to(device), torch.device(device))
        self._flatten(by_tensor(kept), torch.device(device), torch.device(store_device or device))

    @property
    def widths(self) -> dict[str, int]:
        return {name: len(arms) for name, arms in self.slots.items()}

    @property
    def store_bytes(self) -> int:
        return sum(buffers.store.numel() * buffers.store.element_size() for buffers in self.buffers.values())

    @torch.no_grad()
    def _flatten(
        self, kept: Mapping[str, Mapping[int, Tensor]], device: torch.device, store_device: torch.device
    ) -> None:
        """Move narrowed tensors into flat buffers; what is not narrowed is one tensor that both sides share."""
        full, live = named_tensors(self.full), named_tensors(self.active)
        self.spans: dict[str, Span] = {}
        self.buffers: dict[tuple[int, torch.dtype], Buffers] = {}
        pin = device.type == "cuda" and store_device.type == "cpu"
        by_block: dict[tuple[int, torch.dtype], list[str]] = {}
        for name, dims in kept.items():
            if not is_number(name):
                by_block.setdefault((math.prod(full[name].shape[max(dims) + 1 :]), full[name].dtype), []).append(name)
        for (block, dtype), names in by_block.items():
            buffers = self.buffers[block, dtype] = Buffers(
                torch.empty(
                    sum(full[name].numel() for name in names) // block,
                    block,
                    dtype=dtype,
                    device=store_device,
                    pin_memory=pin,
                ),
                torch.empty(sum(live[name].numel() for name in names) // block, block, dtype=dtype, device=device),
                {},
            )
            start = full_start = 0
            for name in names:
                old, small = full[name], live[name]
                lead = max(kept[name]) + 1
                blocks, full_blocks = small.numel() // block, old.numel() // block
                set_tensor(
                    self.full, name, buffers.store[full_start : full_start + full_blocks].view(old.shape).copy_(old)
                )
                set_tensor(self.active, name, buffers.live[start : start + blocks].view(small.shape).copy_(small))
                strides = tuple(math.prod(old.shape[d + 1 : lead]) for d in range(lead))
                index = [kept[name].get(d, torch.arange(old.shape[d])).numpy() for d in range(lead)]
                source = (full_start + positions(index, strides)).astype(
                    np.int32 if len(buffers.store) < 2**31 else np.int64
                )
                self.spans[name] = Span(buffers, start, full_start, source, strides)
                start, full_start = start + blocks, full_start + full_blocks
        for name, tensor in live.items():
            if name not in kept:
                set_tensor(self.full, name, tensor)

    @torch.no_grad()
    def write_back(self) -> None:
        """Copy every active tensor into its place in the full one."""
        for span in self.spans.values():
            rows = span.buffers.live[span.rows]
            span.buffers.store.index_copy_(
                0,
                self._indices([span.source], rows.device).to(span.buffers.store.device),
                rows.to(span.buffers.store.device),
            )

    @torch.no_grad()
    def swap(self, selection: Mapping[str, np.ndarray]) -> int:
        """Make the active model execute `selection`; returns the number of arms exchanged.

        Arms that stay keep their slots. A newcomer brings its parameters, statistics and what the optimizer knows of
        them from the reservoir; only its momentum starts at zero (see `momentum.FRESH`).
        """
        self.adopt()
        moves: dict[str, list[Move]] = {}
        exchanged = 0
        for name, arms in selection.items():
            slots = np.flatnonzero(~np.isin(self.slots[name], arms))
            if not len(slots):
                continue
            before, after = self.slots[name][slots], np.setdiff1d(arms, self.slots[name])
            self.slots[name][slots] = after
            exchanged += len(slots)
            for (tensor, dim), places in self.places[name].items():
                if tensor in self.spans:
                    members = self.graph.groups[name].members[tensor, dim]
                    moves.setdefault(tensor, []).append(
                        Move(
                            self.spans[tensor],
                            dim,
                            places[slots].reshape(-1),
                            (members[after] - members[before]).reshape(-1),
                        )
                    )
        batches: dict[int, list[Move]] = {}
        for own in moves.values():
            batch = batches.setdefault(id(own[0].span.buffers), [])
            batch += own
            if sum(move.blocks for move in batch) > SWAP_BLOCKS:
                self._exchange(batches.pop(id(own[0].span.buffers)))
        for batch in batches.values():
            self._exchange(batch)
        return exchanged

    def _exchange(self, moves: list[Move]) -> None:
        """Write the blocks under these moves back to the full buffer, and load what belongs there now. All moves of one
        tensor come together, and all belong to one pair of buffers."""
        buffers = moves[0].span.buffers
        store = buffers.store
        pairs = [(store, buffers.live)]
        pairs += [(state.store, state.live) for state in buffers.states.values() if state.store is not None]
        here = self._indices([move.targets() for move in moves], buffers.live.device)
        left = self._indices([move.sources() for move in moves], store.device)
        for all_arms, live in pairs:
            all_arms.index_copy_(0, left, live.index_select(0, here).to(store.device))
        for move in moves:
            move.advance()
        came = self._indices([move.sources() for move in moves], store.device)
        for all_arms, live in pairs:
            live.index_copy_(0, here, all_arms.index_select(0, came).to(live.device))
        for state in buffers.states.values():
            if state.store is None:
                state.live.index_fill_(0, here, 0)

    @staticmethod
    def _indices(parts: list[np.ndarray], device: torch.device) -> Tensor:
        return torch.from_numpy(np.concatenate([part.reshape(-1) for part in parts]).astype(np.int64, copy=False)).to(
            device, non_blocking=True
        )

    # -- the optimizer's state -----------------------------------------------------------------------------------------

    def attach(
        self, optimizer: torch.optim.Optimizer, kinds: Mapping[str, float] | None = None, fresh: Collection[str] = FRESH
    ) -> None:
        """Let what the optimizer keeps of every element follow its arms, in flat buffers too.

        kinds: names and first values of such tensors (see `momentum.state_kinds`), those of SGD and Adam if none are
        given. fresh: the names of those with which newcomers begin at zero.
        """
        begins = OPTIMIZER_STATE.get(type(optimizer), ())
        self.optimizer, self.fresh = optimizer, fresh
        self.kinds = dict.fromkeys(begins, 0.0) if kinds is None else dict(kinds)
        for buffers in self.buffers.values():
            buffers.states = {}
        for name, parameter in self.active.named_parameters():
            for key in begins:
                if key in self.kinds:
                    span = self.spans.get(name)
                    optimizer.state[parameter][key] = (
                        torch.zeros_like(parameter) if span is None else self._view(span, key, parameter)
                    )
            if "exp_avg" in begins and "exp_avg" in self.kinds:
                # where the fused kernel reads it
                optimizer.state[parameter]["step"] = torch.zeros((), device=parameter.device)

    def _view(self, span: Span, key: str, like: Tensor) -> Tensor:
        """The place of a parameter's state in its buffer, which is made where there is none yet."""
        state = span.buffers.states.get(key)
        if state is None or state.live.dtype != like.dtype:
            first, store, live = self.kinds[key], span.buffers.store, span.buffers.live
            state = span.buffers.states[key] = State(
                torch.full_like(live, first, dtype=like.dtype),
                None if key in self.fresh else torch.full_like(store, first, dtype=like.dtype),
            )
        return state.live[span.rows].view(like.shape)

    @torch.no_grad()
    def adopt(self) -> None:
        """Move into the buffers what the optimizer has made since, or has loaded."""
        if self.optimizer is None:
            return
        for name, parameter in self.active.named_parameters():
            span, own = self.spans.get(name), self.optimizer.state.get(parameter)
            if span is None or not own:
                continue
            for key in self.kinds:
                value = own.get(key)
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    view = self._view(span, key, value)
                    if value.data_ptr() != view.data_ptr():
                        own[key] = view.copy_(value)

    @torch.no_grad()
    def carried(self) -> dict[str, Tensor]:
        """Of all arms, what the optimizer knows of them and gives back to them, as KEY.PARAMETER at full width."""
        self.adopt()
        found = {}
        for name, parameter in self.active.named_parameters():
            if (span := self.spans.get(name)) is None:
                continue
            for key, state in span.buffers.states.items():
                if state.store is not None and self.optimizer is not None and self.optimizer.state.get(parameter):
                    rows = state.live[span.rows].to(state.store.device)
                    state.store.index_copy_(0, self._indices([span.source], state.store.device), rows)
                    found[f"{key}.{name}"] = self._whole(span, state.store, name)
        return found

    @torch.no_grad()
    def carry(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `carried` gave. Raises ValueError for other shapes."""
        self.adopt()
        for name, value in tensors.items():
            key, _, own = name.partition(".")
            span = self.spans.get(own)
            if span is None or key not in span.buffers.states or (store := span.buffers.states[key].store) is None:
                raise ValueError(f"state of the optimizer for {own}, which has none")
            place = self._whole(span, store, own)
            if place.shape != value.shape:
                raise ValueError(f"state of the optimizer of another shape for {own}")
            place.copy_(value)

    def _whole(self, span: Span, store: Tensor, name: str) -> Tensor:
        """A tensor's part of a full-width buffer, in its full shape."""
        full = named_tensors(self.full)[name]
        return store[span.origin : span.origin + full.numel() // store.shape[1]].view(full.shape)


def up_to_date(reservoir: Reservoir) -> nn.Module:
    """The full-width network with all that training changed in the active one: parameters, statistics, attributes."""
    reservoir.write_back()
    carry_over(
        reservoir.active,
        reservoir.full,
        sizes={parse_number(name)[0].path for name, dim in reservoir.graph.axes if dim < 0},
    )
    return reservoir.full


def positions(index: list[np.ndarray], strides: tuple[int, ...]) -> np.ndarray:
    """Flat positions of the grid that `index` spans, for the given strides: int64, of shape [len(i) for i in index]."""
    total = np.zeros((1,) * len(index), dtype=np.int64)
    for dim, (along, stride) in enumerate(zip(index, strides)):
        total = total + (along.astype(np.int64) * stride).reshape([-1 if d == dim else 1 for d in range(len(index))])
    return total


def set_tensor(model: nn.Module, name: str, value: Tensor) -> None:
    """Let a parameter or buffer use the memory of `value`, but not its version: a network may write into one buffer (a
    spectral norm does in every step) while autograd still needs its neighbours in memory, which then must not count as
    changed."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if (parameter := module._parameters.get(leaf)) is not None:
        parameter.data = value.data
    else:
        module._buffers[leaf] = value.data


def by_tensor(kept: Mapping[AxisKey, np.ndarray]) -> dict[str, dict[int, Tensor]]:
    result: dict[str, dict[int, Tensor]] = {}
    for (name, dim), positions in kept.items():
        result.setdefault(name, {})[dim] = torch.from_numpy(positions)
    return result


@torch.no_grad()
def silence(full: nn.Module, graph: ChannelGraph, arms: Mapping[str, np.ndarray]) -> None:
    """Set the weights that read these arms to zero, in place: who executes them computes what it did before, and they
    can learn."""
    parameters = dict(full.named_parameters())
    for name, own in arms.items():
        group = graph.groups[name]
        for tensor, dim in group.reads:
            if tensor in parameters:
                parameters[tensor].index_fill_(
                    dim, torch.from_numpy(group.members[tensor, dim][own].reshape(-1)).to(parameters[tensor].device), 0
                )


@torch.no_grad()
def scale_for_narrow_fan_in(full: nn.Module, graph: ChannelGraph, widths: Mapping[str, int]) -> None:
    """Scale each filter bank's initial weights by sqrt(full fan-in / narrow fan-in), in place.

    Initial weights are drawn for the full fan-in, but the narrow one runs: at half the width their squared norm would
    be half of what a thin network starts with, which doubles the effective learning rate (measured: worth two points).
    """
    parameters = dict(full.named_parameters())
    for op in {op.weight: op for op in graph.ops}.values():
        key = (op.weight, 1)
        if key in graph.axes and op.weight in parameters:
            parameters[op.weight].mul_(math.sqrt(graph.shapes[op.weight][1] / graph.axis_size(key, widths)))
