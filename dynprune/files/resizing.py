"""Resizing and normalisation as part of an ONNX graph, so that a program hands over decoded photos as they are.

Takes an ONNX file whose input is one size of normalised pixels; puts the steps of `data/preprocess.Preprocess` before
it. The new input is uint8, (images, height, width, 3), of any size: what numpy holds of a photo in RGB. Pixels are
resampled as Pillow does: along rows, then along columns, each a product with a matrix of the filter's weights, rounded
to whole numbers after each. (Where that is less work, newer Pillows take columns first: the roundings in between differ
then, by a level of 255 in photos.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, compose, helper, numpy_helper

from dynprune.data.preprocess import LUMINANCE, Preprocess
from dynprune.errors import DynpruneError

KNOWN = ("bilinear", "bicubic")
CUBIC = -0.5  # Pillow's
INPUT = "photos"


class Steps:
    """ONNX nodes, one call each; constants become initializers."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, value: object, kind: type = np.float32) -> str:
        name = f"resize_c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, kind), name))
        return name

    def __call__(self, op: str, *inputs: str | float, output: str = "", **attributes: Any) -> str:
        """Add a node; numbers are float32 constants. Returns its output's name."""
        output = output or f"resize_{len(self.nodes)}"
        names = [self.constant(value) if isinstance(value, int | float) else value for value in inputs]
        self.nodes.append(helper.make_node(op, names, [output], **attributes))
        return output


def weights(steps: Steps, start: str, length: str, size_in: str, size_out: int, kind: str) -> str:
    """The matrix (size_out, size_in) that resamples `length` pixels from `start` on, out of `size_in`, to `size_out`.

    Row i is the filter around start + (i + 0.5) * length / size_out, stretched by length / size_out where that is above
    1, and sums to 1.
    """
    scale = steps("Div", length, float(size_out))
    stretch = steps("Max", scale, 1.0)
    rows = steps.constant(np.arange(size_out).reshape(-1, 1) + 0.5)
    centre = steps("Add", steps("Mul", rows, scale), start)
    columns = steps("Add", steps("Range", steps.constant(0), size_in, steps.constant(1)), 0.5)
    away = steps("Abs", steps("Div", steps("Sub", columns, centre), stretch))
    if kind == "bilinear":
        found = steps("Max", steps("Sub", 1.0, away), 0.0)
    else:
        square = steps("Mul", away, away)
        cube = steps("Mul", square, away)
        a = CUBIC
        near = steps("Add", steps("Sub", steps("Mul", a + 2, cube), steps("Mul", a + 3, square)), 1.0)
        far = steps("Sub", steps("Add", steps("Mul", a, cube), steps("Mul", 8 * a, away)), steps("Mul", 5 * a, square))
        far = steps("Where", steps("Less", away, 2.0), steps("Sub", far, 4 * a), 0.0)
        found = steps("Where", steps("Less", away, 1.0), near, far)
    total = steps("ReduceSum", found, steps.constant([1], np.int64), keepdims=1)
    return steps("Div", found, total)


def whole(steps: Steps, values: str) -> str:
    """Rounded to 0..255, half upwards, as Pillow keeps pixels between its two passes."""
    return steps("Clip", steps("Floor", steps("Add", values, 0.5)), 0.0, 255.0)


def refuse_interpolation(how: Preprocess) -> None:
    """Raises DynpruneError for images that were resized in a way that is not known here."""
    if how.resize.interpolation not in KNOWN:
        raise DynpruneError(
            f"--fold-resize knows {' and '.join(KNOWN)}, and this network's images were resized by "
            f"{how.resize.interpolation}. Leave it out."
        )


def front(how: Preprocess, output: str) -> Steps:
    """From photos to what the network takes."""
    refuse_interpolation(how)
    channels, high, wide = how.size
    steps = Steps()
    shape = steps("Cast", steps("Shape", INPUT), to=TensorProto.FLOAT)
    height, width = (steps("Gather", shape, steps.constant(at, np.int64), axis=0) for at in (1, 2))
    # the largest box of the output's shape, 1 / margin of the photo
    ratio = steps("Max", steps("Div", float(high), height), steps("Div", float(wide), width))
    shrink = steps("Mul", ratio, float(how.resize.margin))
    tall, broad = (
        steps("Min", side, steps("Div", float(size), shrink)) for side, size in ((height, high), (width, wide))
    )
    top, left = (steps("Mul", steps("Sub", side, own), 0.5) for side, own in ((height, tall), (width, broad)))
    pixels = steps("Transpose", steps("Cast", INPUT, to=TensorProto.FLOAT), perm=[0, 3, 1, 2])
    across = steps("Transpose", weights(steps, left, broad, width, wide, how.resize.interpolation), perm=[1, 0])
    pixels = whole(steps, steps("MatMul", pixels, across))
    pixels = whole(steps, steps("MatMul", weights(steps, top, tall, height, high, how.resize.interpolation), pixels))
    if channels == 1:
        grey = steps.constant(np.array(LUMINANCE).reshape(1, 3, 1, 1))
        axes = steps.constant([1], np.int64)
        pixels = steps("ReduceSum", steps("Mul", pixels, grey), axes, keepdims=1)
    mean, std = (steps.constant(np.array(values).reshape(1, -1, 1, 1)) for values in (how.mean, how.std))
    steps("Div", steps("Sub", steps("Div", pixels, 255.0), mean), std, output=output)
    return steps


def with_resizing(network: onnx.ModelProto, how: Preprocess, facts: Mapping[str, str] | None = None) -> bytes:
    """The network with resizing before it. how: the steps; mean and std are 0 and 1 where the file has normalisation
    inside. facts: metadata to add. Raises DynpruneError for interpolations that cannot be written."""
    taken = network.graph.input[0]
    batch = taken.type.tensor_type.shape.dim[0]
    steps = front(how, "resize_output")
    graph = helper.make_graph(
        steps.nodes,
        "resize",
        [helper.make_tensor_value_info(INPUT, TensorProto.UINT8, ["batch", "photo_height", "photo_width", 3])],
        [
            helper.make_tensor_value_info(
                "resize_output", TensorProto.FLOAT, [batch.dim_param or batch.dim_value, *how.size]
            )
        ],
        steps.constants,
    )
    before = helper.make_model(graph, opset_imports=network.opset_import, ir_version=network.ir_version)
    merged = compose.merge_models(before, network, io_map=[("resize_output", taken.name)])
    known = {entry.key: entry.value for entry in network.metadata_props}
    del merged.metadata_props[:]
    for key, value in {**known, **(facts or {}), "input": INPUT}.items():
        added = merged.metadata_props.add()
        added.key, added.value = key, value
    return merged.SerializeToString()
