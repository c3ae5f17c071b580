"""A run that is given a time: it ends then, whatever steps cost, and its schedule is whole."""

import dataclasses
import math
import time

import pytest
import torch

from dynprune.cli.train import settings_of
from dynprune.commands import train as verb
from dynprune.data.loading import load_data
from dynprune.errors import DynpruneError, Stopped
from dynprune.listener import SILENT
from dynprune.runs.config import TrainConfig
from dynprune.runs.directory import Run
from dynprune.training import within
from dynprune.training.pace import Clock, Pace
from dynprune.training.session import Session
from dynprune.training.train import train
from dynprune.training.within import fit_into

CONFIG = TrainConfig(
    model="tests.models:tiny",
    image_size="8",
    batch_size=64,
    budget=("0.4",),
    precision="float32",
    time="100s",
    threads=1,
    checkpoint_every="never",
)


@pytest.fixture(scope="module")
def data():
    return load_data(CONFIG.source)


class Time:
    """A clock that only work moves: `cost(step)` seconds for a training step, five for an evaluation, on one clock."""

    def __init__(self, monkeypatch, cost):
        self.now, self.cost, self.rates = 0.0, cost, []
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        for name in ("dynprune.training.train.judge", "dynprune.training.train.evaluate"):
            monkeypatch.setattr(name, self.evaluated((0.5, 1.0) if name.endswith("judge") else 0.5))
        monkeypatch.setattr(within, "seconds_of_judging", lambda session: (5.0, 10.0))
        monkeypatch.setattr(within, "seconds_of_step", lambda session, batch, widths, left: cost(0))

    def evaluated(self, result):
        def evaluate(*_):
            self.now += 5.0
            return result

        return evaluate

    def moves_with(self, session):
        step = session.train_step

        def train_step(images, labels):
            self.rates.append(session.rate(session.step))
            self.now += self.cost(session.step)
            return step(images, labels)

        session.train_step = train_step
        return session


def timed_session(data, clock, config=CONFIG, began=0.0):
    session = Session(config, data)
    fit_into(session, config, began)
    return clock.moves_with(session)


@pytest.mark.parametrize(
    "cost",
    [
        lambda step: 0.5,
        lambda step: 0.5 if step < 60 else 1.5,  # other work begins
        lambda step: 1.5 if step < 20 else 0.3,  # and ends
        lambda step: 0.2 + 0.6 * (step % 7 == 0),
    ],
)
@pytest.mark.parametrize("grow", [0.0, 0.5])
def test_it_ends_on_time_whatever_steps_cost(data, tmp_path, monkeypatch, cost, grow):
    clock = Time(monkeypatch, cost)
    config = dataclasses.replace(CONFIG, time="200s", grow=grow, policy="cucb")
    session = timed_session(data, clock, config)
    clock.now = 7.0  # other work before the first step
    run = Run.create(tmp_path / "run", session.config, overwrite=False)
    result = train(session.config, run, session=session)
    assert clock.now == pytest.approx(200, abs=6)
    assert result.steps == session.step == len(clock.rates)
    assert clock.rates[-1] < 0.02 * max(clock.rates)  # the schedule is whole
    peak = clock.rates.index(max(clock.rates))
    assert clock.rates[: peak + 1] == sorted(clock.rates[: peak + 1])
    assert clock.rates[peak:] == sorted(clock.rates[peak:], reverse=True)
    assert session.widths == session.fit.widths  # it has grown, where it was to


def test_a_stopped_run_goes_on_bit_for_bit(data, tmp_path, monkeypatch):
    weights = {}
    for kind in ("whole", "stopped"):
        clock = Time(monkeypatch, lambda step: 0.5 if step < 30 else 0.75)
        session = timed_session(data, clock)
        run = Run.create(tmp_path / kind, session.config, overwrite=False)
        if kind == "stopped":
            with pytest.raises(Stopped):
                train(session.config, run, session=session, stop=lambda session=session: session.step == 50)
            session = clock.moves_with(Session(run.config, data, fit=session.first_fit))
            result = train(run.config, run, session=session, resume=True)
        else:
            result = train(session.config, run, session=session)
        weights[kind] = (result.steps, session.model.state_dict())
    assert weights["whole"][0] == weights["stopped"][0]
    for name, value in weights["whole"][1].items():
        assert torch.equal(value, weights["stopped"][1][name]), name


@pytest.mark.parametrize(("fewer", "expected"), [(0.5, 16), (0.7, 8), (0.95, 64)])
def test_batches_get_smaller_where_steps_are_few_and_cost_less(data, monkeypatch, fewer, expected):
    clock = Time(monkeypatch, lambda step: 0.5)
    monkeypatch.setattr(
        within, "seconds_of_step", lambda session, batch, widths, left: 0.5 * fewer ** (6 - batch.bit_length() + 1)
    )
    monkeypatch.setattr(within, "SMALLEST", 8)
    session = timed_session(data, clock, dataclasses.replace(CONFIG, batch_size=0, epochs=3))
    given = Session(dataclasses.replace(CONFIG, batch_size=0, epochs=3), data).config.batch_size
    assert session.config.batch_size == (expected if fewer < within.WORTH else given)


def test_several_processes_take_the_first_ones_numbers(data, monkeypatch):
    clock, asked = Time(monkeypatch, lambda step: 0.5), []

    def agree(numbers, ranks, device):
        asked.append(numbers)
        return [123] if len(numbers) == 1 and numbers[0] < 10_000 else numbers  # steps; the others are microseconds

    monkeypatch.setattr(within, "agree", agree)
    assert timed_session(data, clock).steps == 123
    monkeypatch.setattr("dynprune.training.session.agree", lambda numbers, ranks, device: [77])
    session = timed_session(data, clock)
    session.look(0.0)
    assert session.steps == 77 and session.execution.steps == 77
    assert len(asked) > 3  # times too: what is decided by them must not differ


def test_too_short_a_time_is_refused_with_what_it_takes(data, monkeypatch):
    clock = Time(monkeypatch, lambda step: 2.0)
    clock.now = 30.0
    with pytest.raises(DynpruneError, match=r"--time 20s is too short: 30 s were over .* Expected \d+s or more"):
        timed_session(data, clock, dataclasses.replace(CONFIG, time="20s"))


def test_the_pace_of_an_unmoved_run_is_its_steps():
    pace = Pace(100, 100)
    assert [pace.of(step) for step in range(100)] == list(range(100))
    pace.end_at(60, 20)
    assert pace.of(20) == 20 and pace.of(60) == 100 and pace.of(40) == 60
    pace.end_at(80, 40)
    assert pace.of(40) == 60 and pace.of(80) == 100


@pytest.mark.parametrize("change", [{"place": 100}, {"at": 100}, {"steps": 0}, {"place": -1}])
def test_a_pace_that_leads_nowhere_is_refused(change):
    with pytest.raises(ValueError, match="nowhere"):
        Pace(**({"planned": 100, "steps": 100} | change))


@pytest.mark.parametrize("change", [{"wide": float("nan")}, {"total": -1}, {"every": 0}, {"narrow": "1"}])
def test_a_clock_of_other_numbers_is_refused(change):
    with pytest.raises(ValueError, match="clock"):
        Clock(**({"total": 60, "before": 1, "after": 1, "judging": 1, "narrow": 1, "wide": 1} | change))


@pytest.mark.parametrize(
    ("change", "narrow", "grows"),
    [
        ({"time": "60s"}, 0.5, 0.667),
        ({"time": "60s"}, 0.65, 0.0),
        ({"time": "300s"}, 0.5, 0.0),  # many epochs
        ({"grow": 0.0}, 0.5, 0.0),
        ({"grow": 0.3}, 0.9, 0.3),
        ({"policy": "dense"}, 0.5, 0.0),
        ({"compile": True}, 0.5, 0.0),
    ],
)
def test_layers_grow_where_narrow_steps_are_so_much_quicker(data, monkeypatch, change, narrow, grows):
    config = dataclasses.replace(CONFIG, **change).validate()
    clock = Time(monkeypatch, lambda step: 0.4)
    full = Session(config, data).fit.widths
    monkeypatch.setattr(
        within, "seconds_of_step", lambda session, batch, widths, left: 0.4 * (1 if widths == full else narrow)
    )
    session = timed_session(data, clock, config)
    assert session.config.grow == grows
    assert session.clock.narrow == pytest.approx(0.4 * (narrow if grows else 1))
    assert (session.execution.growth_step > 0.2 * session.steps) == (grows > 0)


def test_without_a_time_nothing_grows_unasked(data):
    assert Session(dataclasses.replace(CONFIG, time=""), data).config.grow == 0.0


@pytest.mark.parametrize(
    ("losses", "tried", "best"),
    [
        ({0: 2.0, 1: 1.8, 2: 1.7, 3: 1.9}, [0, 1, 2, 3], 2),
        ({0: 2.0, 1: 2.1}, [0, 1], 0),
        ({0: 2.0, 1: math.inf}, [0, 1], 0),
        ({0: math.inf, -1: math.inf, -2: 1.9, -3: 2.0}, [0, -1, -2, -3], -2),
        ({0: 2.4, -1: 2.0, -2: 2.1}, [0, -1, -2], -1),  # no better than chance among ten classes
        ({0: 2.0, 1: 1.9, 2: 1.8, 3: 1.7, 4: 1.6}, [0, 1, 2, 3, 4], 4),
    ],
)
def test_the_rate_follows_what_short_schedules_say(data, monkeypatch, losses, tried, best):
    config = dataclasses.replace(CONFIG, lr=0.0, time="2000s", grow=0.0)
    clock = Time(monkeypatch, lambda step: 0.5)
    base, seen = Session(config, data).config.lr, []

    def loss_after(session, config, steps):
        seen.append(round(math.log2(config.lr / base)))
        assert steps == pytest.approx(0.025 * 2000 / 0.74, abs=3)  # of steps with their share of validations
        return losses[seen[-1]]

    monkeypatch.setattr(within, "loss_after", loss_after)
    session = timed_session(data, clock, config)
    assert seen == tried
    assert session.config.lr == pytest.approx(base * 2.0**best)


def test_runs_by_epochs_find_their_rate_too(data, monkeypatch):
    monkeypatch.setattr(within, "loss_after", lambda session, config, steps: 0.1 / config.lr)
    for epochs, doubled in ((70, 4), (20, 0)):
        session = Session(dataclasses.replace(CONFIG, time="", lr=0.0, epochs=epochs), data)
        usual = session.config.lr
        within.find_rate(session)
        assert session.config.lr == pytest.approx(usual * 2**doubled) == session.rate(session.steps // 10)


def test_a_rate_that_is_given_or_a_short_run_is_left_alone(data, monkeypatch):
    monkeypatch.setattr(within, "loss_after", None)  # would be called
    for change in ({"lr": 0.03, "time": "2000s"}, {"time": "300s"}):
        clock = Time(monkeypatch, lambda step: 0.5)
        config = dataclasses.replace(CONFIG, **change)
        assert timed_session(data, clock, config).config.lr == (config.lr or Session(config, data).config.lr)


def test_a_short_schedule_ends_in_a_finite_loss_or_none(data):
    session = Session(dataclasses.replace(CONFIG, time=""), data)
    before = {name: value.clone() for name, value in session.model.state_dict().items()}
    good, lost = (within.loss_after(session, dataclasses.replace(session.config, lr=rate), 30) for rate in (0.05, 1e9))
    assert good < 2.3 and lost == math.inf
    assert all(torch.equal(value, before[name]) for name, value in session.model.state_dict().items())


def test_a_run_that_was_killed_before_its_first_checkpoint_is_given_its_time_anew(tmp_path, monkeypatch):
    asked = []
    fitting = verb.fit_into
    monkeypatch.setattr(verb, "fit_into", lambda *given: asked.append(given[1].time) or fitting(*given))
    config = dataclasses.replace(CONFIG, time="30s", no_onnx=True)
    with pytest.raises(RuntimeError, match="killed"), monkeypatch.context() as patch:
        patch.setattr(verb, "run_training", lambda *given, **more: (_ for _ in ()).throw(RuntimeError("killed")))
        verb.train(config, tmp_path / "run")
    with pytest.raises(Stopped):
        verb.resume(
            tmp_path / "run", model="tests.models:tiny", listener=dataclasses.replace(SILENT, stop=lambda: True)
        )
    assert asked == ["30s", "30s"]
    assert {"pace", "clock"} <= Run(tmp_path / "run").read_checkpoint()[1].keys()


@pytest.mark.parametrize(
    ("typed", "from_file", "time"),
    [
        ({"time": "9m"}, {"epochs": 3}, "9m"),
        ({"epochs": 3}, {"time": "9m"}, ""),
        ({}, {"time": "9m", "epochs": 3}, "9m"),
    ],
)
def test_what_is_typed_rules_over_the_file(monkeypatch, typed, from_file, time):
    monkeypatch.setattr("dynprune.cli.options.FROM_FILE", set(from_file))
    assert settings_of({**from_file, **typed}).time == time


def test_two_lengths_that_are_typed_are_refused(monkeypatch):
    monkeypatch.setattr("dynprune.cli.options.FROM_FILE", set())
    with pytest.raises(DynpruneError, match="Pass one of the two"):
        settings_of({"epochs": 3, "time": "9m"})
