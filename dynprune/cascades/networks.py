"""The networks of a cascade: ONNX files that answer the same question about the same inputs.

Takes paths of ONNX files or of runs; returns what each costs, and how sure it is of which class on images.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import inliner

from dynprune.budgets.latency import Report
from dynprune.data.loading import Data, Images
from dynprune.data.preprocess import Preprocess
from dynprune.deploy.answers import normalised
from dynprune.errors import DynpruneError
from dynprune.files.nested import wider
from dynprune.files.onnxfile import macs_in, metadata_of, open_session, opset_of
from dynprune.files.onnxfile import run as execute
from dynprune.runs.directory import GateRun, RunDirectory, open_any

FEWEST, MOST = 2, 8  # networks to choose from


@dataclass(frozen=True)
class Network:
    """One ONNX file. macs: for one image. preprocess: how photos become its inputs. run: where it was trained, if that
    is what was given."""

    name: str
    path: Path
    proto: onnx.ModelProto
    macs: int
    classes: list[str]
    preprocess: Preprocess
    facts: dict[str, str]
    run: RunDirectory | None = None


@dataclass(frozen=True)
class Said:
    """What networks say of images. margin: probability of the best class less that of the next, (networks, images).
    said: the best class, (networks, images). labels: (images,)."""

    margin: np.ndarray
    said: np.ndarray
    labels: np.ndarray

    @property
    def right(self) -> np.ndarray:
        return self.said == self.labels


def open_network(target: str | Path) -> Network:
    """The network in an ONNX file that `export` wrote, or of a compact run. Raises DynpruneError for others."""
    path, run = Path(target), None
    name = path.stem
    if path.suffix != ".onnx":
        found = open_any(path)
        if isinstance(found, GateRun):
            raise DynpruneError(
                f"{path} is gated: what it costs depends on the image already. Expected compact or dense runs, or ONNX "
                "files."
            )
        if not found.onnx_file.is_file():
            raise DynpruneError(f"{path} has no ONNX file yet. Run: dynprune export {path} --onnx")
        run, name, path = found, path.name, found.onnx_file
    session = open_session(path)
    facts = metadata_of(session)
    preprocess = Preprocess.from_metadata(facts, str(path))
    taken = session.get_inputs()
    if len(taken) != 1 or isinstance(taken[0].shape[0], int) or "input" in facts:
        raise DynpruneError(
            f"{path} does not take batches of normalised images alone. Expected a compact network's file, without "
            "gates and without resizing inside."
        )
    try:
        classes = list(map(str, json.loads(facts["classes"])))
    except (ValueError, KeyError, TypeError) as error:
        raise DynpruneError(f"{path} has no class names. Expected a file that dynprune export wrote.") from error
    proto = onnx.load(path)
    return Network(name, path, proto, macs_in(proto), classes, preprocess, dict(facts), run)


def nested_in(networks: Sequence[Network]) -> dict[tuple[int, int], int]:
    """Pairs of networks of which the second holds the first, and the multiply-accumulates that it adds."""
    flat = [inliner.inline_local_functions(network.proto) for network in networks]
    found = {}
    for inner, outer in itertools.combinations(range(len(networks)), 2):
        if networks[inner].macs < networks[outer].macs and (more := wider(flat[inner], flat[outer], "")):
            found[inner, outer] = more.macs
    return found


def check_alike(networks: Sequence[Network], wide: Collection[int] = ()) -> None:
    """Raises DynpruneError for networks that no cascade can be made of. wide: those that hold another; they may cost as
    much as their neighbours."""
    if not FEWEST <= len(networks) <= MOST:
        raise DynpruneError(
            f"A cascade got {len(networks)} network(s). Expected {FEWEST} to {MOST}, the smallest first."
        )
    first = networks[0]
    if len(first.classes) < 2:
        raise DynpruneError(f"{first.path} knows one class only: there is nothing to be unsure of.")
    for number, (before, own) in enumerate(zip(networks, networks[1:])):
        if own.classes != first.classes:
            raise DynpruneError(
                f"{first.path} knows the classes {', '.join(first.classes[:5])}; {own.path} "
                f"{', '.join(own.classes[:5])}. "
                "Expected the same ones in the same order."
            )
        if own.preprocess != first.preprocess:
            raise DynpruneError(
                f"{first.path} takes {taken_by(first)}; {own.path} {taken_by(own)}. Expected networks for the same "
                "inputs: train and export them alike."
            )
        if opset_of(own.proto) != opset_of(first.proto):
            raise DynpruneError(
                f"{first.path} is of opset {opset_of(first.proto)}, {own.path} of {opset_of(own.proto)}. Expected one: "
                "export them with the same --opset."
            )
        if own.macs < before.macs or own.macs == before.macs and not {number, number + 1} & set(wide):
            raise DynpruneError(
                f"{before.path} takes {before.macs / 1e6:.2f} M multiply-accumulates, {own.path} after it "
                f"{own.macs / 1e6:.2f} M. Expected the smallest network first."
            )


def taken_by(network: Network) -> str:
    how = network.preprocess
    size = "x".join(map(str, how.size))
    return f"{size} by {how.resize.interpolation}, mean {list(how.mean)}, std {list(how.std)}"


def answers(networks: Sequence[Network], data: Data, images: Images, what: str, report: Report) -> Said:
    """What every network says of every image."""
    margins, classes = [], []
    labels: list[np.ndarray] = []
    for network in networks:
        session, own, labels = open_session(network.path), [], []
        for feed, right in normalised(session, data, images):
            own.append(execute(session, dict(feed)))
            labels.append(right)
            report(f"{network.name} on {what}", sum(map(len, labels)), len(images))
        scores = np.concatenate(own)
        if scores.ndim != 2 or scores.shape[1] != len(network.classes):
            raise DynpruneError(
                f"{network.path} gives scores of shape {list(scores.shape)} for {len(network.classes)} classes. "
                "Expected one for each. Export it again."
            )
        margins.append(margin_of(scores))
        classes.append(scores.argmax(1))
    return Said(np.stack(margins), np.stack(classes), np.concatenate(labels))


def margin_of(scores: np.ndarray) -> np.ndarray:
    """(images, classes) to (images,): probability of the best class less that of the next."""
    chances = np.exp(scores - scores.max(1, keepdims=True))
    chances /= chances.sum(1, keepdims=True)
    two = np.partition(chances, -2, axis=1)[:, -2:]
    return two[:, 1] - two[:, 0]
