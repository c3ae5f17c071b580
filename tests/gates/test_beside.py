"""The static network that a gated one is put beside: of its mean cost, from the same network, trained as long."""

import dataclasses

import pytest

from dynprune.commands import gate as verb
from dynprune.errors import Stopped
from dynprune.gates import beside as module
from dynprune.gates.beside import settings_like, verdict
from dynprune.listener import SILENT
from dynprune.runs.config import GateConfig, TrainConfig
from dynprune.runs.directory import GateRun
from tests.gates.test_training import CONFIG


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    from dynprune.commands import compact, train

    path = tmp_path_factory.mktemp("base") / "run"
    train.train(
        TrainConfig(
            model="tests.models:tiny", image_size=8, batch_size=64, epochs=3, policy="dense", threads=1, no_onnx=True
        ),
        path,
    )
    compact.compact(path)
    return path


@pytest.mark.parametrize("trained", [True, False])
def test_it_costs_as_much_and_has_as_many_steps(base, tmp_path, monkeypatch, trained):
    given = {"target": 0.6, "epochs": 2, "block": 1, "estimator": "gumbel", "threads": 1, "no_onnx": True}
    config = (
        verb.based_on(base, given, trust=True)
        if trained
        else dataclasses.replace(CONFIG, **given | {"estimator": "gumbel"})
    )
    seen = []
    training = module.train

    def watched(settings, run, **more):
        session = more["session"]
        seen.append((session.steps, session.teacher is not None, session.graph.macs(session.widths)))
        return training(settings, run, **more)

    monkeypatch.setattr(module, "train", watched)
    result = verb.gate(config, tmp_path / "gate")
    ((steps, taught, macs),) = seen
    assert steps == result.steps and taught == trained
    assert macs == result.static_macs <= result.macs * 1.001
    assert macs > 0.75 * result.macs
    assert f"{100 * result.static_accuracy:.2f} %" in result.verdict and "gates:" in result.verdict
    recorded = GateRun(tmp_path / "gate").results["gate"]
    assert recorded["static_accuracy"] == result.static_accuracy and recorded["verdict"] == result.verdict
    assert not list((tmp_path / "gate").glob("static-*"))


def test_it_can_be_left_out_and_has_none_beside_an_ungated_network(tmp_path):
    for name, change in (("off", {"no_static": True}), ("ungated", {"target": 1.0})):
        result = verb.gate(dataclasses.replace(CONFIG, epochs=1, no_onnx=True, **change), tmp_path / name)
        assert result.static_accuracy is None and not result.verdict


def test_stopped_meanwhile_the_gates_are_kept(tmp_path, monkeypatch):
    began = []
    training = module.train
    monkeypatch.setattr(module, "train", lambda *given, **more: began.append(1) or training(*given, **more))
    config = dataclasses.replace(CONFIG, epochs=2, no_onnx=True, estimator="gumbel")
    with pytest.raises(Stopped, match="gates are finished and kept"):
        verb.gate(config, tmp_path / "gate", listener=dataclasses.replace(SILENT, stop=lambda: bool(began)))
    assert GateRun(tmp_path / "gate").gated_file.is_file()
    result = verb.resume(tmp_path / "gate", model="tests.models:tiny")
    assert result.static_accuracy is not None


def test_settings_are_those_of_the_gates():
    config = GateConfig(lr=0.03, epochs=7, batch_size=32, label_smoothing=0.1, seed=5, distill=0.4, data="photos")
    settings = settings_like(config, policy="dense")
    for name in ("lr", "epochs", "batch_size", "label_smoothing", "seed", "distill", "data", "schedule", "warmup"):
        assert getattr(settings, name) == getattr(config, name)


@pytest.mark.parametrize(
    ("gates", "static", "images", "said"),
    [(0.80, 0.75, 5000, "Gates pay here"), (0.75, 0.80, 5000, "do not pay"), (0.80, 0.79, 400, "No difference")],
)
def test_the_verdict_says_what_so_many_images_can_show(gates, static, images, said):
    class Result:
        accuracy, dense_macs = gates, 1000

    line = verdict(Result, static, 330, images)
    assert said in line and "33.00 % of the MACs" in line and "\n" not in line
