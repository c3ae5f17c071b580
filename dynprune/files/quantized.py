"""ONNX files in int8 and half precision, by onnxruntime's own quantiser and converter.

Takes a float32 ONNX file and inputs of real images, returns the graph with quantise and dequantise nodes around every
layer (QDQ): weights int8 per output channel, activations uint8 with the smallest and largest value seen as their range.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.calibrate import CalibrationDataReader, CalibrationMethod, TensorsData, create_calibrator
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers.float16 import convert_float_to_float16

from dynprune.errors import DynpruneError
from dynprune.files.onnxfile import quiet
from dynprune.machine import multiplies_int8
from dynprune.structure.tracing import first_line

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# Maxima of int8 are as exact as of floats. Sums and concatenations in int8 are slower here than in float32 (densenet40,
# one thread with VNNI: 6.2 ms, and 4.6 without them) and no more exact.
BETWEEN = ("MaxPool",)

Feed = Mapping[str, np.ndarray]


class Feeds(CalibrationDataReader):
    """Inputs one after another, as onnxruntime's calibration reads them."""

    def __init__(self, feeds: Iterable[Feed]):
        self.feeds = iter(feeds)

    def get_next(self) -> dict | None:
        feed = next(self.feeds, None)
        return None if feed is None else dict(feed)


class Quantiser:
    """One file's graph and the ranges of its activations, from which any choice of layers is quantised."""

    def __init__(self, path: Path, feeds: Iterable[Feed]):
        """Look at the file's activations on `feeds`. Raises DynpruneError for graphs that onnxruntime cannot
        prepare."""
        with tempfile.TemporaryDirectory(prefix="dynprune-") as folder, silenced():
            ready, augmented = Path(folder) / "ready.onnx", Path(folder) / "augmented.onnx"
            try:
                quant_pre_process(str(path), str(ready), skip_symbolic_shape=True)
                self.graph = onnx.load(ready)
                calibrator = create_calibrator(
                    ready,
                    None,
                    str(augmented),
                    calibrate_method=CalibrationMethod.MinMax,
                    providers=["CPUExecutionProvider"],
                )
                calibrator.collect_data(Feeds(feeds))
                self.ranges: TensorsData = calibrator.compute_data()
                del calibrator  # it holds the augmented file open
            except DynpruneError:
                raise
            except Exception as error:
                raise DynpruneError(
                    f"onnxruntime cannot quantise {path} ({type(error).__name__}: {first_line(error)[:200]}). "
                    "Export it without --int8."
                ) from error
        initial = {tensor.name for tensor in self.graph.graph.initializer}
        self.layers = [
            node.name
            for node in self.graph.graph.node
            if node.op_type in LAYERS and any(name in initial for name in node.input)
        ]

    def quantised(self, skipped: Collection[str] = (), facts: Mapping[str, str] | None = None) -> bytes:
        """The file with all layers in int8 but `skipped` ones, which stay in float32. facts: metadata to add."""
        return with_facts(self.convert([], list(skipped), [*LAYERS, *BETWEEN]), facts or {}).SerializeToString()

    def quantised_alone(self, layer: str) -> bytes:
        """The file with this one layer in int8."""
        return self.convert([layer], [], list(LAYERS)).SerializeToString()

    def convert(self, chosen: list[str], skipped: list[str], kinds: list[str]) -> onnx.ModelProto:
        graph = onnx.ModelProto()
        graph.CopyFrom(self.graph)
        with silenced():
            quantiser = QDQQuantizer(
                graph,
                per_channel=True,
                # without such instructions, products of two full bytes overflow what their sum is kept in
                reduce_range=not multiplies_int8(),
                weight_qType=QuantType.QInt8,
                activation_qType=QuantType.QUInt8,
                tensors_range=self.ranges,
                nodes_to_quantize=chosen,
                nodes_to_exclude=skipped,
                op_types_to_quantize=kinds,
                extra_options={},
            )
            quantiser.quantize_model()
            quantiser.model.topological_sort()
        return quantiser.model.model


def halved(path: Path, facts: Mapping[str, str] | None = None) -> bytes:
    """The file with weights and activations in float16; inputs and outputs stay float32."""
    with silenced():
        try:
            graph = convert_float_to_float16(onnx.load(path), keep_io_types=True)
        except Exception as error:
            raise DynpruneError(
                f"onnxruntime cannot turn {path} into half precision ({first_line(error)[:200]}). Export it without "
                "--fp16."
            ) from error
    return with_facts(graph, facts or {}).SerializeToString()


def with_facts(graph: onnx.ModelProto, facts: Mapping[str, str]) -> onnx.ModelProto:
    """Add metadata in place, without what the quantiser says of itself."""
    kept = [(entry.key, entry.value) for entry in graph.metadata_props if not entry.key.startswith("onnx.")]
    del graph.metadata_props[:]
    for key, value in {**dict(kept), **facts}.items():
        entry = graph.metadata_props.add()
        entry.key, entry.value = key, value
    return graph


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """The quantiser logs advice on steps that were taken already."""
    root = logging.getLogger()
    handlers = list(root.handlers)
    try:
        with quiet():
            yield
    finally:
        root.handlers[:] = handlers
