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

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from dynprune.numbers import Number, Source, remembered

AxisKey = tuple[str, int]  # (tensor name, dimension)
PINNED = 0


@dataclass(frozen=True)
class Op:
    """One use of a weight: it costs `positions` x (elements of the weight) multiplications per example.

    kind: linear, or a convolution function's name. size: of the input behind its channels (of a linear layer: its positions).
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


Rule = Callable[["LabelTracer", Callable, tuple, dict], object]


class LabelTracer(TorchFunctionMode):
    """Records the channel structure of everything that runs inside `with tracer.watching(model):`."""

    def __init__(self, model: nn.Module, rules: Mapping[Callable, Rule] | None = None, layers: Collection[Rule] = ()):
        """rules: by function. layers: the rules of functions that use a filter bank rather than compute another one from it."""
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
                # A filter's first dimension makes the channels; any other tensor may carry them along any dimension.
                filters = name.startswith("weight") and hasattr(module, "weight") or isinstance(module, ParametrizationList)
                if tensor.ndim < 2 or not filters:
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
        self.numbers: dict[tuple[Source, tuple[int, int, int]], Tensor] = {}
        self.model = model
        self.module_names = {id(module): name for name, module in model.named_modules()}

    # -- context ------------------------------------------------------------------------------------------------

    @contextmanager
    def watching(self) -> Iterator[LabelTracer]:
        """Record labels, with the model's sizes remembered."""
        with self.watching_layers(), remembered(self.model), self:
            yield self

    @contextmanager
    def watching_layers(self) -> Iterator[LabelTracer]:
        """Follow which module runs, so that pins and failures name the layer. The stack stays where a failure left it."""
        def enter(module: nn.Module, _inputs: object) -> None:
            self.stack.append(self.module_names.get(id(module), type(module).__name__))

        def leave(_module: nn.Module, _inputs: object, _output: object) -> None:
            if self.stack:
                self.stack.pop()

        handles = [nn.modules.module.register_module_forward_pre_hook(enter),
                   nn.modules.module.register_module_forward_hook(leave)]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    @property
    def layer(self) -> str:
        return (self.stack[-1] if self.stack else "") or "(model)"

    # -- labels ---------------------------------------------------------------------------------------------------

    def fresh(self, count: int) -> Tensor:
        start, self.next_label = self.next_label, self.next_label + count
        return torch.arange(start, self.next_label)

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Labels at the same place in `a` and `b` (broadcast against each other) live and die together."""
        a, b = torch.broadcast_tensors(distinct(a) if a.shape == b.shape else a, distinct(b) if a.shape == b.shape else b)
        pairs = torch.stack([a.reshape(-1), b.reshape(-1)])
        pairs = pairs[:, pairs[0] != pairs[1]]
        if pairs.numel():
            self.ties.append(torch.unique(pairs, dim=1))

    def tie_along(self, labels: Tensor, dim: int) -> Tensor:
        """Tie all entries along `dim`; returns the first entry, with `dim` kept at size 1."""
        first = labels.narrow(dim, 0, 1)
        if varies(labels, dim):
            self.tie(labels, first.expand_as(labels))
        return first

    def pin(self, labels: Tensor | None, op: str) -> None:
        if labels is None:
            return
        found = torch.unique(distinct(labels))
        found = found[found != PINNED]
        if found.numel():
            self.pins.append(Pin(op, self.layer, found))

    def cut(self, labels: Tensor, op: str) -> None:
        found = torch.unique(distinct(labels))
        self.cuts.append(Cut(op, self.layer, found[found != PINNED]))

    def sized_by(self, number: object, labels: Tensor) -> bool:
        """Note that `number`, if it is a remembered one, must shrink with these labels (1-D). Returns whether it is."""
        if not isinstance(number, Number) or labels.numel() != int(number):
            return False
        key = (number.source, (number.multiplier, number.divisor, number.offset))
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

    def mix(self, labels: Tensor, op: str) -> None:
        """A statistic over channels: removing one changes what the others see. A narrow layer works, but computes another
        function than the masked original. If a compact copy fails, this is a suspect too."""
        found = torch.unique(distinct(labels))
        found = found[found != PINNED]
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
            elif tensor.size(dim) > 1 and derived.stride(dim) == 0:  # one filter stretched over all channels serves any number
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
        """Labels of what a layer reads. A value without any was made out of sight (scripted code, a custom kernel) from
        activations unknown, so everything that was seen so far is pinned."""
        labels = self.of(value)
        if labels is None:
            if self.next_label > 1:
                self.pins.append(Pin(f"a function out of sight before {op}", self.layer, torch.arange(1, self.next_label)))
            labels = self.pinned_like(value)
        return labels

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

    # -- dispatch -------------------------------------------------------------------------------------------------

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
            return output
        output = rule(self, func, args, kwargs)
        if rule not in self.layers:
            self.remember_bank(output, args, kwargs)
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
