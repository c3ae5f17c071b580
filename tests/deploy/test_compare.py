"""Policies side by side: what is equal, what is repeated, and what the numbers are allowed to say."""

import copy
import dataclasses
import json

import pytest
import torch
from torch import nn

from dynprune import zoo
from dynprune.data.loading import load_data
from dynprune.deploy import compare as comparing
from dynprune.deploy.compare import ComparedRun, compare, summarise, verdict
from dynprune.deploy.rivals import IMPORTANCES, estimate_norms, prune
from dynprune.errors import DynpruneError, Stopped
from dynprune.runs.config import TrainConfig
from dynprune.runs.directory import Run
from dynprune.structure.tracing import trace
from dynprune.training.train import train
from tests.cli.test_commands import TINY, dynprune, refused

CONFIG = TrainConfig(model="tests.models:tiny", image_size=8, batch_size=64, epochs=3, budget=("0.3",), threads=1)


def one(policy, seed, accuracy):
    return ComparedRun(policy, seed, accuracy, 100, 10, 1000, 1.0, 3)


def test_the_verdict_asks_for_more_than_the_spread():
    runs = [
        one("cucb", 0, 0.80),
        one("cucb", 1, 0.82),
        one("static", 0, 0.70),
        one("static", 1, 0.72),
        one("random", 0, 0.79),
        one("random", 1, 0.82),
    ]
    summaries = summarise(runs, ["cucb", "static", "random"])
    assert (
        summaries[0].accuracy == pytest.approx(0.81)
        and summaries[0].spread == pytest.approx(0.0141, abs=1e-4)
        and summaries[1].lead == pytest.approx(0.1)
    )
    lines = verdict(summaries).splitlines()
    assert lines[0] == "cucb is above static: +10.00 points, spread 2.00, 2 seeds"
    assert lines[1].startswith("cucb is not different from random: +0.50 points")
    assert "nothing is shown" in verdict(summarise(runs[::2], ["cucb", "static", "random"]))


def test_finished_runs_are_not_repeated_and_stopped_ones_go_on(tmp_path, monkeypatch):
    heard = []
    first = compare(CONFIG, ["cucb", "static"], 2, tmp_path / "all", say=heard.append)
    assert [(run.policy, run.seed) for run in first.runs] == [
        ("cucb", 0),
        ("static", 0),
        ("cucb", 1),
        ("static", 1),
    ] and len(heard) >= 4
    assert all(run.macs <= 0.3 * 399328 and run.train_macs == 3 * run.macs * 3 * 21 * 64 for run in first.runs)
    (tmp_path / "all" / "static-1" / "result.json").unlink()  # as if it had been killed after its last checkpoint
    trained = []
    whole = comparing.train
    monkeypatch.setattr(
        comparing,
        "train",
        lambda config, run, **options: (
            trained.append((run.path.name, options["resume"])) or whole(config, run, **options)
        ),
    )
    # saved more often: the same result
    again = compare(
        dataclasses.replace(CONFIG, checkpoint_every="3", workers=0), ["cucb", "static"], 2, tmp_path / "all"
    )
    assert trained == [("static-1", True)]
    assert [run.accuracy for run in again.runs] == [run.accuracy for run in first.runs]
    with pytest.raises(DynpruneError, match="cucb-0 was trained with other settings"):
        compare(dataclasses.replace(CONFIG, lr=0.05), ["cucb", "static"], 1, tmp_path / "all")


@pytest.mark.parametrize("asked", [5, 90])  # in the first run, in the second
def test_a_stopped_comparison_says_how_to_go_on_and_does(tmp_path, asked):
    steps = []
    with pytest.raises(Stopped) as stopped:
        compare(
            CONFIG, ["static", "dense"], 1, tmp_path / "stopped", stop=lambda: steps.append(1) or len(steps) == asked
        )
    assert "same command" in str(stopped.value) and str(tmp_path / "stopped") in str(stopped.value)
    assert "train --resume" not in str(stopped.value)
    again = compare(CONFIG, ["static", "dense"], 1, tmp_path / "stopped")
    whole = compare(CONFIG, ["static", "dense"], 1, tmp_path / "whole")
    assert [run.accuracy for run in again.runs] == [run.accuracy for run in whole.runs]


def test_each_run_is_what_train_makes_of_its_settings(tmp_path):
    """Also the split of the images is that of the run's own seed."""
    found = compare(CONFIG, ["static", "random"], 2, tmp_path / "all").runs
    for run in (run for run in found if run.policy == "static"):
        config = Run(tmp_path / "all" / f"static-{run.seed}").config
        alone = train(config, Run.create(tmp_path / f"alone-{run.seed}", config, overwrite=False))
        assert config.seed == run.seed and alone.accuracy == run.accuracy
        assert alone.val_accuracy == Run(tmp_path / "all" / f"static-{run.seed}").results["train"]["val_accuracy"]


def test_equal_cost_gives_dense_training_fewer_epochs(tmp_path):
    config = dataclasses.replace(CONFIG, epochs=8)
    found = {
        run.policy: run for run in compare(config, ["cucb", "dense", "static-ours"], 1, tmp_path, equal="cost").runs
    }
    assert found["static-ours"].epochs == 8 and found["static-ours"].macs == found["cucb"].macs
    # whole epochs
    assert found["dense"].epochs == 2 and found["dense"].train_macs == pytest.approx(found["cucb"].train_macs, rel=0.2)


def test_what_grows_costs_less_and_thin_networks_do_not_grow(tmp_path):
    config = dataclasses.replace(CONFIG, epochs=5, grow=0.5)
    found = {
        run.policy: run
        for run in compare(config, ["cucb", "random", "static", "static:grow=0.5"], 1, tmp_path, equal="cost").runs
    }
    assert (
        found["cucb"].train_macs < 0.8 * 3 * found["cucb"].macs * 5 * 21 * 64
        and found["cucb"].macs == found["static"].macs
    )
    affordable = round(found["cucb"].train_macs / (3 * found["static"].macs * 21 * 64))
    assert (
        affordable < 5
        and [found[name].epochs for name in found] == [5, 5, affordable, 5]
        and found["random"].train_macs == found["cucb"].train_macs
    )


def test_torch_pruning_cuts_at_once_where_weights_are_given(tmp_path):
    """Without weights, half of the images go into the dense network first."""
    pytest.importorskip("torch_pruning")
    weights = tmp_path / "trained.pt"
    torch.save(zoo.build("resnet20", 10).state_dict(), weights)
    config = dataclasses.replace(CONFIG, model="resnet20", epochs=2)
    for given, trained in (("", ["dense", "pruned"]), (str(weights), [])):
        out = tmp_path / ("given" if given else "fresh")
        found = compare(dataclasses.replace(config, weights=given), ["cucb", "dense+prune"], 1, out).runs[1]
        assert sorted(path.name for path in (out / "dense+prune-0").iterdir() if path.is_dir()) == trained
        assert found.epochs == 2 and found.accuracy > 0
        assert (found.train_macs > 3 * found.macs * 2 * 21 * 64) == (not given)


def test_without_training_each_shows_what_it_makes_of_a_trained_network(tmp_path):
    pytest.importorskip("torch_pruning")
    weights = tmp_path / "trained.pt"
    torch.save(zoo.build("resnet20", 10).state_dict(), weights)
    config = dataclasses.replace(CONFIG, model="resnet20", epochs=1, weights=str(weights))
    policies = ["static", "dense+prune:importance=hessian", "dense"]
    found = compare(config, policies, 1, tmp_path / "c", untrained=True)
    assert [run.epochs for run in found.runs] == [0, 0, 0] == [run.train_macs for run in found.runs]
    ours, theirs, dense = found.runs
    assert max(ours.macs, theirs.macs) <= 0.3 * dense.macs and min(ours.train_seconds, theirs.train_seconds) > 0
    assert compare(config, policies, 1, tmp_path / "c", untrained=True).runs == found.runs
    done = dynprune(
        "compare", "--model", "resnet20", "--weights", weights, "--image-size", 8, "--epochs", 0, "--seeds", 1,
        "--policies", "static,dense", "--out", tmp_path / "d", "--json",
    )  # fmt: skip
    assert [run["epochs"] for run in json.loads(done.stdout)["runs"]] == [0, 0]


def test_every_importance_meets_the_budget_and_leaves_the_model_alone():
    pytest.importorskip("torch_pruning")
    data = load_data(dataclasses.replace(CONFIG, model="resnet20", image_size="16").source)
    model = zoo.build("resnet20", 10, size=data.size).eval()
    before, dense = copy.deepcopy(model.state_dict()), trace(model, data.example).macs({})
    for importance in IMPORTANCES:
        small = prune(model, data, 0.4 * dense, importance)
        assert 0.15 * dense < trace(small, data.example).macs({}) <= 0.4 * dense, importance
        assert not small.training and all(parameter.grad is None for parameter in small.parameters())
        assert all(float(norm.running_var.min()) > 0 for norm in small.modules() if isinstance(norm, nn.BatchNorm2d))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_norms_are_estimated_as_the_mean_over_batches():
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Dropout(0.5))
    batches = [torch.randn(16, 2, 4, 4) * scale + 1 for scale in (1.0, 3.0)]
    estimate_norms(model, batches)
    assert model[0].momentum == 0.1 and not model[0].training and not model[1].training
    torch.testing.assert_close(model[0].running_mean, torch.stack([x.mean((0, 2, 3)) for x in batches]).mean(0))


def test_a_policy_with_other_settings_is_a_rival(tmp_path):
    compare(CONFIG, ["cucb", "cucb:explore=0.5:hold=3", "static"], 1, tmp_path)
    plain, other = (
        TrainConfig.from_toml(tmp_path / f"{name}-0" / "config.toml") for name in ("cucb", "cucb,explore=0.5,hold=3")
    )
    assert other == dataclasses.replace(plain, explore=0.5, hold=3) != plain


def test_the_command_prints_every_run(tmp_path):
    done = dynprune(
        "compare",
        *TINY,
        "--epochs",
        2,
        "--policies",
        "cucb,cucb-paper",
        "--seeds",
        1,
        "--out",
        tmp_path / "c",
        "--json",
    )
    runs = json.loads(done.stdout)["runs"]
    assert [run["policy"] for run in runs] == ["cucb", "cucb-paper"]
    assert set(runs[0]) >= {"policy", "seed", "accuracy", "macs", "params", "train_macs", "train_seconds"}
    assert "cucb-paper, seed 0:" in done.stderr
    assert json.loads((tmp_path / "c" / "comparison.json").read_text())["runs"] == runs


@pytest.mark.parametrize(
    "options, message",
    [
        (["--policies", "cucb"], "Expected at least two"),
        (["--policies", "cucb,best"], 'got "best". Choose from: cucb, cucb-paper'),
        (["--policies", "static-ours,cucb"], "Put cucb before it"),
        (["--seeds", "0"], "--seeds got 0"),
        (["--equal", "time"], 'got "time". Expected images or cost'),
        (["--policies", "cucb,static:epochs=9"], 'got "epochs=9" in "static:epochs=9"'),
        (["--policies", "cucb,static:lr=fast"], "Expected NAME=VALUE"),
        (["--policies", "cucb,static:lr=-1"], "--lr got -1"),
        (["--policy", "dense"], "compare takes --policies"),
        (["--policies", "cucb,dense+prune", "--budget", "params=0.5"], "cuts to a budget of MACs alone"),
        (["--policies", "cucb,dense+prune:importance=best"], "Its importance is one of: magnitude, taylor"),
        (["--epochs", "0"], "--epochs 0 compares what is made of a trained network"),
        (["--epochs", "0", "--weights", "w.pt", "--equal", "cost"], "--epochs 0 trains nothing"),
    ],
)
def test_comparisons_that_make_no_sense_are_refused(tmp_path, options, message):
    assert message in refused("compare", *TINY, *options, "--out", tmp_path / "c")
