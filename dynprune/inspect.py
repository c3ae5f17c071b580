"""What can be removed from a network, what cannot and why, and a proof that removal is exact.

Takes a model and an input shape, traces it, and reports groups, shares and pins. `check` removes random arms and compares the
original, in which the removed arms' consumers see zeros, with the compact copy.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass

import torch
from torch import nn

from dynprune import zoo
from dynprune.channels import ChannelGraph, PinnedLayer
from dynprune.errors import DynpruneError
from dynprune.surgery import slim
from dynprune.labels import tensors_in
from dynprune.tracing import EXACT, difference, evaluating, exact_part, first_line, lively, random_selection, run_compact, trace


@dataclass(frozen=True)
class GroupLine:
    """One group; shares are those of the network's MACs and parameters that lie in its arms. mixed_by: see Group."""

    name: str
    arms: int
    layers: list[str]
    macs_share: float
    params_share: float
    mixed_by: tuple[str, ...]


@dataclass(frozen=True)
class Check:
    """max_rel_diff: largest difference over largest output, with arms removed from the groups that no norm mixes.
    params_kept_share: what is left when arms are removed from all groups; that copy must run. mixed: the groups that were
    checked for running only."""

    ok: bool
    max_rel_diff: float
    params_kept_share: float
    trace_seconds: float
    fraction: float
    seed: int
    mixed: list[str]
    failure: str


@dataclass(frozen=True)
class Inspection:
    """prunable_params_share: parameters in at least one removable arm, over all."""

    model: str
    input: str
    groups: int
    arms: int
    macs: int
    params: int
    prunable_params_share: float
    pinned: list[PinnedLayer]
    lines: list[GroupLine]
    check: Check | None


def parse_input(text: str) -> tuple[int, ...]:
    """"3x224x224" to (3, 224, 224)."""
    try:
        shape = tuple(int(part) for part in text.lower().split("x"))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise DynpruneError(f'--input got "{text}". Expected sizes such as 3x224x224.')
    return shape


def default_classes(name: str) -> int:
    """What the source's networks are usually built for: ImageNet's 1000 classes, VOC's 21 in segmentation, COCO's 91 in detection; else 10."""
    if name.startswith("torchvision:"):
        import torchvision

        for module, classes in ((torchvision.models.segmentation, 21), (torchvision.models.detection, 91)):
            if name.partition(":")[2] in torchvision.models.list_models(module=module):
                return classes
    return 1000 if name.startswith(("torchvision:", "timm:")) else 10


def build_for_inspection(name: str, classes: int, shape: str) -> tuple[nn.Module, tuple[int, ...]]:
    """The model, and the input shape: the one given, or the one its source is used to."""
    model = zoo.build(name, classes, 0)
    if shape:
        return model, parse_input(shape)
    if name.startswith("timm:"):
        return model, tuple(model.default_cfg.get("input_size", (3, 224, 224)))
    return model, (3, 224, 224) if name.startswith("torchvision:") else (3, 32, 32)


def example_for(name: str, size: tuple[int, ...]) -> tuple:
    """Arguments for one forward pass; torchvision's detectors take a list of images."""
    x = torch.randn(1, *size, generator=torch.Generator().manual_seed(0))
    if name.startswith("torchvision:"):
        import torchvision
        if name.removeprefix("torchvision:") in torchvision.models.list_models(module=torchvision.models.detection):
            return ([x[0].sigmoid()],)
    return (x,)


def inspect(name: str, *, shape: str = "", classes: int = 0, check: bool = False, fraction: float = 0.5, seed: int = 0) -> Inspection:
    """Trace the network `name`. classes 0: 1000 for torchvision and timm, else 10."""
    if not 0 < fraction < 1:
        raise DynpruneError(f"--fraction got {fraction}. Expected a share between 0 and 1.")
    model, size = build_for_inspection(name, classes or default_classes(name), shape)
    x = example_for(name, size)
    started = time.perf_counter()
    graph = trace(model, x)
    seconds = time.perf_counter() - started
    macs, params = graph.macs({}), graph.params({})
    lines = [GroupLine(g.name, g.arms, g.layers, 1 - graph.macs({g.name: 0}) / max(1, macs), 1 - graph.params({g.name: 0}) / max(1, params), g.mixed_by)
             for g in graph]
    return Inspection(name, "x".join(map(str, size)), len(graph), graph.arms, macs, params, prunable_share(graph), graph.pinned, lines,
                      check_exactness(model, graph, x, fraction, seed, seconds) if check else None)


def prunable_share(graph: ChannelGraph) -> float:
    """Share of the parameters that lie in at least one removable arm."""
    total = held = 0
    for name in graph.parameters:
        shape = graph.shapes[name]
        pinned = [int((graph.axes[name, d].group < 0).sum()) if (name, d) in graph.axes else size for d, size in enumerate(shape)]
        total += math.prod(shape)
        held += math.prod(pinned)
    return 1 - held / max(1, total)


def in_float64(tree: tuple | list) -> tuple | list:
    return type(tree)(value.double() if isinstance(value, torch.Tensor) else in_float64(value) for value in tree)


def check_exactness(model: nn.Module, graph: ChannelGraph, inputs: tuple, fraction: float, seed: int, seconds: float) -> Check:
    """Remove a random `fraction` of every group's arms and compare."""
    selection = random_selection(graph, fraction, seed)
    failure = run_compact(model, graph, selection, inputs)
    mixed = [group.name for group in graph if group.mixed_by]
    if failure is not None:
        return Check(False, math.inf, 1.0, seconds, fraction, seed, mixed, f"{failure.layer}: {failure.message}")
    try:
        found = difference(model, graph, exact_part(graph, selection), inputs)
        if not found < EXACT:  # rounding, or a mistake? float64 tells them apart
            found = difference(copy.deepcopy(model).double(), graph, exact_part(graph, selection), in_float64(inputs))
    except Exception as error:
        return Check(False, math.inf, 1.0, seconds, fraction, seed, mixed, first_line(error))
    kept = sum(p.numel() for p in slim(model, graph.kept(selection)).parameters()) / max(1, graph.params({}))
    if empty_outputs(model, inputs):
        return Check(False, math.nan, kept, seconds, fraction, seed, mixed, "runs, but on a random image the model finds nothing, so nothing could be compared; "
                     "check the backbone by itself")
    return Check(found < EXACT, found, kept, seconds, fraction, seed, mixed, "")


@torch.no_grad()
def empty_outputs(model: nn.Module, inputs: tuple) -> bool:
    """Whether no output has a number in it, such as a detector's that sees no object."""
    with evaluating(model):
        model, inputs = lively(model, inputs)
        return not any(value.numel() for value in tensors_in(model(*inputs)) if value.is_floating_point())
