"""`dynprune export`: from a run, or any module, to ONNX."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import overload

from torch import nn

from dynprune.data.loading import Data
from dynprune.deploy.export import ExportResult
from dynprune.deploy.export import export as make_onnx
from dynprune.deploy.modules import ModuleExport, export_module
from dynprune.deploy.quantize import CALIBRATION, MAX_DROP
from dynprune.errors import DynpruneError
from dynprune.files.program import Axes
from dynprune.gates.export import GatedExportResult, export_gated
from dynprune.listener import SILENT, Listener
from dynprune.runs.directory import GateRun, open_any
from dynprune.structure.calling import Inputs


@overload
def export(
    what: str | Path,
    *,
    out: str | Path | None = None,
    opset: int | None = None,
    fold_normalization: bool = False,
    fold_resize: bool = False,
    int8: bool = False,
    fp16: bool = False,
    calibration: int = CALIBRATION,
    max_drop: float = MAX_DROP,
    data: str | Data = "",
    listener: Listener = SILENT,
) -> ExportResult | GatedExportResult: ...


@overload
def export(
    what: nn.Module,
    example_inputs: Inputs,
    path: str | Path,
    *,
    opset: int | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic: Axes | None = None,
    listener: Listener = SILENT,
) -> ModuleExport: ...


def export(what, *args, listener: Listener = SILENT, **options):
    """Write a network as ONNX, and prove that onnxruntime computes the same as torch.

    *A run* (a path): its compact or gated network. out: the file, RUN/compact.onnx or RUN/gated.onnx if none is given.
    fold_normalization: the graph takes pixels in 0..1. fold_resize: write RUN/compact.photos.onnx too, which takes
    photos of any size, uint8 of shape (images, height, width, 3). int8, fp16: write it in these precisions too, as
    RUN/compact.int8.onnx, and measure them beside float32. calibration: training images that give int8 its ranges.
    max_drop: points of validation accuracy that int8 may lose before its most sensitive layers stay in float32. data:
    where the run's data lie now, or the data themselves.

    *A module*, with example inputs as torch.onnx.export takes its `args`, and a path: every tensor in them is an input,
    every tensor that comes back an output, and each output is compared. input_names, output_names: in order; without
    them, the names in `forward` and the keys of what it returns. dynamic: per input, the dimensions that may vary, as
    {"image": {0: "batch", 2: "height"}}; the first one of all if nothing is said, none with {}. The module stays as it
    is.

    Raises DynpruneError, and leaves no file, when the two disagree.

    >>> dynprune.export("runs/mine").path
    >>> dynprune.export(small, torch.zeros(1, 3, 640, 640), "small.onnx").outputs
    """
    if isinstance(what, nn.Module):
        return of_module(what, *args, listener=listener, **options)
    if args:
        raise DynpruneError(f"export got {len(args) + 1} arguments. Beside a run they need names.")
    return of_run(what, listener=listener, **options)


def of_module(
    model: nn.Module,
    example_inputs: Inputs,
    path: str | Path,
    *,
    opset: int | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic: Axes | None = None,
    listener: Listener = SILENT,
) -> ModuleExport:
    listener.note("exporting to ONNX and comparing with torch")
    return export_module(
        model,
        example_inputs,
        Path(path),
        opset=opset,
        input_names=input_names,
        output_names=output_names,
        dynamic=dynamic,
    )


def of_run(
    run: str | Path,
    *,
    out: str | Path | None = None,
    opset: int | None = None,
    fold_normalization: bool = False,
    fold_resize: bool = False,
    int8: bool = False,
    fp16: bool = False,
    calibration: int = CALIBRATION,
    max_drop: float = MAX_DROP,
    data: str | Data = "",
    listener: Listener = SILENT,
) -> ExportResult | GatedExportResult:
    found, path = open_any(Path(run)), Path(out) if out else None
    if calibration < 1 or calibration > 1_000_000:
        raise DynpruneError(f"--calibration got {calibration}. Expected 1 to 1000000 images.")
    if not 0 <= max_drop < 100:
        raise DynpruneError(f"--max-drop got {max_drop:g}. Expected points from 0 to 100.")
    if isinstance(found, GateRun):
        if int8 or fp16:
            raise DynpruneError(
                f"{run} is gated: its gates and closed channels are computed in float32 only. Drop "
                f"{'--int8' if int8 else '--fp16'}."
            )
        if fold_resize:
            raise DynpruneError(f"{run} is gated: --fold-resize is for compact networks. Drop it.")
        return export_gated(
            found,
            out=path,
            opset=opset,
            fold_normalization=fold_normalization,
            data=found.images(data),
            report=listener.work,
        )
    listener.note("exporting to ONNX and comparing with torch")
    return make_onnx(
        found,
        out=path,
        opset=opset,
        fold_normalization=fold_normalization,
        fold_resize=fold_resize,
        kinds=["int8"] * (int8 or found.config.int8) + ["fp16"] * fp16,
        calibration=calibration,
        max_drop=max_drop,
        data=found.images(data),
        report=listener.work,
    )
