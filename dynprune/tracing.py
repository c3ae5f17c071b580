"""From a module to its ChannelGraph, tried out before it is believed.

Takes a module and example inputs, runs them once on labels, builds the graph, makes a compact copy with half of the arms and
runs that. Where a network cuts channels by a size that cannot be followed, the copy fails or computes something else; then
the arms at the function that failed are pinned and it is tried again. So the answer always works, and says what it pinned.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dynprune.channels import ChannelGraph, Selection, build_graph
from dynprune.errors import DynpruneError
from dynprune.labels import Cut, LabelTracer, Pin, distinct, tensors_in
from dynprune.rules import LAYERS, RULES
from dynprune.surgery import get_tensor, slim

WRONG = 1e-2  # a larger difference than this shows a wrong structure
EXACT = 1e-4  # of the largest output, in float32: sums in another order differ by 1e-6 or so of it
Inputs = Tensor | tuple


def trace(model: nn.Module, example_inputs: Inputs) -> ChannelGraph:
    """Find the channel structure of `model` by running it once on `example_inputs` (a tensor or a tuple of arguments).

    The model runs in eval mode without gradients and is handed back as it was. Any architecture gives a graph: what cannot
    be narrowed safely is pinned and named in `graph.pinned`. Raises DynpruneError when the model fails on the inputs,
    naming the layer.
    """
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    tracer = run_on_labels(model, inputs)
    graph = build_graph(model, tracer)
    tried: set[tuple[str, str]] = set()
    while graph.groups and (suspects := find_suspects(model, graph, tracer, inputs, tried)):
        for cut in suspects:
            tracer.pins.append(Pin(f"{cut.op} that cannot be narrowed", cut.layer, cut.labels))
            tried.add(kind(model, cut))
        graph = build_graph(model, tracer)
    return graph


def run_on_labels(model: nn.Module, inputs: tuple) -> LabelTracer:
    """A forward pass under the label tracer, and a second one in training mode if the first left parameters unused."""
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise DynpruneError("The model contains TorchScript modules, which hide their functions. Pass the original nn.Module.")
    tracer = LabelTracer(model, RULES, LAYERS)
    with evaluating(model), torch.no_grad():
        try:
            with tracer.watching():
                tracer.batch = next((len(value) for value in tensors_in(inputs) if value.ndim), 1)
                for value in tensors_in(inputs):
                    tracer.set(value, tracer.pinned_like(value))
                pin_outputs(tracer, model(*inputs))
        except Exception as error:
            shapes = ", ".join("x".join(map(str, value.shape)) for value in tensors_in(inputs))
            raise DynpruneError(
                f'The model fails on an example input of shape {shapes} in layer "{tracer.layer}" '
                f"({type(error).__name__}: {first_line(error)}). Check the input size it expects (--input CxHxW).") from error
        if any(name not in tracer.used for name, _ in model.named_parameters()):
            follow_training_branches(model, inputs, tracer)
    return tracer


def follow_training_branches(model: nn.Module, inputs: tuple, tracer: LabelTracer) -> None:
    """Auxiliary heads run only in training mode, but read the same channels. BatchNorm and dropout stay in eval mode."""
    model.train()
    for module in model.modules():
        if not list(module.children()):
            module.eval()
    before = len(tracer.ops)
    try:
        with tracer.watching():
            pin_outputs(tracer, model(*inputs))
    except Exception:  # it needs labels or a larger batch: what it would read stays whole only if eval mode reads it too
        pass
    finally:
        tracer.stack = []
        del tracer.ops[before:]  # the cost that counts is that of inference


def pin_outputs(tracer: LabelTracer, output: object) -> None:
    """The user's outputs keep their sizes. One that is not known came from code out of sight, which may have read anything; whole
    numbers excepted, which are indices or class names beside the values that they belong to, and are compared like these."""
    values = list(tensors_in(output))
    if not values or any(value not in tracer.labels and value.is_floating_point() for value in values):
        tracer.pins.append(Pin("a function out of sight before the output", "(output)", torch.arange(1, tracer.next_label)))
    for value in values:
        if value in tracer.labels:
            labels = torch.unique(distinct(tracer.labels[value]))
            tracer.pins.append(Pin("output", "(output)", labels[labels != 0]))


class evaluating:
    """Context: the model in eval mode; afterwards every module's own mode again."""

    def __init__(self, model: nn.Module):
        self.modes = {module: module.training for module in model.modules()}
        self.model = model

    def __enter__(self) -> nn.Module:
        return self.model.eval()

    def __exit__(self, *_: object) -> None:
        for module, mode in self.modes.items():
            module.training = mode


def first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else "no message"


# -- trying it out ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Failure:
    """A compact copy did not run: the layer, and what it said."""

    layer: str
    message: str


def kind(model: nn.Module, cut: Cut) -> tuple[str, str]:
    """Cuts of one kind stand or fall together: the same function called from the same class of module."""
    module = dict(model.named_modules()).get("" if cut.layer.startswith("(") else cut.layer)
    return cut.op, cut.layer if module is None else type(module).__qualname__


def find_suspects(model: nn.Module, graph: ChannelGraph, tracer: LabelTracer, inputs: tuple, tried: set[tuple[str, str]]) -> list[Cut]:
    """Cuts to pin: those nearest to where a compact copy failed, or those whose arms change what it computes.

    Empty when the copy with half of the arms runs and agrees with the masked original; where there are cuts, also one that
    keeps another share of each group, since a size may fit by chance when all shrink alike.
    """
    half = random_selection(graph, 0.5, 0)
    open_cuts = [cut for cut in graph.cuts if kind(model, cut) not in tried and len(cut.labels)]
    for selection in [half, uneven_selection(graph, 1)] if open_cuts else [half]:
        if failure := run_compact(model, graph, selection, inputs) if open_cuts or any(group.mixed_by for group in graph) else None:
            break
        selection = exact_part(graph, selection)
        if agrees(model, graph, selection, inputs):
            continue
        if failure := run_compact(model, graph, selection, inputs):
            break
        for cut_kind in dict.fromkeys(kind(model, cut) for cut in open_cuts):
            alike = [cut for cut in open_cuts if kind(model, cut) == cut_kind]
            if not agrees(model, graph, only(graph, selection, alike), inputs):
                return alike
        return open_cuts or [last_resort(tracer, Failure("", ""), tried)]
    else:
        return []
    if not open_cuts:
        return [last_resort(tracer, failure, tried)]
    nearest = max(open_cuts, key=lambda cut: shared_path(cut.layer, failure.layer))
    return [cut for cut in open_cuts if kind(model, cut) == kind(model, nearest)]


def last_resort(tracer: LabelTracer, failure: Failure, tried: set[tuple[str, str]]) -> Cut:
    """No function is left to suspect: pin the layer that failed with all that it reads and makes, and then everything."""
    held = [labels for (name, _), labels in tracer.axes.items() if failure.layer and name.startswith(failure.layer + ".")]
    op = f"layer {failure.layer}"
    if held and not any(tried_op == op for tried_op, _ in tried):
        return Cut(op, failure.layer, torch.cat(held))
    return Cut("(model)", "(model)", torch.arange(1, tracer.next_label))


def exact_part(graph: ChannelGraph, selection: Selection) -> dict[str, np.ndarray]:
    """The part of a selection whose groups no norm mixes: there the compact copy must equal the masked original."""
    return {name: arms for name, arms in selection.items() if not graph.groups[name].mixed_by}


def shared_path(a: str, b: str) -> int:
    """How many leading parts two module paths have in common."""
    count = 0
    for x, y in zip(a.split("."), b.split(".")):
        if x != y:
            break
        count += 1
    return count


def only(graph: ChannelGraph, selection: Selection, cuts: list[Cut]) -> dict[str, np.ndarray]:
    """The part of a selection that concerns groups whose arms pass through the cuts."""
    touched = graph.groups_of(np.concatenate([cut.labels.numpy() for cut in cuts]))
    return {name: arms for name, arms in selection.items() if name in touched}


def random_selection(graph: ChannelGraph, fraction: float, seed: int) -> dict[str, np.ndarray]:
    """Each group without a random `fraction` of its arms; at least one stays."""
    rng = np.random.default_rng(seed)
    return {group.name: np.sort(rng.permutation(group.arms)[: max(1, round(group.arms * (1 - fraction)))]) for group in graph}


def uneven_selection(graph: ChannelGraph, seed: int) -> dict[str, np.ndarray]:
    """Each group without a share of its arms that differs from group to group, between a quarter and three quarters."""
    rng = np.random.default_rng(seed)
    return {group.name: np.sort(rng.permutation(group.arms)[: max(1, round(group.arms * rng.uniform(0.25, 0.75)))]) for group in graph}


def run_compact(model: nn.Module, graph: ChannelGraph, selection: Selection, inputs: tuple) -> Failure | None:
    """Build and run a compact copy once; None when it works."""
    try:
        small = slim(model, graph.kept(selection)).eval()
    except Exception as error:
        return Failure("", first_line(error))
    watcher = LabelTracer(small)
    try:
        with torch.no_grad(), watcher.watching_layers():
            small(*inputs)
    except Exception as error:
        return Failure(watcher.layer, first_line(error))
    return None


def agrees(model: nn.Module, graph: ChannelGraph, selection: Selection, inputs: tuple) -> bool:
    """Whether a copy computes what the masked original does. A wrong structure is off by the size of the output; float32 rounding in
    a deep network with gates can reach 1e-4 of it. A failure is a disagreement; what cannot be judged (no finite output) is not."""
    try:
        found = difference(model, graph, selection, inputs)
    except Exception:
        return False
    return not found >= WRONG


def difference(model: nn.Module, graph: ChannelGraph, selection: Selection, inputs: tuple) -> float:
    """Largest difference over the largest output between the masked original and the compact copy, in eval mode."""
    with evaluating(model), torch.no_grad():
        full, inputs = lively(model, inputs)
        other = list(tensors_in(slim(full, graph.kept(selection))(*inputs)))
        hide(full, graph, selection)
        one = list(tensors_in(full(*inputs)))
    if [a.shape for a in one] != [b.shape for b in other]:
        return float("inf")
    ratios = [float((a - b).abs().max() / a.abs().max().clamp(min=1e-30)) for a, b in zip(one, other) if a.is_floating_point() and a.numel()]
    return float("nan") if any(ratio != ratio for ratio in ratios) else max(ratios, default=0.0)


def lively(model: nn.Module, inputs: tuple) -> tuple[nn.Module, tuple]:
    """A copy in which every value matters, and inputs that vary (constant ones become random).

    Fresh networks hide mistakes: BatchNorm starts as the identity, some scales start at zero. Constant parameters become
    random ones, and statistics are measured on the inputs, which keeps deep networks' values in range.
    """
    rng = torch.Generator().manual_seed(0)
    inputs = tuple(torch.randn(v.shape, generator=rng).to(v) if isinstance(v, Tensor) and v.is_floating_point() and is_constant(v) else v for v in inputs)
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        if parameter.numel() > 1 and parameter.is_floating_point() and is_constant(parameter):
            centre = 1.0 if float(parameter.flatten()[0]) > 0.5 else 0.0
            parameter.copy_(centre + 0.4 * (torch.rand(parameter.shape, generator=rng) - 0.5).to(parameter))
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None]
    handles = [norm.register_forward_pre_hook(measure_statistics) for norm in norms]
    try:
        if norms:
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return model, inputs


def is_constant(value: Tensor) -> bool:
    return bool((value == value.reshape(-1)[:1]).all())


def measure_statistics(norm: nn.Module, args: tuple) -> None:
    """Set running statistics from the value that a BatchNorm is about to see."""
    if not args:
        return
    others = [d for d in range(args[0].ndim) if d != 1]
    count = args[0].numel() // args[0].shape[1]
    mean, var = args[0].mean(others), args[0].var(others, unbiased=False) if count > 1 else torch.ones_like(args[0].mean(others))
    norm.running_mean.copy_(mean if count > 1 else mean * 0.5)
    norm.running_var.copy_(0.5 * var + 0.5 * var.mean() + 1e-3)


def masked(full: nn.Module, graph: ChannelGraph, selection: Selection) -> nn.Module:
    """A full-width copy in which the consumers of every arm outside `selection` see zeros."""
    model = copy.deepcopy(full)
    hide(model, graph, selection)
    return model


@torch.no_grad()
def hide(model: nn.Module, graph: ChannelGraph, selection: Selection) -> None:
    """Zero, in place, the weights that read arms outside `selection`."""
    for name, kept in selection.items():
        group = graph.groups[name]
        gone = np.setdiff1d(np.arange(group.arms), kept)
        for tensor, dim in group.reads:
            weight = get_tensor(model, tensor)
            weight.index_fill_(dim, torch.from_numpy(group.members[tensor, dim][gone].reshape(-1)).to(weight.device), 0)
