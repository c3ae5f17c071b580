"""The channel structure of a network: groups of arms, and where each arm's slices lie.

Takes the record of one forward pass on labels (`record.py`), and returns a `ChannelGraph`: a table of (tensor,
dimension, positions) per group of arms. `tracing.trace` makes one from a module and example inputs. Execution, surgery,
cost and reports all read this table; no architecture has code of its own.

An *arm* is the smallest set of slices that must live or die together: one filter of a convolution, its BatchNorm
entries, the matching input slices of every consumer, and every channel tied to it by a residual add or a depthwise
convolution. A *group* holds the arms with the same tensors, dimensions and multiplicities: they are interchangeable and
compete.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from dynprune.errors import DynpruneError
from dynprune.structure.numbers import is_number, number_name, parse_number
from dynprune.structure.record import AxisKey, Cut, Op, Record

# group name -> arm numbers in slot order; a group that is absent keeps all its arms
Selection = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Group:
    """Arms that compete with each other.

    members: per axis (tensor, dimension), the positions of each arm along it, int64 of shape (arms, multiplicity).
    made: the axes along which parameters produce or scale the arms, used for their saliency.
    reads: the axes along which parameters multiply what the arms carry; zeros there hide an arm from its consumers.
    mixed_by: functions that take a statistic over these channels (LayerNorm, ...). A narrow copy works, but removing an
    arm changes what the others see, so it does not equal the masked original. Empty for groups whose removal is exact.
    """

    name: str
    arms: int
    members: dict[AxisKey, np.ndarray]
    made: tuple[AxisKey, ...]
    reads: tuple[AxisKey, ...]
    mixed_by: tuple[str, ...] = ()

    @property
    def layers(self) -> list[str]:
        """Names of the layers whose tensors the arms touch, in order of execution."""
        return list(dict.fromkeys(tensor.rpartition(".")[0] or tensor for tensor, dim in self.members if dim >= 0))

    @property
    def makers(self) -> list[str]:
        """Names of the layers that produce or scale the arms, in order of execution."""
        return list(dict.fromkeys(tensor.rpartition(".")[0] or tensor for tensor, _ in self.made))


@dataclass(frozen=True)
class PinnedLayer:
    """A function that pinned channels, the layer it ran in, and how many channels it pinned."""

    op: str
    layer: str
    channels: int


@dataclass
class Axis:
    """One dimension of one tensor: which group, arm and occurrence sits at each position; group -1 is pinned."""

    group: np.ndarray
    arm: np.ndarray
    occurrence: np.ndarray

    @property
    def size(self) -> int:
        return len(self.group)


@dataclass(repr=False)
class ChannelGraph:
    """Groups of arms of one network, iterable; `print(graph)` lists them.

    shapes: every parameter and buffer of the traced model. ops: every use of a weight with its output positions.
    cuts: functions whose sizes depend on channel counts. An integer attribute that counts channels is an axis too,
    named by `number_name`, with dimension -1: its length is what the module remembers.
    """

    groups: dict[str, Group]
    axes: dict[AxisKey, Axis]
    shapes: dict[str, tuple[int, ...]]
    parameters: frozenset[str]
    ops: list[Op]
    pinned: list[PinnedLayer]
    cuts: list[Cut]
    group_of_label: np.ndarray

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups.values())

    def __len__(self) -> int:
        return len(self.groups)

    def __repr__(self) -> str:
        return f"<ChannelGraph: {len(self.groups)} groups, {self.arms} arms>"

    def __str__(self) -> str:
        lines = [f"{len(self.groups)} groups, {self.arms} arms"]
        lines += [
            f"  {group.name}: {group.arms} arms in {', '.join(group.layers)}"
            + (f" (mixed by {', '.join(group.mixed_by)})" if group.mixed_by else "")
            for group in self
        ]
        lines += [f"  pinned by {pin.op} in {pin.layer}: {pin.channels} channels" for pin in self.pinned]
        return "\n".join(lines)

    @property
    def arms(self) -> int:
        return sum(group.arms for group in self)

    @property
    def full_widths(self) -> dict[str, int]:
        return {group.name: group.arms for group in self}

    def groups_of(self, labels: np.ndarray) -> set[str]:
        """Names of the groups that hold any of these labels."""
        numbers = np.unique(self.group_of_label[labels])
        names = list(self.groups)
        return {names[number] for number in numbers if number >= 0}

    def group(self, name: str) -> Group:
        if name not in self.groups:
            raise DynpruneError(f'No group "{name}". Groups: {", ".join(self.groups)}.')
        return self.groups[name]

    # -- sizes and costs of any widths ---------------------------------------------------------------------------------

    def axis_size(self, key: AxisKey, widths: Mapping[str, int]) -> int:
        """Entries left along an axis at the given widths (groups that are absent stay full)."""
        size = self.shapes[key[0]][key[1]]
        for name, count in self._axis_counts[key].items():
            size -= count * (self.groups[name].arms - widths.get(name, self.groups[name].arms))
        return size

    @property
    def _axis_counts(self) -> dict[AxisKey, dict[str, int]]:
        if "counts" not in self.__dict__:
            counts: dict[AxisKey, dict[str, int]] = {}
            for group in self:
                for key, positions in group.members.items():
                    counts.setdefault(key, {})[group.name] = positions.shape[1]
            self.__dict__["counts"] = counts
        return self.__dict__["counts"]

    def tensor_size(self, tensor: str, widths: Mapping[str, int]) -> int:
        """Elements of a tensor at the given widths."""
        return math.prod(
            self.axis_size((tensor, d), widths) if (tensor, d) in self._axis_counts else size
            for d, size in enumerate(self.shapes[tensor])
        )

    def macs(self, widths: Mapping[str, int]) -> int:
        """Multiply-accumulates per example of convolutions and linear layers at the given widths."""
        sizes: dict[str, int] = {}
        total = 0
        for op in self.ops:
            if op.weight in self.shapes:
                if op.weight not in sizes:
                    sizes[op.weight] = self.tensor_size(op.weight, widths)
                total += op.positions * sizes[op.weight]
        return total

    def params(self, widths: Mapping[str, int]) -> int:
        return sum(self.tensor_size(name, widths) for name in self.parameters)

    # -- indices of a selection ----------------------------------------------------------------------------------------

    def kept(self, selection: Selection, template: Selection | None = None) -> dict[AxisKey, np.ndarray]:
        """Positions to keep along every axis that the selection narrows, in the order of the narrow tensor.

        A selection need not be sorted: slot i of a group holds arm selection[i], wherever that slot lies along an axis.
        The slots' places are those of the arms in `template` (sorted arms of the same widths; default: the sorted
        selection), so concatenation order, parts and flattening stay intact.
        """
        result = {}
        for key, axis in self.axes.items():
            keep = np.ones(axis.size, dtype=bool)
            source = np.arange(axis.size)
            for name in self._axis_counts[key]:
                if name not in selection:
                    continue
                slots = np.asarray(selection[name])
                rank = np.full(self.groups[name].arms, -1)
                rank[np.sort(slots) if template is None else template[name]] = np.arange(len(slots))
                here = axis.group == self._number[name]
                ranks = rank[axis.arm[here]]
                keep[here] = ranks >= 0
                members = self.groups[name].members[key]
                source[here] = members[slots[ranks], axis.occurrence[here]]
            if any(name in selection for name in self._axis_counts[key]):
                result[key] = source[keep]
        return result

    def slot_places(self, template: Selection) -> dict[str, dict[AxisKey, np.ndarray]]:
        """Where each slot lies in the narrow tensors: per group and axis, positions of shape (width, multiplicity)."""
        places: dict[str, dict[AxisKey, np.ndarray]] = {}
        for key, source in self.kept(template, template).items():
            axis = self.axes[key]
            for name in self._axis_counts[key]:
                if name in template:
                    here = np.flatnonzero(axis.group[source] == self._number[name])
                    order = np.lexsort((axis.occurrence[source[here]], axis.arm[source[here]]))
                    places.setdefault(name, {})[key] = here[order].reshape(len(template[name]), -1)
        return places

    @property
    def _number(self) -> dict[str, int]:
        if "numbers" not in self.__dict__:
            self.__dict__["numbers"] = {name: i for i, name in enumerate(self.groups)}
        return self.__dict__["numbers"]


def build_graph(model: nn.Module, record: Record) -> ChannelGraph:
    """Merge tied labels into arms, and arms with the same slices into groups."""
    component = record.labels.components()
    pinned = np.zeros(component.max() + 1, dtype=bool)
    pinned[component[0]] = True
    for pin in record.pins:
        pinned[component[pin.labels.numpy()]] = True
    axes = {key: component[labels.numpy()] for key, labels in record.axes.items()}
    for name, labels in record.elements.items():
        along = element_axis(name, component[labels.numpy()], pinned)
        if along is None:
            pinned[np.unique(component[labels.numpy()])] = True
        elif (name, along[0]) not in axes:
            axes[name, along[0]] = along[1]
    for (name, _), roots in axes.items():
        if name in record.opaque:
            pinned[roots] = True
        if (
            name in record.elements and (name, 0) in record.axes
        ):  # used as a layer's weight and as a value: two roles at once
            pinned[roots] = True
            pinned[component[record.elements[name].numpy()]] = True
    for (source, formula), labels in record.numbers.items():
        axes[number_name(source, formula), -1] = component[labels.numpy()]
    shapes: dict[str, tuple[int, ...]] = {name: (len(roots),) for (name, dim), roots in axes.items() if dim < 0}
    shapes |= {name: tuple(t.shape) for name, t in list(model.named_parameters()) + list(model.named_buffers())}
    parameters = frozenset(name for name, _ in model.named_parameters())
    groups = group_arms(axes, pinned, parameters, record.reads)
    table = {
        key: Axis(np.full(len(roots), -1), np.zeros(len(roots), dtype=np.int64), np.zeros(len(roots), dtype=np.int64))
        for key, roots in axes.items()
    }
    for number, group in enumerate(groups.values()):
        for key, positions in group.members.items():
            table[key].group[positions] = number
            table[key].arm[positions] = np.arange(group.arms)[:, None]
            table[key].occurrence[positions] = np.arange(positions.shape[1])[None]
    table = {key: axis for key, axis in table.items() if (axis.group >= 0).any()}
    groups = mark_mixed(groups, table, record, component)
    of_component = np.full(component.max() + 1, -1)
    for key, roots in axes.items():
        if key in table:
            of_component[roots] = table[key].group
    return ChannelGraph(
        groups,
        table,
        shapes,
        parameters,
        record.ops,
        pinned_layers(record, component),
        record.cuts,
        of_component[component],
    )


def mark_mixed(
    groups: dict[str, Group], table: dict[AxisKey, Axis], record: Record, component: np.ndarray
) -> dict[str, Group]:
    """The groups, each with the functions that mix its channels."""
    mixers: dict[int, set[str]] = {}
    for mixed in record.mixed:
        for root in np.unique(component[mixed.labels.numpy()]).tolist():
            mixers.setdefault(root, set()).add(mixed.op)
    found: dict[str, set[str]] = {name: set() for name in groups}
    names, roots = list(groups), np.array(list(mixers), dtype=np.int64)
    for key, axis in table.items() if mixers else ():
        labels = record.numbers[parse_number(key[0])] if is_number(key[0]) else record.axes.get(key)
        if labels is not None:
            own = component[labels.numpy()]
            here = (axis.group >= 0) & np.isin(own, roots)
            for number, root in set(zip(axis.group[here].tolist(), own[here].tolist())):
                found[names[number]] |= mixers[root]
    return {name: replace(group, mixed_by=tuple(sorted(found[name]))) for name, group in groups.items()}


def element_axis(name: str, roots: np.ndarray, pinned: np.ndarray) -> tuple[int, np.ndarray] | None:
    """The one dimension along which a parameter's elements belong to different arms, or None if there is none."""
    roots = np.where(pinned[roots], -1, roots)
    moving = [d for d in range(roots.ndim) if (roots != np.take(roots, [0], axis=d)).any()]
    if len(moving) != 1:
        return None
    flat = np.moveaxis(roots, moving[0], 0).reshape(roots.shape[moving[0]], -1)[:, 0]
    return moving[0], np.where(flat < 0, np.flatnonzero(pinned)[0], flat)


def group_arms(
    axes: dict[AxisKey, np.ndarray], pinned: np.ndarray, parameters: frozenset[str], reads: set[AxisKey]
) -> dict[str, Group]:
    """Arms with the same axes and multiplicities form a group, named after the first layer that makes them."""
    if not any((~pinned[roots]).any() for roots in axes.values()):
        return {}
    keys = list(axes)
    free = [np.flatnonzero(~pinned[roots]) for roots in axes.values()]
    root = np.concatenate([roots[own] for roots, own in zip(axes.values(), free)])
    key = np.repeat(np.arange(len(keys)), [len(own) for own in free])
    order = np.argsort(root, kind="stable")  # by arm, and of each arm by axis and position, as they were
    root, key, position = root[order], key[order], np.concatenate(free)[order]
    starts = np.flatnonzero(np.append(True, root[1:] != root[:-1]))
    lengths = np.diff(np.append(starts, len(root)))
    by_signature: dict[bytes, list[int]] = {}
    for arm in np.argsort(key[starts], kind="stable").tolist():  # in the order in which axes were met
        by_signature.setdefault(key[starts[arm] : starts[arm] + lengths[arm]].tobytes(), []).append(arm)
    groups: dict[str, Group] = {}
    named: Counter[str] = Counter()
    for arms in by_signature.values():
        signature, counts = np.unique(key[starts[arms[0]] : starts[arms[0]] + lengths[arms[0]]], return_counts=True)
        own = [keys[number] for number in signature.tolist()]
        if len(arms) < 2 or all(dim < 0 for _, dim in own):
            continue  # the last arm of a group can never go, and a number alone has nothing to remove
        places = position[starts[arms][:, None] + np.arange(lengths[arms[0]])]
        places = places[np.argsort(places[:, 0], kind="stable")]
        members = dict(zip(own, np.split(places, np.cumsum(counts)[:-1], axis=1)))
        made = tuple(key for key in own if key[0] in parameters and key not in reads)
        first = (made or tuple(key for key in own if key[1] >= 0))[0][0]
        base = first.rpartition(".")[0] or first
        named[base] += 1
        name = f"{base}#{named[base]}" if named[base] > 1 else base
        while name in groups:  # a layer may bear the name that a second group would get
            name += "#"
        groups[name] = Group(name, len(arms), members, made, tuple(key for key in own if key in reads))
    return groups


def pinned_layers(record: Record, component: np.ndarray) -> list[PinnedLayer]:
    seen = [PinnedLayer(pin.op, pin.layer, len(np.unique(component[pin.labels.numpy()]))) for pin in record.pins]
    seen += [PinnedLayer(op, layer, 0) for op, layer in dict.fromkeys(record.opaque.values())]
    return list(dict.fromkeys(seen))
