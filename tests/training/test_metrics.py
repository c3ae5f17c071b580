"""What a run writes down of its epochs, and which weights it keeps."""

import csv
import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F

from dynprune.data.loading import load_data
from dynprune.data.scores import judge, logits
from dynprune.errors import DynpruneError
from dynprune.files.disk import read_tensors
from dynprune.runs import config as settings
from dynprune.runs.directory import Run
from dynprune.training.session import Session
from dynprune.training.train import train
from tests.training.test_train import CONFIG


@pytest.fixture(scope="module")
def data():
    return load_data(CONFIG.source)


def finished(tmp_path, data, stop_at=None, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    session = Session(config, data)
    run = Run.create(tmp_path, session.config, overwrite=True)
    if stop_at:
        with pytest.raises(DynpruneError, match="Stopped"):
            train(config, run, session=session, stop=lambda: session.step >= stop_at)
        session = Session(config, data)
        return run, session, train(config, run, session=session, resume=True)
    return run, session, train(config, run, session=session)


def lines(run):
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


def test_training_accuracy_is_that_of_every_step(tmp_path, data):
    """Counted again from the outputs of each step, by a hook on the loss."""
    session, seen = Session(dataclasses.replace(CONFIG, epochs=1), data), []
    judged = session.loss_of

    def loss_of(scores, images, labels):
        seen.append(float((scores.argmax(1) == labels).float().mean()))
        return judged(scores, images, labels)

    session.loss_of = loss_of
    run = Run.create(tmp_path, session.config, overwrite=True)
    train(session.config, run, session=session)
    assert lines(run)[0]["accuracy"] == pytest.approx(sum(seen) / len(seen)) and len(seen) == session.steps


def test_validation_loss_is_the_cross_entropy(tmp_path, data):
    run, session, _ = finished(tmp_path, data)
    model = session.model.eval()
    with torch.no_grad():
        pairs = [(logits(model(batch)), labels) for batch, labels in data.eval_batches(data.val)]
    scores, labels = (torch.cat(parts) for parts in zip(*pairs))
    last = lines(run)[-1]
    assert last["val_loss"] == pytest.approx(float(F.cross_entropy(scores, labels)), rel=1e-4)
    assert last["val_accuracy"] == pytest.approx(float((scores.argmax(1) == labels).float().mean()))
    assert judge(model, data, data.val)[0] == last["val_accuracy"]


def test_a_resumed_run_writes_the_same_metrics(tmp_path, data):
    whole, _, _ = finished(tmp_path / "a", data, log="csv")
    parts, _, _ = finished(tmp_path / "b", data, stop_at=28, log="csv")
    keys = ("epoch", "step", "loss", "accuracy", "val_loss", "val_accuracy")
    assert [[line[key] for key in keys] for line in lines(whole)] == [
        [line[key] for key in keys] for line in lines(parts)
    ]
    for run in (whole, parts):
        with (run.path / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [float(row["loss"]) for row in rows] == [line["loss"] for line in lines(run)]


def test_tensorboard_gets_every_epoch_once(tmp_path, data):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run, _, _ = finished(tmp_path, data, stop_at=28, log="tensorboard")
    found = reader.EventAccumulator(str(run.path / "tensorboard")).Reload()
    for name in ("val_accuracy", "accuracy", "loss", "val_loss"):
        events = found.Scalars(name)
        assert [event.step for event in events] == [line["step"] for line in lines(run)]
        assert [event.value for event in events] == pytest.approx([line[name] for line in lines(run)])


def test_a_missing_tensorboard_is_said_before_training(monkeypatch):
    monkeypatch.setattr(settings.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(
        DynpruneError, match=r'--log tensorboard needs a package: pip install "dynprune\[tensorboard\]"'
    ):
        dataclasses.replace(CONFIG, log="csv,tensorboard").validate()


@pytest.mark.parametrize("stop_at", [None, 75])
def test_the_best_epoch_is_kept_and_what_is_told_is_of_it(tmp_path, data, stop_at, monkeypatch):
    """The rate is so high at the end that the last epoch is not the best."""
    monkeypatch.setattr("dynprune.training.session.learning_rate", lambda *_: 0.4 if _[1] > 70 else 0.1)
    run, session, result = finished(tmp_path, data, stop_at, epochs=5, explore=0.1, keep_weights="best")
    accuracies = {line["epoch"]: line["val_accuracy"] for line in lines(run)}
    settled = {epoch: accuracy for epoch, accuracy in accuracies.items() if not lines(run)[epoch - 1]["exploring"]}
    best = max(settled, key=lambda epoch: (settled[epoch], -epoch))
    assert result.kept_epoch == best and result.val_accuracy == settled[best]
    assert judge(session.model, data, data.val)[0] == pytest.approx(settled[best])
    assert judge(session.model, data, data.test)[0] == result.accuracy
    kept, facts = read_tensors(run.path / "best.safetensors", "best")
    assert facts["epoch"] == best
    for name, value in session.model.state_dict().items():
        assert torch.equal(kept[name], value)
    # what the checkpoint brings back is what was kept
    again = Session(session.config, data)
    again.restore(run)
    for name, value in session.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


def test_without_it_the_last_weights_are_kept(tmp_path, data):
    run, _, result = finished(tmp_path, data)
    assert result.kept_epoch is None and not (run.path / "best.safetensors").exists()


def test_an_epoch_that_still_explores_is_never_the_best(tmp_path, data):
    run, session, result = finished(tmp_path, data, explore=0.5, epochs=3, keep_weights="best")
    assert result.kept_epoch in [line["epoch"] for line in lines(run) if not line["exploring"]]
    assert session.settled
