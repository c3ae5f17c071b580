"""`dynprune export`: from a run to ONNX."""

from __future__ import annotations

from pathlib import Path

from dynprune.data.loading import Data
from dynprune.deploy.export import ExportResult
from dynprune.deploy.export import export as make_onnx
from dynprune.gates.export import GatedExportResult, export_gated
from dynprune.listener import SILENT, Listener
from dynprune.runs.directory import GateRun, open_any


def export(
    run: str | Path,
    *,
    out: str | Path | None = None,
    opset: int | None = None,
    fold_normalization: bool = False,
    data: str | Data = "",
    listener: Listener = SILENT,
) -> ExportResult | GatedExportResult:
    """Write a run's compact or gated network as ONNX, and prove that onnxruntime computes the same as torch.

    out: the file, RUN/compact.onnx or RUN/gated.onnx if none is given. fold_normalization: the graph takes pixels in
    0..1. data: where the run's data lie now, or the data themselves. Raises DynpruneError, and leaves no file, when the
    two disagree.

    >>> dynprune.export("runs/mine").path
    """
    found, path = open_any(Path(run)), Path(out) if out else None
    if isinstance(found, GateRun):
        return export_gated(
            found,
            out=path,
            opset=opset,
            fold_normalization=fold_normalization,
            data=found.images(data),
            report=listener.work,
        )
    listener.note("exporting to ONNX and comparing with torch")
    return make_onnx(found, out=path, opset=opset, fold_normalization=fold_normalization, data=found.images(data))
