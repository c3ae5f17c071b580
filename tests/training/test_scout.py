"""Widths searched for on a network that is trained at full width for a while, and thrown away."""

import dataclasses

import pytest
import torch

from dynprune.commands import train as verb
from dynprune.data.loading import load_data
from dynprune.deploy.compare import compare
from dynprune.errors import DynpruneError, Stopped
from dynprune.listener import SILENT
from dynprune.runs.config import TrainConfig
from dynprune.runs.directory import Run
from dynprune.training import scout
from dynprune.training.scout import scouted
from dynprune.training.session import PASSES, Session

CONFIG = TrainConfig(
    model="tests.models:tiny",
    image_size="8",
    batch_size=64,
    epochs=2,
    budget=("0.4",),
    precision="float32",
    threads=1,
    policy="static",
    allocation="searched",
    scout=25,
    search_time="1s",
    no_onnx=True,
)


@pytest.fixture(scope="module")
def data():
    return load_data(CONFIG.source)


def test_a_run_begins_anew_at_the_widths_that_were_found(data, tmp_path, monkeypatch):
    seen = []
    searching = scout.searched

    def watched(compaction, fitter, fit, budget, seconds):
        said = compaction.model(data.example)
        seen.append((fit.widths, said, seconds))
        return searching(compaction, fitter, fit, budget, seconds)

    monkeypatch.setattr(scout, "searched", watched)
    plain = Session(dataclasses.replace(CONFIG, allocation="uniform"), data)
    result = verb.train(CONFIG, tmp_path / "run")
    ((start, said, seconds),) = seen
    assert start == plain.fit.widths and seconds == 1.0
    assert float((said - plain.reservoir.full.eval()(data.example)).detach().abs().max()) > 0.1  # it had learned
    run = Run(tmp_path / "run")
    _, facts = run.read_checkpoint()
    widths = facts["fit"]["widths"]
    graph = plain.graph
    assert graph.macs(widths) <= 0.4 * graph.macs({}) and widths.keys() == start.keys()
    steps = PASSES * 64 * (25 * graph.macs({}) + result.steps * graph.macs(widths))
    assert result.train_macs == steps


def test_the_network_is_drawn_as_if_nothing_had_been_tried(data):
    session = Session(CONFIG, data)
    before = {name: value.clone() for name, value in session.model.state_dict().items()}
    state = torch.get_rng_state()
    fit = scouted(session)
    assert torch.equal(state, torch.get_rng_state())
    again = Session(dataclasses.replace(CONFIG), data, fit=dataclasses.replace(fit, widths=session.fit.widths))
    assert all(torch.equal(value, before[name]) for name, value in again.model.state_dict().items())


def test_it_can_be_stopped_and_progress_is_told(data):
    told = []
    session = Session(CONFIG, data)
    with pytest.raises(Stopped, match="step 10 of 25 at full width.*Nothing was saved"):
        scouted(session, lambda *given: told.append(given), lambda: len(told) >= 10)
    assert told[3] == ("some steps at full width, to search widths on", 4, 25)


def test_a_stopped_run_keeps_its_widths(data, tmp_path, monkeypatch):
    asked = []
    with pytest.raises(Stopped):
        verb.train(
            dataclasses.replace(CONFIG, checkpoint_every="5"),
            tmp_path / "run",
            listener=dataclasses.replace(SILENT, stop=lambda: len(asked) > 40 or asked.append(1)),
        )
    widths = Run(tmp_path / "run").read_checkpoint()[1]["first_fit"]["widths"]
    monkeypatch.setattr(verb, "scouted", None)  # would be called
    verb.resume(tmp_path / "run", model="tests.models:tiny")
    assert Run(tmp_path / "run").read_checkpoint()[1]["fit"]["widths"] == widths


def test_it_is_a_rival_in_comparisons(data, tmp_path):
    config = dataclasses.replace(CONFIG, allocation="uniform", policy="cucb")
    found = compare(config, ["static", "static:allocation=searched:scout=5"], 1, tmp_path, equal="cost").runs
    assert found[1].train_macs <= 1.3 * found[0].train_macs


def test_a_dense_network_has_no_widths_to_search():
    with pytest.raises(DynpruneError, match="--policy dense keeps them all"):
        dataclasses.replace(CONFIG, policy="dense").validate()
