"""Cascades of one trained network: what is made of it, what is chosen, and what is refused before long work."""

import json

import pytest
import torch
from typer.testing import CliRunner

import dynprune
from dynprune.cascades.choice import plans
from dynprune.cli.program import app
from dynprune.commands.cascade import shares_for
from dynprune.data.loading import Source, load_data
from dynprune.data.scores import evaluate
from dynprune.errors import DynpruneError
from dynprune.listener import Listener
from dynprune.runs.directory import open_any
from tests.cascades.test_cascades import invented
from tests.models import learned_tiny, normed

NET = ["--model", "tests.models:tiny", "--image-size", "8", "--data", "digits"]


@pytest.fixture(scope="module")
def data():
    return load_data(Source("digits", image_size="8"))


@pytest.fixture(scope="module")
def model(data):
    return learned_tiny(data, 8)


@pytest.fixture(scope="module")
def weights(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.pt"
    torch.save(model.state_dict(), path)
    return str(path)


def settings(weights, **more):
    usual = {"model": "tests.models:tiny", "image_size": "8", "search": "none", "tune": "0"}
    return dynprune.CompactConfig(data="digits", weights=weights, **{**usual, **more})


@pytest.fixture(scope="module")
def made(weights, tmp_path_factory):
    out = tmp_path_factory.mktemp("cascades") / "out"
    return dynprune.cascade(settings(weights, no_repair=True), out=out, target=0.8, shares=(0.3, 0.6, 0.15)), out


def test_networks_are_made_at_the_shares_and_joined(made, model, data):
    result, out = made
    names = ["macs-0.15", "macs-0.3", "macs-0.6", "untouched"]
    assert [row.name for row in result.rows] == [*names, "cascade"]
    full = result.rows[3]
    for row, share in zip(result.rows, (0.15, 0.3, 0.6, 1)):
        assert (
            0.7 * share * full.macs < row.macs <= share * full.macs * 1.001
        )  # the file's and the graph's differ a bit
    assert full.accuracy == pytest.approx(evaluate(model, data, data.test), abs=0.003)
    assert result.val_share <= 0.8 and 2 <= len(result.chain) <= 3 and set(result.chain) <= set(names)
    assert all((out / name).is_file() for name in ("cascade.onnx", "cascade.csv", "cascade.json", "report.html"))
    for name in names:
        run = open_any(out / "networks" / name)
        assert run.compact_file.is_file() and run.onnx_file.is_file()


def test_the_networks_join_again_for_another_target(made, tmp_path):
    _, out = made
    networks = sorted((out / "networks").iterdir())
    other = dynprune.cascade(*networks, out=tmp_path / "again", target=0.5)
    assert other.val_share <= 0.5


def test_where_one_is_best_alone_the_networks_stay(weights, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(DynpruneError, match=r"The networks stay: dynprune gate --form cascade .*macs-0.5 .*untouched"):
        dynprune.cascade(settings(weights), out=out, shares=(0.5,), min_accuracy=20.0)
    assert {path.name for path in (out / "networks").iterdir()} == {"macs-0.5", "untouched"}
    with pytest.raises(DynpruneError, match="--overwrite"):
        dynprune.cascade(settings(weights), out=out, shares=(0.5,), min_accuracy=20.0)
    with pytest.raises(DynpruneError, match="nowhere"):  # nothing of the old one is lost before the new one can be made
        dynprune.cascade(settings("nowhere.pt"), out=out, shares=(0.6,), min_accuracy=20.0, overwrite=True)
    assert {path.name for path in (out / "networks").iterdir()} == {"macs-0.5", "untouched"}
    with pytest.raises(DynpruneError, match="The networks stay"):
        dynprune.cascade(settings(weights), out=out, shares=(0.6,), min_accuracy=20.0, overwrite=True)
    assert {path.name for path in (out / "networks").iterdir()} == {"macs-0.6", "untouched"}


def test_a_stopped_one_goes_on_with_the_networks_that_are_there(weights, model, tmp_path):
    out, said = tmp_path / "out", []
    listener = Listener(say=said.append)
    asked = {"out": out, "shares": (0.2, 0.5), "max_drop": 20.0}

    def stop(words):
        said.append(words)
        if "network 2 of 2" in words:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dynprune.cascade(settings(weights, no_repair=True), **asked, listener=Listener(say=stop))
    networks = out / "networks"
    assert {path.name for path in networks.iterdir()} == {"macs-0.5", "untouched"}
    before = {path.name: (path / "compact.safetensors").stat().st_mtime_ns for path in networks.iterdir()}
    with pytest.raises(DynpruneError, match="--resume goes on"):
        dynprune.cascade(settings(weights, no_repair=True), **asked)
    with pytest.raises(DynpruneError, match="was made with --seed 0, and now it is 1"):
        dynprune.cascade(settings(weights, no_repair=True, seed=1), **asked, resume=True)
    other = tmp_path / "other.pt"
    torch.save(
        {name: value * 1.01 if value.is_floating_point() else value for name, value in model.state_dict().items()},
        other,
    )
    with pytest.raises(DynpruneError, match="was made of other weights"):
        dynprune.cascade(settings(str(other), no_repair=True), **asked, resume=True)
    said.clear()
    result = dynprune.cascade(settings(weights, no_repair=True), **asked, resume=True, listener=listener)
    assert any("macs-0.5 is there: it stays" in words for words in said)
    after = {path.name: (path / "compact.safetensors").stat().st_mtime_ns for path in networks.iterdir()}
    assert set(after) == {"macs-0.2", "macs-0.5", "untouched"} and before.items() <= after.items()
    assert [row.name for row in result.rows] == ["macs-0.2", "macs-0.5", "untouched", "cascade"]


def test_a_compact_file_can_be_what_is_made_smaller(weights, tmp_path):
    """What was cut before is no other network when it is taken up again."""
    start = dynprune.compact(settings(weights, budget=("0.6",)), out=tmp_path / "start").path
    asked = {"out": tmp_path / "out", "shares": (0.15, 0.3), "target": 0.9}
    first = dynprune.cascade(settings(start), **asked)
    again = dynprune.cascade(settings(start), **asked, resume=True)
    assert [row.macs for row in again.rows[:-1]] == [row.macs for row in first.rows[:-1]]


def test_the_command_makes_them_too(weights, tmp_path):
    out = tmp_path / "out"
    asked = ["gate", "--form", "cascade", *NET, "--weights", weights, "--shares", "0.08,0.12", "--target", "0.9"]
    done = CliRunner().invoke(app, [*asked, "--search-time", "1s", "--tune", "0", "--out", str(out), "--json"])
    assert done.exit_code == 0, (done.output, done.exception)
    result = json.loads(done.stdout)
    assert [row["name"] for row in result["rows"]] == ["macs-0.08", "macs-0.12", "untouched", "cascade"]
    assert result["val_share"] <= 0.9 and result["val_accuracy"] > result["rows"][0]["val_accuracy"]
    assert "compact network 2 of 2" in done.stderr and "search" in done.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--shares", "0.5,much"], "--shares got"),
        (["--shares", "0.5,1.5"], "--shares got"),
        (["--shares", "0.5", "--target", "0.4"], "smallest network"),
        (["--target", "0.4", "--max-drop", "1"], "one of them"),
        (["--target", "nan"], "--target"),
        (["--tune", "soon"], "--tune got soon"),
        (["--epochs", "3"], "--epochs is for gates"),
        (["--shares", ",".join(str(number / 10) for number in range(1, 10))], "--shares got"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_read(options, said, tmp_path):
    asked = ["gate", "--form", "cascade", *NET, "--weights", "nowhere.pt", "--out", str(tmp_path / "out"), *options]
    error = CliRunner().invoke(app, asked).exception
    assert isinstance(error, DynpruneError) and said in str(error)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["a", "b", "--weights", "w.pt", "--form", "cascade"], "--weights is for a cascade that makes its networks"),
        (["a", "b", "--shares", "0.5", "--form", "cascade"], "no runs"),
        (["--form", "cascade", "--model", "resnet20"], "with --weights"),
        (["a", "--tune", "3m"], "--form cascade"),
    ],
)
def test_options_of_networks_that_are_made_belong_to_weights(options, said):
    error = CliRunner().invoke(app, ["gate", *options]).exception
    assert isinstance(error, DynpruneError) and said in str(error)


def test_a_missing_checkpoint_leaves_nothing(tmp_path):
    with pytest.raises(DynpruneError, match=r"nowhere\.pt"):
        dynprune.cascade(settings(str(tmp_path / "nowhere.pt")), out=tmp_path / "out", target=0.5)
    assert not (tmp_path / "out").exists()


def test_shares_lie_around_the_target():
    for target in (0.05, 0.25, 0.5, 0.66, 1.0):
        shares = shares_for(target)
        assert shares[0] < target and all(0 < share < 1 for share in shares) and len(shares) >= 2
    assert len(shares_for(None)) > 2


def test_of_many_networks_chains_of_up_to_three_are_weighed():
    found = list(plans(invented(8), tuple(range(10, 90, 10))))
    assert {len(plan.chain) for plan in found} == {1, 2, 3} and len(found) < 100_000
    assert len({plan.chain for plan in found}) == 8 + 28 + 56


NESTED = {"target": 0.85, "shares": (0.08, 0.1), "nested": True}


@pytest.fixture(scope="module")
def nested(weights, tmp_path_factory):
    out = tmp_path_factory.mktemp("nested") / "out"
    return dynprune.cascade(settings(weights, tune="1s", tune_lr=1e-4), out=out, **NESTED), out


def test_a_network_goes_on_from_the_one_that_lies_in_it(nested, data):
    result, out = nested
    names = ["macs-0.08", "macs-0.1", "macs-0.08-wide", "macs-0.1-wide", "untouched"]
    assert [row.name for row in result.rows] == [*names, "cascade"]
    inner = result.chain.index(result.goes_on_from)
    assert result.chain[inner + 1] == f"{result.goes_on_from}-wide"
    rows = {row.name: row for row in result.rows}
    assert rows["macs-0.1-wide"].macs == rows["untouched"].macs
    passes = sum(rows[name].macs * share_reached(result, rows, name) for name in result.chain)
    reached = share_reached(result, rows, result.chain[inner + 1])
    assert rows["cascade"].macs < passes or reached == 0  # the wide network computes less than all of itself
    assert result.agreement >= 0.99 and result.verdict
    again = dynprune.cascade(*(out / "networks" / name for name in names), out=out.parent / "again", target=0.85)
    assert again.rows[0].accuracy == result.rows[0].accuracy


def share_reached(result, rows, name):
    """Of the images, those that reach a network of the chain."""
    later = result.chain[result.chain.index(name) :]
    return sum(rows[own].images_share for own in later)


def test_networks_that_lie_in_others_stay_when_it_goes_on(nested, weights):
    result, out = nested
    before = {path.name: (path / "compact.safetensors").stat().st_mtime_ns for path in (out / "networks").iterdir()}
    again = dynprune.cascade(settings(weights, tune="1s", tune_lr=1e-4), out=out, **NESTED, overwrite=True, resume=True)
    after = {path.name: (path / "compact.safetensors").stat().st_mtime_ns for path in (out / "networks").iterdir()}
    assert after == before and again.chain == result.chain


def test_what_cannot_be_nested_is_refused_before_anything_is_made(weights, tmp_path):
    error = CliRunner().invoke(app, ["gate", "--form", "nested", "runs/a", "runs/b"]).exception
    assert isinstance(error, DynpruneError) and "--form nested makes its networks of a trained one" in str(error)
    with pytest.raises(DynpruneError, match="--shares got 4, of which 4 lie in a wide network"):
        dynprune.cascade(settings(weights), out=tmp_path / "out", shares=(0.1, 0.2, 0.3, 0.4), nested=True)
    torch.manual_seed(0)
    torch.save(normed(10).state_dict(), tmp_path / "normed.pt")
    other = settings(str(tmp_path / "normed.pt"), model="tests.models:normed")
    with pytest.raises(DynpruneError, match="cannot lie in a wider one"):
        dynprune.cascade(other, out=tmp_path / "out", shares=(0.5,), target=0.8, nested=True)
    assert not (tmp_path / "out").exists()
