"""From a module to its ChannelGraph, tried out before it is believed.

Takes a module and example inputs, runs them once on labels, builds the graph, makes a compact copy with half of the
arms and runs that. Where a network cuts channels by a size that cannot be followed, the copy fails or computes
something else; then the arms at the function that failed are pinned and it is tried again. So the answer always works,
and says what it pinned.
"""

from __future__ import annotations

import math
import re
import traceback
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dynprune.errors import DynpruneError, ModelFails
from dynprune.state.copies import cloned, copied, same_randomness
from dynprune.structure.calling import Inputs, arguments, call
from dynprune.structure.channels import ChannelGraph, Selection, build_graph
from dynprune.structure.folding import sizes_for_later
from dynprune.structure.labels import pinned_like, tensors_in
from dynprune.structure.layers import RunningLayer
from dynprune.structure.record import Cut, Pin, Record
from dynprune.structure.rules import LAYERS, RULES
from dynprune.structure.surgery import get_tensor, slim
from dynprune.structure.tracer import LabelTracer

WRONG = 1e-2  # a larger difference than this shows a wrong structure
EXACT = 1e-4  # of the largest output, in float32: sums in another order differ by 1e-6 or so of it
MOST_TRIALS = 64  # groups that are tried one by one, where nothing says which of them is to blame


def trace(model: nn.Module, example_inputs: Inputs) -> ChannelGraph:
    """Find the channel structure of `model` by running it once on `example_inputs`, which are what torch.onnx.export
    takes as `args`: a tensor, or a tuple of arguments whose last one may be a dict of named ones.

    A copy runs, in eval mode without gradients: the model, the inputs and the random generators stay as they are. Any
    architecture gives a graph: what cannot be narrowed safely is pinned and named in `graph.pinned`. Raises
    DynpruneError when the model fails on the inputs, naming the layer.

    >>> graph = dynprune.trace(torchvision.models.resnet18(), torch.zeros(1, 3, 224, 224))
    >>> print(graph, graph.macs({}))
    """
    inputs = arguments(example_inputs)
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise DynpruneError(
            "The model contains TorchScript modules, which hide their functions. Pass the original nn.Module."
        )
    with same_randomness(0), torch.no_grad():
        model = copied(model).eval()
        record = run_on_labels(model, inputs)
        trials = Trials(model, record, cloned(inputs))
        graph = trials.settle()
        if folded := sizes_for_later(model, graph, record, inputs):
            record.numbers |= folded
            graph = build_graph(model, record)
    return graph


def run_on_labels(model: nn.Module, inputs: tuple) -> Record:
    """A forward pass under the label tracer, and a second one in training mode if that may run or return something
    else."""
    tracer = LabelTracer(model, RULES, LAYERS)
    given, inputs = inputs, cloned(inputs)
    try:
        with tracer.watching():
            tracer.batch = next((len(value) for value in tensors_in(inputs) if value.ndim), 1)
            for value in tensors_in(inputs):
                tracer.set(value, pinned_like(value))
            torch.manual_seed(0)
            output = call(model, inputs)
            tracer.record.outputs = list(tensors_in(output))
            pin_outputs(tracer, output)
    except Exception as error:
        shapes = ", ".join("x".join(map(str, value.shape)) for value in tensors_in(given))
        raise ModelFails(
            f'The model fails on an example input of shape {shapes} in layer "{tracer.layer}" '
            f"({type(error).__name__}: {first_line(error)}). Check the size and the channels of the input that it "
            f"expects."
        ) from error
    if any(name not in tracer.record.used for name, _ in model.named_parameters()) or differs_in_training(model):
        follow_training_branches(model, cloned(given), tracer)
    return tracer.record


def differs_in_training(model: nn.Module) -> bool:
    """Whether code from outside torch.nn asks for the mode: then other functions may run in training."""
    kinds = {
        cls
        for module in model.modules()
        for cls in type(module).__mro__
        if not cls.__module__.startswith(("torch.nn.", "builtins"))
    }
    return any(
        "training" in names_in(function.__code__)
        for cls in kinds
        for function in vars(cls).values()
        if hasattr(function, "__code__")
    )


def names_in(code: types.CodeType) -> set[str]:
    """The names that a function's code uses, and those of the functions inside it."""
    return set(code.co_names).union(
        *(names_in(constant) for constant in code.co_consts if isinstance(constant, types.CodeType))
    )


def follow_training_branches(model: nn.Module, inputs: tuple, tracer: LabelTracer) -> None:
    """Side heads may run, or be returned, in training mode only, but read the same channels. Norms and dropout stay in
    eval mode."""
    before = len(tracer.record.ops)
    with branching(model):
        try:
            with tracer.watching():
                for value in tensors_in(inputs):
                    tracer.set(value, pinned_like(value))
                pin_outputs(tracer, call(model, inputs))
        # it needs labels or a larger batch: what it would read stays whole only if eval mode reads it too
        except Exception:
            pass
        finally:
            tracer.running.stack.clear()
            del tracer.record.ops[before:]  # the cost that counts is that of inference


@contextmanager
def branching(model: nn.Module) -> Iterator[nn.Module]:
    """The model in training mode but for torch.nn's own layers and their kinds, so that no statistic moves and nothing
    is dropped."""
    with evaluating(model):
        for module in model.modules():
            own = isinstance(module, (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd))
            module.training = not own and (
                not type(module).__module__.startswith("torch.nn.") or bool(list(module.children()))
            )
        yield model


def pin_outputs(tracer: LabelTracer, output: object) -> None:
    """The user's outputs keep their sizes. One of unknown origin came from code out of sight, which may have read
    anything; whole numbers excepted, which are indices or class names beside the values that they belong to, and are
    compared like these. A constant beside the scores, such as a grid, has no channels to keep, and a parameter that is
    returned keeps its own."""
    values = list(tensors_in(output))
    if not values or any(not tracer.known(value) and value.is_floating_point() for value in values):
        tracer.record.pins.append(Pin("a function out of sight before the output", "(output)", tracer.labels.all()))
    for value in values:
        if (found := tracer.of(value)) is not None:
            tracer.record.pins.append(Pin("output", "(output)", tracer.labels.among(found)))


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


def first_line(error: BaseException) -> str:
    """An exception's first line with something in it, without terminal escapes."""
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", str(error)).splitlines()]
    text = "".join(char for char in next((line for line in lines if line), "") if char.isprintable())
    return text or "no message"


def cause(error: BaseException) -> str:
    """What went wrong, in the words of the code that found it: 'assertion in `features`: wrong number of channels'."""
    where = next(
        (
            f" in `{frame.name}`"
            for frame in reversed(traceback.extract_tb(error.__traceback__))
            if not library_code(frame.filename)
        ),
        "",
    )
    kind = "assertion" if isinstance(error, AssertionError) else type(error).__name__
    return f"{kind}{where}: {first_line(error)}"


def library_code(filename: str) -> bool:
    """Whether a source file belongs to torch or to this package, rather than to the network."""
    path = Path(filename)
    return (
        filename.startswith("<")
        or Path(torch.__file__).parent in path.parents
        or Path(__file__).parents[1] in path.parents
    )


# -- trying it out -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Failure:
    """A compact copy did not run, or not as it should: the layer, and what was wrong with it."""

    layer: str
    message: str


class Trials:
    """Compact copies of a traced model, until one works: what stands in the way is pinned, with the reason."""

    def __init__(self, model: nn.Module, record: Record, inputs: tuple):
        self.model, self.record, self.inputs = model, record, inputs
        self.modules = dict(model.named_modules())
        self.tried: set[tuple[str, str]] = set()
        # pins of earlier trials, to be withdrawn where they turn out not to matter
        self.suspected: list[list[Pin]] = []
        self.branches = differs_in_training(model) and self.full_output(True) is not None

    def kind(self, cut: Cut) -> tuple[str, str]:
        """Cuts of one kind stand or fall together: the same function called from the same class of module."""
        module = None if cut.layer.startswith("(") else self.modules.get(cut.layer)
        return cut.op, cut.layer if module is None else type(module).__qualname__

    def settle(self) -> ChannelGraph:
        """The graph with which compact copies run and compute what they should."""
        graph = build_graph(self.model, self.record)
        while graph.groups and (pins := self.find_pins(graph)):
            if self.record.guessed:  # a remembered size that was guessed to count channels may be what is wrong
                self.record.numbers = {
                    key: labels for key, labels in self.record.numbers.items() if key not in self.record.guessed
                }
                self.record.guessed = set()
                self.tried.clear()
            else:
                self.record.pins += pins
                self.suspected.append(pins)
            graph = build_graph(self.model, self.record)
        return self.withdraw(graph)

    def withdraw(self, graph: ChannelGraph) -> ChannelGraph:
        """Drop the pins of suspects that were not to blame: what works without them was not in their way."""
        if len(self.suspected) < 2:
            return graph
        for pins in self.suspected[:-1]:
            self.record.pins = [pin for pin in self.record.pins if not any(pin is other for other in pins)]
            trial = build_graph(self.model, self.record)
            if graph.groups.keys() != trial.groups.keys() and self.failure(trial) is not None:
                self.record.pins += pins
            else:
                graph = trial
        return graph

    def failure(self, graph: ChannelGraph) -> Failure | None:
        """What is wrong with compact copies of this graph, if anything is."""
        half = random_selection(graph, 0.5, 0)
        for selection in [half, uneven_selection(graph, 1)] if graph.cuts else [half]:
            if found := self.run(graph, selection):
                return found
            if not agrees(self.model, graph, exact_part(graph, selection), self.inputs):
                return Failure("", "removal changes what the network computes in a way that was not followed")
        return None

    def run(self, graph: ChannelGraph, selection: Selection) -> Failure | None:
        """A compact copy, run in both modes."""
        return run_compact(self.model, graph, selection, self.inputs) or (
            self.run_training(graph, selection) if self.branches else None
        )

    def full_output(self, training: bool) -> list[torch.Size] | None:
        """The shapes that the full model returns, None where it fails."""
        try:
            with same_randomness(0):
                model = copied(self.model)
                with branching(model) if training else evaluating(model):
                    return [value.shape for value in tensors_in(call(model, cloned(self.inputs)))]
        except Exception:
            return None

    def run_training(self, graph: ChannelGraph, selection: Selection) -> Failure | None:
        """As `run_compact`, in training mode: it must run, and return values of the shapes that the full model returns
        there."""
        small = slim(self.model, graph.kept(selection))
        running = RunningLayer(small)
        try:
            with same_randomness(0), branching(small), running.watched():
                shapes = [value.shape for value in tensors_in(call(small, cloned(self.inputs)))]
        except Exception as error:
            return Failure(running.name, f"in training mode, {cause(error)}")
        return None if shapes == self.full_output(True) else Failure("", "in training mode, outputs of other shapes")

    def find_pins(self, graph: ChannelGraph) -> list[Pin]:
        """What to pin: the cuts nearest to where a compact copy failed, or those whose arms change what it computes.

        Empty when the copy with half of the arms runs and agrees with the masked original; where there are cuts, also
        one that keeps another share of each group, since a size may fit by chance when all shrink alike.
        """
        model, inputs = self.model, self.inputs
        half = random_selection(graph, 0.5, 0)
        open_cuts = [cut for cut in graph.cuts if self.kind(cut) not in self.tried and len(cut.labels)]
        for selection in [half, uneven_selection(graph, 1)] if open_cuts else [half]:
            if (
                failure := self.run(graph, selection)
                if open_cuts or self.branches or any(group.mixed_by for group in graph)
                else None
            ):
                break
            exact = exact_part(graph, selection)
            if agrees(model, graph, exact, inputs):
                continue
            if failure := self.run(graph, selection):
                break
            for cut_kind in dict.fromkeys(self.kind(cut) for cut in open_cuts):
                alike = [cut for cut in open_cuts if self.kind(cut) == cut_kind]
                if not agrees(model, graph, only(graph, exact, alike), inputs):
                    return self.suspect(alike)
            return (
                self.suspect(open_cuts)
                if open_cuts
                else self.last_resort(
                    graph, Failure("", "removal changes what the network computes in a way that was not followed")
                )
            )
        else:
            return []
        if not open_cuts:
            return self.last_resort(graph, failure)
        nearest = max(open_cuts, key=lambda cut: shared_path(cut.layer, failure.layer))
        return self.suspect([cut for cut in open_cuts if self.kind(cut) == self.kind(nearest)])

    def suspect(self, cuts: list[Cut]) -> list[Pin]:
        self.tried |= {self.kind(cut) for cut in cuts}
        return [Pin(f"{cut.op} that cannot be narrowed", cut.layer, cut.labels) for cut in cuts]

    def guilty(self, graph: ChannelGraph) -> list[int]:
        """Numbers of the groups with which a compact copy fails even if they alone are narrowed; none where there are
        too many to try."""
        if not 1 < len(graph) <= MOST_TRIALS:
            return []
        half = random_selection(graph, 0.5, 0)
        return [
            number
            for number, name in enumerate(graph.groups)
            if self.run(graph, {name: half[name]})
            or not agrees(self.model, graph, exact_part(graph, {name: half[name]}), self.inputs)
        ]

    def last_resort(self, graph: ChannelGraph, failure: Failure) -> list[Pin]:
        """No function is left to suspect: pin the layer that failed with all that it reads and makes, then the groups
        that fail by themselves, and then everything."""
        held = [
            labels
            for (name, _), labels in self.record.axes.items()
            if failure.layer and name.startswith(failure.layer + ".")
        ]
        key = (failure.message, failure.layer)
        if held and key not in self.tried:
            self.tried.add(key)
            return [Pin(failure.message, failure.layer, torch.cat(held))]
        guilty = self.guilty(graph)
        if guilty:
            return [
                Pin(
                    failure.message,
                    failure.layer or "(model)",
                    torch.from_numpy(np.flatnonzero(np.isin(graph.group_of_label, guilty))),
                )
            ]
        return [
            Pin(
                failure.message,
                failure.layer if failure.layer not in ("", "(model)") else "(model)",
                self.record.labels.all(),
            )
        ]


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
    return {
        group.name: np.sort(rng.permutation(group.arms)[: max(1, round(group.arms * (1 - fraction)))])
        for group in graph
    }


def uneven_selection(graph: ChannelGraph, seed: int) -> dict[str, np.ndarray]:
    """Each group without a share of its arms that differs from group to group, between a quarter and three quarters."""
    rng = np.random.default_rng(seed)
    return {
        group.name: np.sort(rng.permutation(group.arms)[: max(1, round(group.arms * rng.uniform(0.25, 0.75)))])
        for group in graph
    }


def run_compact(model: nn.Module, graph: ChannelGraph, selection: Selection, inputs: tuple) -> Failure | None:
    """Build a compact copy and run it once in eval mode; None when it works and keeps its sizes."""
    try:
        small = slim(model, graph.kept(selection)).eval()
    except Exception as error:
        return Failure("", cause(error))
    running = RunningLayer(small)
    sizes = {name: value.shape for name, value in named_tensors(small)}
    try:
        with same_randomness(0), torch.no_grad(), running.watched():
            call(small, cloned(inputs))
    except Exception as error:
        return Failure(running.name, cause(error))
    for name, value in named_tensors(small):
        if name in sizes and value.shape != sizes[name]:
            return Failure(
                name.rpartition(".")[0],
                f"the network rewrites {name} when it runs, and gave it {list(value.shape)} for {list(sizes[name])}",
            )
    return None


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def agrees(model: nn.Module, graph: ChannelGraph, selection: Selection, inputs: tuple) -> bool:
    """Whether a copy computes what the masked original does. A wrong structure is off by the size of the output;
    float32 rounding in a deep network with gates can reach 1e-4 of it. A failure is a disagreement; what cannot be
    judged (no finite output) is not."""
    try:
        found = difference(model, graph, selection, inputs)
    except Exception:
        return False
    return not found >= WRONG


@dataclass(frozen=True)
class Comparison:
    """Largest differences over the largest output. difference: between the masked original and the compact copy.
    effect: between the untouched original and the masked one, without which the first says nothing."""

    difference: float
    effect: float


def difference(model: nn.Module, graph: ChannelGraph, selection: Selection, inputs: tuple) -> float:
    """Largest difference over the largest output between the masked original and the compact copy, in eval mode."""
    return compare_copies(model, graph, selection, inputs, with_effect=False).difference


def compare_copies(
    model: nn.Module, graph: ChannelGraph, selection: Selection, inputs: tuple, *, with_effect: bool = True
) -> Comparison:
    """Outputs of the original, of the original whose removed arms are masked, and of the compact copy, on copies and in
    eval mode."""
    with same_randomness(0), torch.no_grad():
        full, inputs = lively(model, inputs)
        small = slim(full, graph.kept(selection))
        whole = outputs_of(copied(full), inputs) if with_effect else None
        hide(full, graph, selection)
        one, other = outputs_of(full, inputs), outputs_of(small, inputs)
    effect = largest_ratio(one, whole) if whole is not None and numbers_in(whole) else math.nan
    return Comparison(largest_ratio(one, other), effect)


def outputs_of(model: nn.Module, inputs: tuple) -> list[Tensor]:
    """The tensors that the model returns for inputs of its own, with the same random numbers each time."""
    torch.manual_seed(0)
    return list(tensors_in(call(model, cloned(inputs))))


def numbers_in(values: list[Tensor]) -> list[Tensor]:
    """Those of the outputs that can be compared: with at least one real or complex number in them."""
    return [value for value in values if (value.is_floating_point() or value.is_complex()) and value.numel()]


def largest_ratio(one: list[Tensor], other: list[Tensor]) -> float:
    """Largest difference of two lists of outputs, each over its largest value; infinite for other shapes, nan where
    nothing can be judged."""
    if [a.shape for a in one] != [b.shape for b in other]:
        return float("inf")
    ratios = [
        float((a - b).abs().max() / a.abs().max().clamp(min=1e-30)) for a, b in zip(numbers_in(one), numbers_in(other))
    ]
    return float("nan") if any(ratio != ratio for ratio in ratios) else max(ratios, default=0.0)


def lively(model: nn.Module, inputs: tuple) -> tuple[nn.Module, tuple]:
    """A copy in which every value matters, and inputs that vary (constant ones become random).

    Fresh networks hide mistakes: BatchNorm starts as the identity, some scales start at zero. Constant parameters from
    -1 to 1 become random ones (larger ones were meant), and statistics are measured on the inputs, which keeps deep
    networks' values in range.
    """
    rng = torch.Generator().manual_seed(0)
    inputs = tuple(
        torch.randn(v.shape, generator=rng).to(v)
        if isinstance(v, Tensor) and v.is_floating_point() and is_constant(v)
        else v
        for v in inputs
    )
    model = copied(model).eval()
    for parameter in model.parameters():
        if (
            parameter.numel() > 1
            and parameter.is_floating_point()
            and is_constant(parameter)
            and abs(float(parameter.flatten()[0])) <= 1
        ):
            centre = 1.0 if float(parameter.flatten()[0]) > 0.5 else 0.0
            parameter.data.copy_(centre + 0.4 * (torch.rand(parameter.shape, generator=rng) - 0.5).to(parameter))
    norms = [
        m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None
    ]
    handles = [norm.register_forward_pre_hook(measure_statistics) for norm in norms]
    try:
        if norms:
            call(model, cloned(inputs))
    finally:
        for handle in handles:
            handle.remove()
    return model, inputs


def is_constant(value: Tensor) -> bool:
    return bool((value == value.reshape(-1)[:1]).all())


def measure_statistics(norm: nn.modules.batchnorm._BatchNorm, args: tuple) -> None:
    """Set running statistics from the value that a BatchNorm is about to see."""
    if not args or norm.running_mean is None or norm.running_var is None:
        return
    others = [d for d in range(args[0].ndim) if d != 1]
    count = args[0].numel() // args[0].shape[1]
    mean, var = (
        args[0].mean(others),
        args[0].var(others, unbiased=False) if count > 1 else torch.ones_like(args[0].mean(others)),
    )
    norm.running_mean.copy_(mean if count > 1 else mean * 0.5)
    norm.running_var.copy_(0.5 * var + 0.5 * var.mean() + 1e-3)


def masked(full: nn.Module, graph: ChannelGraph, selection: Selection) -> nn.Module:
    """A full-width copy in which the consumers of every arm outside `selection` see zeros."""
    model = copied(full)
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
