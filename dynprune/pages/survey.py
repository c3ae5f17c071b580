"""Everything that a report tells of one run, gathered from its directory and measured where it is not there.

Takes a run directory and its data; returns a `Survey`. The test images are looked at once more, by the ONNX file if
there is one; time is split up by layer with onnxruntime's own profiler.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor

from dynprune import zoo
from dynprune.budgets.latency import Report, silent
from dynprune.data.loading import Data, Images, image_name, some
from dynprune.data.scores import logits
from dynprune.deploy.answers import normalised
from dynprune.deploy.export import check_classes
from dynprune.errors import DynpruneError
from dynprune.execution.explore import picked_in
from dynprune.files import artifact
from dynprune.files.onnxfile import open_session
from dynprune.files.onnxfile import run as execute
from dynprune.gates.export import load_run
from dynprune.gates.stats import observe
from dynprune.runs.directory import CompactDirectory, GateRun, Run, RunDirectory
from dynprune.runs.logs import metrics_of
from dynprune.structure.channels import ChannelGraph
from dynprune.structure.tracing import trace

MOST_IMAGES = 5000  # of the test images
WORST = 12
PROFILED_RUNS = 30
# what onnxruntime fuses with the layer before
FUSED = ("Add", "BatchNormalization", "Clip", "HardSigmoid", "HardSwish", "LeakyRelu", "Relu", "Sigmoid", "Tanh")
THUMBNAIL = 96  # pixels


@dataclass(frozen=True)
class LayerCost:
    """One layer with weights, full-width and as it is. ms: in onnxruntime at batch 1 on one thread, None if not
    measured."""

    name: str
    dense_macs: int
    macs: int
    dense_params: int
    params: int
    dense_ms: float | None = None
    ms: float | None = None


@dataclass(frozen=True)
class Picks:
    """steps: when each selection began. chosen: 0 or 1 of every arm, (rounds, arms). groups: (name, arms) in order.
    executed: share of all steps in which each arm ran, (arms,)."""

    steps: list[int]
    chosen: np.ndarray
    groups: list[tuple[str, int]]
    executed: np.ndarray


@dataclass(frozen=True)
class WorstImage:
    """An image that is taken for another class, with the probability of its own."""

    name: str
    pixels: Tensor  # uint8, (3, height, width)
    label: str
    said: str
    probability: float
    own_probability: float


@dataclass(frozen=True)
class Answers:
    """confusion: images by true and predicted class, (classes, classes). worst: of those taken for another class, the
    ones whose own class seemed least probable. images: how many were looked at, of `total`."""

    classes: list[str]
    confusion: np.ndarray
    worst: list[WorstImage]
    images: int
    total: int
    by: str
    test_data: str

    @property
    def accuracy(self) -> float:
        return float(np.trace(self.confusion) / max(1, self.confusion.sum()))

    @property
    def by_class(self) -> np.ndarray:
        """Accuracy of every class; nan of one without images."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.diag(self.confusion) / self.confusion.sum(1)


@dataclass(frozen=True)
class GatedImage:
    """share: what it cost, over the ungated network's."""

    name: str
    pixels: Tensor  # uint8, (3, height, width)
    label: str
    said: str
    share: float


@dataclass(frozen=True)
class GatedImages:
    """What the gates of a network made of the test images. shares: cost of each over the ungated network's; right:
    whether its class was said. easiest, hardest: those that cost least and most."""

    shares: np.ndarray
    right: np.ndarray
    easiest: list[GatedImage]
    hardest: list[GatedImage]
    total: int


@dataclass(frozen=True)
class Survey:
    """What there is to tell of one run. results: of each command, as result.json holds them. bench: with all samples,
    as bench.json holds it; empty if the run was not benchmarked. widths: (group, full width, width)."""

    path: Path
    command: str
    model: str
    data: str
    settings: str
    environment: dict
    results: dict
    metrics: list[dict]
    bench: dict
    widths: list[tuple[str, int, int]] = field(default_factory=list)
    layers: list[LayerCost] = field(default_factory=list)
    between_ms: tuple[float, float] | None = None
    picks: Picks | None = None
    answers: Answers | None = None
    gated: GatedImages | None = None

    @property
    def accuracy(self) -> float | None:
        """On the test images, of what is shipped."""
        for command in ("compact", "gate", "train"):
            if isinstance(value := self.results.get(command, {}).get("accuracy"), int | float):
                return float(value)
        return self.answers.accuracy if self.answers else None


def survey(run: RunDirectory, *, data: str | Data = "", report: Report = silent) -> Survey:
    """Gather what there is. data: where the run's data lie now, or the data themselves. Raises DynpruneError for a run
    that has neither results nor a compact network yet."""
    config, results = run.config, {name: own for name, own in run.results.items() if isinstance(own, dict)}
    told = Survey(
        run.path,
        run.command,
        config.model,
        config.data,
        config.to_toml(),
        read_json(run.path / "env.json"),
        results,
        metrics_of(run),
        read_json(run.path / "bench.json"),
    )
    if isinstance(run, GateRun) and run.gated_file.is_file():
        return replace(told, gated=gated_images(run, data, report))
    if not isinstance(run, CompactDirectory) or not run.compact_file.is_file():
        if not told.metrics and not results:
            raise DynpruneError(f"{run.path} has nothing to report yet. Let dynprune {run.command} finish first.")
        return told
    model, facts = artifact.load_with_facts(run.compact_file, trust=zoo.runs_code(config.model))
    report("reading the network's structure", 0, 0)
    full = zoo.build(facts.model, len(facts.classes), 0, size=tuple(facts.input_size))
    graph = trace(full, facts.example)
    widths = {**graph.full_widths, **facts.widths}
    layers = layer_costs(graph, widths)
    if run.onnx_file.is_file() and run.dense_onnx_file.is_file():
        report("timing layer by layer", 0, 0)
        dense_ms, own_ms = (profile(path) for path in (run.dense_onnx_file, run.onnx_file))
        layers = [replace(own, dense_ms=dense_ms.pop(own.name, None), ms=own_ms.pop(own.name, None)) for own in layers]
        between = (sum(dense_ms.values()), sum(own_ms.values()))
    else:
        between = None
    images = run.images(data)
    check_classes(run.compact_file, facts, images.classes)
    images = images.with_channels(facts.input_size[0])
    return replace(
        told,
        widths=[(name, graph.full_widths[name], widths[name]) for name in graph.full_widths],
        layers=layers,
        between_ms=between,
        picks=picks_of(run, graph) if isinstance(run, Run) else None,
        answers=answers_of(run, model, images, report),
    )


def read_json(path: Path) -> dict:
    """A file that only repeats what was shown; empty where it is absent or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def layer_costs(graph: ChannelGraph, widths: Mapping[str, int]) -> list[LayerCost]:
    """MACs and parameters of every layer that has either, those that multiply in the order in which the network runs
    them."""
    macs: dict[str, list[int]] = {}
    for op in graph.ops:
        if op.weight in graph.shapes:
            own = macs.setdefault(layer_of(op.weight), [0, 0])
            own[0] += op.positions * graph.tensor_size(op.weight, {})
            own[1] += op.positions * graph.tensor_size(op.weight, widths)
    params: dict[str, list[int]] = {}
    for name in graph.parameters:
        own = params.setdefault(layer_of(name), [0, 0])
        own[0] += graph.tensor_size(name, {})
        own[1] += graph.tensor_size(name, widths)
    return [LayerCost(name, *macs.get(name, (0, 0)), *params.get(name, (0, 0))) for name in {**macs, **params}]


def layer_of(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def profile(path: Path) -> dict[str, float]:
    """Milliseconds per image of each layer in onnxruntime, and of what stands between layers by the kind of
    operation."""
    layer = layers_by_node(onnx.load(path, load_external_data=False).graph)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory(prefix="dynprune-") as folder:
        options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        entry = session.get_inputs()[0]
        feed = {entry.name: np.random.default_rng(0).standard_normal((1, *entry.shape[1:])).astype(np.float32)}
        for _ in range(PROFILED_RUNS + 1):
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    spent: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and str(event.get("name", "")).endswith("_kernel_time"):
            spent[str(event["name"]).removesuffix("_kernel_time")].append(event["dur"] / 1000)
    found: dict[str, float] = defaultdict(float)
    for node, times in spent.items():
        found[layer.get(node, node)] += float(np.median(times[1:]))
    return dict(found)


def layers_by_node(graph: onnx.GraphProto) -> dict[str, str]:
    """The layer that each node of a profile belongs to. onnxruntime names what it has fused in its blocked layout after
    the last value that comes out, such as relu_1_nchwc: activations and sums behind a layer are counted with it."""
    weights = {tensor.name for tensor in graph.initializer}
    found: dict[str, str] = {}
    value: dict[str, str] = {}
    for node in graph.node:
        name = next((name for name in list(node.input)[1:2] if name in weights and "." in name), "")
        if name and node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            own = found[node.name] = layer_of(name.removeprefix("model."))
        elif node.op_type in FUSED:
            own = next((value[name] for name in reversed(node.input) if name in value), "")
        else:
            continue
        if own:
            for output in node.output:
                value[output] = found[f"{output}_nchwc"] = own
    return found


def picks_of(run: Run, graph: ChannelGraph) -> Picks | None:
    """What the bandit picked, from the run's checkpoint; None where there is none, or the run explored nothing."""
    counts = read_json(run.path / "selections.json")
    try:
        groups = [(name, len(entry["steps_executed"])) for name, entry in counts["groups"].items()]
        executed = np.concatenate([entry["steps_executed"] for entry in counts["groups"].values()])
        executed = executed / max(1, counts["steps"])
        tensors, _ = run.read_checkpoint()
        own = {name.removeprefix("explorer."): value for name, value in tensors.items() if "explorer.picked" in name}
        found, _ = picked_in(own, graph.arms)
    except (DynpruneError, KeyError, TypeError, ValueError, AttributeError):
        return None
    if len(executed) != graph.arms or not found:
        return None
    return Picks(list(found), torch.stack(list(found.values())).numpy(), groups, executed)


def gated_images(run: GateRun, moved: str | Data, report: Report) -> GatedImages:
    """What each test image costs, and those that cost least and most."""
    model, facts, _ = load_run(run)
    data = run.images(moved)
    check_classes(run.gated_file, facts, data.classes)
    data = data.with_channels(facts.input_size[0])
    images = some(data.test, MOST_IMAGES) if len(data.test) > MOST_IMAGES else data.test
    report("running the test images through the gates", 0, len(images))
    seen = observe(model, data, images)

    def shown(number: int) -> GatedImage:
        return GatedImage(
            image_name(images, number),
            picture(data, images, number),
            data.classes[int(seen.labels[number])],
            data.classes[int(seen.said[number])],
            float(seen.shares[number]),
        )

    order = torch.argsort(seen.shares, stable=True).tolist()
    shares, right = seen.shares.numpy(), seen.right.numpy()
    easiest, hardest = ([shown(number) for number in own[:WORST]] for own in (order, order[::-1]))
    return GatedImages(shares, right, easiest, hardest, len(data.test))


def answers_of(run: CompactDirectory, model: torch.nn.Module, data: Data, report: Report) -> Answers:
    """What the network says of the test images: by its ONNX file if there is one."""
    images = some(data.test, MOST_IMAGES) if len(data.test) > MOST_IMAGES else data.test
    report("looking at the test images", 0, len(images))
    scores, labels = [], []
    for part in parts(run, model, data, images):
        scores.append(part[0])
        labels.append(part[1])
        report("looking at the test images", sum(map(len, labels)), len(images))
    said, right = np.concatenate(scores), np.concatenate(labels)
    chances = np.exp(said - said.max(1, keepdims=True))
    chances /= chances.sum(1, keepdims=True)
    confusion = np.zeros((len(data.classes), len(data.classes)), dtype=np.int64)
    np.add.at(confusion, (right, said.argmax(1)), 1)
    own = chances[np.arange(len(right)), right]
    wrong = np.flatnonzero(said.argmax(1) != right)
    worst = [
        WorstImage(
            image_name(images, int(number)),
            picture(data, images, int(number)),
            data.classes[right[number]],
            data.classes[int(said[number].argmax())],
            float(chances[number].max()),
            float(own[number]),
        )
        for number in wrong[np.argsort(own[wrong])][:WORST]
    ]
    by = run.onnx_file.name if run.onnx_file.is_file() else run.compact_file.name
    return Answers(data.classes, confusion, worst, len(images), len(data.test), by, data.reports)


def parts(
    run: CompactDirectory, model: torch.nn.Module, data: Data, images: Images
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Scores and labels, batch after batch."""
    if run.onnx_file.is_file():
        session = open_session(run.onnx_file)
        for feed, labels in normalised(session, data, images):
            yield execute(session, dict(feed)), labels
        return
    with torch.no_grad():
        for batch, right in data.eval_batches(images, 32):
            yield logits(model(batch)).float().numpy(), right.numpy()


def picture(data: Data, images: Images, number: int) -> Tensor:
    """One image as the network sees it, before normalisation."""
    batch, _ = next(iter(data.eval_batches(images.take(torch.tensor([number])), 1)))
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (data.mean, data.std))
    pixels = ((batch * std + mean) * 255).clamp(0, 255).round().to(torch.uint8)[0]
    pixels = pixels.expand(3, *pixels.shape[1:]) if len(pixels) == 1 else pixels
    largest = max(pixels.shape[1:])
    if largest > THUMBNAIL:
        scale = THUMBNAIL / largest
        size = [max(1, math.floor(side * scale)) for side in pixels.shape[1:]]
        small = torch.nn.functional.interpolate(pixels[None].float(), size, mode="bilinear", antialias=True)
        pixels = small[0].round().clamp(0, 255).to(torch.uint8)
    return pixels
