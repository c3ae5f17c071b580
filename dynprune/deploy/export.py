"""ONNX, and the proof that it computes the same.

Takes a compact file and real validation images, writes one `.onnx` file with a dynamic batch, runs it in onnxruntime
and compares with torch. A file that disagrees is not kept.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from dynprune.budgets.latency import Report, silent
from dynprune.data.loading import Data, load_data
from dynprune.data.scores import Scores, logits
from dynprune.deploy.modules import TOLERANCE, export_module, writing
from dynprune.deploy.photos import PhotosFile, write_photos
from dynprune.deploy.quantize import CALIBRATION, KINDS, MAX_DROP, Variant, beside, is_of, write_variants
from dynprune.errors import DynpruneError
from dynprune.files import artifact
from dynprune.files.onnxfile import open_session, run_all
from dynprune.files.program import feed, gap
from dynprune.files.resizing import refuse_interpolation
from dynprune.runs.directory import CompactDirectory, GateRun
from dynprune.version import __version__
from dynprune.zoo import runs_code

PARITY_IMAGES = 256


@dataclass(frozen=True)
class ExportResult:
    """max_abs_diff, max_rel_diff: between torch and onnxruntime on `images` validation images; top1_agreement: their
    share with the same class first. variants: the same network in int8 or float16, measured beside it. photos: each of
    these files with resizing inside."""

    path: str
    opset: int
    size_bytes: int
    max_abs_diff: float
    max_rel_diff: float
    top1_agreement: float
    images: int
    fold_normalization: bool
    variants: list[Variant] = field(default_factory=list)
    photos: list[PhotosFile] = field(default_factory=list)


def load_compact(run: CompactDirectory) -> tuple[nn.Module, artifact.Facts]:
    """The run's compact model. Code that its file names was allowed if the run's own settings name it; another model is
    refused."""
    model, facts = artifact.load_with_facts(run.compact_file, trust=runs_code(run.config.model))
    if facts.model != run.config.model:
        raise DynpruneError(
            f'{run.compact_file} is of "{facts.model}", the run of "{run.config.model}". Compact the run again.'
        )
    return model, facts


def check_classes(path: Path, facts: artifact.Facts, classes: list[str]) -> None:
    """Refuse data of other classes than those that the file in `path` knows."""
    if facts.classes != classes:
        raise DynpruneError(
            f"{path} knows the classes {', '.join(facts.classes[:8])}; --data now gives "
            f"{', '.join(classes[:8])}. Use the data it was trained on."
        )


class Normalised(nn.Module):
    """Takes pixels in 0..1 and normalises them inside the graph."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: list[float], std: list[float]):
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return logits(self.model((x - self.mean) / self.std))


def export(
    run: CompactDirectory,
    *,
    out: Path | None = None,
    opset: int | None = None,
    fold_normalization: bool = False,
    fold_resize: bool = False,
    kinds: Sequence[str] = (),
    calibration: int = CALIBRATION,
    max_drop: float = MAX_DROP,
    data: Data | None = None,
    report: Report = silent,
) -> ExportResult:
    """Write the run's compact model as ONNX, and beside it in the precisions that `kinds` names ("int8", "fp16"), see
    `quantize.write_variants`. Raises DynpruneError and leaves no file when onnxruntime disagrees with torch."""
    if not run.compact_file.is_file():
        raise DynpruneError(f"{run.path} has no compact model yet. Run: dynprune compact {run.path}")
    model, facts = load_compact(run)
    data, path = data_and_path(run, run.compact_file, facts, data, out)
    if fold_resize:
        refuse_interpolation(facts.preprocess)
    wrapped = with_scores(model, facts, fold_normalization)
    partial = path.with_name(path.name + ".partial")
    with writing(path, partial):
        written = export_module(
            wrapped,
            data.example,
            partial,
            opset=opset,
            input_names=["input"],
            output_names=["logits"],
            dynamic={"input": {0: "batch"}},
            facts=metadata(facts, fold_normalization),
        )
        difference, largest, agreement, count = parity(wrapped, partial, data, facts, fold_normalization)
        if not difference <= TOLERANCE * largest or agreement < 1:
            raise DynpruneError(
                f"onnxruntime differs from torch by {difference:.1e} (largest output {largest:.1e}) "
                f"with {agreement:.1%} equal classes on {count} images. No file was written. Try "
                f"another --opset, and please report the model's name."
            )
        partial.replace(path)
    forget_stale(path)
    made = write_variants(kinds, path, data, calibration=calibration, max_drop=max_drop, report=report)
    files = [path, *(Path(own.path) for own in made)] if fold_resize else []
    photos = [write_photos(file, data, facts, fold_normalization) for file in files]
    result = ExportResult(
        str(path),
        written.opset,
        written.size_bytes,
        difference,
        difference / max(largest, 1e-30),
        agreement,
        count,
        fold_normalization,
        made,
        photos,
    )
    run.record("export", asdict(result))
    return result


def forget_stale(path: Path) -> None:
    """Delete the forms of an exported file (precisions, with resizing) that an earlier export left, if it differs."""
    for form in (beside(path, kind) for kind in KINDS):
        if form.is_file() and not is_of(form, path):
            form.unlink()
    for file in (path, *(beside(path, kind) for kind in KINDS)):
        photos = beside(file, "photos")
        if photos.is_file() and not (file.is_file() and is_of(photos, file)):
            photos.unlink()


def data_and_path(
    run: CompactDirectory | GateRun, file: Path, facts: artifact.Facts, data: Data | None, out: Path | None
) -> tuple[Data, Path]:
    """What every export begins with: the run's data (or those given) as `file` knows them, and where to write. Raises
    DynpruneError for data of other classes, and for a folder."""
    data = data or load_data(run.config.source)
    check_classes(file, facts, data.classes)
    data = data.with_channels(facts.input_size[0])
    path = out or run.onnx_file
    if not path.name or path.is_dir():
        raise DynpruneError(f"--out got {path}, which is a folder. Expected a file name such as {path / 'model.onnx'}.")
    return data, path


def with_scores(model: nn.Module, facts: artifact.Facts, folded: bool) -> nn.Module:
    """The network as its graph is written: it returns scores, and takes pixels in 0..1 if normalisation is `folded`."""
    return Normalised(model, facts.mean, facts.std) if folded else Scores(model)


def metadata(facts: artifact.Facts, folded: bool) -> dict[str, str]:
    """What a user of the file must know: class names and how pixels become inputs."""
    channels = facts.input_size[0]
    pixels = "RGB pixels" if channels == 3 else "grey pixels (luminance)"
    return {
        "producer": f"dynprune {__version__}",
        "model": facts.model,
        "classes": json.dumps(facts.classes),
        "input_size": "x".join(map(str, facts.input_size)),
        "input_range": f"{pixels} in 0..1" if folded else f"{pixels} in 0..1, then (x - mean) / std",
        "mean": json.dumps([0.0] * channels if folded else facts.mean),
        "std": json.dumps([1.0] * channels if folded else facts.std),
        "preprocess": facts.preprocess.as_json(folded),
    }


@torch.no_grad()
def parity(
    model: nn.Module, path: Path, data: Data, facts: artifact.Facts, folded: bool
) -> tuple[float, float, float, int]:
    """Largest difference, largest output, share of equal classes, and number of images."""
    session = open_session(path)
    difference = largest = 0.0
    equal = count = 0
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (facts.mean, facts.std))
    for batch, _ in data.eval_batches(data.val, 32):
        batch = (batch * std + mean if folded else batch)[: PARITY_IMAGES - count]
        ours = model(batch.clone()).numpy()  # some networks write into their input
        theirs = run_all(session, feed(session, ["input"], [batch]))[0]
        here, most = gap(ours, theirs)
        difference, largest = max(difference, here), max(largest, most)
        equal += int((ours.argmax(1) == theirs.argmax(1)).sum())
        count += len(batch)
        if count >= PARITY_IMAGES:
            break
    return difference, largest, equal / count, count
