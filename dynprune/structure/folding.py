"""Sizes that a block needs later: how many channels its own layers have, kept for a method that folds them into one.

RepVGG, MobileOne and their kind train with several branches and fold them afterwards (`reparameterize`,
`switch_to_deploy`, `fuse`): into a new layer of `self.in_channels` and `self.out_channels`. No forward pass uses these
numbers, so tracing does not meet them. Takes a traced module and its graph; returns the numbers that count channels of
the module's own layers and that no forward pass uses.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from dynprune.state.copies import cloned
from dynprune.structure.calling import call
from dynprune.structure.channels import ChannelGraph
from dynprune.structure.labels import tensors_in
from dynprune.structure.numbers import Source
from dynprune.structure.record import NumberKey, Record

INTO = {"in", "inp", "input", "inputs", "inc", "cin", "c1", "inplanes", "inchannels"}
OUT = {"out", "oup", "output", "outputs", "outc", "cout", "c2", "outplanes", "outchannels", "planes", "num"}
COUNTS = (
    INTO
    | OUT
    | {
        "channels",
        "channel",
        "chs",
        "chans",
        "ch",
        "dim",
        "dims",
        "features",
        "filters",
        "width",
        "hidden",
        "embed",
        "groups",
        "size",
        "c",
    }
)
UNUSED = -7654321  # no forward pass works with so many channels


def sizes_for_later(model: nn.Module, graph: ChannelGraph, record: Record, inputs: tuple) -> dict[NumberKey, Tensor]:
    """Numbers to repair in compact copies, with the labels that they count. The model is run once more."""
    if not graph.groups:
        return {}
    known, component = {source for source, _ in record.numbers}, torch.from_numpy(record.labels.components())
    found: dict[NumberKey, Tensor] = {}
    for path, module in model.named_modules():
        if type(module).__module__.startswith("torch.nn."):
            continue
        for attribute, value in vars(module).items():
            words = set(re.split(r"[_\d]+|(?<=[a-z])(?=[A-Z])", attribute)) | {attribute.replace("_", "").lower()}
            source = Source(path, attribute, -1)
            if (
                type(value) is int
                and value > 1
                and not attribute.startswith("_")
                and source not in known
                and {word.lower() for word in words} & COUNTS
            ):
                labels = counted(path, {word.lower() for word in words}, value, record, component)
                if labels is not None:
                    found[source, (1, 1, 0)] = labels
    return found if found and unused(model, [source for source, _ in found], inputs, record.outputs) else {}


def counted(path: str, words: set[str], value: int, record: Record, component: Tensor) -> Tensor | None:
    """The labels of the channels inside the module that an attribute of this name counts, or None if that is not
    clear."""
    inside = path + "." if path else ""
    own = [
        (op, record.axes.get((op.weight, 0)), record.axes.get((op.weight, 1)))
        for op in record.ops
        if op.weight.startswith(inside)
    ]
    made = [axis for op, axis, _ in own if axis is not None and len(axis) == value]
    read = [axis for op, _, axis in own if axis is not None and len(axis) == value]
    depthwise = [axis for op, axis, _ in own if axis is not None and op.groups == value and len(axis) == value]
    if "groups" in words:
        return alike(depthwise, component)
    if words & INTO:
        return first_of(read or depthwise)
    if words & OUT:
        return made[-1] if made else None
    return alike(made + read, component)


def first_of(axes: list[Tensor]) -> Tensor | None:
    return axes[0] if axes else None


def alike(axes: list[Tensor], component: Tensor) -> Tensor | None:
    """The first of these labels, if all stand for the same arms."""
    return axes[0] if axes and all(torch.equal(component[axes[0]], component[axis]) for axis in axes[1:]) else None


@torch.no_grad()
def unused(model: nn.Module, sources: list[Source], inputs: tuple, outputs: list[Tensor]) -> bool:
    """Whether the outputs stay what they were when these numbers are nonsense. They are put back."""
    before = [getattr(model.get_submodule(source.module), source.attribute) for source in sources]
    try:
        for source in sources:
            setattr(model.get_submodule(source.module), source.attribute, UNUSED)
        torch.manual_seed(0)
        found = list(tensors_in(call(model, cloned(inputs))))
    except Exception:
        return False
    finally:
        for source, value in zip(sources, before):
            setattr(model.get_submodule(source.module), source.attribute, value)
    return len(outputs) == len(found) and all(
        a.shape == b.shape and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) for a, b in zip(outputs, found)
    )
