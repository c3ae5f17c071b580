"""`dynprune gate`: training, resume, files, export and bench of gated networks, on the embedded digits."""

import dataclasses
import json

import pytest
import torch

import dynprune
from dynprune.data.loading import load_data
from dynprune.errors import DynpruneError
from dynprune.gates import supervised
from dynprune.gates.file import load_gated
from dynprune.gates.session import GateSession
from dynprune.gates.threshold import calibrate, mean_share
from dynprune.gates.training import gate
from dynprune.runs.config import GateConfig, TrainConfig
from dynprune.runs.directory import GateRun
from tests.cli.test_commands import TINY, refused
from tests.cli.test_commands import dynprune as command

CONFIG = GateConfig(
    model="tests.models:tiny",
    data="digits",
    image_size=8,
    batch_size=64,
    epochs=4,
    lr=0.05,
    target=0.7,
    block=4,
    estimator="reinforce",
    threads=1,
    precision="float32",
)


@pytest.fixture(scope="module")
def data():
    return load_data(CONFIG.source)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data):
    run = GateRun.create(tmp_path_factory.mktemp("gate") / "run", CONFIG, False)
    return run, gate(CONFIG, run, data=data)


def test_gates_meet_the_target_and_say_what_they_do(finished, data):
    run, result = finished
    assert (
        result.met
        and result.stats.share <= 1.02 * 0.7
        and result.stats.share * result.dense_macs == pytest.approx(result.macs, abs=1)
    )
    assert result.accuracy > 0.3 and 0 <= result.stats.varying_share <= 1
    assert result.stats.frozen_share >= result.stats.share - 1e-9
    assert set(result.stats.by_class) == set(data.classes) and len(result.stats.easiest) == 5
    assert result.stats.easiest[0][1] <= result.stats.hardest[0][1]
    assert json.loads((run.path / "result.json").read_text())["gate"]["accuracy"] == result.accuracy


def test_the_file_gives_the_network_back(finished, data):
    run, result = finished
    with pytest.raises(DynpruneError, match="asks to run the code"):
        dynprune.load(run.gated_file)
    model = dynprune.load(run.gated_file, trust=True)
    images = next(iter(data.eval_batches(data.test, 8)))[0]
    with torch.no_grad():
        assert torch.allclose(torch.cat([model(image) for image in images.split(1)]), model(images), atol=1e-4)
    whole, facts, gates = load_gated(run.gated_file, trust=True)
    assert sum(
        len(gate.sizes) for gate in model.gates
    ) == result.units - result.closed_for_good and result.units == sum(len(gate.sizes) for gate in whole.gates)
    assert torch.allclose(model(images), whole(images), atol=1e-4)
    assert gates.target == 0.7 and gates.share == result.stats.share and facts.classes == data.classes


@pytest.mark.parametrize("estimator", ["reinforce", "gumbel", "supervised"])
def test_resumed_gates_equal_uninterrupted_ones(tmp_path, data, estimator):
    config = dataclasses.replace(CONFIG, estimator=estimator, epochs=2, checkpoint_every="7")
    whole = gate(config, GateRun.create(tmp_path / "whole", config, False), data=data)
    run, session = GateRun.create(tmp_path / "stopped", config, False), GateSession(config, data)
    with pytest.raises(DynpruneError, match="Stopped at step 17"):
        gate(config, run, session=session, stop=lambda: session.step == 16)
    again = gate(config, run, data=data, resume=True)
    assert again.stats == whole.stats and again.accuracy == whole.accuracy
    ours, theirs = (
        load_gated(tmp_path / name / "gated.safetensors", trust=True)[0].state_dict() for name in ("whole", "stopped")
    )
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_gates_that_closed_too_much_are_opened_at_the_end(data):
    session = GateSession(CONFIG, data)
    for images, labels in data.train_batches(64, 0, 0):
        session.train_step(images, labels)
    session.step, session.model.shift = session.steps, torch.tensor(-8.0)
    batches = [batch for batch, _ in data.eval_batches(data.val, 100)]
    session.model.eval()
    closed = mean_share(session, batches)
    calibrate(session)
    assert closed < 0.6 * CONFIG.target < mean_share(session, batches) <= 1.02 * CONFIG.target


def test_the_phases_follow_each_other(data):
    session = GateSession(dataclasses.replace(CONFIG, gates_first=0.2, settle=0.3), data)
    phases = [session.phase(step) for step in range(session.steps)]
    assert list(dict.fromkeys(phases)) == ["warming", "gating", "settled"]
    before = [value.clone() for value in session.network.parameters()]
    session.train_step(*next(iter(data.train_batches(64, 0, 0))))
    assert all(torch.equal(a, b) for a, b in zip(before, session.network.parameters()))  # warming: the weights rest
    assert session.temperature == pytest.approx(1, abs=0.05)
    session.step = session.settled_at
    assert session.temperature == pytest.approx(0.2) and session.entropy_weight == 0
    assert session.target_at(0) == 1 and session.target_at(session.settled_at) == pytest.approx(0.7)


@pytest.mark.parametrize("estimator", ["supervised", "reinforce", "gumbel"])
def test_gates_that_are_told_learn_it(data, estimator):
    """Supervised throughout, or in the steps before the weights join: what is worth more opens more often."""
    session = GateSession(
        dataclasses.replace(CONFIG, estimator=estimator, gates_first=0.45, gate_lr=0.1, entropy=0.0), data
    )
    images, labels = next(iter(data.train_batches(64, 0, 0)))
    session.step = round(0.4 * session.steps)  # the target is below 1 by then
    for _ in range(12):
        session.train_step(images, labels)
        session.step = round(0.4 * session.steps)
    every, by_gate = supervised.worth(session.model, images, lambda output: session.loss_of(output, labels, None))
    wanted = torch.cat(supervised.answers(session.model, every, by_gate, session.target_at(session.step)), 1) > 0
    scores = torch.cat(session.model.run(images, session.model.threshold)[1].logits, 1)
    assert 0 < wanted.float().mean() < 1 and scores[wanted].mean() > scores[~wanted].mean() + 0.5


def test_target_one_is_the_ungated_network(tmp_path, data):
    config = dataclasses.replace(CONFIG, target=1.0, epochs=1)
    run = GateRun.create(tmp_path / "run", config, False)
    result = gate(config, run, data=data)
    model = load_gated(run.gated_file, trust=True)[0]
    images = next(iter(data.eval_batches(data.test, 8)))[0]
    with torch.no_grad():
        assert torch.equal(model(images), model.network(images))
    assert result.stats.share == 1 and result.stats.varying_share == 0


def test_random_gates_cost_the_target_and_are_not_exported(tmp_path, data):
    config = dataclasses.replace(CONFIG, estimator="random", epochs=1)
    run = GateRun.create(tmp_path / "run", config, False)
    result = gate(config, run, data=data)
    assert result.stats.share == pytest.approx(0.7, abs=0.03)
    assert "only serve to compare with" in refused("export", run.path, "--onnx")


def test_distilling_follows_the_network_without_gates(tmp_path, data):
    weights = tmp_path / "weights.pt"
    torch.save(GateSession(CONFIG, data).network.state_dict(), weights)
    session = GateSession(dataclasses.replace(CONFIG, distill=0.25, weights=str(weights)), data)
    images, labels = next(iter(data.train_batches(64, 0, 0)))
    before = session.teach(images)
    said, plain = torch.randn(64, 10), GateSession(CONFIG, data)
    soft = [torch.softmax(logits / 2, 1) for logits in (before, said)]
    apart = 4 * (soft[0] * (soft[0] / soft[1]).log()).sum(1)
    assert torch.allclose(
        session.loss_of(said, labels, before),
        0.75 * plain.loss_of(said, labels, plain.teach(images)) + 0.25 * apart,
        atol=1e-5,
    )
    session.train_step(images, labels)
    assert torch.equal(session.teach(images), before)  # the teacher does not learn
    assert session.train_macs - plain.train_macs == 64 * session.steps * session.model.dense_macs
    assert GateSession(dataclasses.replace(CONFIG, target=1.0, weights=str(weights)), data).teacher is None


def test_targets_out_of_reach_are_refused_before_training(data):
    with pytest.raises(
        DynpruneError,
        match="--target 0.05 is below what gates can reach here: with as little open as possible an image costs 0.",
    ):
        GateSession(dataclasses.replace(CONFIG, target=0.05), data)


def test_a_whole_journey_from_a_compact_run(tmp_path):
    """Train, compact, gate, export, bench; the two savings multiply."""
    command("train", *TINY, "--out", tmp_path / "run")
    compact = json.loads(command("compact", tmp_path / "run", "--json").stdout)
    done = command(
        "gate", tmp_path / "run", "--target", 0.8, "--block", 2, "--epochs", 2, "--out", tmp_path / "gated", "--json"
    )
    result = json.loads(done.stdout)
    assert (
        result["dense_macs"] == compact["macs"]
        and result["base"] == str(tmp_path / "run")
        and "epoch 2/2" in done.stderr
    )
    assert GateRun.open(tmp_path / "gated").config.data == TrainConfig.from_toml(tmp_path / "run" / "config.toml").data
    exported = json.loads(command("export", tmp_path / "gated", "--onnx", "--json").stdout)
    assert (
        exported["max_rel_diff"] < 1e-4
        and exported["gates_agree"] > 0.9
        and sum(exported["forms"].values()) == len(exported["layers"])
    )
    bench = json.loads(command("bench", tmp_path / "gated", "--json").stdout)
    assert [row["network"] for row in bench["rows"]] == ["ungated", "gated", "static, same mean cost"] and bench[
        "accuracy"
    ] == result["accuracy"]
    assert "is a run of dynprune gate" in refused("compact", tmp_path / "gated")
    assert "is a run of dynprune gate" in refused("train", "--resume", "--out", tmp_path / "gated")
    assert "is a run of dynprune train" in refused("gate", "--resume", "--out", tmp_path / "run")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--target", "0"], "--target got 0"),
        (["--estimator", "guess"], "Choose one of: gumbel, reinforce, supervised, random"),
        (["--settle", "0.6", "--gates-first", "0.4"], "leave no steps"),
        (["--precision", "float64"], "gate works in float32"),
        (["nowhere"], "is not a directory"),
        (["--resume"], "Pass --out"),
        (["--block", "-1"], "--block got -1"),
        (["--distill", "1.5"], "--distill got 1.5"),
    ],
)
def test_bad_options_give_one_line(tmp_path, options, message):
    assert message in refused("gate", *options, *([] if "--resume" in options else ["--out", tmp_path / "out"]))


def test_gates_want_one_process(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "gate works in one process" in refused("gate", "--model", "resnet20", "--out", tmp_path / "out")
