"""Weights that make up for the arms that are gone.

Takes a narrow network, the positions that it kept, and what the untouched one says of some images (`Targets`); changes
weights, biases and the means of BatchNorms in place. In one forward pass, before a layer runs, it is refitted by ridge
regression: from its own inputs, as they are after the layers before it were refitted, to the untouched layer's outputs.

Three things are ours: the last layer of a residual branch aims at the sum, and so makes up for errors on the shortcut;
behind a rectifier, values that both networks cut off count as equal (as in Zhang, Zou, He & Sun, 2016, for low-rank
filters); and places are sampled, so that no unfolded activation is ever held.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from dynprune.repair.calibration import MOST_COLUMNS, sample_rows
from dynprune.repair.following import Following, Numbered, followed, listen
from dynprune.repair.patches import (
    Conv,
    Layer,
    explains,
    gram_of,
    groups_of,
    is_layer,
    layer_at,
    matrix_of,
    patches,
    positions_of,
    rows_of,
    size_of,
    weight_from,
)
from dynprune.repair.shares import WHOLE, Share
from dynprune.structure import calling
from dynprune.structure.labels import tensors_in
from dynprune.structure.record import AxisKey

BatchNorm = nn.modules.batchnorm._BatchNorm
RIDGE = 0.01  # of the mean square of a column of inputs: how much a weight is held where it was
ROUNDS = 4  # of the regression behind a rectifier
FROZEN = "is frozen: its weight does not require gradients"
LEAST_SLOPE = 1e-3  # of a channel on the way to a sum: with less, what it says does not reach it


@dataclass
class Target:
    """What one untouched layer says. rows: the places, as `sample_rows` numbers them. size: of its output behind the
    channels. values: its output there, (places, channels). slope, intercept: per channel, from that output to where its
    branch ends. added: what the branch is added to, there."""

    rows: Tensor
    size: tuple[int, ...]
    values: Tensor
    slope: Tensor | None = None
    intercept: Tensor | None = None
    added: Tensor | None = None

    def end_is(self, branch: Tensor, share: Share) -> None:
        """Fit slope and intercept. branch: the branch's end at these places, (places, channels)."""
        mean, end = share.total(torch.stack([self.values.mean(0), branch.mean(0)])) / share.count
        centred = self.values - mean
        both, own = share.total(torch.stack([(centred * branch).sum(0), centred.square().sum(0)]))
        self.slope = both / own.clamp(min=1e-12)
        self.intercept = end - self.slope * mean


@dataclass
class Sums:
    """Of an untouched layer that runs several times, over the places of all its runs. inputs: of u uᵀ, u a patch with
    a 1 appended, (groups, columns + 1, columns + 1). outputs: of u yᵀ, y what it says there, (groups, columns + 1,
    channels)."""

    inputs: Tensor
    outputs: Tensor

    def add(self, rows: Tensor, values: Tensor) -> None:
        """rows: (groups, places, columns + 1). values: (groups, places, channels)."""
        wide = torch.promote_types(rows.dtype, torch.float32)
        rows, values = rows.to(wide), values.to(wide)
        self.inputs += gram_of(rows).double()
        self.outputs += (rows.transpose(1, 2) @ values).double()


@dataclass
class Targets:
    """What the untouched network says of `inputs`, arguments of a call, of which other processes have other shares.
    left: layers that are not refitted, and why. shared: layers that run several times; they are refitted from what the
    untouched network gives them."""

    inputs: tuple
    layers: dict[str, Target]
    following: dict[str, Following]
    left: dict[str, str]
    share: Share = WHOLE
    shared: dict[str, Sums] = field(default_factory=dict)


def frozen(model: nn.Module) -> list[str]:
    """Layers whose weights are not to be trained, where others are: they stay as they are. Of a network in which
    nothing is to be trained, as one that was loaded to be used, none is."""
    wanted = {name: value.requires_grad for name, value in model.named_parameters()}
    layers = [name for name, module in model.named_modules() if is_layer(module)]
    return [name for name in layers if wanted.get(f"{name}.weight") is False] if any(wanted.values()) else []


@torch.no_grad()
def targets_of(
    model: nn.Module,
    inputs: tuple,
    *,
    few: tuple | None = None,
    seed: int = 0,
    scale: float = 1.0,
    share: Share = WHOLE,
    thorough: bool = False,
) -> Targets:
    """One forward pass of the untouched network, in eval mode. inputs: arguments of a call; few: of a small one. scale,
    thorough: of the number of places, see `sample_rows`."""
    few = few or inputs
    story = listen(model, few, lambda: calling.call(model, few))
    following, left = followed(model, story), story.left() | dict.fromkeys(frozen(model), FROZEN)
    result = Targets(inputs, {}, following, left, share)
    for name in story.shared():
        if isinstance(layer := layer_at(model, name), Conv) and layer.transposed:
            left.setdefault(name, "runs several times, and is transposed")
    runs = {name: len(story.ran[name]) for name in story.shared() if name not in left}
    ending = {own.end: name for name, own in following.items()}
    wanted = {own.added for own in following.values() if own.added is not None}
    seen = {-1 - i: value for i, value in enumerate(tensors_in(inputs))}

    def tell(number: int, _function: object, _given: object, results: list[Tensor]) -> None:
        if number in wanted and len(results) == 1:
            seen[number] = results[0]
        if (name := ending.get(number)) in result.layers:
            reach_end(name, results[0])

    def reach_end(name: str, end: Tensor) -> None:
        layer, target, place = layer_at(model, name), result.layers[name], following[name].added
        added = None if place is None else seen.get(place)
        target.end_is(rows_of(layer, end, target.rows), share)
        if added is not None and added.shape == end.shape:
            target.added = rows_of(layer, added, target.rows)

    def look(name: str, layer: Layer, x: Tensor, output: Tensor) -> None:
        rows = sample_rows(layer, len(x), positions_of(layer, output), seed, scale, share, thorough).to(x.device)
        if not share.everywhere(explains(layer, x, output, rows[:256]), x.device):
            result.left[name] = "says something else than the product of its input with its weight"
            return
        values = rows_of(layer, output, rows)
        result.layers[name] = Target(rows, size_of(layer, output), values)
        if numbered.count - 1 == following[name].end:  # nothing comes between the layer and its end
            reach_end(name, output)

    def add(name: str, layer: Layer, x: Tensor, output: Tensor) -> None:
        rows = sample_rows(layer, len(x), positions_of(layer, output), seed, scale / runs[name], share).to(x.device)
        if name in result.left or not share.everywhere(explains(layer, x, output, rows[:256]), x.device):
            result.left.setdefault(name, "says something else than the product of its input with its weight")
            return
        groups = groups_of(layer)
        read = patches(layer, x, size_of(layer, output), rows)
        read = torch.cat([read, read.new_ones(*read.shape[:2], 1)], dim=2)
        if read.shape[2] > MOST_COLUMNS:
            result.left[name] = f"runs several times and reads more than {MOST_COLUMNS} numbers"
            return
        values = rows_of(layer, output, rows).unflatten(1, (groups, -1)).movedim(1, 0)
        if name not in result.shared:
            sizes = groups, read.shape[2], read.shape[2], values.shape[2]
            result.shared[name] = Sums(
                read.new_zeros(sizes[0], sizes[1], sizes[2], dtype=torch.float64),
                read.new_zeros(sizes[0], sizes[1], sizes[3], dtype=torch.float64),
            )
        result.shared[name].add(read, values)

    numbered = Numbered(tell)
    looking: dict[str, Callable] = {name: look for name in following if name not in result.left}
    run_hooked(model, inputs, numbered, after=looking | dict.fromkeys(runs, add))
    result.shared = {name: own for name, own in result.shared.items() if name not in result.left}
    for own in result.shared.values():
        own.inputs, own.outputs = share.total(own.inputs), share.total(own.outputs)
    return result


@torch.no_grad()
def repair(
    narrow: nn.Module,
    kept: Mapping[AxisKey, np.ndarray],
    targets: Targets,
    *,
    ridge: float = RIDGE,
    sums: bool = True,
    rounds: int = ROUNDS,
    settle: Callable[[], object] = lambda: None,
) -> None:
    """Refit every layer of `narrow`, which is in eval mode, in place.

    kept: the positions of the untouched tensors that it holds. sums: let the last layer of a branch aim at the sum.
    rounds: of the regression behind a rectifier; 0 fits also what it cuts off. settle: called after each layer, to put
    back what is not to change.
    """
    wanted = {own.added for own in targets.following.values() if own.added is not None}
    seen = {-1 - i: value for i, value in enumerate(tensors_in(targets.inputs))}

    def tell(number: int, _function: object, _given: object, results: list[Tensor]) -> None:
        if number in wanted and len(results) == 1:
            seen[number] = results[0]

    def refit(name: str, layer: Layer, x: Tensor) -> None:
        own, target = targets.following[name], kept_part(targets.layers[name], layer, kept, name)
        added = None
        if own.added is not None and target.added is not None:
            added = rows_of(layer, seen[own.added], target.rows)
        wanted, edge = target.values, None
        if target.slope is not None and target.intercept is not None:
            reaches = target.slope.abs() >= LEAST_SLOPE
            slope = torch.where(reaches, target.slope, LEAST_SLOPE)
            if sums and added is not None and target.added is not None:
                wanted = wanted + torch.where(reaches, (target.added - added) / slope, 0)
            if rounds and own.passes:
                before = target.intercept[None] + (0 if added is None else added)
                low, high = ((bound - before) / slope for bound in own.passes)
                edge = Edge(torch.where(slope > 0, low, high), torch.where(slope > 0, high, low))
        norm = norm_at(narrow, own.norm) if own.norm else None
        rows = patches(layer, x, target.size, target.rows)
        solve(layer, rows, wanted, ridge, norm, edge, rounds, targets.share)
        settle()

    for name, own in targets.shared.items():
        refit_shared(layer_at(narrow, name), own, kept, name, ridge)
        settle()
    run_hooked(narrow, targets.inputs, Numbered(tell), before={name: refit for name in targets.layers})


def refit_shared(layer: Layer, sums: Sums, kept: Mapping[AxisKey, np.ndarray], name: str, ridge: float = RIDGE) -> None:
    """Refit a layer that runs several times, in place: from the inputs that it still has to what it said of all."""
    taps = math.prod(layer.kernel_size) if isinstance(layer, Conv) else 1
    groups, every = sums.inputs.shape[:2]
    each = sums.outputs.shape[2]  # channels of a group
    reads = torch.from_numpy(kept.get((f"{name}.weight", 1), np.arange((every - 1) // taps)))
    columns = (reads[:, None] * taps + torch.arange(taps)).reshape(-1).to(sums.inputs.device)
    channels = torch.from_numpy(kept.get((f"{name}.weight", 0), np.arange(groups * each)))
    channels = channels.to(sums.inputs.device).view(groups_of(layer), -1)  # whole groups go, or as many of every one
    own = channels[:, 0] // each
    count = sums.inputs[0, -1, -1]
    both = sums.inputs[own] / count
    said = (sums.outputs[own] / count).gather(2, (channels % each)[:, None].expand(-1, every, -1))
    mean_read, mean_said = both[:, columns, -1:], said[:, -1:, :]
    gram, cross = both[:, columns][:, :, columns], said[:, columns]
    if layer.bias is not None:
        gram, cross = gram - mean_read @ mean_read.transpose(1, 2), cross - mean_read @ mean_said
    before = matrix_of(layer).double()
    penalty = ridge * gram.diagonal(dim1=1, dim2=2).mean(1, keepdim=True) + 1e-12
    gap = cross - gram @ before
    gram = gram.clone()
    gram.diagonal(dim1=1, dim2=2).add_(penalty)
    fitted = before + torch.linalg.solve(gram, gap)
    layer.weight.copy_(weight_from(layer, fitted.to(layer.weight.dtype)))
    if layer.bias is not None:
        layer.bias.copy_((mean_said - mean_read.transpose(1, 2) @ fitted).reshape(-1))


def run_hooked(
    model: nn.Module,
    inputs: tuple,
    numbered: Numbered,
    *,
    before: Mapping[str, Callable] | None = None,
    after: Mapping[str, Callable] | None = None,
) -> None:
    """A forward pass in which functions look at layers: before one runs, with its name, itself and its input; or after
    it, with its output too."""

    def ahead(name: str, act: Callable) -> Callable:
        def hook(layer: nn.Module, given: tuple) -> None:
            with numbered.aside():
                act(name, layer, given[0])

        return hook

    def behind(name: str, act: Callable) -> Callable:
        def hook(layer: nn.Module, given: tuple, output: Tensor) -> None:
            with numbered.aside():
                act(name, layer, given[0], output)

        return hook

    with ExitStack() as context:
        for name, act in (before or {}).items():
            context.callback(model.get_submodule(name).register_forward_pre_hook(ahead(name, act)).remove)
        for name, act in (after or {}).items():
            context.callback(model.get_submodule(name).register_forward_hook(behind(name, act)).remove)
        context.enter_context(numbered)
        calling.call(model, inputs)


def kept_part(target: Target, layer: Layer, kept: Mapping[AxisKey, np.ndarray], name: str) -> Target:
    """What the untouched layer says on the channels that the narrow one still has."""
    transposed = isinstance(layer, Conv) and layer.transposed
    positions = kept.get((f"{name}.weight", 1 if transposed else 0))
    if positions is None:
        return target
    channels = torch.from_numpy(positions)
    if transposed:  # the same offsets of every group
        groups = groups_of(layer)
        starts = torch.arange(groups) * (target.values.shape[1] // groups)
        channels = (starts[:, None] + channels).reshape(-1)
    channels = channels.to(target.values.device)

    def pick(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.index_select(-1, channels)

    return Target(
        target.rows,
        target.size,
        target.values[:, channels],
        pick(target.slope),
        pick(target.intercept),
        pick(target.added),
    )


def norm_at(model: nn.Module, name: str) -> BatchNorm:
    norm = model.get_submodule(name)
    assert isinstance(norm, BatchNorm), name
    return norm


@dataclass(frozen=True)
class Edge:
    """What a rectifier lets through of a layer's output: what lies between, in the layer's own scale, (places or 1,
    channels). One of the two may be infinite."""

    low: Tensor
    high: Tensor


def solve(
    layer: Layer,
    rows: Tensor,
    wanted: Tensor,
    ridge: float,
    norm: BatchNorm | None,
    edge: Edge | None,
    rounds: int,
    share: Share = WHOLE,
) -> None:
    """Refit one layer. rows: what it multiplies, (groups, places, columns). wanted: (places, channels). norm: takes the
    shift of a layer without bias; where there is neither, the fit goes through the origin."""
    groups, before = groups_of(layer), matrix_of(layer)

    def by_group(values: Tensor) -> Tensor:
        return values.unflatten(-1, (groups, -1)).movedim(-2, 0)

    def mean_of(values: Tensor) -> Tensor:
        return share.total(values.mean(1, keepdim=True)) / share.count

    shifts = layer.bias is not None or norm is not None
    mean = mean_of(rows) if shifts else rows.new_zeros(groups, 1, rows.shape[2])
    rows, wanted = rows - mean, by_group(wanted)
    ridge_of = Ridge(rows, before, ridge, share)

    def fit(target: Tensor) -> tuple[Tensor, Tensor]:
        shift = mean_of(target) if shifts else target.new_zeros(groups, 1, 1)
        return ridge_of(target - shift), shift

    fitted, shift = fit(wanted)
    if edge is not None:
        low, high = by_group(edge.low), by_group(edge.high)
        below, above = wanted <= low, wanted >= high
        for _ in range(rounds):  # where the untouched layer is cut off, being cut off too is all that is asked for
            said = rows @ fitted + shift
            aim = torch.where(below, torch.minimum(said, low), wanted)
            fitted, shift = fit(torch.where(above, torch.maximum(said, high), aim))
    layer.weight.copy_(weight_from(layer, fitted))
    if shifts:
        shift = (shift - mean @ fitted).reshape(-1)
        if layer.bias is not None:
            layer.bias.copy_(shift)
        elif norm is not None and norm.running_mean is not None:
            norm.running_mean.sub_(shift)


class Ridge:
    """argmin |rows W - wanted|² + λ |W - before|² for several `wanted`. λ: a share of the mean square of a column.

    rows: (groups, places, columns). before: (groups, columns, channels). Factored once, in float64, over places or over
    columns, whichever are fewer; over columns where several processes have shares of the places.
    """

    def __init__(self, rows: Tensor, before: Tensor, ridge: float, share: Share = WHOLE):
        self.rows, self.before, self.share = rows, before, share
        squares = share.total(rows.square().sum((1, 2), dtype=torch.float64))
        self.penalty = ridge * squares[:, None] / rows.shape[2] + 1e-12
        self.over_columns = rows.shape[1] >= rows.shape[2] or share.count > 1
        gram = gram_of(rows if self.over_columns else rows.transpose(1, 2)).double()
        gram = share.total(gram)
        gram.diagonal(dim1=1, dim2=2).add_(self.penalty)
        self.factor = torch.linalg.cholesky(gram)

    def __call__(self, wanted: Tensor) -> Tensor:
        rows = self.rows.transpose(1, 2)
        gap = wanted - self.rows @ self.before
        if self.over_columns:
            change = torch.cholesky_solve(self.share.total((rows @ gap).double()), self.factor)
        else:
            change = rows.double() @ torch.cholesky_solve(gap.double(), self.factor)
        return self.before + change.to(self.before.dtype)
