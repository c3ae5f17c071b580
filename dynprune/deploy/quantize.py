"""int8 and half precision: written beside the float32 file, and measured against it.

Takes a run's float32 ONNX file and its data. Training images give the ranges, validation images decide which layers
stay in float32, test images are only reported.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dynprune.budgets.latency import FASTER, Report, interleaved, silent
from dynprune.data.loading import Data, some
from dynprune.deploy.answers import BATCH, classes_of, normalised, scores_of
from dynprune.errors import DynpruneError
from dynprune.files.disk import write_bytes
from dynprune.files.onnxfile import metadata_of, open_session, size_bytes
from dynprune.files.quantized import Feed, Quantiser, halved
from dynprune.machine import multiplies_int8, processor

KINDS = ("int8", "fp16")
CALIBRATION = 500  # training images
MAX_DROP = 1.0  # points
SENSITIVITY_IMAGES = 64
SECONDS, RUNS = 3.0, (20, 1000)
SOURCE = "made_from_sha256"  # metadata: of which file this is another form


@dataclass(frozen=True)
class Variant:
    """A file in int8 or float16 beside the float32 file that it was made from.

    kind: "int8" or "fp16". ms, float32_ms: medians at batch 1 on one thread, timed in turn. accuracy, val_accuracy: on
    test and validation images, beside float32_accuracy and float32_val_accuracy. agreement: share of the test images
    with the same class first. float32_layers: what stayed in float32, the most sensitive first, of `layers`.
    """

    kind: str
    path: str
    size_bytes: int
    float32_size_bytes: int
    ms: float
    float32_ms: float
    accuracy: float
    float32_accuracy: float
    val_accuracy: float
    float32_val_accuracy: float
    agreement: float
    calibration: int
    float32_layers: list[str]
    layers: int
    verdict: str


def beside(path: Path, kind: str) -> Path:
    """Where a file's form in another precision lies: compact.onnx, compact.int8.onnx."""
    return path.with_name(f"{path.stem}.{kind}{path.suffix}")


def fingerprint(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def is_of(variant: Path, source: Path) -> bool:
    """Whether one file is a form of the other as it is now."""
    return variant.is_file() and metadata_of(open_session(variant)).get(SOURCE) == fingerprint(source)


def calibration_feeds(source: Path, data: Data, count: int) -> Iterator[Feed]:
    """Inputs of `count` training images of all classes, not augmented."""
    session = open_session(source)
    for feed, _ in normalised(session, data, some(data.train, count)):
        yield feed


def observed(source: Path, data: Data, calibration: int, report: Report) -> Quantiser:
    """The file with the ranges of its activations on so many training images."""
    count = min(calibration, len(data.train))

    def told() -> Iterator[Feed]:
        for number, feed in enumerate(calibration_feeds(source, data, count)):
            report(f"int8: ranges of {count} training images", number * BATCH, count)
            yield feed

    return Quantiser(source, told())


def as_fast_as_int8(source: Path, out: Path, data: Data) -> None:
    """Write `source` wholly in int8, whatever it says then: to be timed, of a network with random weights."""
    write_bytes(out, observed(source, data, BATCH, silent).quantised([], {SOURCE: fingerprint(source)}))


@dataclass(frozen=True)
class Answers:
    """Which class a file takes every validation and test image for, (images,) each."""

    val: np.ndarray
    test: np.ndarray


def to_int8(
    source: Path, out: Path, data: Data, exact: Answers, *, calibration: int, max_drop: float, report: Report
) -> tuple[list[str], int, np.ndarray]:
    """Write `source`, which answers `exact`, in int8. Where that loses more than `max_drop` points on validation
    images, the layers that change the scores most stay in float32. Returns these, the number of layers, and what the
    file says of validation images."""
    quantiser = observed(source, data, calibration, report)
    if not quantiser.layers:
        raise DynpruneError(f"{source} has no convolution or linear layer to quantise. Export it without --int8.")
    report("int8: accuracy on validation images", 0, 0)
    labels = data.val.labels.numpy()
    allowed = int((exact.val == labels).sum()) - math.floor(max_drop / 100 * len(labels))
    answers: dict[int, np.ndarray] = {}

    def enough(skipped: Sequence[str]) -> bool:
        said = answers[len(skipped)] = classes_of(quantiser.quantised(skipped), data, data.val)[0]
        return int((said == labels).sum()) >= allowed

    kept: list[str] = []
    if not enough(kept):
        order = by_sensitivity(quantiser, source, data, report)
        kept = fewest(order, enough, report)
        if len(kept) == len(order):
            raise DynpruneError(
                f"int8 loses more than {max_drop:g} points on validation images whichever layers stay in float32. "
                "Raise --max-drop, or export without --int8."
            )
    write_bytes(out, quantiser.quantised(kept, {SOURCE: fingerprint(source), "precision": "int8"}))
    return kept, len(quantiser.layers), answers[len(kept)]


def by_sensitivity(quantiser: Quantiser, source: Path, data: Data, report: Report) -> list[str]:
    """The layers, those first whose quantisation alone changes the scores most."""
    images = some(data.val, SENSITIVITY_IMAGES)
    feeds = [feed for feed, _ in normalised(open_session(source), data, images)]
    exact = scores_of(source, feeds)
    change = {}
    for number, layer in enumerate(quantiser.layers):
        report("int8: which layers it hurts", number, len(quantiser.layers))
        change[layer] = float(np.square(scores_of(quantiser.quantised_alone(layer), feeds) - exact).mean())
    return sorted(change, key=lambda layer: -change[layer])


def fewest(order: list[str], enough: Callable[[Sequence[str]], bool], report: Report) -> list[str]:
    """The shortest beginning of `order` with which it is enough: doubled until it is, then halved."""
    low, high = 0, 1
    while high < len(order) and not enough(order[:high]):
        report("int8: how many layers must stay in float32", 0, 0)
        low, high = high, min(2 * high, len(order))
    while high - low > 1:
        middle = (low + high) // 2
        if enough(order[:middle]):
            high = middle
        else:
            low = middle
    return order[:high]


def write_variants(
    kinds: Sequence[str],
    source: Path,
    data: Data,
    *,
    calibration: int = CALIBRATION,
    max_drop: float = MAX_DROP,
    report: Report = silent,
) -> list[Variant]:
    """Write `source` as "int8" or "fp16" beside it, and measure each against it. Raises DynpruneError, and leaves no
    new file of that kind, where onnxruntime cannot."""
    if not kinds:
        return []
    report("accuracy in float32", 0, 0)
    exact = Answers(*(classes_of(source, data, images)[0] for images in (data.val, data.test)))
    labels = Answers(data.val.labels.numpy(), data.test.labels.numpy())
    made = []
    for kind in kinds:
        out = beside(source, kind)
        kept: list[str] = []
        layers = 0
        if kind == "int8":
            kept, layers, val = to_int8(
                source, out, data, exact, calibration=calibration, max_drop=max_drop, report=report
            )
        else:
            report("fp16: converting", 0, 0)
            write_bytes(out, halved(source, {SOURCE: fingerprint(source), "precision": "fp16"}))
            val = classes_of(out, data, data.val)[0]
        report(f"{kind}: accuracy and time beside float32", 0, 0)
        test = classes_of(out, data, data.test)[0]
        exact_ms, ms = time_pair(source, out, data)
        made.append(
            Variant(
                kind,
                str(out),
                size_bytes(out),
                size_bytes(source),
                ms,
                exact_ms,
                share_of(test == labels.test),
                share_of(exact.test == labels.test),
                share_of(val == labels.val),
                share_of(exact.val == labels.val),
                share_of(test == exact.test),
                min(calibration, len(data.train)) if kind == "int8" else 0,
                kept,
                layers,
                verdict(kind, exact_ms / ms),
            )
        )
    return made


def share_of(right: np.ndarray) -> float:
    return float(right.mean())


def time_pair(source: Path, out: Path, data: Data) -> tuple[float, float]:
    """Medians in ms at batch 1 on one thread, in turn."""
    sessions = [open_session(path, 1) for path in (source, out)]
    feeds = [next(iter(normalised(session, data, some(data.val, 1))))[0] for session in sessions]
    exact, fast = interleaved([(s, dict(feed)) for s, feed in zip(sessions, feeds)], SECONDS, RUNS)
    return float(np.median(exact)), float(np.median(fast))


def verdict(kind: str, ratio: float) -> str:
    """One line: how much faster, or that it is not, and why."""
    if ratio >= FASTER:
        return f"{kind} is {ratio:.2f}x as fast as float32 at batch 1"
    how = f"not faster here ({ratio:.2f}x at batch 1)"
    if kind == "fp16":
        return f"fp16 is {how}: onnxruntime computes it in float32 on processors; it halves the file, and is for GPUs"
    if not multiplies_int8():
        return f"int8 is {how}: {processor()} has no instructions for int8 (VNNI)"
    return f"int8 is {how}: layers this thin take their time in moving data, which int8 adds to"
