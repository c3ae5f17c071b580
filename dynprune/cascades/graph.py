"""One ONNX graph that holds a whole cascade, for stock onnxruntime.

Takes the graphs of the networks and the thresholds between them. Of a batch, the images that the first is unsure of are
gathered and given to the next, inside an `If`: where there are none, nothing of it runs. A network that holds the one
before it computes what that did not, from what that has. The outputs are `logits`, and `step`: which network had the
last word, from 0.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, compose, helper, inliner, numpy_helper

from dynprune.errors import DynpruneError
from dynprune.files.nested import Wider, wider
from dynprune.structure.tracing import first_line

OUTPUTS = ("logits", "step")


class Steps:
    """Nodes and constants of a graph, one call each; names are unlike those of other `prefix`es."""

    def __init__(self, prefix: str):
        self.prefix = prefix
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, value: object, kind: type) -> str:
        name = f"{self.prefix}/c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, kind), name))
        return name

    def __call__(self, op: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        output = output or f"{self.prefix}/{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [output], **attributes))
        return output

    def network(self, graph: onnx.GraphProto, x: str) -> str:
        """All of a network, of the input x; returns its scores."""
        self("Identity", x, output=graph.input[0].name)
        self.nodes += graph.node
        self.constants += graph.initializer
        return graph.output[0].name


@dataclass(frozen=True)
class Stage:
    """One network of a cascade. more: where it holds the one before it, what it adds, and where in the graph the names
    of that one's tensors are: behind `before`."""

    graph: onnx.GraphProto
    more: Wider | None = None
    before: str = ""


def stages_of(protos: Sequence[onnx.ModelProto]) -> list[Stage]:
    """The networks in turn. One that holds the one before it goes on from there, unless that does so itself."""
    found: list[Stage] = []
    flat = [inliner.inline_local_functions(proto) for proto in protos]
    for number, proto in enumerate(flat):
        graph = compose.add_prefix(proto, f"network{number}/").graph
        del graph.value_info[:]  # they speak of the whole batch
        alone = not found or found[-1].more is not None
        more = None if alone else wider(flat[number - 1], proto, f"network{number}")
        found.append(Stage(graph, more, f"network{number - 1}/"))
    return found


def joined(protos: Sequence[onnx.ModelProto], thresholds: Sequence[float], facts: Mapping[str, str]) -> bytes:
    """The file, of networks of one opset. facts: metadata. Raises DynpruneError for graphs that cannot stand in one
    file."""
    stages = stages_of(protos)
    taken = protos[0].graph.input[0]
    top = Steps("cascade")
    logits, step = cascade(top, stages, list(thresholds), top.network(stages[0].graph, taken.name), taken.name)
    top("Identity", logits, output=OUTPUTS[0])
    top("Identity", step, output=OUTPUTS[1])
    sizes = taken.type.tensor_type.shape.dim
    classes = protos[0].graph.output[0].type.tensor_type.shape.dim[1].dim_value
    batch = sizes[0].dim_param or "batch"
    graph = helper.make_graph(
        top.nodes,
        "cascade",
        [taken],
        [
            helper.make_tensor_value_info(OUTPUTS[0], TensorProto.FLOAT, [batch, classes or None]),
            helper.make_tensor_value_info(OUTPUTS[1], TensorProto.INT64, [batch]),
        ],
        top.constants,
    )
    domains: dict[str, int] = {}
    for entry in itertools.chain.from_iterable(proto.opset_import for proto in protos):
        domain = "" if entry.domain == "ai.onnx" else entry.domain
        domains[domain] = max(entry.version, domains.get(domain, 0))
    made = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid(domain, version) for domain, version in domains.items()],
        ir_version=max(proto.ir_version for proto in protos),
    )
    for key, value in facts.items():
        entry = made.metadata_props.add()
        entry.key, entry.value = key, value
    try:
        onnx.checker.check_model(made, full_check=True)
    except Exception as error:  # the checker's own kinds have no common base
        raise DynpruneError(f"These networks do not fit into one graph ({first_line(error)[:200]}).") from error
    return made.SerializeToString()


def cascade(steps: Steps, stages: Sequence[Stage], thresholds: list[float], scores: str, x: str) -> tuple[str, str]:
    """What the first network said of x, and the rest of what it is unsure of; names of scores and steps."""
    rows = steps("Shape", scores, end=1)
    first = steps("ConstantOfShape", rows, value=numpy_helper.from_array(np.array([0], np.int64)))
    if len(stages) == 1:
        return scores, first
    chances = steps("Softmax", scores, axis=1)
    best, _ = two_best(steps, chances)
    at = [steps("Gather", best, steps.constant(place, np.int64), axis=1) for place in (0, 1)]
    unsure = steps("Less", steps("Sub", *at), steps.constant(thresholds[0], np.float32))
    where = steps("Transpose", steps("NonZero", unsure), perm=[1, 0])  # (images that go on, 1)
    some = steps("Greater", steps("Size", where), steps.constant(0, np.int64))

    def going_on(inner: Steps) -> tuple[str, str]:
        flat = inner("Reshape", where, inner.constant([-1], np.int64))
        following = stages[1]
        own = x if all(stage.more for stage in stages[1:]) else inner("Gather", x, flat, axis=0)
        if following.more:
            for twin, name in following.more.seen.items():
                inner("Gather", following.before + twin, flat, axis=0, output=name)
            inner.nodes += following.more.nodes
            inner.constants += following.more.constants
        again = following.more.scores if following.more else inner.network(following.graph, own)
        again, later = cascade(inner, stages[1:], thresholds[1:], again, own)
        later = inner("Add", later, inner.constant(1, np.int64))
        return inner("ScatterND", scores, where, again), inner("ScatterND", first, where, later)

    def staying(inner: Steps) -> tuple[str, str]:
        return inner("Identity", scores), inner("Identity", first)

    outputs = [f"{steps.prefix}/{name}" for name in OUTPUTS]
    steps.nodes.append(
        helper.make_node(
            "If",
            [some],
            outputs,
            then_branch=branch(f"{steps.prefix}/on", going_on),
            else_branch=branch(f"{steps.prefix}/stay", staying),
        )
    )
    return outputs[0], outputs[1]


def two_best(steps: Steps, chances: str) -> tuple[str, str]:
    values, places = f"{steps.prefix}/best", f"{steps.prefix}/best_classes"
    steps.nodes.append(helper.make_node("TopK", [chances, steps.constant([2], np.int64)], [values, places], axis=1))
    return values, places


def branch(name: str, build: Callable[[Steps], tuple[str, str]]) -> onnx.GraphProto:
    """A subgraph without inputs; it sees the values outside. Its constants are its own, so that onnxruntime can prepare
    them."""
    inner = Steps(name)
    outputs = build(inner)
    kinds = (TensorProto.FLOAT, TensorProto.INT64)
    return helper.make_graph(
        inner.nodes,
        name,
        [],
        [helper.make_tensor_value_info(own, kind, None) for own, kind in zip(outputs, kinds)],
        inner.constants,
    )
