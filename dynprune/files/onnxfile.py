"""ONNX files: written from a torch model, opened in onnxruntime.

Takes a model and an example input, writes one checked `.onnx` file with a dynamic batch and the weights inside.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from dynprune.errors import DynpruneError
from dynprune.structure.tracing import first_line, library_code


def write_onnx(model: nn.Module, example: Tensor, path: Path, opset: int | None, facts: dict[str, str]) -> None:
    """One checked file with a dynamic batch; weights inside, `facts` as metadata."""
    batch = example.expand(2, *example.shape[1:]).contiguous()  # an example batch of 1 would be taken as a constant
    write_program(model, (batch,), path, opset, facts, ["input"], ["logits"], ({0: torch.export.Dim("batch")},))


def write_program(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    path: Path,
    opset: int | None,
    facts: dict[str, str],
    input_names: list[str],
    output_names: list[str],
    dynamic_shapes: tuple,
) -> None:
    """One checked file of a module that takes and returns tensors. dynamic_shapes: as torch.export takes them."""
    try:
        with quiet():
            program = torch.onnx.export(
                model,
                inputs,
                dynamo=True,
                opset_version=opset,
                input_names=input_names,
                output_names=output_names,
                dynamic_shapes=dynamic_shapes,
                external_data=False,
                verbose=False,
            )
        assert program is not None  # as with every export by dynamo
        proto = program.model_proto
    except Exception as error:
        raise DynpruneError(
            f"torch cannot export this network to ONNX "
            f"({why(error)}).{'' if opset is None else ' Try another --opset.'}"
        ) from error
    written = opset_of(proto)
    if opset is not None and written != opset:
        raise DynpruneError(
            f"--opset {opset} cannot be written for this network: torch's exporter gives {written} "
            f"instead. Pass --opset {written}, or leave it out."
        )
    for key, value in facts.items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, value
    onnx.checker.check_model(proto, full_check=True)
    onnx.save_model(proto, path)


def why(error: BaseException) -> str:
    """The exporter's first words that say something, and the line of the network's code that it stopped at."""
    place = ""
    inner: BaseException | None = error
    while inner is not None:
        frames = [
            frame
            for frame in traceback.extract_tb(inner.__traceback__)
            if not library_code(frame.filename) and "onnxscript" not in frame.filename
        ]
        if frames:
            place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}, `{frames[-1].line}`"
        inner = inner.__cause__ or inner.__context__
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    return f"{type(root).__name__}: {first_line(root)[:200]}{place}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The exporter reports its steps on stdout, and on stderr warns of its own internals and prints graphs that it
    cannot export; none of that belongs into our output."""
    level, disabled = logging.getLogger().level, logging.root.manager.disable
    logging.getLogger().setLevel(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            logging.disable(logging.CRITICAL)
            yield
    finally:
        logging.disable(disabled)
        logging.getLogger().setLevel(level)


def read_opset(path: Path) -> int:
    """The opset that was written: a requested one that cannot be converted to is silently replaced."""
    return opset_of(onnx.load(path, load_external_data=False))


def opset_of(proto: onnx.ModelProto) -> int:
    return next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))


def size_bytes(path: Path) -> int:
    """What a network takes on disk: the file, and the files beside it that hold its weights (`external_data`)."""
    tensors = [*(graph := onnx.load(path, load_external_data=False).graph).initializer, *constants_in(graph)]
    beside = {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}
    return path.stat().st_size + sum(
        (path.parent / name).stat().st_size for name in beside if (path.parent / name).is_file()
    )


def constants_in(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Tensors in the attributes of a graph's nodes, and of the graphs inside them."""
    for node in graph.node:
        for attribute in node.attribute:
            yield from [attribute.t] * attribute.HasField("t") + list(attribute.tensors)
            for inner in [attribute.g] * attribute.HasField("g") + list(attribute.graphs):
                yield from inner.initializer
                yield from constants_in(inner)


def shapes_of(proto: onnx.ModelProto) -> dict[str, list[int]]:
    """Of one image's tensors, by name, as far as they are known: 0 stands for a size that is not."""
    one = onnx.ModelProto()
    one.CopyFrom(proto)
    for value in [*one.graph.input, *one.graph.output]:
        value.type.tensor_type.shape.dim[0].dim_value = 1
    del one.graph.value_info[:]
    graph = onnx.shape_inference.infer_shapes(one, data_prop=True).graph
    shapes = {entry.name: list(entry.dims) for entry in graph.initializer}
    for value in [*graph.value_info, *graph.input, *graph.output]:
        shapes[value.name] = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
    return shapes


def macs_in(proto: onnx.ModelProto) -> int:
    """Multiply-accumulates of convolutions and matrix products for one image, weights in int8 included. Raises
    DynpruneError where shapes are not known."""
    shapes = shapes_of(proto)
    total = 0
    for node in proto.graph.node:
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            continue
        taken, weight, made = (shapes.get(name, []) for name in (*node.input[:2], node.output[0]))
        if not (taken and weight and made) or 0 in [*taken, *weight, *made]:
            raise DynpruneError(
                f"The shapes around {node.name or node.op_type} are not known, and so not what it costs. Expected a "
                "file that dynprune export wrote."
            )
        if node.op_type in ("Conv", "ConvTranspose"):
            total += math.prod(weight) * math.prod((made if node.op_type == "Conv" else taken)[2:])
        else:
            turned = any(own.name == "transA" and own.i for own in node.attribute)
            total += math.prod(made) * taken[-2 if turned else -1]
    return total


def open_session(path: Path | bytes, threads: int = 0) -> onnxruntime.InferenceSession:
    """An onnxruntime session on the CPU, of a file or of its bytes. threads: for one operator; 0 leaves onnxruntime's
    choice."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(
            path if isinstance(path, bytes) else str(path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:
        name = "a network in memory" if isinstance(path, bytes) else path
        raise DynpruneError(
            f"{name} cannot be opened by onnxruntime ({str(error).splitlines()[0][:200]}). Expected an ONNX file."
        ) from error


def metadata_of(session: onnxruntime.InferenceSession) -> dict[str, str]:
    """What the file says of itself. Raises DynpruneError where that is not text."""
    try:
        return session.get_modelmeta().custom_metadata_map
    except UnicodeDecodeError as error:
        raise DynpruneError(
            f"The ONNX file's metadata is not text ({first_line(error)[:100]}). Is the file damaged? Export it again."
        ) from error


def run(session: onnxruntime.InferenceSession, feed: dict[str, np.ndarray]) -> np.ndarray:
    """The first output. Raises DynpruneError for a file that opens but cannot be executed."""
    return run_all(session, feed)[0]


def run_all(session: onnxruntime.InferenceSession, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Every output. Raises as `run` does."""
    try:
        return session.run(None, feed)
    except Exception as error:  # onnxruntime's own kinds have no common base
        raise DynpruneError(
            f"onnxruntime cannot execute this network ({first_line(error)[:200]}). Is the file "
            f"damaged? Export it again."
        ) from error
