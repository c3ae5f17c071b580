"""What an ONNX file says of images: scores, classes, accuracy.

Takes a file (or its bytes) and images of a `Data`; inputs are normalised unless the graph does that itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnxruntime

from dynprune.data.loading import Data, Images
from dynprune.errors import DynpruneError
from dynprune.files.onnxfile import metadata_of, open_session
from dynprune.files.onnxfile import run as execute
from dynprune.files.quantized import Feed

BATCH = 32


def normalised(session: onnxruntime.InferenceSession, data: Data, images: Images) -> Iterator[tuple[Feed, np.ndarray]]:
    """Inputs as the file wants them, in batches, with their labels."""
    name = session.get_inputs()[0].name
    folded = metadata_of(session).get("mean") in ("[0.0, 0.0, 0.0]", "[0.0]")
    mean, std = (np.asarray(v, dtype=np.float32).reshape(1, -1, 1, 1) for v in (data.mean, data.std))
    for batch, labels in data.eval_batches(images, BATCH):
        yield {name: batch.numpy() * std + mean if folded else batch.numpy()}, labels.numpy()


def classes_of(file: Path | bytes, data: Data, images: Images) -> tuple[np.ndarray, np.ndarray]:
    """What the file takes each image for, and its label; (images,) each."""
    session = open_session(file)
    pairs = []
    for feed, labels in normalised(session, data, images):
        scores = execute(session, dict(feed))
        if scores.ndim != 2 or scores.shape[0] != len(labels):
            raise DynpruneError(
                f"{'A network in memory' if isinstance(file, bytes) else file} gives an output of shape "
                f"{'x'.join(map(str, scores.shape))} for {len(labels)} images. Expected one row of class scores "
                "for each."
            )
        pairs.append((scores.argmax(1), labels))
    said, right = (np.concatenate(parts) for parts in zip(*pairs))
    return said, right


def accuracy_of(file: Path | bytes, data: Data, images: Images) -> float:
    """Share of the images whose class the file predicts right."""
    said, right = classes_of(file, data, images)
    return float((said == right).mean())


def scores_of(file: Path | bytes, feeds: Sequence[Feed]) -> np.ndarray:
    session = open_session(file)
    return np.concatenate([execute(session, dict(feed)) for feed in feeds])
