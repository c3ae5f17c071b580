"""The loop as a whole: what it computes, whatever way the swaps are carried out; and that it can be repeated."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dynprune import zoo
from dynprune.data.loading import load_data
from dynprune.errors import DynpruneError
from dynprune.execution.explore import Explorer
from dynprune.execution.quick import quick_layers
from dynprune.execution.reservoir import by_tensor
from dynprune.runs.config import TrainConfig
from dynprune.runs.directory import Run
from dynprune.structure.surgery import slim
from dynprune.structure.tracing import trace
from dynprune.training.checkpoint import History
from dynprune.training.recipe import learning_rate, make_optimizer, set_learning_rate
from dynprune.training.session import Session
from dynprune.training.train import Due, train
from tests.execution.test_reservoir import gather_back

CONFIG = TrainConfig(
    model="tests.models:tiny",
    image_size=8,
    batch_size=64,
    epochs=3,
    explore=0.5,
    hold=2,
    budget=("0.3",),
    precision="float32",
    bonus=0.3,
)


@pytest.fixture(scope="module")
def data():
    return load_data(CONFIG.source)


def run(session, steps):
    """The selection that ran in each step."""
    chosen = []
    batches = [
        batch
        for epoch in range(CONFIG.epochs)
        for batch in session.data.train_batches(CONFIG.batch_size, CONFIG.seed, epoch)
    ]
    session.model.train()
    for images, labels in batches[:steps]:
        chosen.append({name: arms.copy() for name, arms in session.reservoir.slots.items()})
        session.train_step(images, labels)
    return chosen


class Plain:
    """The same training with everything gathered anew at every change: new narrow model, new optimizer, momenta carried
    over."""

    def __init__(self, session):
        self.session, self.full = session, copy.deepcopy(session.reservoir.full)
        self.slots = {name: arms.copy() for name, arms in session.reservoir.slots.items()}
        self.momenta = {}
        self.rebuild()

    def rebuild(self):
        graph, template = self.session.graph, self.session.reservoir.template
        self.kept = graph.kept(self.slots, template)
        self.model = slim(self.full, self.kept).train()
        self.optimizer = make_optimizer(CONFIG, list(self.model.parameters()), torch.device("cpu"))
        for name, parameter in self.model.named_parameters():
            if name in self.momenta:
                self.optimizer.state[parameter]["momentum_buffer"] = self.momenta[name]

    def change(self, selection):
        gather_back(
            self.full,
            self.model,
            self.session.graph,
            dataclasses.make_dataclass("R", ["slots", "template"])(self.slots, self.session.reservoir.template),
        )
        self.momenta = {
            name: self.optimizer.state[p]["momentum_buffer"].clone() for name, p in self.model.named_parameters()
        }
        for name, arms in selection.items():
            leaving = np.flatnonzero(~np.isin(self.slots[name], arms))
            self.slots[name][leaving] = np.setdiff1d(arms, self.slots[name])
            for (tensor, dim), places in self.session.reservoir.places[name].items():
                if tensor in self.momenta:
                    self.momenta[tensor].index_fill_(dim, torch.from_numpy(places[leaving].reshape(-1)), 0)
        self.rebuild()

    def step(self, images, labels, rate):
        set_learning_rate(self.optimizer, rate)
        self.optimizer.zero_grad()
        with quick_layers(self.model):
            scores = self.model(images.contiguous(memory_format=torch.channels_last))
        F.cross_entropy(scores, labels).backward()
        self.optimizer.step()


def test_swapped_slots_train_like_gathering_everything_at_each_change(data):
    session = Session(CONFIG, data)
    assert session.explorer.steps >= 10 and session.explorer.hold == 2
    plain = Plain(session)
    session.model.train()
    changes = 0
    for epoch in range(CONFIG.epochs):
        for images, labels in data.train_batches(CONFIG.batch_size, CONFIG.seed, epoch):
            step = session.step
            session.train_step(images, labels)
            plain.step(images, labels, learning_rate(session.config, step, session.steps))
            if any((session.reservoir.slots[name] != arms).any() for name, arms in plain.slots.items()):
                plain.change({name: np.sort(arms) for name, arms in session.reservoir.slots.items()})
                changes += 1
            assert all((session.reservoir.slots[name] == arms).all() for name, arms in plain.slots.items())
    assert changes >= 5
    for name, value in session.model.state_dict().items():  # float32 sums in other orders over some 60 steps
        torch.testing.assert_close(value, plain.model.state_dict()[name], rtol=1e-3, atol=1e-4)


def test_equal_seeds_give_equal_selections_and_others_differ(data):
    one, same = (run(Session(CONFIG, data), 30) for _ in range(2))
    assert all((a[name] == b[name]).all() for a, b in zip(one, same) for name in a)
    other = run(Session(dataclasses.replace(CONFIG, seed=1), data), 30)
    assert any(set(a[name]) != set(b[name]) for a, b in zip(one, other) for name in a)


def test_every_arm_is_executed_before_exploration_ends(data):
    session = Session(CONFIG, data)
    chosen = run(session, session.explorer.steps)
    for group in session.graph:
        assert set(np.concatenate([selection[group.name] for selection in chosen])) == set(range(group.arms))


def test_the_selection_stays_once_settled(data):
    session = Session(CONFIG, data)
    chosen = run(session, session.steps)
    settled = chosen[session.explorer.steps :]
    assert len(settled) > 10 and all((settled[0][name] == later[name]).all() for later in settled for name in later)


@pytest.mark.parametrize("policy", ["static", "dense", "random"])
def test_rivals_run_through_the_same_loop(data, policy):
    session = Session(dataclasses.replace(CONFIG, policy=policy), data)
    chosen = run(session, 12)
    widths = {name: len(arms) for name, arms in chosen[0].items()}
    if policy == "dense":
        assert widths == session.graph.full_widths
    else:
        assert session.macs <= 0.3 * session.graph.macs({})
    moved = any((chosen[0][name] != chosen[-1][name]).any() for name in widths)
    assert moved == (policy == "random")


def test_with_trained_weights_and_no_repair_the_largest_arms_come_first(data, tmp_path):
    """Without exploring they stay; the bandit begins with them, and an untrained network with the lower arms."""
    full = zoo.build(CONFIG.model, 10, 0)
    with torch.no_grad():  # make the upper half of every layer's channels large
        for group in trace(full, data.example):
            for (tensor, dim), positions in group.members.items():
                own = dict(full.named_parameters()).get(tensor)
                if own is not None:
                    index = torch.from_numpy(positions[group.arms // 2 :].reshape(-1))
                    own.index_copy_(dim, index, own.index_select(dim, index) * 4)
    torch.save(full.state_dict(), tmp_path / "trained.pt")
    for policy in ("static", "cucb"):
        given = Session(
            dataclasses.replace(CONFIG, policy=policy, weights=str(tmp_path / "trained.pt"), no_repair=True), data
        )
        fresh = Session(dataclasses.replace(CONFIG, policy=policy), data)
        for group in given.graph:
            width, upper = given.widths[group.name], set(range(group.arms // 2, group.arms))
            assert len(upper & set(given.reservoir.slots[group.name])) == min(width, len(upper))
            assert fresh.reservoir.slots[group.name].tolist() == list(range(width))
    run(given, given.explorer.steps)
    assert all((state.counts >= 1).all() for state in given.explorer.bandits.values())


def test_the_global_random_state_is_left_alone(data):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    run(Session(CONFIG, data), 4)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_momentum_buffers_follow_the_flat_layout(data, optimizer):
    session = Session(dataclasses.replace(CONFIG, optimizer=optimizer, lr=0.01), data)
    run(session, 3)
    key = "momentum_buffer" if optimizer == "sgd" else "exp_avg"
    for name, parameter in session.parameters.items():
        state = session.optimizer.state[parameter][key]
        assert state.shape == parameter.shape and state.abs().sum() > 0
        if name in session.reservoir.spans:
            buffers = session.reservoir.spans[name].buffers
            assert (
                state.untyped_storage().data_ptr()
                == next(iter(buffers.states.values())).live.untyped_storage().data_ptr()
            )
            assert parameter.untyped_storage().data_ptr() == buffers.live.untyped_storage().data_ptr()


def test_learning_rate_rises_and_falls():
    config = TrainConfig(lr=0.1, warmup=0.1)
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.01) and max(rates) == pytest.approx(0.1) and rates.index(max(rates)) in (9, 10)
    assert rates[-1] < 0.001 and all(a >= b for a, b in zip(rates[10:], rates[11:]))


def test_kept_slices_are_one_table(data):
    """The graph's table, the narrow tensors and the slots agree after swaps."""
    session = Session(CONFIG, data)
    run(session, 9)
    session.reservoir.write_back()
    kept = by_tensor(session.graph.kept(session.reservoir.slots, session.reservoir.template))
    full, live = session.reservoir.full.state_dict(), session.model.state_dict()
    for name, value in live.items():
        expected = full[name]
        for dim, where in kept.get(name, {}).items():
            expected = expected.index_select(dim, where)
        assert torch.equal(value, expected)


def test_learned_widths_change_once_and_a_checkpoint_remembers_them(data, tmp_path):
    """A run that is saved after its widths changed goes on as if nothing had happened."""
    config = dataclasses.replace(CONFIG, allocation="learned", budget=("macs=0.4",), align="1")
    session = Session(config, data)
    chosen = run(session, session.steps)
    widths = [tuple(len(arms) for arms in selection.values()) for selection in chosen]
    at = session.explorer.reallocation_step
    assert 0 < at < session.explorer.steps and len(set(widths[:at])) == 1 and len(set(widths[at:])) == 1
    assert widths[-1] != widths[0] and session.macs <= 0.4 * session.graph.macs({})
    interrupted = Session(config, data)
    run(interrupted, at + 3)
    folder = Run.create(tmp_path / "run", config, False)
    interrupted.save(folder, History())
    later = Session(config, data, fit=interrupted.first_fit)
    later.restore(folder)
    assert later.widths == interrupted.widths != later.first_fit.widths
    batches = [
        batch for epoch in range(CONFIG.epochs) for batch in data.train_batches(CONFIG.batch_size, CONFIG.seed, epoch)
    ]
    later.model.train()
    for images, labels in batches[at + 3 :]:
        later.train_step(images, labels)
    for (name, value), other in zip(session.model.state_dict().items(), later.model.state_dict().values()):
        assert torch.equal(value, other), name


def test_what_the_weights_say_is_not_mistaken_for_measured_saliency(data):
    """Magnitudes count as one round's reward; the mean saliency is that of the rounds that were played."""
    graph = Session(CONFIG, data).graph
    widths = {group.name: group.arms // 2 for group in graph}
    explorer = Explorer(
        CONFIG.exploration,
        graph,
        widths,
        60,
        {group.name: torch.ones(group.arms, dtype=torch.float64) for group in graph},
    )
    slots = explorer.first()
    for reward, saliency in ((0.2, 6.0), (0.4, 2.0)):
        explorer.sums[0], explorer.sums[1] = reward * explorer.hold, saliency * explorer.hold
        explorer.end_round(slots)
    for name, arms in slots.items():
        assert torch.allclose(explorer.saliency[name][arms], torch.tensor(4.0, dtype=torch.float64))
        means, played = explorer.bandits[name].means, torch.zeros(graph.groups[name].arms, dtype=torch.bool)
        played[arms] = True
        assert torch.allclose(means[played], torch.tensor((0.2 + 0.2 + 0.4) / 3, dtype=torch.float64))
        assert torch.allclose(
            means[~played], torch.tensor(0.2, dtype=torch.float64)
        )  # on the scale of the first round's rewards


@pytest.mark.parametrize("policy", ["cucb", "random", "static"])
def test_layers_grow_once_and_lose_nothing(data, policy):
    """Half of the multiplications until the growth step, then all; the arms that ran stay, and the network computes
    what it did."""
    session = Session(
        dataclasses.replace(CONFIG, policy=policy, grow=0.6, explore=0.3, align="1", precision="float64"), data
    )
    batches = [
        batch for epoch in range(CONFIG.epochs) for batch in data.train_batches(CONFIG.batch_size, CONFIG.seed, epoch)
    ]
    session.model.train()
    at, goal = session.execution.growth_step, session.graph.macs(session.fit.widths)
    assert at == 38 and 0.4 * goal < session.macs <= 0.5 * goal
    narrow_macs = session.macs
    session.execution.growth_step = session.steps  # until it was seen what is computed before
    for images, labels in batches[:at]:
        session.train_step(images, labels)
    assert session.macs == narrow_macs and session.phase(at - 1) == "narrow"
    before, slots = session.model.eval(), {name: set(arms) for name, arms in session.reservoir.slots.items()}
    images = batches[0][0].double()
    expected = before(images)
    session.execution.growth_step = at
    session.execution.turn()
    assert session.macs == goal <= 0.3 * session.graph.macs({}) and all(
        arms <= set(session.reservoir.slots[name]) for name, arms in slots.items()
    )
    assert torch.allclose(session.model.eval()(images), expected, rtol=1e-9, atol=1e-9)
    session.model.train()
    for images, labels in batches[at:]:
        session.train_step(images, labels)
    assert session.macs == goal and session.train_macs == 3 * 64 * (at * narrow_macs + (len(batches) - at) * goal)
    newcomers = [(name, sorted(set(session.reservoir.slots[name]) - arms)) for name, arms in slots.items()]
    session.reservoir.write_back()
    newcomers = [(name, own) for name, own in newcomers if own]
    read = [
        dict(session.reservoir.full.named_parameters())[tensor].index_select(
            dim, torch.from_numpy(session.graph.groups[name].members[tensor, dim][own].reshape(-1))
        )
        for name, own in newcomers
        for tensor, dim in session.graph.groups[name].reads
    ]
    assert read and all(weights.abs().max() > 0 for weights in read)  # they have begun to be read


@pytest.mark.parametrize("stopped_at", [20, 36, 40])
def test_a_run_that_grows_goes_on_from_any_step(data, tmp_path, stopped_at):
    config = dataclasses.replace(CONFIG, grow=0.6, explore=0.3, align="1")
    whole, interrupted = Session(config, data), Session(config, data)
    run(whole, whole.steps)
    run(interrupted, stopped_at)
    folder = Run.create(tmp_path / "run", config, False)
    interrupted.save(folder, History())
    later = Session(config, data, fit=interrupted.first_fit)
    later.restore(folder)
    batches = [
        batch for epoch in range(CONFIG.epochs) for batch in data.train_batches(CONFIG.batch_size, CONFIG.seed, epoch)
    ]
    later.model.train()
    for images, labels in batches[stopped_at:]:
        later.train_step(images, labels)
    for (name, value), other in zip(whole.model.state_dict().items(), later.model.state_dict().values()):
        assert torch.equal(value, other), name


class Breaking(Session):
    """Fails as a machine without memory does, at step 25."""

    def train_step(self, images, labels):
        if self.step == 25:
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate "
                "memory: you tried to allocate 9 bytes"
            )
        return super().train_step(images, labels)


def test_without_memory_the_message_names_the_batch_size_and_what_is_kept(data, tmp_path):
    folder = Run.create(tmp_path / "run", CONFIG, False)
    with pytest.raises(
        DynpruneError,
        match=r"Out of memory at step 25 of 63 with --batch-size 64. The last "
        r"checkpoint is in .*run. Try a smaller --batch-size",
    ):
        train(CONFIG, folder, session=Breaking(CONFIG, data))
    assert train(CONFIG, folder, session=Session(CONFIG, data), resume=True).steps == 63


@pytest.mark.parametrize(
    "error, message",
    [
        (DynpruneError("Cannot read the image a.jpg (FileNotFoundError)."), "Cannot read the image a.jpg"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "A process that decodes photos died"),
    ],
)
def test_when_data_vanishes_the_last_step_is_kept(data, tmp_path, error, message):
    """A run that went on after that ends like one that was never disturbed."""

    def failing(*args):
        for number, batch in enumerate(data.train_batches(*args)):
            if number == 7:
                raise error
            yield batch

    whole = Session(CONFIG, data)
    train(CONFIG, Run.create(tmp_path / "whole", CONFIG, False), session=whole)
    folder, session = Run.create(tmp_path / "run", CONFIG, False), Session(CONFIG, copy.copy(data))
    session.data.train_batches = failing
    with pytest.raises(DynpruneError, match=message + ".*The state at step 7 of 63 is saved"):
        train(CONFIG, folder, session=session)
    resumed = Session(CONFIG, data)
    train(CONFIG, folder, session=resumed, resume=True)
    assert all(
        torch.equal(a, b) for a, b in zip(whole.model.state_dict().values(), resumed.model.state_dict().values())
    )


def test_checkpoints_are_due_by_steps_or_by_time(monkeypatch):
    def due(text):
        return Due(dataclasses.replace(CONFIG, checkpoint_every=text))

    assert [step for step in range(1, 10) if due("4").now(step)] == [4, 8]
    assert not any(due("never").now(step) for step in range(1, 1000))
    clock = due("2m")
    now = clock.saved
    monkeypatch.setattr("time.monotonic", lambda: now + 119)
    assert not clock.now(7)
    monkeypatch.setattr("time.monotonic", lambda: now + 121)
    assert clock.now(8) and not clock.now(9)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """Weights of the tiny network after some epochs, dense."""
    session = Session(dataclasses.replace(CONFIG, policy="dense", epochs=8), data)
    run(session, session.steps)
    path = tmp_path_factory.mktemp("trained") / "w.pt"
    torch.save(session.model.state_dict(), path)
    return str(path)


def far(session, weights, data):
    """How far a session's model is from the network whose weights it was given."""
    whole = zoo.build(CONFIG.model, 10, 0)
    whole.load_state_dict(torch.load(weights))
    images = next(data.eval_batches(data.val))[0]
    with torch.no_grad():
        return float((whole.eval()(images) - session.model.eval()(images)).square().mean())


@pytest.mark.parametrize("policy", ["static", "cucb", "random"])
def test_training_from_weights_begins_repaired_within_the_budget(data, trained, policy):
    config = dataclasses.replace(CONFIG, policy=policy, weights=trained, search_time="1s", budget=("0.5",))
    repaired, cut = (
        Session(config, data),
        Session(dataclasses.replace(config, no_repair=True, allocation="uniform"), data),
    )
    assert repaired.macs <= 0.5 * repaired.graph.macs({}) and far(repaired, trained, data) < 0.6 * far(
        cut, trained, data
    )
    assert repaired.config.lr == cut.config.lr == 0.5 * Session(dataclasses.replace(CONFIG), data).config.lr
    run(repaired, 3)  # its tensors are still views of the reservoir's
    repaired.reservoir.write_back()
    for span in repaired.reservoir.spans.values():
        assert span.buffers.store.isfinite().all()


def test_it_learns_from_the_untouched_network(data, trained):
    config = dataclasses.replace(CONFIG, policy="static", weights=trained, allocation="uniform", budget=("0.5",))
    told, alone = (
        Session(dataclasses.replace(config, distill=1.0), data),
        Session(dataclasses.replace(config, distill=0.0), data),
    )
    assert alone.teacher is None and not told.teacher.training
    before = {name: value.clone() for name, value in told.teacher.state_dict().items()}
    images, labels = next(data.train_batches(64, 0, 0))
    first = told.train_step(images, labels)
    assert torch.allclose(
        first, Session(dataclasses.replace(config, distill=1.0), data).train_step(images, labels.flip(0))
    )
    assert not torch.allclose(alone.train_step(images, labels), first)
    assert all(torch.equal(value, before[name]) for name, value in told.teacher.state_dict().items())
    assert Session(dataclasses.replace(config, policy="dense"), data).teacher is None


def test_a_run_from_weights_goes_on_where_it_was_stopped(data, trained, tmp_path):
    config = dataclasses.replace(CONFIG, policy="cucb", weights=trained, search_time="1s", budget=("0.5",))
    whole = Session(config, data)
    directory = Run.create(tmp_path / "run", whole.config, overwrite=True)
    run(whole, 5)
    whole.save(directory, History())
    again = Session(config, data, fit=whole.first_fit)
    again.restore(directory)
    run(whole, 4)
    run(again, 4)
    assert whole.widths == again.widths
    for one, other in zip(whole.model.state_dict().values(), again.model.state_dict().values()):
        assert torch.equal(one, other)
