"""Label tracing: run a network once and see which channel each number belongs to.

Takes a module and example inputs; runs one real forward pass while every activation carries a *label tensor* of its own
shape, one integer per element, that says which arm the element belongs to. Label 0 is pinned: it can never be removed.
Data movement needs no rules (the same function runs on the labels), elementwise functions tie the labels that meet,
only a few functions create or read channels, and every other function pins what goes in. So an unknown function
costs compression, never correctness.

Returns nothing but a record: which labels sit along which dimension of which tensor (`axes`), which labels must live
and die together (`ties`), which are pinned and by what (`pins`), and how many multiplications each weight takes part in
(`ops`). `channels.py` turns that record into groups of arms.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from dynprune.state.attributes import attribute_values
from dynprune.structure.numbers import Number, Source, remembered

AxisKey = tuple[str, int]  # (tensor name, dimension); dimension -1: a remembered number
PINNED = 0
RECENT = 8  # shapes that a remembered size may be compared with


@dataclass(frozen=True)
class Op:
    """One use of a weight: it costs `positions` x (elements of the weight) multiplications per example.

    kind: linear, or a convolution function's name. size: of the input behind its channels (of a linear layer: its
    positions).
    stride, padding, dilation: per spatial dimension. groups: of the full-width convolution.
    """

    layer: str
    weight: str
    positions: int
    kind: str = "linear"
    size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1


@dataclass(frozen=True)
class Pin:
    """Why some labels cannot be removed: the function that mixed them, the layer that called it, and the labels."""

    op: str
    layer: str
    labels: Tensor


@dataclass(frozen=True)
class Cut:
    """A function whose sizes depend on a channel dimension (split, slice, view), and the labels that passed through it.

    When a compact copy does not behave, these are the suspects.
    """

    op: str
    layer: str
    labels: Tensor


def distinct(labels: Tensor) -> Tensor:
    """The labels without the repeats that broadcasting makes: every stride-0 dimension cut to its first entry."""
    return labels[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in labels.stride())]


def varies(labels: Tensor, dim: int) -> bool:
    """True when the labels are not the same all along `dim`."""
    if labels.size(dim) < 2 or labels.stride(dim) == 0:
        return False
    small = distinct(labels)
    return bool((small != small.narrow(dim, 0, 1)).any())


def tensors_in(tree: object) -> Iterator[Tensor]:
    """Every tensor in nested lists, tuples, dicts and plain objects such as model outputs."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from tensors_in(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from tensors_in(value)
    elif hasattr(tree, "__dict__") and not isinstance(tree, (nn.Module, type)) and not callable(tree):
        yield from tensors_in(vars(tree))
    elif hasattr(tree, "__dataclass_fields__"):
        yield from tensors_in([getattr(tree, name) for name in tree.__dataclass_fields__])


def is_filter_bank(module: nn.Module, name: str, tensor: Tensor) -> bool:
    """A filter's first dimension makes the channels; any other tensor may carry them along any dimension. A `weight`
    that is longer than 1 in a single dimension is a scale, whatever its shape: (1, C, 1, 1)."""
    if tensor.ndim < 2:
        return False
    if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear, ParametrizationList)):
        return isinstance(module, ParametrizationList) or name.startswith("weight")
    return (
        name.startswith("weight")
        and hasattr(module, "weight")
        and tensor.size(0) > 1
        and tensor.numel() > max(tensor.shape)
    )


Rule = Callable[["LabelTracer", Callable, tuple, dict], object]


class LabelTracer(TorchFunctionMode):
    """Records the channel structure of everything that runs inside `with tracer.watching(model):`."""

    def __init__(self, model: nn.Module, rules: Mapping[Callable, Rule] | None = None, layers: Collection[Rule] = ()):
        """rules: by function. layers: the rules of functions that use a filter bank rather than compute another one
        from it."""
        super().__init__()
        self.rules, self.layers = rules or {}, layers
        self.names: dict[int, str] = {}
        self.banks: dict[str, Tensor] = {}
        self.elementwise_weights: set[str] = set()
        for path, module in model.named_modules():
            own = list(module.named_parameters(recurse=False)) + list(module.named_buffers(recurse=False))
            for name, tensor in own:
                full = f"{path}.{name}" if path else name
                self.names.setdefault(id(tensor), full)
                self.banks[full] = tensor
                if not is_filter_bank(module, name, tensor):
                    self.elementwise_weights.add(full)
        self.labels: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self.next_label = 1
        self.axes: dict[tuple[str, int], Tensor] = {}
        self.elements: dict[str, Tensor] = {}
        self.reads: set[tuple[str, int]] = set()
        self.ties: list[Tensor] = []
        self.pins: list[Pin] = []
        self.cuts: list[Cut] = []
        self.mixed: list[Pin] = []
        self.origin: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self.ops: list[Op] = []
        self.opaque: dict[str, tuple[str, str]] = {}
        self.used: set[str] = set()
        self.stack: list[str] = []
        self.batch = 1
        self.outputs: list[Tensor] = []
        self.numbers: dict[tuple[Source, tuple[int, int, int]], Tensor] = {}
        self.guessed: set[tuple[Source, tuple[int, int, int]]] = set()
        self.recent: deque[Tensor] = deque(maxlen=RECENT)
        self.bank_vectors: dict[str, list[Tensor]] = {}
        self.pointwise: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self.constants: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        for _, value in attribute_values(model):
            if isinstance(value, Tensor):
                self.constants[value] = True
        self.model = model
        self.modules = dict(model.named_modules())
        self.module_names = {id(module): name for name, module in self.modules.items()}

    # -- context -------------------------------------------------------------------------------------------------------

    @contextmanager
    def watching(self) -> Iterator[LabelTracer]:
        """Record labels, with the model's sizes remembered."""
        with self.watching_layers(), remembered(self.model, self.compared), self.seeing_arrays(), self:
            yield self

    @contextmanager
    def seeing_arrays(self) -> Iterator[None]:
        """torch does not tell function modes of from_numpy. What it makes is a constant: channels that had left torch
        stay anyway."""
        original = torch.from_numpy

        def from_numpy(array: object) -> Tensor:
            value = original(array)
            self.constants[value] = True
            return value

        torch.from_numpy = from_numpy
        try:
            yield
        finally:
            torch.from_numpy = original

    @contextmanager
    def watching_layers(self) -> Iterator[LabelTracer]:
        """Follow which module runs, so that pins and failures name the layer. The stack stays where a failure left
        it."""

        def enter(module: nn.Module, _inputs: object) -> None:
            self.stack.append(self.module_names.get(id(module), type(module).__name__))

        def leave(_module: nn.Module, _inputs: object, _output: object) -> None:
            if self.stack:
                self.stack.pop()

        handles = [
            nn.modules.module.register_module_forward_pre_hook(enter),
            nn.modules.module.register_module_forward_hook(leave),
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    @property
    def layer(self) -> str:
        return (self.stack[-1] if self.stack else "") or "(model)"

    # -- labels --------------------------------------------------------------------------------------------------------

    def fresh(self, count: int) -> Tensor:
        start, self.next_label = self.next_label, self.next_label + count
        return torch.arange(start, self.next_label)

    def among(self, labels: Tensor) -> Tensor:
        """The labels that occur, each once, in order, without PINNED. As marks in a list of all labels: unique would
        sort every element."""
        there = torch.zeros(self.next_label, dtype=torch.bool)
        there[distinct(labels).reshape(-1)] = True
        there[PINNED] = False
        return there.nonzero()[:, 0]

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Labels at the same place in `a` and `b` (broadcast against each other) live and die together."""
        a, b = torch.broadcast_tensors(a, b)
        once = tuple(slice(0, 1) if one == other == 0 else slice(None) for one, other in zip(a.stride(), b.stride()))
        a, b = a[once].reshape(-1), b[once].reshape(-1)
        differ = a != b
        if bool(differ.any()):  # as one number per pair, since unique over columns takes fifty times as long
            pairs = torch.unique(a[differ] * self.next_label + b[differ])
            self.ties.append(torch.stack([pairs // self.next_label, pairs % self.next_label]))

    def tie_along(self, labels: Tensor, dim: int) -> Tensor:
        """Tie all entries along `dim`; returns the first entry, with `dim` kept at size 1."""
        first = labels.narrow(dim, 0, 1)
        if varies(labels, dim):
            self.tie(labels, first.expand_as(labels))
        return first

    def pin(self, labels: Tensor | None, op: str) -> None:
        if labels is None:
            return
        found = self.among(labels)
        if found.numel():
            self.pins.append(Pin(op, self.layer, found))

    def cut(self, labels: Tensor, op: str) -> None:
        self.cuts.append(Cut(op, self.layer, self.among(labels)))

    def sized_by(self, number: object, labels: Tensor) -> bool:
        """Note that `number`, if it is a remembered one, must shrink with these labels (1-D). Returns whether it is."""
        if not isinstance(number, Number) or labels.numel() != int(number):
            return False
        key = (number.source, number.formula)
        if number.multiplier > 1 and number.divisor == 1 and labels.numel() % number.multiplier == 0:
            self.tie_along(labels.view(number.multiplier, -1), 0)  # only multiples can be remembered
        for (source, _), known in self.numbers.items():
            if source == number.source:
                if known.numel() == labels.numel():  # one attribute used twice: what it counts must shrink alike
                    self.tie(known, labels)
                elif known.numel() % labels.numel() == 0:
                    self.tie(known.view(-1, labels.numel()), labels.expand(known.numel() // labels.numel(), -1))
                elif labels.numel() % known.numel() == 0:
                    self.tie(labels.view(-1, known.numel()), known.expand(labels.numel() // known.numel(), -1))
                else:
                    return False
        self.numbers.setdefault(key, labels.clone())
        return True

    def compared(self, number: Number) -> None:
        """A remembered size turned out to equal another whole number. If the shape of a value was just asked for and
        its channels are as many, they were compared with each other, so the size must shrink with them. It is a guess
        that a trial can refute."""
        for labels in reversed(self.recent):
            for dim in range(labels.ndim):
                if (
                    labels.size(dim) == int(number)
                    and varies(labels, dim)
                    and (along := self.vector(labels, dim)) is not None
                ):
                    key = (number.source, number.formula)
                    known = key in self.numbers
                    if self.sized_by(number, along) and not known:
                        self.guessed.add(key)
                    return

    def note_size(self, attribute: str, labels: Tensor) -> None:
        """The running layer remembers under this name how many channels it has: labels, (channels,)."""
        module = self.modules[self.stack[-1]] if self.stack and self.stack[-1] in self.modules else None
        if (
            module is not None
            and type(vars(module).get(attribute)) is int
            and vars(module)[attribute] == labels.numel()
        ):
            self.numbers.setdefault((Source(self.stack[-1], attribute, -1), (1, 1, 0)), labels.clone())

    def mix(self, labels: Tensor, op: str) -> None:
        """A statistic over channels: removing one changes what the others see. A narrow layer works, but computes
        another function than the masked original. If a compact copy fails, this is a suspect too."""
        found = self.among(labels)
        if found.numel():
            self.mixed.append(Pin(op, self.layer, found))
            self.cuts.append(Cut(op, self.layer, found))

    def bank_of(self, value: object) -> str | None:
        """The filter bank that a computed weight came from, by name."""
        if not isinstance(value, Tensor):
            return None
        name = self.names.get(id(value))
        if name is not None:
            return None if name in self.elementwise_weights else name
        return self.origin.get(value)

    def of(self, value: object) -> Tensor | None:
        """Labels of a value: None for anything that carries no channels (numbers, constants)."""
        if not isinstance(value, Tensor):
            return None
        if value in self.labels:
            return self.labels[value]
        name = self.names.get(id(value))
        if name is None or value.numel() < 2:
            return None
        return self.parameter_labels(name, value)

    def parameter_labels(self, name: str, value: Tensor) -> Tensor:
        """Labels of a parameter that is used as a value: one per element, or one per filter for a filter bank."""
        if name not in self.elements:
            self.used.add(name)
            if name in self.elementwise_weights:
                labels = self.fresh(value.numel()).view(value.shape)
            else:
                labels = self.fresh(value.size(0)).view(-1, *[1] * (value.ndim - 1)).expand(value.shape)
            self.elements[name] = labels
        return self.elements[name]

    def axis(self, tensor: Tensor | None, dim: int, labels: Tensor, reads: bool = False) -> None:
        """`labels` (one per entry) sit along dimension `dim` of a parameter, buffer, or tensor made of one.

        reads: the tensor's slices multiply the channels of its input, so zeroing them hides an arm from it.
        """
        if tensor is None:
            return
        name = self.names.get(id(tensor))
        if name is None:
            derived = self.labels.get(tensor)
            if derived is None:
                self.pin(labels, "constant operand")
            elif not bool(distinct(derived).any()):
                self.pin(labels, "operand of fixed size")
            # one filter stretched over all channels serves any number
            elif tensor.size(dim) > 1 and derived.stride(dim) == 0:
                self.pin(derived, "stretched operand")
            else:
                shape = [1] * tensor.ndim
                shape[dim] = -1
                self.tie(derived, labels.reshape(shape).expand(derived.shape))
            return
        self.used.add(name)
        if reads:
            self.reads.add((name, dim))
        if (name, dim) in self.axes:
            self.tie(self.axes[name, dim], labels)
        else:
            self.axes[name, dim] = labels

    def vector(self, labels: Tensor, dim: int) -> Tensor | None:
        """The labels along `dim` when they do not depend on any other dimension, else None. Shape (size of dim,)."""
        dim = dim % labels.ndim
        if any(varies(labels, d) for d in range(labels.ndim) if d != dim):
            return None
        return labels.movedim(dim, 0).reshape(labels.size(dim), -1)[:, 0]

    def input_labels(self, value: Tensor, op: str) -> Tensor:
        """Labels of what a layer reads. A constant has none to follow. Any other value without labels was made out of
        sight (scripted code, a custom kernel) from activations unknown, so everything that was seen so far is
        pinned."""
        labels = self.of(value)
        if labels is None:
            if self.next_label > 1 and not self.known(value):
                self.pins.append(
                    Pin(f"a function out of sight before {op}", self.layer, torch.arange(1, self.next_label))
                )
            labels = self.pinned_like(value)
        return labels

    def is_own(self, value: Tensor) -> bool:
        """Whether a value is one of the network's parameters or buffers, or a copy of one."""
        return id(value) in self.names or value in self.pointwise

    def known(self, value: Tensor) -> bool:
        """Whether it is clear where a value came from: activations that carry labels, the network's own tensors, or
        constants."""
        return value in self.labels or value in self.constants or id(value) in self.names

    def note_constants(self, output: object, args: tuple, kwargs: dict) -> None:
        """What a function makes of nothing, or of constants only, is a constant."""
        made = [value for value in tensors_in(output) if not self.known(value)]
        if made and all(self.known(value) for value in tensors_in([args, kwargs])):
            for value in made:
                self.constants[value] = True

    def pinned_like(self, value: Tensor) -> Tensor:
        return torch.zeros((), dtype=torch.int64).expand(value.shape)

    def set(self, output: Tensor, labels: Tensor) -> None:
        self.labels[output] = labels.expand(output.shape)

    def remember_bank(self, output: object, args: tuple, kwargs: dict) -> None:
        """A function of a filter bank gives a computed weight of that bank."""
        if isinstance(output, Tensor):
            bank = next((name for value in tensors_in([args, kwargs]) if (name := self.bank_of(value))), None)
            if bank is not None and output not in self.origin:
                self.origin[output] = bank

    # -- dispatch ------------------------------------------------------------------------------------------------------

    def __torch_function__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        kwargs = kwargs or {}
        for name in ("input", "tensors", "tensor"):  # rules find the first operand in args[0], however it was passed
            if not args and name in kwargs:
                args, kwargs = (kwargs[name],), {key: value for key, value in kwargs.items() if key != name}
        rule = self.rules.get(func)
        if rule is None:
            output = func(*args, **kwargs)
            if isinstance(output, (Tensor, tuple, list)):
                self.default(func, output, args, kwargs)
        else:
            output = rule(self, func, args, kwargs)
            if rule not in self.layers:
                self.remember_bank(output, args, kwargs)
        if isinstance(output, (Tensor, tuple, list)):
            self.note_constants(output, args, kwargs)
        return output

    def default(self, func: Callable, output: object, args: tuple, kwargs: dict) -> None:
        """No rule: everything that goes in and comes out is pinned."""
        name = getattr(func, "__name__", str(func))
        outputs = list(tensors_in(output))
        if not outputs:
            return
        labelled = False
        for value in tensors_in([args, kwargs]):
            parameter = self.names.get(id(value))
            if parameter is not None:
                self.opaque[parameter] = (name, self.layer)
            if value in self.labels:
                labelled = True
                self.pin(self.labels[value], name)
        for value in outputs:
            if labelled and id(value) not in self.names:
                self.set(value, self.pinned_like(value))
