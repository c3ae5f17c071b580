"""A wide network that goes on from a narrow one: of a cascade's second network, only what the first did not compute.

Takes the ONNX graphs of two networks of one architecture; finds out whether the narrow one lies inside the wide one:
whether in every layer some of the wide one's channels have the narrow one's weights and read nothing else. Then the
channels of the first are read where they are, and nodes for the others are written. Nothing but the weights says so,
and nothing else is believed: a file is compared with its networks after it is written.

The idea of widths that lie in one another is that of slimmable networks (Yu et al., ICLR 2019) and NestedNet (Kim, Ahn
& Oh, CVPR 2018); that inner channels are computed once is ours to show.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import onnx
from onnx import helper, numpy_helper

from dynprune.files.onnxfile import macs_in, shapes_of

# what an operator with one input does to every channel alone
ALONE = {
    "Relu", "LeakyRelu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Elu", "Selu", "Gelu", "Erf", "Mish",
    "Softplus", "Identity", "Dropout", "Cast", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Exp",
    "Sqrt", "Neg", "Abs", "Reciprocal", "Swish",
}  # fmt: skip
BETWEEN = {"Add", "Sub", "Mul", "Div", "Max", "Min", "Pow"}
PRODUCTS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
FLAT = {"Flatten", "Reshape"}
IN_PLACES = {"ReduceMean", "Pad", "Resize", "Squeeze", "Unsqueeze"}  # as a rule; `spatial` looks


class NotNestedError(Exception):
    """The narrow network does not lie inside the wide one, or not as this file can use."""


@dataclass(frozen=True)
class Value:
    """A tensor of the wide network. twin: the narrow network's tensor that holds the channels `held`, in their order,
    of `size`; "" where it holds none. own: the tensor with the others, in their order; "" where there are none."""

    twin: str
    held: np.ndarray
    size: int
    own: str

    @property
    def rest(self) -> np.ndarray:
        return np.setdiff1d(np.arange(self.size), self.held)

    @property
    def order(self) -> np.ndarray:
        """Channels of the whole tensor as it is joined."""
        return np.concatenate([self.held, self.rest]).astype(np.int64)


@dataclass
class Wider:
    """Nodes that compute what a wide network adds to a narrow one. nodes, constants: of a graph in which the narrow
    network's tensors can be seen through `seen`: their names there, by their names in the narrow network's graph.
    scores: what comes out. macs: multiply-accumulates of an image in these nodes."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    seen: dict[str, str] = field(default_factory=dict)
    scores: str = ""
    macs: int = 0


def wider(narrow: onnx.ModelProto, wide: onnx.ModelProto, prefix: str) -> Wider | None:
    """What the wide network adds; None where it does not hold the narrow one. Names of the nodes' tensors begin with
    the prefix. Both graphs: as `export` writes them, without functions."""
    try:
        found = Widening(narrow, wide, prefix).all()
    except NotNestedError:
        return None
    return found if found.macs < macs_in(wide) else None  # two networks of one kind may have nothing in common


class Widening:
    """The nodes of both networks, one after another; raises NotNestedError where they do not fit."""

    def __init__(self, narrow: onnx.ModelProto, wide: onnx.ModelProto, prefix: str):
        self.narrow, self.wide, self.prefix = narrow.graph, wide.graph, prefix
        self.constants = {graph: constants_of(own.graph) for graph, own in (("narrow", narrow), ("wide", wide))}
        self.shapes = shapes_of(wide)
        self.made = Wider()
        self.values: dict[str, Value] = {}
        self.joined: dict[str, str] = {}
        self.numbers = itertools.count()

    def all(self) -> Wider:
        pairs = list(zip(self.narrow.node, self.wide.node))
        ops = [[node.op_type for node in graph.node] for graph in (self.narrow, self.wide)]
        if ops[0] != ops[1] or len(self.narrow.input) != 1 or len(self.wide.input) != 1:
            raise NotNestedError
        taken, size = self.wide.input[0].name, self.shapes[self.wide.input[0].name][1]
        self.values[taken] = Value(self.narrow.input[0].name, np.arange(size), size, "")
        for inner, node in pairs:
            if node.op_type == "Constant":
                continue
            self.add(inner, node)
        last = self.values.get(self.wide.output[0].name)
        if last is None or len(last.held):
            raise NotNestedError  # nothing of its own to say, or no scores
        self.made.scores = last.own
        return self.made

    def add(self, inner: onnx.NodeProto, node: onnx.NodeProto) -> None:
        """The nodes for one node of the wide network."""
        given = [self.values[name] for name in node.input if name in self.values]
        if not given:  # of constants alone
            raise NotNestedError
        if any(name for name in node.output[1:]) or settings(inner) != settings(node):
            raise NotNestedError
        if all(not len(value.held) for value in given):
            made = self.whole(node)
        elif node.op_type in PRODUCTS:
            made = self.product(inner, node)
        elif node.op_type == "BatchNormalization":
            made = self.each(inner, node, given[0], range(1, 5))
        elif node.op_type == "PRelu":
            made = self.slope(inner, node, given[0])
        elif node.op_type in ALONE or node.op_type in IN_PLACES and self.spatial(node):
            made = self.emit_like(inner, node, given[0], [given[0].own, *self.other(node)])
        elif node.op_type in BETWEEN:
            made = self.between(inner, node)
        elif node.op_type == "Concat":
            made = self.concat(inner, node)
        elif node.op_type in FLAT:
            made = self.flat(inner, node, given[0])
        else:
            raise NotNestedError
        self.values[node.output[0]] = made

    # -- operators -----------------------------------------------------------------------------------------------------

    def product(self, inner: onnx.NodeProto, node: onnx.NodeProto) -> Value:
        """A convolution, or a product with a matrix: the channels that the narrow network lacks, of all inputs."""
        taken = self.values.get(node.input[0])
        ours, wide = self.constant("narrow", inner.input[1]), self.constant("wide", node.input[1])
        if taken is None or ours is None or wide is None or attribute(node, "transA", 0):
            raise NotNestedError
        if node.op_type in ("Gemm", "MatMul") and self.rank(node.input[0]) != 2:
            raise NotNestedError  # channels stand at the end of its rows
        if (groups := attribute(node, "group", 1)) != 1:
            if groups != taken.size or node.op_type != "Conv":
                raise NotNestedError
            return self.depthwise(inner, node, taken)
        rows = 1 if node.op_type in ("ConvTranspose", "MatMul") else 0  # the dimension of the outputs
        if node.op_type == "Gemm" and not attribute(node, "transB", 0):
            rows = 1
        ours, wide = np.swapaxes(ours, 0, rows), np.swapaxes(wide, 0, rows)
        added, to_all = self.added("narrow", inner, len(ours)), self.added("wide", node, len(wide))
        held = rows_inside(ours, wide, taken, added, to_all)
        made = Value(
            inner.output[0] if len(held) else "", held, len(wide), self.name() if len(held) < len(wide) else ""
        )
        if made.own:
            part = wide[made.rest][:, taken.order]
            inputs = [self.whole_of(taken), self.put(np.swapaxes(part, 0, rows))]
            if to_all is not None:
                inputs.append(self.put(to_all[made.rest]))
            self.emit(node, inputs, made.own)
            self.count(node, part)
        return made

    def added(self, graph: str, node: onnx.NodeProto, channels: int) -> np.ndarray | None:
        """The bias of a product, one number for each channel."""
        if len(node.input) < 3 or not node.input[2]:
            return None
        bias = self.constant(graph, node.input[2])
        if bias is None or bias.size not in (1, channels):
            raise NotNestedError
        return np.broadcast_to(bias.reshape(-1), (channels,))

    def depthwise(self, inner: onnx.NodeProto, node: onnx.NodeProto, taken: Value) -> Value:
        weight = self.constant("wide", node.input[1])
        if weight is None:
            raise NotNestedError
        each = len(weight) // taken.size
        held = (taken.held[:, None] * each + np.arange(each)).reshape(-1)
        made = self.each(inner, node, Value("", held, len(weight), taken.own), range(1, len(node.input)))
        if made.own:
            groups = next(own for own in self.made.nodes[-1].attribute if own.name == "group")
            groups.i = len(taken.rest)
            self.count(node, weight[made.rest])
        return made

    def each(self, inner: onnx.NodeProto, node: onnx.NodeProto, taken: Value, parameters: range) -> Value:
        """An operator with parameters of every channel, which stand in these inputs."""
        inputs = [taken.own]
        for place in parameters:
            if not node.input[place]:
                inputs.append("")
                continue
            ours, wide = self.constant("narrow", inner.input[place]), self.constant("wide", node.input[place])
            if ours is None or wide is None or not np.array_equal(wide[taken.held], ours):
                raise NotNestedError
            inputs.append(self.put(wide[taken.rest]) if taken.own else "")
        return self.emit_like(inner, node, taken, inputs)

    def slope(self, inner: onnx.NodeProto, node: onnx.NodeProto, taken: Value) -> Value:
        ours, wide = self.constant("narrow", inner.input[1]), self.constant("wide", node.input[1])
        if ours is None or wide is None:
            raise NotNestedError
        return self.emit_like(inner, node, taken, [taken.own, self.of_channels(ours, wide, taken, node.input[0])])

    def between(self, inner: onnx.NodeProto, node: onnx.NodeProto) -> Value:
        """Of two tensors of the same channels, or of one and a constant."""
        names = [name for name in node.input if name in self.values]
        given = [self.values[name] for name in names]
        first = given[0]
        if any(value.size != first.size or not np.array_equal(value.held, first.held) for value in given):
            raise NotNestedError
        inputs = []
        for own, name in zip(inner.input, node.input):
            if name in self.values:
                inputs.append(self.values[name].own)
                continue
            ours, wide = self.constant("narrow", own), self.constant("wide", name)
            if ours is None or wide is None:
                raise NotNestedError
            inputs.append(self.of_channels(ours, wide, first, names[0]) if first.own else "")
        return self.emit_like(inner, node, first, inputs)

    def of_channels(self, ours: np.ndarray, wide: np.ndarray, taken: Value, name: str) -> str:
        """A constant beside the rest of a tensor's channels. name: the tensor's, whose second dimension they are."""
        if wide.size == 1 and np.array_equal(ours, wide):
            return self.put(wide)
        place = self.rank(name) - 1  # from the end
        if not 0 < place <= wide.ndim or wide.shape[-place] != taken.size:
            raise NotNestedError
        if not np.array_equal(np.take(wide, taken.held, -place), ours):
            raise NotNestedError
        return self.put(np.take(wide, taken.rest, -place))

    def concat(self, inner: onnx.NodeProto, node: onnx.NodeProto) -> Value:
        parts = [self.values.get(name) for name in node.input]
        if attribute(node, "axis", 0) not in (1, 1 - self.rank(node.output[0])) or any(part is None for part in parts):
            raise NotNestedError
        held, start, own = [], 0, []
        for part in cast(list[Value], parts):
            held.append(start + part.held)
            start += part.size
            own += [part.own] if part.own else []
            if not len(part.held) or np.any(np.diff(part.held) < 0):
                raise NotNestedError
        made = Value(inner.output[0], np.concatenate(held), start, self.name() if own else "")
        if own:
            self.emit(node, own, made.own)
        return made

    def flat(self, inner: onnx.NodeProto, node: onnx.NodeProto, taken: Value) -> Value:
        """(batch, channels, height, width) to (batch, channels * height * width)."""
        before, after = self.shapes.get(node.input[0], []), self.shapes.get(node.output[0], [])
        places = math.prod(before[2:])
        if len(after) != 2 or len(before) < 2 or not places or after[1] != taken.size * places:
            raise NotNestedError
        held = (taken.held[:, None] * places + np.arange(places)).reshape(-1)
        made = Value(inner.output[0], held, after[1], self.name() if taken.own else "")
        if taken.own:
            self.made.nodes.append(helper.make_node("Flatten", [taken.own], [made.own], axis=1))
        return made

    def whole(self, node: onnx.NodeProto) -> Value:
        """Of tensors of which the narrow network has no part: as the wide network has it."""
        inputs = []
        for name in node.input:
            constant = None if name in self.values else self.constant("wide", name)
            if name and name not in self.values and constant is None:
                raise NotNestedError
            inputs.append(
                self.values[name].own if name in self.values else "" if constant is None else self.put(constant)
            )
        size = (self.shapes.get(node.output[0]) or [0, 0])[1:2]
        made = Value("", np.zeros(0, np.int64), size[0] if size else 0, self.name())
        self.emit(node, inputs, made.own)
        if node.op_type in PRODUCTS and (weight := self.constant("wide", node.input[1])) is not None:
            self.count(node, weight)
        return made

    # -- nodes and constants -------------------------------------------------------------------------------------------

    def emit_like(self, inner: onnx.NodeProto, node: onnx.NodeProto, taken: Value, inputs: list[str]) -> Value:
        """The node for the rest of the channels, which stay in their places."""
        made = Value(inner.output[0], taken.held, taken.size, self.name() if taken.own else "")
        if taken.own:
            self.emit(node, inputs, made.own)
        return made

    def emit(self, node: onnx.NodeProto, inputs: list[str], output: str) -> None:
        own = onnx.NodeProto()
        own.CopyFrom(node)
        del own.input[:], own.output[:]
        own.input.extend(inputs)
        own.output.append(output)
        own.name = output
        self.made.nodes.append(own)

    def name(self) -> str:
        return f"{self.prefix}/v{next(self.numbers)}"

    def put(self, value: np.ndarray) -> str:
        name = f"{self.prefix}/c{len(self.made.constants)}"
        self.made.constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def other(self, node: onnx.NodeProto) -> list[str]:
        """Inputs behind the first, which are constants for all channels."""
        found = []
        for name in node.input[1:]:
            value = self.constant("wide", name) if name else None
            if name and value is None:
                raise NotNestedError
            found.append("" if value is None else self.put(value))
        return found

    def whole_of(self, value: Value) -> str:
        """The tensor with all its channels, in the order of `value.order`."""
        if not value.own:
            return self.seen(value.twin)
        if not len(value.held):
            return value.own
        if value.own not in self.joined:
            name = f"{value.own}_whole"
            self.made.nodes.append(helper.make_node("Concat", [self.seen(value.twin), value.own], [name], axis=1))
            self.joined[value.own] = name
        return self.joined[value.own]

    def seen(self, twin: str) -> str:
        return self.made.seen.setdefault(twin, f"{self.prefix}/seen{len(self.made.seen)}")

    def count(self, node: onnx.NodeProto, weight: np.ndarray) -> None:
        shape = self.shapes.get(node.input[0] if node.op_type == "ConvTranspose" else node.output[0], [])
        if len(shape) < 2 or 0 in shape:
            raise NotNestedError
        places = shape[1:-1] if node.op_type in ("Gemm", "MatMul") else shape[2:]
        self.made.macs += weight.size * math.prod(places)

    def constant(self, graph: str, name: str) -> np.ndarray | None:
        return self.constants[graph].get(name)

    def rank(self, name: str) -> int:
        return len(self.shapes.get(name, []))

    def spatial(self, node: onnx.NodeProto) -> bool:
        """Whether it leaves batch and channels alone."""
        rank = self.rank(node.output[0] if node.op_type == "Unsqueeze" else node.input[0])
        if node.op_type in ("ReduceMean", "Squeeze", "Unsqueeze"):
            axes = self.constant("wide", node.input[1]) if len(node.input) > 1 else attribute(node, "axes", None)
            return axes is not None and all(axis % rank > 1 for axis in np.asarray(axes).tolist())
        if node.op_type == "Pad":
            pads = self.constant("wide", node.input[1])
            axes = self.constant("wide", node.input[3]) if len(node.input) > 3 and node.input[3] else np.arange(rank)
            if pads is None or axes is None:
                return False
            return not any(pads.reshape(2, -1)[:, place].any() for place, axis in enumerate(axes) if axis % rank < 2)
        scales = self.constant("wide", node.input[2]) if len(node.input) > 2 and node.input[2] else None
        return scales is not None and len(scales) == rank and bool((scales[:2] == 1).all())


def rows_inside(
    ours: np.ndarray, wide: np.ndarray, taken: Value, added: np.ndarray | None, to_all: np.ndarray | None
) -> np.ndarray:
    """Which rows of the wide network's weight are the narrow one's, in their order; none unless all are found. ours,
    wide: (channels, inputs, ...). added, to_all: what is added to each channel. Inputs that the narrow network lacks
    must not be read."""
    nothing = np.zeros(0, np.int64)
    if ours.shape[1] != len(taken.held) or ours.shape[2:] != wide.shape[2:] or (added is None) != (to_all is None):
        return nothing
    blind = ~wide[:, taken.rest].reshape(len(wide), -1).any(1)
    places: dict[bytes, list[int]] = {}
    rows = with_bias(wide[:, taken.held], to_all)
    for number in np.flatnonzero(blind)[::-1]:
        places.setdefault(rows[number].tobytes(), []).append(int(number))
    found = []
    for row in with_bias(ours, added):
        if not (left := places.get(row.tobytes())):
            return nothing
        found.append(left.pop())
    return np.array(found, np.int64)


def with_bias(weight: np.ndarray, added: np.ndarray | None) -> np.ndarray:
    """Each row with what is added to it, (channels, numbers); -0 and 0 are alike."""
    flat = weight.reshape(len(weight), -1)
    return (flat if added is None else np.column_stack([flat, added])) + 0.0


def settings(node: onnx.NodeProto) -> dict[str, Any]:
    """Its attributes but for the number of groups, which is that of a depthwise layer's channels."""
    return {own.name: own.SerializeToString() for own in node.attribute if own.name != "group"}


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    return next((helper.get_attribute_value(own) for own in node.attribute if own.name == name), default)


def constants_of(graph: onnx.GraphProto) -> dict[str, np.ndarray]:
    found = {own.name: numpy_helper.to_array(own) for own in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and (value := attribute(node, "value", None)) is not None:
            found[node.output[0]] = numpy_helper.to_array(value)
    return found
