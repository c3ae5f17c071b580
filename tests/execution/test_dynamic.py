"""Dynamic execution in a loop of one's own: any optimizer, any inputs, and the same as the command."""

import copy
import dataclasses
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dynprune
from dynprune import zoo
from dynprune.data.loading import Source, load_data
from dynprune.errors import DynpruneError
from dynprune.execution.momentum import FRESH
from dynprune.execution.reservoir import by_tensor
from dynprune.structure.surgery import slim
from dynprune.training.recipe import learning_rate, set_learning_rate
from dynprune.training.session import Session
from tests import models
from tests.cli.test_commands import ROOT

X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
Y = torch.arange(16) % 10
STEPS = 24
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 1e-2),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, 1e-3, momentum=0.5, centered=True),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, 1e-2, initial_accumulator_value=0.1),
    "lion": lambda parameters: Lion(parameters, 1e-3),
}


class Lion(torch.optim.Optimizer):
    """An optimizer from elsewhere: the sign of an average of gradients (Chen et al. 2023)."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for value in group["params"]:
                if value.grad is not None:
                    average = self.state[value].setdefault("exp_avg", torch.zeros_like(value))
                    value.sub_(torch.sign(0.9 * average + 0.1 * value.grad), alpha=group["lr"])
                    average.mul_(0.99).add_(value.grad, alpha=0.01)


def tiny(seed=0):
    torch.manual_seed(seed)
    return models.perturb(models.Tiny()).double().train()


def execute(model=None, optimizer="sgd", steps=STEPS, example=X[:1].double(), **options):
    """Exploring nearly to the end, so that arms leave and come back."""
    options = {"budget": "macs=0.4", "explore": 0.9, "hold": 2, "trained": False, **options}
    budget = dynprune.Budget((options.pop("budget"),), align="1")
    make = OPTIMIZERS[optimizer] if isinstance(optimizer, str) else optimizer
    return dynprune.DynamicExecution(model or tiny(), example, budget, steps=steps, optimizer=make, **options)


def take_steps(execution, steps):
    for _ in range(steps):
        F.cross_entropy(execution.model(X.double()), Y).backward()
        execution.step()
    return execution


class Gathered:
    """The same, the plain way: before every step all weights, statistics and optimizer state are gathered from tensors
    at full width, afterwards all are written back."""

    def __init__(self, execution, make):
        self.graph, self.make, self.execution = execution.graph, make, execution
        self.full = copy.deepcopy(execution.reservoir.full)
        self.slots = {name: arms.copy() for name, arms in execution.reservoir.slots.items()}
        self.state: dict[str, dict[str, torch.Tensor]] = {}

    def index(self, name, shape):
        kept = by_tensor(self.graph.kept(self.slots, self.execution.reservoir.template)).get(name, {})
        return (
            ()
            if not shape
            else torch.meshgrid(*[kept.get(d, torch.arange(n)) for d, n in enumerate(shape)], indexing="ij")
        )

    def step(self):
        narrow = slim(self.full, self.graph.kept(self.slots, self.execution.reservoir.template)).train()
        optimizer = self.make(list(narrow.parameters()))
        full = dict(self.full.named_parameters()) | dict(self.full.named_buffers())
        for name, value in narrow.named_parameters():
            for key, whole in self.state.get(name, {}).items():
                optimizer.state[value][key] = whole[self.index(name, whole.shape)] if whole.ndim else whole
        F.cross_entropy(narrow(X.double()), Y).backward()
        optimizer.step()
        with torch.no_grad():
            for name, value in [*narrow.named_parameters(), *narrow.named_buffers()]:
                full[name][self.index(name, full[name].shape)] = value
            for name, value in narrow.named_parameters():
                for key, own in optimizer.state[value].items():
                    if isinstance(own, torch.Tensor) and own.ndim:
                        first = 0.1 if key == "sum" else 0.0
                        whole = self.state.setdefault(name, {}).setdefault(key, torch.full_like(full[name], first))
                        whole[self.index(name, whole.shape)] = own
                    else:
                        self.state.setdefault(name, {})[key] = own

    def follow(self):
        """Take over the slots, and forget the momentum of newcomers."""
        for name, arms in self.execution.reservoir.slots.items():
            for arm in np.setdiff1d(arms, self.slots[name]):
                for (tensor, dim), members in self.graph.groups[name].members.items():
                    for key in FRESH:
                        if dim >= 0 and key in self.state.get(tensor, {}):
                            self.state[tensor][key].index_fill_(dim, torch.from_numpy(members[arm].reshape(-1)), 0)
            self.slots[name] = arms.copy()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_exchanged_arms_carry_what_the_optimizer_knows_of_them(optimizer):
    execution = execute(optimizer=optimizer)
    plain, exchanges = Gathered(execution, OPTIMIZERS[optimizer]), 0
    came_back = set()
    for _ in range(STEPS):
        before = {name: set(arms) for name, arms in execution.reservoir.slots.items()}
        take_steps(execution, 1)
        plain.step()
        plain.follow()
        gone = {(name, arm) for name, arms in execution.reservoir.slots.items() for arm in before[name] - set(arms)}
        came_back |= {
            (name, arm) for name, arms in execution.reservoir.slots.items() for arm in set(arms) - before[name]
        }
        exchanges += len(gone)
    assert exchanges > 20 and came_back
    kept = execution.graph.kept(execution.reservoir.slots, execution.reservoir.template)
    for value, other in zip(execution.model.state_dict().values(), slim(plain.full, kept).state_dict().values()):
        torch.testing.assert_close(value, other, rtol=1e-9, atol=1e-9)


def test_without_fresh_names_momentum_comes_back_too():
    execution = execute(fresh=(), budget="macs=0.2", policy="static")
    take_steps(execution, 2)
    weight = execution.model.conv1.weight
    before = execution.optimizer.state[weight]["momentum_buffer"].clone()
    assert before.abs().sum() > 0
    here = {name: arms.copy() for name, arms in execution.reservoir.slots.items()}
    there = {**here, "conv1": np.setdiff1d(np.arange(24), here["conv1"])[: len(here["conv1"])]}
    execution.reservoir.swap(there)
    assert execution.optimizer.state[weight]["momentum_buffer"].abs().sum() == 0  # these have never run
    execution.reservoir.swap(here)
    now = execution.optimizer.state[execution.model.conv1.weight]["momentum_buffer"]
    order = [list(execution.reservoir.slots["conv1"]).index(arm) for arm in here["conv1"]]
    assert torch.equal(now[order], before)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("grow", [0.0, 0.95])
def test_a_loop_goes_on_exactly_where_it_was_stopped(optimizer, grow, tmp_path):
    options = dict(optimizer=optimizer, grow=grow, explore=0.7)
    whole = take_steps(execute(**options), STEPS)
    for stopped in (1, 8, 9, 23):
        torch.save(take_steps(execute(**options), stopped).state_dict(), tmp_path / "state.pt")
        later = execute(**options)
        later.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        take_steps(later, STEPS - stopped)
        for (name, value), other in zip(whole.model.state_dict().items(), later.model.state_dict().values()):
            assert torch.equal(value, other), (stopped, name)
        assert all((whole.selection[name] == arms).all() for name, arms in later.selection.items())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_loop_of_ones_own_and_the_command_agree_bit_for_bit(optimizer):
    data = load_data(Source("digits", image_size="8"))
    config = dynprune.TrainConfig(
        model="resnet20", data="digits", image_size="8", budget=("macs=0.25",), epochs=1, batch_size=64, explore=0.5
    )
    config = dataclasses.replace(config, optimizer=optimizer, hold=2, precision="float32")
    session = Session(config, data)
    config, made = session.config, zoo.build("resnet20", 10, config.seed, size=data.size)
    execution = dynprune.DynamicExecution(
        made,
        data.example,
        "macs=0.25",
        steps=session.steps,
        optimizer=lambda parameters: (
            torch.optim.SGD(parameters, config.lr, 0.9, weight_decay=5e-4, nesterov=True, fused=True)
            if optimizer == "sgd"
            else torch.optim.AdamW(parameters, config.lr, weight_decay=5e-4, fused=True)
        ),
        explore=0.5,
        hold=2,
    )
    session.model.train()
    swaps, before = 0, execution.selection
    for images, labels in data.train_batches(64, config.seed, 0):
        session.train_step(images, labels)
        set_learning_rate(execution.optimizer, learning_rate(config, execution.done, execution.steps))
        with dynprune.quick_layers(execution.model):
            scores = execution.model(images.contiguous(memory_format=torch.channels_last))
        F.cross_entropy(scores, labels).backward()
        execution.step()
        swaps += any((before[name] != arms).any() for name, arms in execution.selection.items())
        before = execution.selection
        assert all((session.reservoir.slots[n] == arms).all() for n, arms in execution.reservoir.slots.items())
    assert swaps > 3 and execution.done == session.step == session.steps
    for (name, value), other in zip(session.model.state_dict().items(), execution.finish().state_dict().values()):
        assert torch.equal(value, other), name


class Several(nn.Module):
    """Two heads, an integer input, one that is given by name, outputs in a dict."""

    def __init__(self):
        super().__init__()
        self.embed, self.conv = nn.Embedding(5, 8), nn.Conv2d(3, 16, 3, padding=1)
        self.more, self.point, self.kind = nn.Conv2d(16, 24, 3, padding=1), nn.Linear(24, 2), nn.Linear(32, 4)

    def forward(self, image, kind, *, scale=None):
        x = F.relu(self.more(F.relu(self.conv(image)))).mean((2, 3))
        x = x if scale is None else x * scale["by"]
        return {"point": self.point(x), "kind": [self.kind(torch.cat([x, self.embed(kind)], 1))]}


def test_milliseconds_are_those_of_all_inputs():
    example = (torch.zeros(2, 3, 48, 48), torch.tensor([1, 2]), {"scale": {"by": torch.ones(2, 1)}})
    execution = dynprune.DynamicExecution(Several(), example, "latency=0.6", steps=9, optimizer=OPTIMIZERS["sgd"])
    assert sum(map(len, execution.selection.values())) < 16 + 24


def test_any_inputs_outputs_and_losses():
    example = (X[:2], torch.tensor([1, 2]), {"scale": {"by": torch.ones(2, 1)}})
    execution = dynprune.DynamicExecution(
        Several(), example, "params=0.4", steps=30, optimizer=OPTIMIZERS["adamw"], explore=0.5, hold=1
    )
    losses = []
    for _ in range(30):
        said = execution.model(X, Y % 5, scale={"by": torch.full((16, 1), 2.0)})
        loss = F.smooth_l1_loss(said["point"], X.mean((2, 3))[:, :2]) + F.cross_entropy(said["kind"][0], Y % 4)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(execution.model.parameters(), 1.0)
        execution.step()
        losses.append(loss.item())
    small = execution.finish()
    assert losses[-1] < 0.8 * losses[0] and not small.training and type(small) is Several
    assert sum(p.numel() for p in small.parameters()) == execution.params <= 0.4 * execution.graph.params({})
    assert execution.graph.macs({}) > execution.macs
    with torch.no_grad():
        said = [network(X, Y % 5)["point"] for network in (small, execution.model.eval())]
    assert torch.equal(*said)


def test_gradients_may_be_added_up_and_scaled():
    whole, parts = execute(), execute()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    bn_free = [m for e in (whole, parts) for m in e.model.modules() if isinstance(m, nn.BatchNorm2d)]
    for _ in range(6):
        for norm in bn_free:
            norm.eval()  # so that parts of a batch say what the whole says
        F.cross_entropy(whole.model(X.double()), Y).backward()
        torch.nn.utils.clip_grad_norm_(whole.model.parameters(), 0.5)
        whole.step()
        for part in (slice(0, 8), slice(8, 16)):
            scaler.scale(F.cross_entropy(parts.model(X[part].double()), Y[part]) / 2).backward()
        scaler.unscale_(parts.optimizer)
        torch.nn.utils.clip_grad_norm_(parts.model.parameters(), 0.5)
        parts.step(scaler)
    for value, other in zip(whole.model.state_dict().values(), parts.model.state_dict().values()):
        torch.testing.assert_close(value, other, rtol=1e-8, atol=1e-9)
    before = copy.deepcopy(parts.model.state_dict())
    scaler.scale(F.cross_entropy(parts.model(X.double()), Y) * float("inf")).backward()
    parts.step(scaler)  # a step that overflows is left out, and its rewards with it
    assert all(torch.equal(value, before[name]) for name, value in parts.model.named_parameters())
    assert bool(torch.isfinite(parts.explorer.sums).all()) and scaler.get_scale() < 2.0**10


def test_schedulers_and_groups_survive_growing():
    def make(parameters):
        thin = [p for p in parameters if p.ndim == 1]
        rest = [p for p in parameters if p.ndim > 1]
        return torch.optim.SGD([{"params": rest}, {"params": thin, "weight_decay": 0.0}], 0.1, weight_decay=0.1)

    execution = execute(optimizer=make, grow=0.5, explore=0.1)
    scheduler, narrow = torch.optim.lr_scheduler.StepLR(execution.optimizer, 2, 0.5), execution.macs
    for _ in range(STEPS):
        take_steps(execution, 1)
        scheduler.step()
    assert execution.macs > 1.5 * narrow
    rates = [(group["lr"], group["weight_decay"]) for group in execution.optimizer.param_groups]
    assert rates == [(0.1 * 0.5**12, 0.1), (0.1 * 0.5**12, 0.0)]
    held = {id(p) for group in execution.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in execution.model.parameters()}


def test_the_users_model_stays_as_it_is():
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    execution = take_steps(execute(model), 4)
    small = execution.finish()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()) and model.training
    storages = {value.untyped_storage().data_ptr() for value in small.state_dict().values()}
    assert not storages & {value.untyped_storage().data_ptr() for value in execution.model.state_dict().values()}


def test_trained_networks_are_not_scaled_and_keep_their_largest_channels():
    model = tiny()
    model.train()(X.double())  # BatchNorms count what they see
    execution = execute(model, trained=None, policy="static")
    assert set(np.unique(execution.model.stem[0].weight.detach())) <= set(np.unique(model.stem[0].weight.detach()))
    kept = execution.selection["conv1"]
    assert list(kept) != list(range(len(kept)))
    scaled = execute(model, trained=False, policy="static")
    assert list(scaled.selection["conv1"]) == list(range(len(kept)))


def refusals():
    def with_loss(change):
        def act():
            execution = execute()
            change(execution)
            take_steps(execution, 1)

        return act

    def replaced(execution):
        execution.model.head = copy.deepcopy(execution.model.head)

    def moved(execution):
        F.cross_entropy(execution.model.float()(X), Y).backward()
        execution.step()

    def adopted(execution):
        execution.model.extra = nn.Linear(2, 2)

    other = tiny()
    return {
        "no gradients": (lambda: execute().step(), "step\\(\\) found no gradients. Expected loss.backward"),
        "too many steps": (lambda: take_steps(execute(steps=3), 4), "called 4 times, and steps=3"),
        "replaced": (with_loss(replaced), '"head.weight" of execution.model was replaced'),
        "moved": (lambda: moved(execute()), "replaced or moved from outside"),
        "added": (with_loss(adopted), 'has got the parameter "extra.'),
        "example": (lambda: execute(example=torch.zeros(1, 5, 8, 8).double()), "1x5x8x8"),
        "budget": (lambda: execute(budget="macs=0.001"), "reach|narrowest|least"),
        "milliseconds": (
            lambda: dynprune.DynamicExecution(
                Several(), (X, Y % 5), "latency=0.0001", steps=9, optimizer=OPTIMIZERS["sgd"]
            ),
            "latency=0.0001",
        ),
        "policy": (lambda: execute(policy="ucb"), 'policy got "ucb"'),
        "steps": (lambda: execute(steps=0), "steps got 0"),
        "other tensors": (
            lambda: execute(optimizer=lambda _: torch.optim.SGD(other.parameters(), 0.1)),
            "other tensors",
        ),
        "no optimizer": (lambda: execute(optimizer=lambda parameters: None), "returned a NoneType"),
        "closure": (lambda: execute(optimizer=lambda p: torch.optim.LBFGS(p)), "LBFGS cannot make a step by itself"),
        "state": (lambda: execute(optimizer=lambda p: torch.optim.Adafactor(p)), 'Adafactor keeps "row_var" of shape'),
        "another run": (
            lambda: execute(steps=9).load_state_dict(execute().state_dict()),
            "of a run of 24 steps, this one has 9",
        ),
        "another budget": (
            lambda: execute(tiny(), "adamw").load_state_dict(take_steps(execute(tiny(), "sgd"), 3).state_dict()),
            "does not fit this execution",
        ),
    }


@pytest.mark.parametrize("case", list(refusals()))
def test_what_cannot_work_is_one_line(case):
    act, words = refusals()[case]
    with pytest.raises(DynpruneError, match=words) as caught:
        act()
    assert "\n" not in str(caught.value)


def test_two_processes_choose_and_train_alike(tmp_path):
    program = tmp_path / "loop.py"
    program.write_text(
        textwrap.dedent("""
        import os, sys, torch, torch.nn.functional as F, dynprune.zoo
        import torch.distributed as dist
        from torch.nn.parallel import DistributedDataParallel
        from tests.execution.test_dynamic import X, Y, execute
        from dynprune.budgets.fit import Fit, Fitter
        dist.init_process_group("gloo")
        rank = dist.get_rank()
        measured = Fitter.fit
        Fitter.fit = lambda self: Fit({name: 4 + rank for name in self.graph.full_widths})  # each measures other times
        timed = dynprune.DynamicExecution(
            dynprune.zoo.build("resnet20", 10), torch.zeros(1, 3, 32, 32), "latency=0.5", steps=9,
            optimizer=lambda parameters: torch.optim.SGD(parameters, 0.1),
        )
        assert {len(arms) for arms in timed.selection.values()} == {4}
        Fitter.fit = measured
        execution = execute()
        for norm in execution.model.modules():
            if isinstance(norm, torch.nn.BatchNorm2d):
                norm.eval()  # each process would have statistics of its own
        parallel = DistributedDataParallel(execution.model)
        for step in range(12):
            part = slice(8 * rank, 8 * rank + 8)
            F.cross_entropy(parallel(X[part].double()), Y[part]).backward()
            execution.step()
        chosen = {name: torch.from_numpy(arms) for name, arms in execution.selection.items()}
        torch.save((execution.finish().state_dict(), chosen), f"{sys.argv[1]}/{rank}.pt")
        """)
    )
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", program, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    (one, chosen), (other, also) = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    alone = execute()
    for norm in alone.model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.eval()
    take_steps(alone, 12)
    assert all(chosen[name].tolist() == also[name].tolist() == list(arms) for name, arms in alone.selection.items())
    for name, value in alone.finish().state_dict().items():
        assert torch.equal(one[name], other[name])
        torch.testing.assert_close(one[name], value, rtol=1e-8, atol=1e-9)


def test_a_state_that_does_not_fit_changes_nothing():
    execution, untouched = (take_steps(execute(tiny(), "adamw"), 5) for _ in range(2))
    right = execution.state_dict()
    for wrong in (
        take_steps(execute(tiny(), "sgd"), 5).state_dict(),  # found at the end, when arms and weights are filled in
        {**right, "tensors": {**right["tensors"], "head.weight": torch.zeros(2, 2)}},
        {name: value for name, value in right.items() if name != "explorer"},
        {**right, "final": {}},
    ):
        with pytest.raises(DynpruneError, match="does not fit this execution"):
            execution.load_state_dict(wrong)
    assert execution.done == 5
    take_steps(execution, 6)
    take_steps(untouched, 6)
    expected = untouched.finish().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in execution.finish().state_dict().items())
