"""How long widths take in onnxruntime on this machine.

Takes a network and its channel graph, returns milliseconds for any widths. Single layers are measured once per
processor and onnxruntime version, at a few widths each, and kept in a file; a network's layers are interpolated and
added up. Layers do not add up exactly (activations, pooling, reordering between layouts), so whole networks of
candidate widths are exported and timed beside the dense one, and the sum is corrected by what they took. All of it at
batch 1 with one thread.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import platformdirs
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from dynprune.budgets.allocation import CostModel
from dynprune.data.scores import Scores
from dynprune.errors import DynpruneError
from dynprune.files.disk import write_text
from dynprune.files.onnxfile import open_session, run
from dynprune.files.program import Program, on_cpu
from dynprune.files.quantized import Quantiser
from dynprune.machine import processor
from dynprune.structure.channels import ChannelGraph
from dynprune.structure.record import Op
from dynprune.structure.surgery import slim

SHARES = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)  # of a layer's channels, where it is measured
LAYER_SECONDS, LAYER_RUNS = 0.015, (5, 60)  # per layer: so long, within these numbers of runs
NETWORK_SECONDS, NETWORK_RUNS = 2.0, (15, 300)
FASTER = 1.05  # a smaller ratio than this is within what two measurements of one file differ
SETTLED_RUNS = 50  # before a measurement may end early
SAVE_EVERY = 50  # layers

Timed = tuple[onnxruntime.InferenceSession, dict[str, np.ndarray]]  # a network and what goes into it
Report = Callable[[str, int, int], None]  # what is being done, how much of it is done, out of how much


def silent(_text: str, _done: int, _total: int) -> None:
    """No report."""


@dataclass(frozen=True)
class Layer:
    """One convolution or linear layer at given numbers of channels; `op` says the rest."""

    op: Op
    kernel: tuple[int, ...]
    inputs: int
    outputs: int
    groups: int
    int8: bool = False

    @property
    def key(self) -> str:
        op = self.op
        parts = ["x".join(map(str, values)) for values in (self.kernel, op.stride, op.padding, op.dilation, op.size)]
        kernel, stride, padding, dilation, size = parts
        return (
            f"{op.kind} {self.inputs}>{self.outputs} groups {self.groups} kernel {kernel} stride {stride} "
            f"padding {padding} dilation {dilation} at {size}{' int8' if self.int8 else ''}"
        )

    def onnx(self) -> bytes:
        """A model of this layer alone, with random weights."""
        op, rng = self.op, np.random.default_rng(0)
        if op.kind == "linear":
            node, weight = (
                helper.make_node("MatMul", ["x", "w"], ["y"]),
                rng.standard_normal((self.inputs, self.outputs)),
            )
            shape = [math.prod(op.size), self.inputs]
        else:
            transposed = op.kind.startswith("conv_transpose")
            ends = (
                (self.inputs, self.outputs // self.groups) if transposed else (self.outputs, self.inputs // self.groups)
            )
            weight = rng.standard_normal((*ends, *self.kernel))
            node = helper.make_node(
                "ConvTranspose" if transposed else "Conv",
                ["x", "w"],
                ["y"],
                group=self.groups,
                strides=op.stride,
                pads=op.padding * 2,
                dilations=op.dilation,
            )
            shape = [1, self.inputs, *op.size]
        weights = (0.01 * weight).astype(np.float32)
        nodes, tensors = [node], [numpy_helper.from_array(weights, "w")]
        if self.int8:
            nodes, tensors = in_int8(node, weights)
        graph = helper.make_graph(
            nodes,
            "layer",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            tensors,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9).SerializeToString()


def in_int8(node: onnx.NodeProto, weights: np.ndarray) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """A layer of "x" and "w" between quantise and dequantise nodes, as onnxruntime's quantiser writes them."""
    scale, middle = (
        numpy_helper.from_array(np.array(0.03, np.float32), "s"),
        numpy_helper.from_array(np.array(128, np.uint8), "m"),
    )
    of_weights = numpy_helper.from_array(np.array(max(float(np.abs(weights).max()) / 127, 1e-9), np.float32), "ws")
    whole = np.clip(np.round(weights / numpy_helper.to_array(of_weights)), -127, 127).astype(np.int8)
    zero = numpy_helper.from_array(np.array(0, np.int8), "z")
    inner = onnx.NodeProto()
    inner.CopyFrom(node)
    inner.input[:], inner.output[:] = ["xd", "wd"], ["yf"]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "m"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "s", "m"], ["xd"]),
        helper.make_node("DequantizeLinear", ["wq", "ws", "z"], ["wd"]),
        inner,
        helper.make_node("QuantizeLinear", ["yf", "s", "m"], ["yq"]),
        helper.make_node("DequantizeLinear", ["yq", "s", "m"], ["y"]),
    ]
    return nodes, [scale, middle, of_weights, zero, numpy_helper.from_array(whole, "wq")]


class LayerTable:
    """Measured layers, kept in `path` from run to run. A damaged file is measured anew."""

    def __init__(self, path: Path | None = None):
        name = "".join(c if c.isalnum() else "-" for c in f"{processor()} onnxruntime {onnxruntime.__version__}")
        self.path = path or platformdirs.user_cache_path("dynprune") / f"layers-{name}.json"
        try:
            known = json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else {"ms": {}}
            self.ms = {str(key): float(ms) for key, ms in known["ms"].items() if float(ms) > 0}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            self.ms = {}

    def measure(self, layers: list[Layer], report: Report) -> None:
        """Measure those that are not known yet."""
        unknown = list({layer.key: layer for layer in layers if layer.key not in self.ms}.values())
        for number, layer in enumerate(unknown):
            report("timing layers in onnxruntime (kept for next time)", number, len(unknown))
            self.ms[layer.key] = time_layer(layer)
            if number % SAVE_EVERY == SAVE_EVERY - 1 or number == len(unknown) - 1:
                self.save()

    def save(self) -> None:
        """A cache that cannot be written costs time, not the run."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(
                self.path,
                json.dumps({"processor": processor(), "onnxruntime": onnxruntime.__version__, "ms": self.ms}, indent=0),
            )
        except (OSError, DynpruneError):
            pass


def time_layer(layer: Layer) -> float:
    """Lower quartile of its runs: what other programs take comes on top, never off."""
    session = open_session(layer.onnx(), 1)
    feed = {"x": np.random.default_rng(1).standard_normal(session.get_inputs()[0].shape).astype(np.float32)}
    return float(np.percentile(interleaved([(session, feed)], LAYER_SECONDS, LAYER_RUNS)[0], 25))


def run_ms(session: onnxruntime.InferenceSession, feed: dict[str, np.ndarray]) -> float:
    started = time.perf_counter()
    run(session, feed)
    return 1000 * (time.perf_counter() - started)


def interleaved(
    pairs: list[Timed], seconds: float, runs: tuple[int, int], precise: float | None = None
) -> list[list[float]]:
    """Milliseconds of every run of each (session, inputs), in turn, so that a drift of the machine's speed meets all
    alike. A turn of several is three runs of which the first does not count: it only brings the network's weights back
    into the caches, as they are where one network runs alone. Ends after `seconds`, within these numbers of runs, or
    earlier where every median is known to a share of `precise` (its standard error).
    """
    for pair in [*pairs, *pairs]:
        run_ms(*pair)
    samples: list[list[float]] = [[] for _ in pairs]
    end, turn, uncounted = time.perf_counter() + seconds, *((3, 1) if len(pairs) > 1 else (1, 0))
    while (count := len(samples[0])) < runs[1]:
        if count >= runs[0] and time.perf_counter() >= end:
            break
        if precise and count >= SETTLED_RUNS and count % 20 == 0 and max(map(uncertainty, samples)) <= precise:
            break
        for kept, pair in zip(samples, pairs):
            kept += [run_ms(*pair) for _ in range(turn)][uncounted:]
    return samples


def uncertainty(samples: list[float]) -> float:
    """Standard error of the median, as a share of it: 0.93 times the interquartile range over the root of their
    number, for errors as a normal distribution has them (McGill, Tukey & Larsen, 1978)."""
    low, middle, high = np.percentile(samples, (25, 50, 75))
    return float(0.93 * (high - low) / math.sqrt(len(samples)) / middle)


class LatencyModel:
    """Milliseconds of any widths: `correction` x the sum of interpolated layers."""

    def __init__(
        self,
        graph: ChannelGraph,
        cost: CostModel,
        smallest: np.ndarray,
        table: LayerTable,
        report: Report = silent,
        *,
        int8: bool = False,
    ):
        """smallest: the narrowest widths that will be asked for, int64 of shape (groups,). int8: of layers in int8."""
        self.correction = 1.0
        least = cost.axis_sizes(smallest)
        ops = [op for op in graph.ops if op.weight in graph.shapes and op.size]
        ends = [self.ends(graph, op) for op in ops]
        grids = [[grid(int(least[cost.rows[key]]) if key else size, size) for key, size in pair] for pair in ends]
        layers = [
            [[replace(self.layer(graph, op, i, o), int8=int8) for o in outputs] for i in inputs]
            for op, (inputs, outputs) in zip(ops, grids)
        ]
        table.measure([layer for rows in layers for row in rows for layer in row], report)
        points = max((len(g) for pair in grids for g in pair), default=1) + 1
        self.rows = np.array([[cost.rows[key] if key else -1 for key, _ in pair] for pair in ends]).reshape(-1, 2)
        self.fixed = np.array([[size for _, size in pair] for pair in ends]).reshape(-1, 2)
        self.grids = np.array(
            [[padded(np.array(g, dtype=float), points, 1.0) for g in pair] for pair in grids]
        ).reshape(-1, 2, points)
        self.ms = np.array(
            [
                padded(
                    np.array([padded(np.array([table.ms[layer.key] for layer in row]), points, 0.0) for row in rows]),
                    points,
                    0.0,
                )
                for rows in layers
            ]
        ).reshape(-1, points, points)

    @staticmethod
    def ends(graph: ChannelGraph, op: Op) -> list[tuple[tuple[str, int] | None, int]]:
        """Axis (None where nothing can be removed) and size of the weight's two channel dimensions."""
        shape = graph.shapes[op.weight]
        return [((op.weight, dim) if (op.weight, dim) in graph.axes else None, shape[dim]) for dim in (0, 1)]

    @staticmethod
    def layer(graph: ChannelGraph, op: Op, first: int, second: int) -> Layer:
        """The layer whose weight has these two channel dimensions."""
        shape = graph.shapes[op.weight]
        groups = op.groups
        if groups > 1 and shape[1] == 1:  # depthwise: it loses groups
            groups = max(1, first * groups // shape[0])
        if op.kind == "linear":
            inputs, outputs = second, first
        elif op.kind.startswith("conv_transpose"):
            inputs, outputs = first, second * groups
        else:
            inputs, outputs = second * groups, first
        return Layer(op, tuple(shape[2:]), inputs, outputs, groups)

    def total(self, sizes: np.ndarray) -> float:
        """Milliseconds; sizes: of every axis, from CostModel.axis_sizes."""
        if not len(self.rows):
            return 0.0
        at = np.where(self.rows < 0, self.fixed, sizes[self.rows])
        low = np.clip((self.grids <= at[..., None]).sum(2) - 1, 0, self.grids.shape[2] - 2)
        left, right = (np.take_along_axis(self.grids, low[..., None] + step, 2)[..., 0] for step in (0, 1))
        share = np.clip((at - left) / (right - left), 0, 1)
        each = np.arange(len(at))
        corner = [[self.ms[each, low[:, 0] + i, low[:, 1] + j] for j in (0, 1)] for i in (0, 1)]
        a, b = share[:, 0], share[:, 1]
        return self.correction * float(
            (
                (1 - a) * ((1 - b) * corner[0][0] + b * corner[0][1]) + a * ((1 - b) * corner[1][0] + b * corner[1][1])
            ).sum()
        )


def grid(least: int, full: int) -> list[int]:
    """Where a dimension is measured between its narrowest and full size: multiples of 16 where it has that many."""
    step = next((step for step in (16, 8, 4) if full >= 4 * step), 1)
    return sorted(
        {max(min(least, full), min(full, math.ceil(full * share / step) * step)) for share in SHARES} | {full}
    )


def padded(values: np.ndarray, length: int, step: float) -> np.ndarray:
    """Repeat the last entry along the first dimension up to `length`, each time `step` larger."""
    more = np.arange(1, length - len(values) + 1).reshape(-1, *[1] * (values.ndim - 1))
    return np.concatenate([values, values[-1:] + step * more])


class Stopwatch:
    """Times compact candidates of one network beside its dense form, as whole ONNX files in onnxruntime.

    inputs: the arguments of a call. whole: with all that the network returns; else its class scores, which is what the
    commands export. int8: both forms in int8, with the ranges of one example.
    """

    def __init__(self, full: nn.Module, graph: ChannelGraph, inputs: tuple, *, whole: bool = False, int8: bool = False):
        self.full, self.graph, self.whole, self.int8 = full, graph, whole, int8
        self.inputs = on_cpu(inputs)
        self.dense = self.open(full)

    def open(self, model: nn.Module) -> Timed:
        was_training = model.training
        try:
            with tempfile.TemporaryDirectory() as folder:
                path, own = Path(folder) / "model.onnx", model.eval() if self.whole else Scores(model.eval())
                program = Program.of(own, self.inputs, dynamic={} if self.whole else None)
                program.write(path, None, {})
                content = path.read_bytes()
                if self.int8:
                    content = Quantiser(path, [program.feed(open_session(content))]).quantised()
                session = open_session(content, 1)
                return session, program.feed(session)
        finally:
            model.train(was_training)

    def candidate(self, widths: Mapping[str, int]) -> nn.Module:
        return slim(self.full, self.graph.kept({name: np.arange(width) for name, width in widths.items()}))

    def measure(self, model: nn.Module) -> tuple[float, float]:
        """Medians in ms of the dense network and of `model`, timed in turn."""
        pair = [self.dense, self.open(model)]
        dense, narrow = (float(np.median(kept)) for kept in interleaved(pair, NETWORK_SECONDS, NETWORK_RUNS))
        return dense, narrow

    def measure_dense(self) -> float:
        return float(np.median(interleaved([self.dense], NETWORK_SECONDS, NETWORK_RUNS)[0]))
