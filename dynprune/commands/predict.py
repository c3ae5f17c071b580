"""`dynprune predict`: the classes of photos, by a file alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dynprune.deploy.export import load_compact
from dynprune.deploy.predict import Prediction, Predictor, images_in, of_network, of_onnx, predict_images
from dynprune.errors import DynpruneError
from dynprune.files import artifact
from dynprune.files.disk import kind_of
from dynprune.gates.file import cut_closed, load_gated
from dynprune.listener import SILENT, Listener
from dynprune.runs.directory import GateRun, open_any


def predict(
    target: str | Path,
    images: str | Path | Sequence[str | Path],
    *,
    top: int = 3,
    threads: int = 0,
    trust: bool = False,
    listener: Listener = SILENT,
) -> list[Prediction]:
    """The most probable classes of images. Preprocessing and class names are read from the file alone.

    target: an ONNX file that `export` wrote, a compact or gated safetensors file, or a run. images: files and folders.
    top: how many classes of each. threads: of onnxruntime; 0 leaves its choice. trust: let a file name code of your own
    to build its network with.

    Raises DynpruneError, before anything is computed, for what is not there, and for files that do not say how images
    become inputs; for an image that cannot be read when it is its turn.

    >>> dynprune.predict("runs/mine/compact.onnx", "photos/val")[0].classes
    """
    if top < 1:
        raise DynpruneError(f"--top got {top}. Expected how many classes to name, at least 1.")
    paths = images_in([images] if isinstance(images, str | Path) else images)
    predictor = opened(Path(target), threads, trust)
    return list(
        predict_images(predictor, paths, top, lambda done: listener.work("predicting images", done, len(paths)))
    )


def opened(path: Path, threads: int, trust: bool) -> Predictor:
    if path.suffix == ".onnx":
        return of_onnx(path, threads)
    if path.is_dir():
        run = open_any(path)
        if not isinstance(run, GateRun):
            return of_network(run.compact_file, *load_compact(run))
        path = run.gated_file
    if not path.is_file():
        raise DynpruneError(f"There is no {path}. Expected an ONNX file, a compact file, or a run.")
    if kind_of(path) == "gated":
        gated, facts, _ = load_gated(path, trust=trust)
        return of_network(path, cut_closed(gated, facts.example).eval(), facts, one=True)
    model, facts = artifact.load_with_facts(path, trust=trust)
    return of_network(path, model.eval(), facts)
