"""The order of arms: what repair cannot replace stays."""

import numpy as np
import pytest
import torch
from torch import nn

from dynprune.repair.calibration import calibrate
from dynprune.repair.choice import Reader, order_of, orders, readers_of
from dynprune.structure.tracing import trace
from tests.models import Grouped, Tiny, perturb


def reader(inputs, weights, curvature, arms, columns):
    root = torch.linalg.cholesky(curvature).T
    return Reader(torch.linalg.inv(inputs), root @ weights, torch.arange(arms * columns).view(arms, columns))


def test_the_loss_of_an_arm_is_what_least_squares_leaves():
    """Against the definition: refit the reader without the arm's columns and measure what remains."""
    torch.manual_seed(0)
    rows = torch.randn(200, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64)
    weights, noise = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
    inputs, curvature = rows.T @ rows / 200, noise @ noise.T + torch.eye(3)
    made = reader(inputs, weights, curvature, 3, 2)

    def remains(gone):
        stays = [column for column in range(6) if column // 2 not in gone]
        refit = torch.linalg.lstsq(rows[:, stays], rows @ weights.T).solution
        gap = rows[:, stays] @ refit - rows @ weights.T
        return 0.5 * float(((gap @ curvature) * gap).sum() / 200)

    expected = [remains([arm]) for arm in range(3)]
    torch.testing.assert_close(made.losses(torch.arange(3)), torch.tensor(expected, dtype=torch.float64))
    made.remove(torch.tensor([1]))
    after = [remains([1, arm]) - remains([1]) for arm in (0, 2)]
    torch.testing.assert_close(made.losses(torch.tensor([0, 2])), torch.tensor(after, dtype=torch.float64))


def test_a_copy_goes_before_a_small_one_that_nothing_replaces():
    """Arms 0 and 1 say the same and are large; arm 2 is small and alone. Magnitude would give up arm 2."""
    said = torch.randn(500, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = torch.stack([said[:, 0], said[:, 0], said[:, 1]], dim=1)
    inputs = rows.T @ rows / 500 + 1e-3 * torch.eye(3)
    weights = torch.tensor([[3.0, 3.0, 0.5], [2.0, -1.0, 0.5]], dtype=torch.float64)
    order = order_of(3, [reader(inputs, weights, torch.eye(2, dtype=torch.float64), 3, 1)])
    assert order.arms[0] in (0, 1) and order.arms[1] == 2 and order.losses[0] < 0.05 < order.losses[1]
    assert order.kept(2).tolist() == sorted(order.arms[1:].tolist())


@pytest.mark.parametrize("network", [Tiny, Grouped])
def test_orders_of_a_network(network):
    torch.manual_seed(0)
    model = perturb(network())
    images = torch.randn(32, 3, 12, 12)
    graph, before = trace(model, images[:1]), {name: value.clone() for name, value in model.state_dict().items()}
    wanted = [p.requires_grad for p in model.parameters()]
    calibration = calibrate(model, [(images[:16],), (images[16:],)])
    assert set(calibration.moments) == {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    for moments in calibration.moments.values():
        assert (torch.linalg.eigvalsh(moments.inputs) > -1e-4).all() and moments.gradients.diagonal(dim1=1, dim2=2).gt(
            0
        ).any()
        torch.testing.assert_close(moments.inputs[:, -1, -1], torch.ones(len(moments.inputs)))  # of the appended 1
    assert all(readers_of(model, graph, calibration).values())
    for choice in ("repairable", "magnitude", "random"):
        found = orders(model, graph, calibration, choice)
        assert {name: sorted(order.arms.tolist()) for name, order in found.items()} == {
            group.name: list(range(group.arms)) for group in graph
        }
    again = orders(model, graph, calibrate(model, [(images[:16],), (images[16:],)]))
    assert all(np.array_equal(again[name].arms, orders(model, graph, calibration)[name].arms) for name in again)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == wanted and not any(
        p.grad is not None for p in model.parameters()
    )
