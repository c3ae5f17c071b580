"""An ONNX file that takes photos as they are, beside the one that takes normalised pixels.

Takes an exported file and the run's data; writes compact.photos.onnx, and compares what it makes of validation photos
with what this library makes of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper

from dynprune.data.loading import Data, ImageFiles, Images, some
from dynprune.data.photos import open_image
from dynprune.data.preprocess import Preprocess
from dynprune.deploy.quantize import SOURCE, beside, fingerprint
from dynprune.errors import DynpruneError
from dynprune.files import artifact
from dynprune.files.disk import write_bytes
from dynprune.files.onnxfile import open_session, size_bytes
from dynprune.files.onnxfile import run as execute
from dynprune.files.resizing import INPUT, with_resizing

IMAGES = 64
LEVELS, FEW = 2.0, 0.01  # of 255, and the share of all pixels that may be farther off


@dataclass(frozen=True)
class PhotosFile:
    """off_share: of the pixels of `images` validation photos, those that differ by more than 2 of 255 levels from what
    is made of them without the graph. top1_agreement: share of the photos with the same class first."""

    path: str
    size_bytes: int
    images: int
    off_share: float
    top1_agreement: float


def write_photos(path: Path, data: Data, facts: artifact.Facts, folded: bool) -> PhotosFile:
    """Write `path` with resizing and normalisation inside. folded: it has normalisation inside already. Raises
    DynpruneError, and leaves no new file, where the graph makes something else of photos than this library."""
    how = facts.preprocess
    channels = how.size[0]
    inside = replace(how, mean=(0.0,) * channels, std=(1.0,) * channels) if folded else how
    made = with_resizing(onnx.load(path), inside, {SOURCE: fingerprint(path)})
    plain, session = open_session(path), open_session(made)
    name, off, pixels, same, images = plain.get_inputs()[0].name, 0, 0, 0, some(data.val, IMAGES)
    scale = np.array(inside.std, np.float32).reshape(1, -1, 1, 1) * 255
    seen = open_session(only_resizing(inside))
    for number in range(len(images)):
        photo, expected = one(images, number, inside, data)
        own = execute(seen, {INPUT: photo[None]})
        off += int((np.abs(own - expected) * scale > LEVELS + 0.01).sum())
        pixels += own.size
        ours, theirs = execute(plain, {name: expected}), execute(session, {INPUT: photo[None]})
        same += int(ours.argmax(1)[0] == theirs.argmax(1)[0])
    if off > FEW * pixels:
        raise DynpruneError(
            f"The resizing in the graph differs in {off / pixels:.1%} of the pixels of {len(images)} photos from what "
            "this library does. No file was written. Leave --fold-resize out, and please report the image size."
        )
    out = beside(path, "photos")
    write_bytes(out, made)
    return PhotosFile(str(out), size_bytes(out), len(images), off / pixels, same / len(images))


def one(images: Images, number: int, how: Preprocess, data: Data) -> tuple[np.ndarray, np.ndarray]:
    """A photo as numpy holds it, (height, width, 3), and as the network takes it, (1, channels, height, width)."""
    if isinstance(images, ImageFiles):
        path = images.paths[number]
        return np.asarray(open_image(path, data.depth)), how(path)[None]
    pixels = images.take(torch.tensor([number])).pixels[0].permute(1, 2, 0).numpy()
    return pixels, how.of_pixels(pixels)[None]


def only_resizing(how: Preprocess) -> bytes:
    """A graph that returns what the network would take."""
    kind = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *how.size])
    same = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", *how.size])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "same", [kind], [same])
    return with_resizing(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), how)
