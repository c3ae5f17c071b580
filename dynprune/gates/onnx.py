"""A gated network as ONNX for stock onnxruntime, where a closed gate means less work.

Takes a GatedNetwork and the ONNX graph of its network without gates; puts the predictors in and gives every gated layer
one of these forms:

    full    everything is computed, closed inputs multiplied by 0: for layers too small to gain
    layer   an `If` around the layer: nothing is computed when all of its outputs, or all of its inputs, are closed
    blocks  an `If` with constant weights per unit of outputs: keeps onnxruntime's blocked layout, does not profit from
            closed inputs
    pair    two layers at once, one that makes a group and the only one that reads it: an `If` per unit around its part
            of both, and the sum of the parts; keeps the blocked layout and profits from closed units twice
    gather  only open rows and columns of the weight are gathered and convolved: profits from both, but leaves the
            blocked layout

Which form a layer gets is measured, with the gates of real images. The graph takes one image; its second output is what
was open.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from dynprune.budgets.latency import interleaved
from dynprune.errors import DynpruneError
from dynprune.files.onnxfile import open_session
from dynprune.gates.gating import Channels, Choices, GatedNetwork, Site, is_depthwise

FORMS = ("full", "layer", "blocks", "pair", "gather")
SITE_SECONDS, SITE_RUNS = 0.03, (2, 20)  # for one form of one layer over its images
MOST_BLOCKS = 32  # more `If`s than this in one layer do not pay
# Kinds of nodes that work on single values.
BETWEEN = {
    "Relu",
    "LeakyRelu",
    "Clip",
    "HardSwish",
    "HardSigmoid",
    "Sigmoid",
    "Tanh",
    "Elu",
    "Celu",
    "Selu",
    "Gelu",
    "Softplus",
    "Mish",
    "Identity",
}


class Builder:
    """Nodes and constants of an ONNX graph under construction; every value gets a fresh name."""

    def __init__(self, prefix: str = "gate"):
        self.prefix, self.count = prefix, 0
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def name(self) -> str:
        self.count += 1
        return f"{self.prefix}/{self.count}"

    def constant(self, value: np.ndarray) -> str:
        name = self.name()
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def node(self, kind: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        output = output or self.name()
        self.nodes.append(helper.make_node(kind, list(inputs), [output], **attributes))
        return output

    def ints(self, *values: int) -> str:
        return self.constant(np.array(values, dtype=np.int64))

    def branch(self, build: Callable[[Builder], str]) -> onnx.GraphProto:
        """A subgraph without inputs; it sees the values outside. Its constants are its own, so that onnxruntime can
        prepare them."""
        inner = Builder(self.name())
        output = build(inner)
        return helper.make_graph(
            inner.nodes,
            self.name(),
            [],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
            inner.constants,
        )

    def when(
        self,
        condition: str,
        then: Callable[[Builder], str],
        otherwise: Callable[[Builder], str],
        output: str | None = None,
    ) -> str:
        return self.node(
            "If", condition, output=output, then_branch=self.branch(then), else_branch=self.branch(otherwise)
        )


@dataclass(frozen=True)
class Layer:
    """One convolution to be rewritten. shape: of its output for one image, (1, channels, ...). arms: names of the open
    masks, (1, channels) each, None where nothing is gated. attributes: of the Conv node."""

    site: Site
    weight: np.ndarray
    bias: np.ndarray | None
    shape: tuple[int, ...]
    attributes: dict
    seen: str | None
    made: str | None

    @property
    def plain(self) -> bool:
        return self.site.op.groups == 1

    @property
    def forms(self) -> tuple[str, ...]:
        """The forms that this layer can take."""
        everything_read, everything_made = all_gated(self.site.inputs), all_gated(self.site.outputs)
        forms = ["full"]
        if self.plain and (everything_read or everything_made):
            forms.append("layer")
        if self.plain and everything_made and 1 < len(self.units) <= MOST_BLOCKS:
            forms.append("blocks")
        if self.plain and (self.seen or self.made):
            forms.append("gather")
        return tuple(forms)

    @property
    def units(self) -> list[np.ndarray]:
        """Output channels of each unit that this layer makes, if it makes one group: they open and close together."""
        sizes = [size for gate in self.site.decides for size in gate.sizes]
        if self.site.outputs is None or sum(sizes) != len(self.weight):
            return []
        order = np.argsort(self.site.outputs.index.numpy(), kind="stable")
        return np.split(order, np.cumsum(sizes)[:-1])


@dataclass(frozen=True)
class Pair:
    """A layer that makes a group, what stands between, and the only layer that reads it. between: nodes that work on
    single values, and depthwise layers."""

    maker: Layer
    between: tuple[tuple[onnx.NodeProto, Layer | None], ...]
    reader: Layer


def all_gated(channels: Channels | None) -> bool:
    """Whether there are gated channels, and no others beside them."""
    return channels is not None and bool((channels.index > 0).all())


def masked_input(builder: Builder, x: str, layer: Layer) -> str:
    if layer.seen is None:
        return x
    rank = len(layer.shape)
    shaped = builder.node("Reshape", layer.seen, builder.ints(1, -1, *[1] * (rank - 2))) if rank > 2 else layer.seen
    return builder.node("Mul", x, shaped)


def conv(builder: Builder, x: str, layer: Layer, rows: np.ndarray | None = None, output: str | None = None) -> str:
    weight = layer.weight if rows is None else layer.weight[rows]
    attributes = layer.attributes if rows is None or layer.plain else {**layer.attributes, "group": len(rows)}
    bias = [] if layer.bias is None else [builder.constant(layer.bias if rows is None else layer.bias[rows])]
    return builder.node("Conv", x, builder.constant(weight), *bias, output=output, **attributes)


def nothing(builder: Builder, channels: int, layer: Layer) -> str:
    """Zeros in place of closed outputs, made without a large constant in the file."""
    return builder.node("ConstantOfShape", builder.ints(1, channels, *layer.shape[2:]))


def bias_alone(builder: Builder, layer: Layer) -> str:
    """What a layer gives for zeros."""
    if layer.bias is None:
        return nothing(builder, layer.shape[1], layer)
    return builder.node(
        "Expand", builder.constant(layer.bias.reshape(1, -1, *[1] * (len(layer.shape) - 2))), builder.ints(*layer.shape)
    )


def any_open(builder: Builder, mask: str) -> str:
    largest = builder.node("ReduceMax", mask, builder.ints(0, 1), keepdims=0)
    return builder.node("Greater", largest, builder.constant(np.array(0.5, dtype=np.float32)))


def add_full(builder: Builder, x: str, layer: Layer, output: str) -> None:
    conv(builder, masked_input(builder, x, layer), layer, output=output)


def add_layer(builder: Builder, x: str, layer: Layer, output: str) -> None:
    def inside(inner: Builder, name: str | None = None) -> str:
        return conv(inner, masked_input(inner, x, layer), layer, output=name)

    # the masks that say of everything whether it is open
    seen = layer.seen if all_gated(layer.site.inputs) else None
    made = layer.made if all_gated(layer.site.outputs) else None

    def reading(outer: Builder, name: str | None = None) -> str:
        if seen is None:
            return inside(outer, name)
        return outer.when(any_open(outer, seen), inside, lambda inner: bias_alone(inner, layer), output=name)

    if made is not None:
        builder.when(
            any_open(builder, made), reading, lambda inner: nothing(inner, layer.shape[1], layer), output=output
        )
    else:
        reading(builder, output)


def add_blocks(builder: Builder, x: str, layer: Layer, output: str) -> None:
    assert layer.made is not None, "units without a mask"
    x = masked_input(builder, x, layer)
    parts = []
    for rows in layer.units:
        is_open = builder.node(
            "Greater",
            builder.node(
                "Gather",
                builder.node("Reshape", layer.made, builder.ints(-1)),
                builder.constant(np.array(rows[0])),
                axis=0,
            ),
            builder.constant(np.array(0.5, dtype=np.float32)),
        )
        parts.append(
            builder.when(
                is_open, partial(conv, x=x, layer=layer, rows=rows), partial(nothing, channels=len(rows), layer=layer)
            )
        )
    order = np.concatenate(layer.units)
    if (order == np.arange(len(order))).all():
        builder.node("Concat", *parts, output=output, axis=1)
    else:
        builder.node(
            "Gather", builder.node("Concat", *parts, axis=1), builder.constant(np.argsort(order)), output=output, axis=1
        )


def add_gather(builder: Builder, x: str, layer: Layer, output: str) -> None:
    def positions(inner: Builder, mask: str) -> str:
        flat = inner.node("Reshape", mask, inner.ints(-1))
        return inner.node("Reshape", inner.node("NonZero", flat), inner.ints(-1))

    def inside(inner: Builder) -> str:
        weight, data = inner.constant(layer.weight), x
        bias = None if layer.bias is None else inner.constant(layer.bias)
        if layer.made is not None:
            rows = positions(inner, layer.made)
            weight = inner.node("Gather", weight, rows, axis=0)
            bias = bias and inner.node("Gather", bias, rows, axis=0)
        if layer.seen is not None:
            columns = positions(inner, layer.seen)
            weight = inner.node("Gather", weight, columns, axis=1)
            data = inner.node("Gather", data, columns, axis=1)
        result = inner.node("Conv", data, weight, *([bias] if bias else []), **layer.attributes)
        if layer.made is None:
            return result
        # Put back: closed channels read the first, which is zero.
        padded = inner.node("Concat", nothing(inner, 1, layer), result, axis=1)
        mask = inner.node("Cast", inner.node("Reshape", layer.made, inner.ints(-1)), to=TensorProto.INT64)
        place = inner.node("Mul", inner.node("CumSum", mask, inner.constant(np.array(0, dtype=np.int64))), mask)
        return inner.node("Gather", padded, place, axis=1)

    def reading(inner: Builder) -> str:
        if layer.seen is None:
            return inside(inner)
        return inner.when(any_open(inner, layer.seen), inside, lambda other: bias_alone(other, layer))

    if layer.made is not None:
        builder.when(
            any_open(builder, layer.made), reading, lambda inner: nothing(inner, layer.shape[1], layer), output=output
        )
    else:
        assert layer.seen is not None, "no mask to gather by"
        builder.when(any_open(builder, layer.seen), inside, lambda inner: bias_alone(inner, layer), output=output)


def arms_along(channels: Channels | None) -> np.ndarray:
    """Where the arms of the only group along an axis lie, in order."""
    assert channels is not None, "no group along this axis"
    return np.argsort(channels.index.numpy(), kind="stable")


def add_pair(builder: Builder, x: str, pair: Pair, values: Mapping[str, onnx.TensorProto], output: str) -> None:
    maker, reader = pair.maker, pair.reader
    assert maker.made is not None, "a pair without a mask"
    x = masked_input(builder, x, maker)
    flat = builder.node("Reshape", maker.made, builder.ints(-1))
    parts, start, columns = [bias_alone(builder, reader)], 0, arms_along(reader.site.inputs)
    for rows in maker.units:
        unit = slice(start, start + len(rows))
        start += len(rows)

        def inside(inner: Builder, rows: np.ndarray = rows, unit: slice = unit) -> str:
            value = conv(inner, x, maker, rows)
            for node, depthwise in pair.between:
                if depthwise is not None:
                    value = conv(inner, value, depthwise, arms_along(depthwise.site.outputs)[unit])
                    continue
                constants = [
                    inner.constant(numpy_helper.to_array(values[name])) if name else "" for name in node.input[1:]
                ]
                value = inner.node(
                    node.op_type,
                    value,
                    *constants,
                    **{attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute},
                )
            return inner.node("Conv", value, inner.constant(reader.weight[:, columns[unit]]), **reader.attributes)

        is_open = builder.node(
            "Greater",
            builder.node("Gather", flat, builder.constant(np.array(rows[0])), axis=0),
            builder.constant(np.array(0.5, dtype=np.float32)),
        )
        parts.append(
            builder.when(
                is_open, inside, lambda inner: inner.node("ConstantOfShape", inner.ints(*[1] * len(reader.shape)))
            )
        )
    builder.node("Sum", *parts, output=output)


ADD = {"full": add_full, "layer": add_layer, "blocks": add_blocks, "gather": add_gather}


# -- the whole graph ---------------------------------------------------------------------------------------------------


class Rewriter:
    """Puts gates into the ONNX graph of a network that was exported with its weights under `prefix` + their names."""

    def __init__(self, proto: onnx.ModelProto, gated: GatedNetwork, prefix: str):
        self.proto, self.gated, self.prefix = proto, gated, prefix
        self.values = {entry.name: entry for entry in proto.graph.initializer}
        shaped = onnx.shape_inference.infer_shapes(one_image(proto)).graph
        self.shapes = {
            info.name: tuple(dim.dim_value for dim in info.type.tensor_type.shape.dim)
            for info in [*shaped.value_info, *shaped.output, *shaped.input]
        }
        self.sites: dict[str, Site] = {prefix + weight: site for weight, site in gated.sites.items()}
        found = {name for node in proto.graph.node for name in node.input if name in self.sites}
        if missing := set(self.sites) - found:
            raise DynpruneError(
                f"The exported graph has no layer with the weight "
                f"{sorted(missing)[0].removeprefix(prefix)}. This network's gates cannot be written "
                f"as ONNX."
            )
        self.pairs = self.find_pairs()

    def find_pairs(self) -> dict[str, list[onnx.NodeProto]]:
        """By the weight of a layer that makes a group: it, the nodes after it, and the layer that reads the group,
        where these may become one form."""
        readers: dict[str, list[onnx.NodeProto]] = {value.name: [value] for value in self.proto.graph.output}
        for node in self.proto.graph.node:
            for name in node.input:
                readers.setdefault(name, []).append(node)
        found = {}
        for first in self.proto.graph.node:
            chain = [first]
            while len(readers.get(chain[-1].output[0], [])) == 1 and (
                chain[-1] is first or self.works_on_each_channel(chain[-1])
            ):
                following = readers[chain[-1].output[0]][0]
                if not isinstance(following, onnx.NodeProto):
                    break
                chain.append(following)
            if self.are_pair(first, chain[-1]):
                found[self.known_site(first).op.weight] = chain
        return found

    def works_on_each_channel(self, node: onnx.NodeProto) -> bool:
        """Whether a unit's part of what the node gives depends on that part of its input alone."""
        site = self.site_of(node)
        if site is None:
            return node.op_type in BETWEEN and all(name in self.values or not name for name in node.input[1:])
        return (
            node.op_type == "Conv"
            and is_depthwise(self.gated.graph, site.op)
            and site.op.groups == self.gated.graph.shapes[site.op.weight][0]
        )

    def are_pair(self, first: onnx.NodeProto, last: onnx.NodeProto) -> bool:
        """Whether one layer decides on and makes all of a group, not more, and the other reads just that, decides
        nothing, and makes channels without gates."""
        maker, reader = self.site_of(first), self.site_of(last)
        if (
            maker is None
            or reader is None
            or maker.outputs is None
            or reader.inputs is None
            or {first.op_type, last.op_type} != {"Conv"}
        ):
            return False
        groups = tuple(gate.group for gate in maker.decides)
        return (
            len(groups) == 1
            and maker.outputs.groups == reader.inputs.groups == groups
            and maker.op.groups == reader.op.groups == 1
            and all_gated(maker.outputs)
            and all_gated(reader.inputs)
            and reader.outputs is None
            and not reader.decides
            and len(maker.decides[0].sizes) <= MOST_BLOCKS
        )

    def site_of(self, node: onnx.NodeProto) -> Site | None:
        return next((self.sites[name] for name in node.input if name in self.sites), None)

    def known_site(self, node: onnx.NodeProto) -> Site:
        """The site of a layer that has one."""
        site = self.site_of(node)
        assert site is not None
        return site

    def pair(self, chain: list[onnx.NodeProto], seen: str | None, made: str | None) -> Pair:
        """seen, made: names of the masks of the first layer's inputs and of the group."""
        first, *between, last = chain
        layers = [
            None if (site := self.site_of(node)) is None else self.layer(node, site, None, None) for node in between
        ]
        return Pair(
            self.layer(first, self.known_site(first), seen, made),
            tuple(zip(between, layers)),
            self.layer(last, self.known_site(last), made, None),
        )

    def rewrite(self, forms: dict[str, str]) -> onnx.ModelProto:
        """The graph with gates. forms: by weight; layers that are absent stay full, and a pair is named by the one that
        makes the group."""
        proto = one_image(self.proto)
        builder = Builder()
        self.masks: dict[str, str] = {}
        self.opened: list[str] = []
        chains = [chain for weight, chain in self.pairs.items() if forms.get(weight) == "pair"]
        ends = {chain[-1].output[0]: chain for chain in chains}
        gone = {node.output[0] for chain in chains for node in chain[:-1]}
        for node in proto.graph.node:
            site = self.site_of(node)
            if node.output[0] in gone:
                if site is not None:
                    self.decided(builder, node, site)
            elif node.output[0] in ends:
                chain = ends[node.output[0]]
                first = self.known_site(chain[0])
                pair = self.pair(chain, self.mask(builder, first.inputs), self.mask(builder, first.outputs))
                add_pair(builder, chain[0].input[0], pair, self.values, node.output[0])
            elif site is None:
                builder.nodes.append(node)
            else:
                self.replace(builder, node, site, forms)
        builder.node("Concat", *self.opened, output="gates", axis=1)
        used = {name for node in builder.nodes for name in node.input}
        graph = helper.make_graph(
            builder.nodes,
            proto.graph.name,
            list(proto.graph.input),
            [*proto.graph.output, helper.make_tensor_value_info("gates", TensorProto.FLOAT, [1, None])],
            [entry for entry in proto.graph.initializer if entry.name in used] + builder.constants,
        )
        made = helper.make_model(graph, opset_imports=list(proto.opset_import), ir_version=proto.ir_version)
        made.metadata_props.extend(proto.metadata_props)
        onnx.checker.check_model(made, full_check=True)
        return made

    def decided(self, builder: Builder, node: onnx.NodeProto, site: Site) -> str | None:
        """The mask of what a layer sees, after it has decided what it is to."""
        seen = self.mask(builder, site.inputs, site.op.groups)
        if site.decides and site.decides[0].group not in self.masks:
            self.decide(builder, node.input[0], site, seen)
        return seen

    def replace(self, builder: Builder, node: onnx.NodeProto, site: Site, forms: dict[str, str]) -> None:
        seen = self.decided(builder, node, site)
        made = None if is_depthwise(self.gated.graph, site.op) else self.mask(builder, site.outputs)
        if node.op_type != "Conv":
            if seen is None:
                builder.nodes.append(node)
                return
            masked = onnx.NodeProto()
            masked.CopyFrom(node)
            masked.input[0] = builder.node("Mul", node.input[0], seen)
            builder.nodes.append(masked)
            return
        layer = self.layer(node, site, seen, made)
        form = forms.get(site.op.weight, "full")
        ADD[form if form in layer.forms else "full"](builder, node.input[0], layer, node.output[0])

    def layer(self, node: onnx.NodeProto, site: Site, seen: str | None, made: str | None) -> Layer:
        bias = numpy_helper.to_array(self.values[node.input[2]]) if len(node.input) > 2 and node.input[2] else None
        return Layer(
            site,
            numpy_helper.to_array(self.values[node.input[1]]),
            bias,
            self.shapes[node.output[0]],
            {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute},
            seen,
            made,
        )

    def mask(self, builder: Builder, channels: Channels | None, groups: int = 1) -> str | None:
        """(1, channels): 1 where open."""
        if channels is None or any(name not in self.masks for name in channels.groups):
            return None
        index = np.tile(channels.index.numpy(), groups)
        single = self.masks[channels.groups[0]]
        if (
            len(channels.groups) == 1
            and index.shape == (self.gated.graph.groups[channels.groups[0]].arms,)
            and (index == np.arange(1, len(index) + 1)).all()
        ):
            return single
        every = builder.node(
            "Concat",
            builder.constant(np.ones((1, 1), dtype=np.float32)),
            *[self.masks[name] for name in channels.groups],
            axis=1,
        )
        return builder.node("Gather", every, builder.constant(index), axis=1)

    def decide(self, builder: Builder, x: str, site: Site, seen: str | None) -> None:
        gated = self.gated
        weight, bias, second, second_bias = (value.numpy() for value in gated.predictor(site).folded())
        pooled = x
        if len(self.shapes[x]) > 2:
            pooled = builder.node("Flatten", builder.node("GlobalAveragePool", x), axis=1)
        if seen is not None:
            pooled = builder.node("Mul", pooled, seen)
        hidden = builder.node(
            "Relu", builder.node("Gemm", pooled, builder.constant(weight), builder.constant(bias), transB=1)
        )
        logits = builder.node(
            "Gemm", hidden, builder.constant(second), builder.constant(second_bias + float(gated.shift)), transB=1
        )
        zero, start = builder.constant(np.zeros((), dtype=np.float32)), 0
        for gate in site.decides:
            own = logits
            if len(site.decides) > 1:
                own = builder.node(
                    "Slice", logits, builder.ints(start), builder.ints(start + len(gate.sizes)), builder.ints(1)
                )
            start += len(gate.sizes)
            is_open = builder.node("Greater", own, zero)
            if gate.cuts:
                is_open = builder.node(
                    "Or",
                    is_open,
                    builder.node("GreaterOrEqual", own, builder.node("ReduceMax", own, builder.ints(1), keepdims=1)),
                )
            units = builder.node("Cast", is_open, to=TensorProto.FLOAT)
            self.opened.append(units)
            if set(gate.sizes) != {1}:
                units = builder.node(
                    "Gather", units, builder.constant(np.repeat(np.arange(len(gate.sizes)), gate.sizes)), axis=1
                )
            self.masks[gate.group] = units


def one_image(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy that takes a batch of one; what was known of sizes is inferred anew."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for value in [*copy.graph.input, *copy.graph.output]:
        value.type.tensor_type.shape.dim[0].dim_value = 1
    del copy.graph.value_info[:]
    return copy


# -- which form wins ---------------------------------------------------------------------------------------------------


def choose_forms(rewriter: Rewriter, choices: Choices, report: Callable[[str, int, int], None]) -> dict[str, dict]:
    """Time every form of every gated convolution with the gates of real images; by weight, the form that took least and
    all milliseconds.

    choices: of some images, (images, units) per gate. A layer that could become a pair has "pair_ms", of both together,
    and "reader", the weight of the other.
    """
    masks = {
        gate.group: opened.repeat_interleave(torch.tensor(gate.sizes), dim=1)
        for gate, opened in zip(choices.gates, choices.open)
    }
    images = len(next(iter(masks.values())))

    def time(
        add: Callable[[Builder], None], layer: Layer, shape: tuple[int, ...], seen: Tensor | None, made: Tensor | None
    ) -> float:
        """Mean over the images of the least milliseconds of each: what else runs on the machine only adds."""
        feeds = [
            {
                key: value[i : i + 1].numpy().astype(np.float32)
                for key, value in (("seen", seen), ("made", made))
                if value is not None
            }
            for i in range(images)
        ]
        x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        session = open_session(alone(add, layer, shape, rewriter.proto).SerializeToString(), 1)
        samples = interleaved([(session, {"x": x, **feed}) for feed in feeds], SITE_SECONDS, SITE_RUNS)
        return float(np.mean([np.min(own) for own in samples]))

    nodes = {
        name: node
        for node in rewriter.proto.graph.node
        for name in node.input
        if name in rewriter.sites and node.op_type == "Conv"
    }
    chosen: dict[str, dict[str, Any]] = {}
    for number, (name, node) in enumerate(nodes.items()):
        site = rewriter.sites[name]
        report("timing forms of gated layers", number, len(nodes))
        seen, made = (
            mask_of(masks, site.inputs),
            None if is_depthwise(rewriter.gated.graph, site.op) else mask_of(masks, site.outputs),
        )
        layer = rewriter.layer(node, site, None if seen is None else "seen", None if made is None else "made")
        shape = rewriter.shapes[node.input[0]]
        took = {
            form: time(partial(ADD[form], x="x", layer=layer, output="y"), layer, shape, seen, made)
            for form in layer.forms
        }
        chosen[site.op.weight] = {"form": min(took, key=took.__getitem__), "ms": took}
    for weight, chain in rewriter.pairs.items():
        first, last = rewriter.known_site(chain[0]), rewriter.known_site(chain[-1])
        seen, made = mask_of(masks, first.inputs), mask_of(masks, first.outputs)
        pair = rewriter.pair(chain, None if seen is None else "seen", "made")
        both_ms = time(
            partial(add_pair, x="x", pair=pair, values=rewriter.values, output="y"),
            pair.maker,
            rewriter.shapes[chain[0].input[0]],
            seen,
            made,
        )
        chosen[weight] |= {"pair_ms": both_ms, "reader": last.op.weight}
    return with_pairs(chosen, FORMS)


def with_pairs(layers: dict[str, dict], allowed: Collection[str]) -> dict[str, dict]:
    """For each layer the quickest of the allowed forms; two layers become a pair where that takes less than both."""
    found = {
        weight: {**line, "form": min((form for form in line["ms"] if form in allowed), key=line["ms"].get)}
        for weight, line in layers.items()
    }
    for line in found.values():
        if "pair" in allowed and "reader" in line:
            reader = found[line["reader"]]
            if line["pair_ms"] < line["ms"][line["form"]] + reader["ms"][reader["form"]]:
                line["form"] = reader["form"] = "pair"
    return found


def mask_of(masks: dict[str, Tensor], channels: Channels | None) -> Tensor | None:
    if channels is None or any(name not in masks for name in channels.groups):
        return None
    known = [masks[name] for name in channels.groups]
    return torch.cat([torch.ones(len(known[0]), 1), *known], 1).index_select(1, channels.index)


def alone(
    add: Callable[[Builder], None], layer: Layer, shape: Iterable[int], proto: onnx.ModelProto
) -> onnx.ModelProto:
    """What `add` makes of "x", named "y", as a model of its own, with the masks that `layer` wants as inputs."""
    builder = Builder()
    add(builder)
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(shape))]
    for name, channels in (
        ("seen", layer.seen and layer.weight.shape[1] * layer.site.op.groups),
        ("made", layer.made and len(layer.weight)),
    ):
        if channels:
            inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, channels]))
    graph = helper.make_graph(
        builder.nodes, "layer", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], builder.constants
    )
    return helper.make_model(graph, opset_imports=list(proto.opset_import), ir_version=proto.ir_version)
