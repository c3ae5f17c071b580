"""Classes of photos, by a file alone: what it computes, and how images become its inputs.

Takes an ONNX file that `export` wrote, or a compact or gated network with its facts, and image files or folders; gives
per image the most probable classes. Nothing else is asked: size, resizing, normalisation and class names are the
file's.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dynprune.data.photos import Depth, files_in, open_image
from dynprune.data.preprocess import Preprocess
from dynprune.data.scores import logits
from dynprune.errors import DynpruneError
from dynprune.files import artifact
from dynprune.files.onnxfile import metadata_of, open_session, run_all
from dynprune.files.resizing import INPUT as PHOTOS

BATCH = 32


@dataclass(frozen=True)
class Predictor:
    """preprocess: an image file to an input. scores: inputs (images, ...) to class scores (images, classes). batch: how
    many images it takes at once."""

    name: str
    classes: list[str]
    preprocess: Callable[[str], np.ndarray]
    scores: Callable[[np.ndarray], np.ndarray]
    batch: int = BATCH


@dataclass(frozen=True)
class Prediction:
    """classes: names and probabilities of the most probable ones, best first."""

    path: str
    classes: list[tuple[str, float]]


def of_onnx(path: Path, threads: int = 0) -> Predictor:
    """An ONNX file that `export` wrote, of a compact or a gated network. threads: 0 leaves onnxruntime's choice."""
    session = open_session(path, threads)
    metadata = metadata_of(session)
    preprocess = Preprocess.from_metadata(metadata, path.name)
    try:
        classes = json.loads(metadata["classes"])
        assert isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    except (ValueError, KeyError, AssertionError) as error:
        raise DynpruneError(f"{path.name} has no class names. Expected a file that dynprune export wrote.") from error
    taken = session.get_inputs()[0]
    names = [output.name for output in session.get_outputs()]
    where = names.index("logits") if "logits" in names else 0
    batch = taken.shape[0] if isinstance(taken.shape[0], int) else BATCH
    if metadata.get("input") == PHOTOS:  # it resizes itself, photos of any size, so one at a time
        depth = Depth(preprocess.white)
        return Predictor(
            str(path),
            classes,
            lambda photo: np.asarray(open_image(photo, depth)),
            lambda inputs: np.asarray(run_all(session, {taken.name: inputs})[where]),
            1,
        )
    return Predictor(
        str(path), classes, preprocess, lambda inputs: np.asarray(run_all(session, {taken.name: inputs})[where]), batch
    )


def of_network(path: Path, model: nn.Module, facts: artifact.Facts, *, one: bool = False) -> Predictor:
    """A network in eval mode, with what its file says of it. one: it takes one image at a time."""

    @torch.no_grad()
    def scores(inputs: np.ndarray) -> np.ndarray:
        return logits(model(torch.from_numpy(inputs))).float().numpy()

    return Predictor(str(path), facts.classes, facts.preprocess, scores, 1 if one else BATCH)


def images_in(paths: Sequence[str | Path]) -> list[str]:
    """Image files, those of folders included. Raises DynpruneError for what is not there, and for folders without
    images."""
    found: list[str] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = files_in(path, Counter())
            if not inside:
                raise DynpruneError(f"{path} holds no images. Expected image files, or a folder with some.")
            found += inside
        elif path.is_file():
            found.append(str(path))
        else:
            raise DynpruneError(f"There is no file or folder {path}. Expected images to predict.")
    if not found:
        raise DynpruneError("No images given. Expected image files or folders.")
    return found


def predict_images(
    predictor: Predictor, paths: Iterable[str], top: int, report: Callable[[int], None] = lambda _: None
) -> Iterator[Prediction]:
    """Predictions in order, as they come. report: how many images are done."""
    paths, done = list(paths), 0
    top = min(top, len(predictor.classes))
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(paths), predictor.batch):
            part = paths[start : start + predictor.batch]
            inputs = np.stack(list(pool.map(predictor.preprocess, part)))
            scores = predictor.scores(inputs).astype(np.float64)
            if scores.shape != (len(part), len(predictor.classes)):
                raise DynpruneError(
                    f"{predictor.name} gives scores of shape {list(scores.shape)} for {len(part)} images and "
                    f"{len(predictor.classes)} classes. Expected one for each. Export it again."
                )
            chances = np.exp(scores - scores.max(1, keepdims=True))
            chances /= chances.sum(1, keepdims=True)
            for path, own in zip(part, chances):
                best = np.argsort(-own, kind="stable")[:top]
                yield Prediction(path, [(predictor.classes[i], float(own[i])) for i in best])
            done += len(part)
            report(done)
