"""Label tracing: run a network once and see which channel each number belongs to.

While a network runs in `with tracer.watching():`, every activation carries a label tensor (`labels.py`) of its own
shape. Data movement needs no rules (the same function runs on the labels), elementwise functions tie the labels that
meet, only a few functions create or read channels, and every other function pins what goes in. So an unknown function
costs compression, never correctness.

Takes a module and the rules of functions (`rules.py`); what it finds is in its `record`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from dynprune.structure.labels import distinct, pinned_like, tensors_in
from dynprune.structure.layers import RunningLayer
from dynprune.structure.numbers import remembered
from dynprune.structure.origins import Origins
from dynprune.structure.record import Cut, Pin, Record
from dynprune.structure.sizes import Sizes

Rule = Callable[["LabelTracer", Callable, tuple, dict], object]


class LabelTracer(TorchFunctionMode):
    """Runs functions by their rules. carried: the labels of each value that has any. batch: examples in the input."""

    def __init__(self, model: nn.Module, rules: Mapping[Callable, Rule], layers: Collection[Rule]):
        """rules: by function. layers: the rules of functions that use a filter bank rather than compute another one
        from it."""
        super().__init__()
        self.model, self.rules, self.layers = model, rules, layers
        self.record = Record()
        self.labels = self.record.labels
        self.carried: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self.origins, self.running = Origins(model), RunningLayer(model)
        self.sizes = Sizes(self.record, self.running)
        self.batch = 1

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record labels, with the model's sizes remembered."""
        with self.running.watched(), remembered(self.model, self.sizes.compared), self.origins.seeing_arrays(), self:
            yield

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
                self.origins.add_computed(output, args, kwargs)
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
            parameter = self.origins.name_of(value)
            if parameter is not None:
                self.record.opaque[parameter] = (name, self.layer)
            if value in self.carried:
                labelled = True
                self.pin(self.carried[value], name)
        for value in outputs:
            if labelled and self.origins.name_of(value) is None:
                self.set(value, pinned_like(value))

    def note_constants(self, output: object, args: tuple, kwargs: dict) -> None:
        """What a function makes of nothing, or of constants only, is a constant."""
        made = [value for value in tensors_in(output) if not self.known(value)]
        if made and all(self.known(value) for value in tensors_in([args, kwargs])):
            for value in made:
                self.origins.add_constant(value)

    @property
    def layer(self) -> str:
        """The name of the layer that runs."""
        return self.running.name

    # -- labels of values ----------------------------------------------------------------------------------------------

    def of(self, value: object) -> Tensor | None:
        """Labels of a value: None for anything that carries no channels (numbers, constants)."""
        if not isinstance(value, Tensor):
            return None
        if value in self.carried:
            return self.carried[value]
        name = self.origins.name_of(value)
        if name is None or value.numel() < 2:
            return None
        return self.parameter_labels(name, value)

    def parameter_labels(self, name: str, value: Tensor) -> Tensor:
        """Labels of a parameter that is used as a value: one per element, or one per filter for a filter bank."""
        elements = self.record.elements
        if name not in elements:
            self.record.used.add(name)
            if name in self.origins.filter_banks:
                labels = self.labels.fresh(value.size(0)).view(-1, *[1] * (value.ndim - 1)).expand(value.shape)
            else:
                labels = self.labels.fresh(value.numel()).view(value.shape)
            elements[name] = labels
        return elements[name]

    def input_labels(self, value: Tensor, op: str) -> Tensor:
        """Labels of what a layer reads. A constant has none to follow. Any other value without labels was made out of
        sight (scripted code, a custom kernel) from activations unknown, so everything that was seen so far is
        pinned."""
        labels = self.of(value)
        if labels is None:
            if self.labels.next > 1 and not self.known(value):
                self.record.pins.append(Pin(f"a function out of sight before {op}", self.layer, self.labels.all()))
            labels = pinned_like(value)
        return labels

    def known(self, value: Tensor) -> bool:
        """Whether it is clear where a value came from: activations that carry labels, the network's own tensors, or
        constants."""
        return value in self.carried or self.origins.knows(value)

    def set(self, output: Tensor, labels: Tensor) -> None:
        self.carried[output] = labels.expand(output.shape)

    # -- what a function does to channels ------------------------------------------------------------------------------

    def axis(self, tensor: Tensor | None, dim: int, labels: Tensor, reads: bool = False) -> None:
        """`labels` (one per entry) sit along dimension `dim` of a parameter, buffer, or tensor made of one.

        reads: the tensor's slices multiply the channels of its input, so zeroing them hides an arm from it.
        """
        if tensor is None:
            return
        name = self.origins.name_of(tensor)
        if name is None:
            self.computed_axis(tensor, dim, labels)
            return
        self.record.used.add(name)
        if reads:
            self.record.reads.add((name, dim))
        if (name, dim) in self.record.axes:
            self.labels.tie(self.record.axes[name, dim], labels)
        else:
            self.record.axes[name, dim] = labels

    def computed_axis(self, tensor: Tensor, dim: int, labels: Tensor) -> None:
        """As `axis`, of a tensor that has no name: it has labels if it was made of one that does."""
        derived = self.carried.get(tensor)
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
            self.labels.tie(derived, labels.reshape(shape).expand(derived.shape))

    def pin(self, labels: Tensor | None, op: str) -> None:
        if labels is None:
            return
        found = self.labels.among(labels)
        if found.numel():
            self.record.pins.append(Pin(op, self.layer, found))

    def cut(self, labels: Tensor, op: str) -> None:
        self.record.cuts.append(Cut(op, self.layer, self.labels.among(labels)))

    def mix(self, labels: Tensor, op: str) -> None:
        """A statistic over channels: removing one changes what the others see. A narrow layer works, but computes
        another function than the masked original. If a compact copy fails, this is a suspect too."""
        found = self.labels.among(labels)
        if found.numel():
            self.record.mixed.append(Pin(op, self.layer, found))
            self.record.cuts.append(Cut(op, self.layer, found))
