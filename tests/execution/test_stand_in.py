"""An execution where a trainer expects an optimizer: the same steps, whoever calls them."""

import pytest
import torch
from torch import nn

import dynprune
from dynprune.errors import DynpruneError

STEPS = 30


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )


def made(**options):
    return dynprune.DynamicExecution(
        network(),
        torch.zeros(1, 3, 8, 8),
        "macs=0.5",
        steps=STEPS,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, 1e-2),
        **options,
    )


def trained(how):
    """Weights after training in which `how` makes every step: of an execution, its stand-in and a backward pass."""
    execution = made(explore=0.5, hold=3)
    optimizer = execution.as_optimizer()
    stepped = execution.optimizer if how is own_loop else optimizer
    schedule = torch.optim.lr_scheduler.LinearLR(stepped, 1, 0.1, STEPS)
    rng = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x = torch.randn(8, 3, 8, 8, generator=rng)

        def closure(x=x):
            optimizer.zero_grad()
            loss = execution.model(x).square().mean()
            loss.backward()
            return loss

        how(execution, optimizer, closure)
        schedule.step()
    assert execution.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)
    return execution.finish().state_dict()


def own_loop(execution, _optimizer, closure):
    closure()
    execution.step()


def plain(_execution, optimizer, closure):
    closure()
    optimizer.step()


def with_closure(_execution, optimizer, closure):
    with torch.no_grad():
        assert optimizer.step(closure).requires_grad


def test_its_step_is_the_executions():
    expected = trained(own_loop)
    for how in (plain, with_closure):
        found = trained(how)
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_state_comes_from_the_execution_and_not_from_a_trainer():
    execution = made()
    optimizer = execution.as_optimizer()
    assert isinstance(optimizer, torch.optim.Optimizer) and optimizer.state is execution.optimizer.state
    optimizer.load_state_dict(optimizer.state_dict())  # as accelerate does before the first step
    execution.model(torch.randn(4, 3, 8, 8)).mean().backward()
    before = {"state": {}, "param_groups": []}
    optimizer.step()
    with pytest.raises(DynpruneError, match="give it to execution.load_state_dict"):
        optimizer.load_state_dict(before)
    with pytest.raises(DynpruneError, match="A group of parameters was added"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


def test_a_network_that_grows_has_none():
    with pytest.raises(DynpruneError, match="Expected grow=0: trainers keep one model"):
        made(grow=0.5).as_optimizer()
