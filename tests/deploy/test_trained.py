"""A trained network in, a compact one out: the command and the function."""

import contextlib
import copy
import dataclasses
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import dynprune
from dynprune.commands.gate import based_on
from dynprune.data.loading import Source, load_data
from dynprune.data.scores import evaluate
from dynprune.deploy import trained
from dynprune.deploy.trained import better_of, between
from dynprune.errors import DynpruneError
from dynprune.files.artifact import load_with_facts
from dynprune.files.disk import read_tensors, write_tensors
from dynprune.listener import Listener
from dynprune.runs.directory import GateRun, open_any
from tests.cli.test_commands import dynprune as command
from tests.cli.test_commands import refused, write_folder
from tests.models import learned_tiny, tiny

NET = ["--model", "tests.models:tiny", "--image-size", "8"]
SHORT = ["--search-time", "2s", "--tune", "2s", "--images", "256"]


@pytest.fixture(scope="module")
def data():
    return load_data(Source("digits", image_size="8"))


@pytest.fixture(scope="module")
def model(data):
    """The tiny network, trained to some 95 % of the digits."""
    return learned_tiny(data, 12)


@pytest.fixture(scope="module")
def weights(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.pt"
    torch.save({"model": model.state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def compacted(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "small"
    longer = ["--tune", "5s"]  # enough steps to be worth keeping on a busy machine
    done = command("compact", *NET, "--weights", weights, "--budget", 0.5, "--out", path, *SHORT, *longer, "--json")
    return path, json.loads(done.stdout), done.stderr


def test_compact_of_weights_keeps_accuracy_within_the_budget(compacted, data, model):
    path, result, progress = compacted
    assert result["macs"] <= 0.5 * result["dense_macs"] and all(line["met"] for line in result["budgets"])
    assert (
        result["accuracy_before"] == pytest.approx(evaluate(model, data, data.test)) and result["accuracy_before"] > 0.9
    )
    assert result["accuracy"] > result["accuracy_before"] - 0.05
    assert result["pulls"] > 0 and result["distance"] < 1 and result["tune_steps"] > 0
    assert result["max_rel_diff"] < 1e-5
    for phase in ("calibrating", "searching", "repairing", "tuning"):
        assert phase in progress
    loaded = dynprune.load(path / "compact.safetensors", tiny(10))
    assert evaluate(loaded, data, data.test) == pytest.approx(result["accuracy"])


def test_export_and_bench_take_the_run(compacted):
    path, result, _ = compacted
    exported = json.loads(command("export", path, "--onnx", "--json").stdout)
    assert exported["top1_agreement"] == 1
    benched = json.loads(command("bench", path, "--batch", "1", "--json").stdout)
    assert benched["accuracy_onnx"] == pytest.approx(result["accuracy"]) and benched["budgets"][0]["met"]


def test_repair_is_what_keeps_it(weights, tmp_path, compacted):
    bare = [*NET, "--weights", weights, "--budget", 0.5, "--search", "none", "--tune", 0, "--images", 256, "--json"]
    cut = json.loads(command("compact", *bare, "--no-repair", "--out", tmp_path / "cut").stdout)
    fixed = json.loads(command("compact", *bare, "--out", tmp_path / "fixed").stdout)
    assert cut["tune_steps"] == fixed["tune_steps"] == cut["pulls"] == fixed["pulls"] == 0
    assert cut["widths"] == fixed["widths"] and fixed["distance"] < 0.5 * cut["distance"]
    assert fixed["accuracy"] > cut["accuracy"] + 0.1
    again = json.loads(command("compact", *bare, "--out", tmp_path / "again").stdout)
    assert again["distance"] == fixed["distance"] and again["accuracy"] == fixed["accuracy"]


def test_bad_input_is_one_line_before_anything_is_computed(weights, tmp_path, compacted):
    out = ["--out", tmp_path / "run"]
    assert "Pass its --weights" in refused("compact", *NET, *out)
    assert "--tune got soon. Expected a time" in refused("compact", *NET, "--weights", weights, "--tune", "soon", *out)
    assert "below what this network can reach" in refused(
        "compact", *NET, "--weights", weights, "--budget", "0.0001", *out
    )
    assert "does not fit the model" in refused("compact", "--model", "resnet20", "--weights", weights, *out)
    assert "exists" in refused("compact", *NET, "--weights", weights, "--out", compacted[0])
    assert "belongs to compact RUN" in refused("compact", *NET, "--weights", weights, "--min-rate", 0.1, *out)
    assert "belongs to compact without a run" in refused("compact", compacted[0], "--budget", 0.5)
    assert "is a run of dynprune compact" in refused("compact", compacted[0])
    assert not (tmp_path / "run").exists()


def test_weights_that_are_not_finite_are_refused(model, tmp_path):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["conv1.weight"][0, 0, 0, 0] = float("nan")
    torch.save(state, tmp_path / "nan.pt")
    assert "not finite" in refused("compact", *NET, "--weights", tmp_path / "nan.pt", "--out", tmp_path / "run")


def test_few_images_are_refused_and_chance_is_told(tmp_path):
    torch.save(tiny(2).state_dict(), tmp_path / "two.pt")
    two = [
        "--model",
        "tests.models:tiny",
        "--image-size",
        "16",
        "--weights",
        tmp_path / "two.pt",
        "--out",
        tmp_path / "run",
    ]
    few = write_folder(tmp_path / "few", images=10)
    assert "has 18 training images. Expected at least 32" in refused("compact", *two, "--data", few)
    torch.save(tiny(10).state_dict(), tmp_path / "ten.pt")  # knows nothing
    ten = [*NET, "--weights", tmp_path / "ten.pt", "--out", tmp_path / "run"]
    assert "which is chance" in command("compact", *ten, "--images", 64, "--search-time", "1s", "--tune", 0).stderr


def test_a_module_of_ones_own(model, data):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loader = list(data.train_batches(64, 0, 0))
    small = dynprune.compact(model, data.example, loader, "macs=0.5", images=256, search=2, tune=2)
    assert small.macs <= 0.5 * small.graph.macs({}) and small.pulls > 0 and small.tune_steps > 0
    assert evaluate(small.model, data, data.test) > evaluate(model, data, data.test) - 0.05
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    without_labels = [images for images, _ in loader]
    told = dynprune.compact(
        model, data.example, without_labels, ["macs=0.6", "params=0.5"], images=128, search=0, tune=1
    )
    assert told.params <= 0.5 * told.graph.params({}) and evaluate(told.model, data, data.test) > 0.8


def test_what_a_module_is_given_must_make_sense(model, data):
    with pytest.raises(DynpruneError, match="gave 8 images. Expected at least 32"):
        dynprune.compact(model, data.example, [torch.zeros(8, 3, 8, 8)])
    with pytest.raises(DynpruneError, match="gave a dict. Expected batches of images"):
        dynprune.compact(model, data.example, [{"images": torch.zeros(8, 3, 8, 8)}])
    with pytest.raises(DynpruneError, match="cannot be met|least|reach"):
        dynprune.compact(model, data.example, [torch.zeros(8, 3, 8, 8)], "latency=0.001ms")
    with pytest.raises(DynpruneError, match="they need names"):
        dynprune.compact(Path("runs/mine"), 0.5)


def test_the_saved_module_loads_again(model, data, tmp_path):
    small = dynprune.compact(model, data.example, list(data.train_batches(64, 0, 0)), images=96, search=0, tune=0)
    dynprune.save(small.model, tmp_path / "small.safetensors", small.graph, small.selection, classes=10, size=data.size)
    loaded = dynprune.load(tmp_path / "small.safetensors", tiny(10))
    x = data.example.repeat(4, 1, 1, 1)
    np.testing.assert_allclose(loaded(x).detach(), small.model(x).detach(), atol=1e-6)


def test_a_compact_file_is_compacted_again(compacted, tmp_path, data):
    path, first, _ = compacted
    again = [
        *NET,
        "--weights",
        path / "compact.safetensors",
        "--budget",
        "macs=0.7",
        *SHORT,
        "--out",
        tmp_path / "again",
    ]
    second = json.loads(command("compact", *again, "--json").stdout)
    assert second["dense_macs"] == first["macs"] and second["macs"] <= 0.7 * first["macs"]
    assert second["accuracy_before"] == pytest.approx(first["accuracy"])
    loaded = dynprune.load(tmp_path / "again" / "compact.safetensors", tiny(10))
    assert evaluate(loaded, data, data.test) == pytest.approx(second["accuracy"])
    assert json.loads(command("export", tmp_path / "again", "--onnx", "--json").stdout)["top1_agreement"] == 1


@pytest.mark.parametrize("gone", [False, True])
def test_what_comes_after_sees_the_images_as_the_weights_did(compacted, tmp_path, gone):
    """Of a compact file whose normalisation and resizing are not those of its new run's images by themselves."""
    tensors, header = read_tensors(compacted[0] / "compact.safetensors", "compact")
    header |= {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "resize": {"interpolation": "bicubic", "margin": 1.0}}
    weights, out = tmp_path / "odd.safetensors", tmp_path / "again"
    write_tensors(weights, tensors, header)
    bare = ["--search", "none", "--tune", 0, "--images", 256]
    command("compact", *NET, "--weights", weights, "--budget", "macs=0.7", *bare, "--out", out)
    if gone:
        weights.unlink()
    _, facts = load_with_facts(out / "compact.safetensors", tiny(10))
    seen = open_any(out).images()
    assert seen.preprocess == facts.preprocess
    assert (seen.mean, seen.resize.interpolation) == ((0.1, 0.2, 0.3), "bicubic")
    gates = based_on(out, {}, trust=True)
    assert gates.source.mean == (0.1, 0.2, 0.3)
    command("export", out, "--onnx")
    said = json.loads(command("bench", out, "--batch", "1", "--json").stdout)
    recorded = json.loads((out / "result.json").read_text())["compact"]["accuracy"]
    assert said["accuracy_onnx"] == pytest.approx(recorded)
    gated = GateRun.create(tmp_path / "gated", gates, False)
    write_tensors(gated.gated_file, tensors, header | {"kind": "gated"})
    (out / "compact.safetensors").unlink()
    assert gated.images().mean == (0.1, 0.2, 0.3)


def test_the_smallest_network_within_a_drop(weights, tmp_path, data):
    bare = [*NET, "--weights", weights, "--search", "none", "--tune", 0, "--images", 256, "--json"]
    tight = json.loads(command("compact", *bare, "--max-drop", 2, "--out", tmp_path / "tight").stdout)
    loose = json.loads(command("compact", *bare, "--max-drop", 15, "--out", tmp_path / "loose").stdout)
    assert loose["macs"] < tight["macs"] < tight["dense_macs"]
    before = load_trained_accuracy(weights, data)
    for result, drop in ((tight, 0.02), (loose, 0.15)):
        network = dynprune.load(result["path"], tiny(10))
        assert evaluate(network, data, data.val) >= before - drop
    both = ["--max-drop", 1, "--budget", 0.5]
    assert "Choose one of the two" in refused("compact", *bare[:-1], *both, "--out", tmp_path / "both")


@pytest.mark.parametrize("power", [0.7, 1, 2, 3])
@pytest.mark.parametrize("lost_at_half", [0.001, 0.01, 0.05, 0.3])
def test_the_next_budget_to_try_comes_nearer_to_the_drop(power, lost_at_half):
    """Of networks that lose what a power of the logarithm of their budget says: the drop lies between two budgets at
    every step, and soon they are near, or the drop is."""
    low, high, aimed = (0.04, math.nan), (1.0, 0.0), trained.AIMED * 0.01
    for _ in range(trained.DROP_STEPS):
        share = between(low, high, aimed)
        assert low[0] < share < high[0]
        drop = lost_at_half * (math.log(share) / math.log(0.5)) ** power
        low, high = (low, (share, drop)) if drop <= 0.01 else ((share, drop), high)
    assert high[1] > 0.7 * 0.01 or high[0] / low[0] < 1.2


@pytest.mark.parametrize(("wrong", "looked_at"), [(0.0, 10), (0.01, 10), (0.5, 2)])
def test_a_drop_that_is_far_too_large_is_told_after_few_images(monkeypatch, wrong, looked_at):
    seen, bench = [], SimpleNamespace(data=None, device="cpu")
    answers = torch.rand(10, 500, generator=torch.Generator().manual_seed(0)) >= wrong
    monkeypatch.setattr(trained, "right_by_batch", lambda *_: (seen.append(1) or own for own in answers))
    lost, error = trained.lost_by(None, torch.ones(5000, dtype=torch.bool), bench, 0.01)
    of = (~answers[:looked_at]).float().flatten()
    assert len(seen) == looked_at and lost == pytest.approx(float(of.mean()))
    assert error == pytest.approx(float(of.std()) / math.sqrt(len(of)))


@pytest.mark.parametrize(("augment", "knows"), [("none", True), ("crop", False)])
def test_images_that_come_again_unchanged_are_known(model, data, augment, knows, monkeypatch):
    """Rows are those of the images that come with them, of every process."""
    seen, lessons = [], []
    monkeypatch.setattr(trained, "tune", lambda _narrow, lesson, batches, *_, **__: lessons.append((lesson, batches)))
    own = dataclasses.replace(data, augment=augment)
    for ranks in (trained.Ranks(0, 2), trained.Ranks(1, 2)):
        bench = SimpleNamespace(
            config=dynprune.CompactConfig(), data=own, full=model, device=torch.device("cpu"), ranks=ranks
        )
        bench.compaction = SimpleNamespace(images=SimpleNamespace(share=SimpleNamespace(clock=lambda _: None)))
        monkeypatch.setattr(trained, "learning_together", lambda *_: contextlib.nullcontext())
        trained.tuned(bench, model, lambda *_: None, Listener())
        lesson, batches = lessons[-1]
        assert (lesson.memory is not None) == knows
        for images, labels, rows in itertools.islice(batches, 2 * own.steps_per_epoch(128) + 1):
            seen.append(rows)
            assert torch.equal(labels, own.train.labels[rows])
            plain = own.normalise(own.train.take(rows).pixels)
            assert torch.equal(images, plain) == knows
    assert torch.cat(seen).unique().numel() == len(own.train)


def load_trained_accuracy(weights, data):
    network = tiny(10)
    network.load_state_dict(torch.load(weights)["model"])
    return evaluate(network.eval(), data, data.val)


def test_a_curve_before_anybody_decides(weights, tmp_path):
    given = [*NET, "--weights", weights, "--search", "none", "--images", 128, "--out", tmp_path / "curve"]
    curve = json.loads(command("compact", *given, "--curve", "0.3,0.8", "--json").stdout)
    large, small = curve["points"]
    assert (large["share"], small["share"]) == (0.8, 0.3)
    assert small["macs"] <= 0.3 * curve["macs"] < large["macs"] <= 0.8 * curve["macs"]
    assert small["distance"] > large["distance"] and large["accuracy"] > 0.8 and large["ms"] > 0 < large["dense_ms"]
    assert curve["plot"] is None or (tmp_path / "curve" / "curve.png").stat().st_size > 1000
    assert not (tmp_path / "curve" / "compact.safetensors").exists()
    assert "--curve expects shares" in refused("compact", *given, "--curve", "2,half")


def test_tuning_that_does_harm_is_taken_back(model, data):
    """Validation images say so; of two networks that are as good, the tuned one is kept."""
    said = []
    listener = Listener(say=said.append)
    bench = SimpleNamespace(data=data, device="cpu")
    ruined = copy.deepcopy(model)
    for parameter in ruined.parameters():
        parameter.data.mul_(torch.randn_like(parameter))
    kept, steps = better_of(bench, (model, 0.0), (ruined, 1.0), 7, listener)
    assert kept is model and steps == 0 and "7 steps of tuning left" in said[0]
    assert "the network stays as it was repaired" in said[0]
    same = copy.deepcopy(model)
    assert better_of(bench, (model, 0.0), (same, 0.0), 7, listener) == (same, 7) and len(said) == 1
    assert better_of(bench, (ruined, 1.0), (model, 0.0), 7, listener) == (model, 7)


@pytest.mark.parametrize(
    "right_before, right_after, farther, kept",
    [
        (800, 900, 0.1, True),  # of 1,000: many more are right, however far it is
        (800, 805, 0.1, False),  # five may be chance, and it is farther away
        (800, 805, -0.1, True),
        (800, 795, -0.1, True),  # as good, and nearer
        (800, 700, -0.1, False),  # nearer to the untouched network on average, and much worse
        (800, 800, 0.0, True),
    ],
)
def test_accuracy_decides_where_it_is_no_chance_and_distance_where_it_is(
    monkeypatch, right_before, right_after, farther, kept
):
    answers = {"before": torch.arange(1000) < right_before, "after": torch.arange(1000) >= 1000 - right_after}
    monkeypatch.setattr(trained, "right_answers", lambda own, *_: answers[own])
    monkeypatch.setattr(trained, "some", lambda images, _: images)
    bench = SimpleNamespace(data=load_data(Source("digits", image_size="8")), device="cpu")
    both = ("before", 0.5), ("after", 0.5 + farther)
    assert better_of(bench, *both, 9, Listener()) == (("after", 9) if kept else ("before", 0))
