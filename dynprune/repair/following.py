"""What comes after each layer: the norm behind it, the sum in which its branch ends, the rectifier behind that.

Takes a network and an input, runs it once while every function that gives tensors is written down, and returns per
layer what repair can make use of. A layer without bias may hand its shift to the norm that alone reads it; the last
layer of a residual branch may aim at the sum, so that it also makes up for what went wrong on the shortcut; and where a
rectifier cuts values off, below or above, nothing need be fitted there.

Functions are numbered in the order of their calls. A narrow copy runs the same code, so there a number means the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dynprune.repair.patches import is_layer
from dynprune.structure import calling
from dynprune.structure.labels import tensors_in
from dynprune.structure.rules import argument, named

ADD = set(named("add"))
NORM = {F.batch_norm, torch.batch_norm}
SCALE = set(named("mul multiply"))
KEEP = set(named("dropout dropout1d dropout2d dropout3d feature_dropout alpha_dropout contiguous"))
CONSTANT = {  # between which values a function is not constant
    **dict.fromkeys(named("relu"), (0.0, math.inf)),
    **dict.fromkeys(named("relu6"), (0.0, 6.0)),
    **dict.fromkeys(named("hardsigmoid"), (-3.0, 3.0)),
    **dict.fromkeys(named("hardswish"), (-3.0, math.inf)),
}
# the same of functions whose arguments say it: names and defaults of the two
BOUNDED: dict[Callable, tuple[tuple[str, float], tuple[str, float]]] = {
    **dict.fromkeys(named("hardtanh"), (("min_val", -1.0), ("max_val", 1.0))),
    **dict.fromkeys(named("clamp clip"), (("min", -math.inf), ("max", math.inf))),
}
# what decides by values which of them go on: two networks choose differently, so what comes behind cannot be compared
CHOOSE = {"topk", "sort", "argsort", "nonzero", "argwhere", "masked_select", "unique", "multinomial", "nms"}
CHOSEN = "runs on what was chosen by value"
BY_NAME = "is given its input by name"


@dataclass(frozen=True)
class Following:
    """norm: name of the BatchNorm that alone reads the layer's output, if one does. end: the last call that gives,
    channel by channel, an affine function of that output. added: the call that made what this is added to, if that is
    there before the layer runs; -1 - i is the network's input number i. passes: where a function that is constant below
    one value or above another, as rectifiers are, alone reads the end or the sum, those two values. chosen: what the
    layer reads was chosen by value, as the best proposals of a detector are."""

    norm: str | None
    end: int
    added: int | None
    passes: tuple[float, float] | None
    chosen: bool = False


class Numbered(TorchFunctionMode):
    """Context: tells of every function call that gives tensors: its number, the function, the tensors it was given and
    those it gave. What hooks compute is none of the network's: they pass through `aside`."""

    def __init__(self, tell: Callable[[int, Callable, list[Tensor], list[Tensor]], None]):
        super().__init__()
        self.count, self.tell, self.listening = 0, tell, True
        self.arguments: tuple[tuple, dict] = (), {}  # of the call that is told

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = result
        if function is Tensor.__iter__:
            given = list(result)
            result = iter(given)
        elif function is Tensor.__setitem__:  # gives nothing, and what it wrote to is another tensor now
            given = args[0]
        if self.listening and isinstance(given, Tensor | tuple | list) and (results := list(tensors_in(given))):
            self.arguments = args, kwargs or {}
            with self.aside():
                self.tell(self.count, function, list(tensors_in([args, kwargs or {}])), results)
            self.count += 1
        return result

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Inside, calls are not counted."""
        before, self.listening = self.listening, False
        try:
            yield
        finally:
            self.listening = before


@dataclass(frozen=True)
class Call:
    """given: the calls that made its operands, one entry for each; parameters have none. module: in which it was.
    chooses: by values which of them go on. passes: the values between which it is not constant, None if it is nowhere.
    """

    function: Callable
    given: list[int]
    module: str
    chooses: bool
    passes: tuple[float, float] | None = None


@dataclass
class Story:
    """One forward pass. ran: of every layer, the calls that made its outputs, and whether hooks saw its input: they
    do not where it is given by name."""

    calls: list[Call]
    ran: dict[str, list[tuple[int | None, bool]]]

    def readers(self) -> dict[int, list[int]]:
        """Of every call, those that read what it made."""
        found: dict[int, list[int]] = {}
        for number, call in enumerate(self.calls):
            for source in dict.fromkeys(call.given):
                found.setdefault(source, []).append(number)
        return found

    def chosen(self) -> set[int]:
        """Calls that depend on a choice between values that a layer computed."""
        layers = {place for places in self.ran.values() for place, _ in places}
        computed: set[int] = set()
        found: set[int] = set()
        for number, call in enumerate(self.calls):
            if number in layers or any(source in computed for source in call.given):
                computed.add(number)
            if any(source in found or (call.chooses and source in computed) for source in call.given):
                found.add(number)
        return found

    def shared(self) -> list[str]:
        """Layers that run several times, as a detector's head does at every scale; in the order of their first runs."""
        chosen = self.chosen()
        return [
            name
            for name, places in self.ran.items()
            if len(places) > 1 and all(seen and place is not None and place not in chosen for place, seen in places)
        ]

    def left(self) -> dict[str, str]:
        """Layers that nothing can be made of, and why."""
        chosen = self.chosen()
        found = {}
        for name, places in self.ran.items():
            if any(place in chosen for place, _ in places):
                found[name] = CHOSEN
            elif not all(seen for _, seen in places):
                found[name] = BY_NAME
        return found


@torch.no_grad()
def follow(model: nn.Module, inputs: tuple) -> dict[str, Following]:
    """Every layer that ran exactly once, in the order of execution, with what comes after it.

    model: in eval mode. inputs: arguments for a few examples; every activation is held while this runs.
    """
    return followed(model, listen(model, inputs, lambda: calling.call(model, inputs)))


def followed(model: nn.Module, story: Story) -> dict[str, Following]:
    """The same of a story that was heard."""
    readers, chosen = story.readers(), story.chosen()
    once = {name: places[0] for name, places in story.ran.items() if len(places) == 1}
    return {
        name: replace(after(model, story.calls, readers, start), chosen=start in chosen)
        for name, (start, seen) in once.items()
        if start is not None and seen
    }


@torch.no_grad()
def last_layers(model: nn.Module, run: Callable[[nn.Module], object]) -> list[str]:
    """Layers from whose output no other layer is reached, and that do not run on what was chosen by value.

    model: in eval mode. run: calls it with a few examples; every activation is held while this runs.
    """
    story = listen(model, (), lambda: run(model))
    readers, chosen = story.readers(), story.chosen()
    layers = {place for places in story.ran.values() for place, _ in places if place is not None} - chosen
    leads_on: set[int] = set()  # calls whose output reaches a layer
    for number in range(len(story.calls) - 1, -1, -1):
        if any(reader in layers or reader in leads_on for reader in readers.get(number, [])):
            leads_on.add(number)
    return [
        name
        for name, places in story.ran.items()
        if all(place is not None and place not in leads_on and place not in chosen for place, _ in places)
    ]


def listen(model: nn.Module, inputs: tuple, run: Callable[[], object]) -> Story:
    """Run a model and write down its calls."""
    calls: list[Call] = []
    made = {id(value): -1 - i for i, value in enumerate(tensors_in(inputs))}
    held: list[Tensor] = []  # or the place of a tensor in memory could be that of a later one
    stack = [""]
    ran: dict[str, list[tuple[int | None, bool]]] = {}

    def tell(number: int, function: Callable, given: list[Tensor], results: list[Tensor]) -> None:
        sources = [made[id(value)] for value in given if id(value) in made]
        passes = not_constant(function, *numbered.arguments)
        calls.append(Call(function, sources, stack[-1], chooses(function, given), passes))
        for value in results:
            made[id(value)] = number
            held.append(value)

    def enter(name: str) -> Callable:
        return lambda *_: stack.append(name)

    def leave(name: str, layer: bool) -> Callable:
        def hook(_module: nn.Module, given: tuple, output: object) -> None:
            stack.pop()
            if layer:
                ran.setdefault(name, []).append((made.get(id(output)), bool(given)))

        return hook

    with ExitStack() as context:
        for name, module in model.named_modules():
            context.callback(module.register_forward_pre_hook(enter(name)).remove)
            context.callback(module.register_forward_hook(leave(name, is_layer(module))).remove)
        context.enter_context(numbered := Numbered(tell))
        run()
    return Story(calls, ran)


def not_constant(function: Callable, args: tuple, kwargs: dict) -> tuple[float, float] | None:
    """The values between which a function of every element is not constant; None where it is constant nowhere, or where
    that cannot be told."""
    if function in CONSTANT:
        return CONSTANT[function]
    if function not in BOUNDED:
        return None
    bounds = []
    for place, (name, default) in enumerate(BOUNDED[function], 1):
        given = argument(args, kwargs, place, name)
        given = default if given is None else given
        if isinstance(given, bool) or not isinstance(given, int | float):
            return None
        bounds.append(float(given))
    low, high = bounds
    return (low, high) if low < high and (low > -math.inf or high < math.inf) else None


def chooses(function: Callable, given: list[Tensor]) -> bool:
    """Whether a function decides by values which of them go on; indexing does so with a mask."""
    name = getattr(function, "__name__", "")
    if name == "where":
        return len(given) == 1
    return name in CHOOSE or (name == "__getitem__" and any(value.dtype == torch.bool for value in given[1:]))


def after(model: nn.Module, calls: list[Call], readers: dict[int, list[int]], start: int) -> Following:
    """Follow one layer's output as long as one function alone reads it and treats every channel by itself."""

    def only_reader(place: int) -> int | None:
        found = readers.get(place, [])
        return found[0] if len(found) == 1 else None

    def passes(place: int) -> tuple[float, float] | None:
        reader = only_reader(place)
        return None if reader is None else calls[reader].passes

    norm, here = None, start
    while (number := only_reader(here)) is not None:
        call = calls[number]
        if call.function in ADD and len(call.given) == 2 and call.given[0] != call.given[1]:
            other = next(source for source in call.given if source != here)
            return Following(norm, here, other, passes(number)) if other < start else Following(norm, here, None, None)
        if call.given != [here] or call.function not in NORM | SCALE | KEEP:
            break
        if call.function in NORM and here == start:
            module = model.get_submodule(call.module)
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                norm = call.module
        here = number
    return Following(norm, here, None, passes(here))
