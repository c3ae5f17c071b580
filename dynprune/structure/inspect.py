"""What can be removed from a network, what cannot and why, and a proof that removal is exact.

Takes a model and an input shape, traces it, and reports groups, shares and pins. `check` removes random arms and
compares the original, in which the removed arms' consumers see zeros, with the compact copy.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dynprune import zoo
from dynprune.errors import DynpruneError, ModelFails
from dynprune.state.copies import doubled
from dynprune.structure.channels import ChannelGraph, PinnedLayer
from dynprune.structure.surgery import slim
from dynprune.structure.tracing import (
    EXACT,
    Comparison,
    cause,
    compare_copies,
    exact_part,
    random_selection,
    run_compact,
    trace,
)


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
    """ok: shown to be exact. max_rel_diff: largest difference over largest output between the compact copy and the
    masked original, with arms removed from the groups that no norm mixes. effect: the same between the untouched and
    the masked original; where nothing changes, nothing is shown. params_kept_share: what is left when arms are removed
    from all groups; that copy must run. mixed: the groups that were checked for running only. failure: what went wrong.
    not_shown: why nothing could be compared."""

    ok: bool
    max_rel_diff: float
    effect: float
    params_kept_share: float
    trace_seconds: float
    fraction: float
    seed: int
    mixed: list[str]
    failure: str
    not_shown: str = ""


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
    """ "3x224x224" to (3, 224, 224)."""
    try:
        shape = tuple(int(part) for part in text.lower().split("x"))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise DynpruneError(f'--input got "{text}". Expected sizes such as 3x224x224.')
    return shape


def default_classes(name: str) -> int:
    """What the source's networks are usually built for: ImageNet's 1000 classes, VOC's 21 in segmentation, COCO's 91 in
    detection; else 10."""
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
        return model, tuple(getattr(model, "default_cfg", {}).get("input_size", (3, 224, 224)))
    return model, (3, 224, 224) if name.startswith("torchvision:") else (3, 32, 32)


def example_for(name: str, size: tuple[int, ...]) -> tuple:
    """Arguments for one forward pass; torchvision's detectors take a list of images."""
    x = torch.randn(1, *size, generator=torch.Generator().manual_seed(0))
    if name.startswith("torchvision:"):
        import torchvision

        if name.removeprefix("torchvision:") in torchvision.models.list_models(module=torchvision.models.detection):
            return ([x[0].sigmoid()],)
    return (x,)


def inspect(
    name: str, *, shape: str = "", classes: int = 0, check: bool = False, fraction: float = 0.5, seed: int = 0
) -> Inspection:
    """Which channels of the network `name` can be removed, which cannot and why.

    name: as the option `--model`. shape: of one input, "3x224x224"; the network's own without an answer. classes: 0
    takes 1000 for torchvision and timm, else 10. check: prove on random weights that removal changes nothing else, with
    this fraction of the channels. Raises DynpruneError for names, shapes and fractions that make no sense.

    >>> print(dynprune.inspect("torchvision:resnet18").groups[0])
    """
    if not 0 < fraction < 1:
        raise DynpruneError(f"--fraction got {fraction}. Expected a share between 0 and 1.")
    model, size = build_for_inspection(name, classes or default_classes(name), shape)
    x = example_for(name, size)
    started = time.perf_counter()
    graph = trace_with_option(model, x)
    seconds = time.perf_counter() - started
    macs, params = graph.macs({}), graph.params({})
    lines = [
        GroupLine(
            g.name,
            g.arms,
            g.layers,
            1 - graph.macs({g.name: 0}) / max(1, macs),
            1 - graph.params({g.name: 0}) / max(1, params),
            g.mixed_by,
        )
        for g in graph
    ]
    return Inspection(
        name,
        "x".join(map(str, size)),
        len(graph),
        graph.arms,
        macs,
        params,
        prunable_share(graph),
        graph.pinned,
        lines,
        check_exactness(model, graph, x, fraction, seed, seconds) if check else None,
    )


def trace_with_option(model: nn.Module, inputs: torch.Tensor | tuple) -> ChannelGraph:
    """As `trace`, for commands whose option --input sets the example."""
    try:
        return trace(model, inputs)
    except ModelFails as error:
        raise DynpruneError(f"{error} It is set with --input, such as --input 3x64x64.") from error


def prunable_share(graph: ChannelGraph) -> float:
    """Share of the parameters that lie in at least one removable arm."""
    total = held = 0
    for name in graph.parameters:
        shape = graph.shapes[name]
        pinned = [
            int((graph.axes[name, d].group < 0).sum()) if (name, d) in graph.axes else size
            for d, size in enumerate(shape)
        ]
        total += math.prod(shape)
        held += math.prod(pinned)
    return 1 - held / max(1, total)


def in_float64(tree: Any) -> Any:
    if isinstance(tree, torch.Tensor):
        return tree.double() if tree.is_floating_point() else tree
    return type(tree)(in_float64(value) for value in tree) if type(tree) in (tuple, list) else tree


CLEAR = 10  # the effect of removal must be so many times what could be a mistake
MEASURABLE = 1e-9  # of the largest output, in float64: a hundred thousand times its rounding


def check_exactness(
    model: nn.Module, graph: ChannelGraph, inputs: tuple, fraction: float, seed: int, seconds: float
) -> Check:
    """Remove a random `fraction` of every group's arms, and compare untouched, masked and compact outputs."""
    selection = random_selection(graph, fraction, seed)
    mixed = [group.name for group in graph if group.mixed_by]
    known: dict[str, Any] = {"trace_seconds": seconds, "fraction": fraction, "seed": seed, "mixed": mixed}
    if failure := run_compact(model, graph, selection, inputs):
        return Check(
            False, math.inf, math.nan, 1.0, **known, failure=f"{failure.layer or '(model)'}: {failure.message}"
        )
    kept = sum(p.numel() for p in slim(model, graph.kept(selection)).parameters()) / max(1, graph.params({}))
    exact = exact_part(graph, selection)
    if not any(len(arms) < graph.groups[name].arms for name, arms in exact.items()):
        why = (
            "no channel of this network can be removed"
            if not graph.groups
            else f"every group is mixed by {', '.join(sorted({op for group in graph for op in group.mixed_by}))}, so "
            f"masked and compact outputs may differ; the compact copy runs"
            if not exact
            else f"at --fraction {fraction:g} no channel is removed"
        )
        return Check(False, math.nan, 0.0, kept, **known, failure="", not_shown=why)
    try:
        found = compare_copies(model, graph, exact, inputs)
        # rounding, or a mistake? float64 tells them apart
        if not found.difference < EXACT or not found.effect > CLEAR * EXACT:
            found = compare_copies(doubled(model), graph, exact, in_float64(inputs))
    except Exception as error:
        return Check(False, math.inf, math.nan, kept, **known, failure=cause(error))
    return judged(found, kept, known)


def judged(found: Comparison, kept: float, known: dict[str, Any]) -> Check:
    """The verdict of a comparison. A difference means something only beside what removal changed: far less than that,
    or a mistake."""
    why = (
        "no output has a number in it, as of a detector that sees no object; check the backbone by itself"
        if math.isnan(found.effect)
        else "removing channels changes nothing in the output that can be measured"
        if not found.effect > MEASURABLE
        else ""
    )
    if math.isinf(found.effect):
        return Check(
            False,
            found.difference,
            found.effect,
            kept,
            **known,
            failure="masked and untouched network give outputs of other shapes",
        )
    if math.isnan(found.difference):
        return Check(False, found.difference, found.effect, kept, **known, failure="outputs that are not finite")
    if why:
        return Check(False, found.difference, found.effect, kept, **known, failure="", not_shown=why)
    ok = found.difference < EXACT and found.difference * CLEAR < found.effect
    return Check(ok, found.difference, found.effect, kept, **known, failure="")
