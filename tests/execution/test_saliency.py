import numpy as np
import torch
from torch import nn

from dynprune.execution.saliency import magnitude, normalise, prepare, taylor
from dynprune.structure.tracing import trace


def ledger_for(module, axes, multiplicity=1):
    """One group whose slots lie one after the other along the given axes."""
    shapes = {name: p.shape for name, p in module.named_parameters()}
    width = shapes[axes[0][0]][axes[0][1]] // multiplicity
    places = {key: np.arange(width * multiplicity).reshape(multiplicity, width).T for key in axes}
    return prepare(shapes, {"group": places}, {"group": tuple(axes)}, "cpu")


def test_batchnorm_identity_holds():
    """weight * d/dweight + bias * d/dbias equals the sum of activation * gradient over the batch, per channel."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(5)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    activation = norm(torch.randn(4, 5, 3, 3))
    activation.retain_grad()
    (activation.sin() * torch.randn(4, 5, 3, 3)).sum().backward()
    expected = (activation * activation.grad).sum((0, 2, 3)).abs()
    found = taylor(dict(norm.named_parameters()), ledger_for(norm, [("weight", 0), ("bias", 0)]))
    torch.testing.assert_close(found, expected.detach())


def test_convolution_identity_holds():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3)
    activation = conv(torch.randn(2, 3, 6, 6))
    activation.retain_grad()
    activation.pow(3).mean().backward()
    found = taylor(dict(conv.named_parameters()), ledger_for(conv, [("weight", 0), ("bias", 0)]))
    torch.testing.assert_close(
        found, (activation * activation.grad).sum((0, 2, 3)).abs().detach(), rtol=1e-4, atol=1e-6
    )


def test_before_a_norm_a_filters_own_sum_is_zero_so_it_is_left_out():
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
    (block(torch.randn(8, 3, 6, 6)).tanh() * torch.randn(8, 4, 4, 4)).sum().backward()
    weight = block[0].weight
    sums = (weight * weight.grad).sum((1, 2, 3)).abs()
    ledger = ledger_for(block, [("0.weight", 0), ("1.weight", 0), ("1.bias", 0)])
    found = taylor(dict(block.named_parameters()), ledger)
    assert not ledger.filters and bool((sums < 1e-3 * found.min()).all())


def test_several_places_of_one_slot_add_up():
    module = nn.Module()
    module.bias = nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    module.bias.grad = torch.tensor([1.0, -1.0, 2.0, 0.5])
    assert taylor({"bias": module.bias}, ledger_for(module, [("bias", 0)], 2)).tolist() == [7.0, 0.0]


def test_rewards_lie_between_0_and_1_in_each_group():
    shapes = {"a": torch.Size([3]), "b": torch.Size([2])}
    places = {"one": {("a", 0): np.arange(3)[:, None]}, "two": {("b", 0): np.arange(2)[:, None]}}
    ledger = prepare(shapes, places, {"one": (("a", 0),), "two": (("b", 0),)}, "cpu")
    assert normalise(torch.tensor([0.5, 2.0, 0.0, 0.0, 0.0]), ledger).tolist() == [0.25, 1.0, 0.0, 0.0, 0.0]


def test_magnitudes_count_who_makes_an_arm_and_who_reads_it():
    """By hand: filters of squares 1 and 9, read by weights of squares 4 and 4. Shares of the means: 0.2 and 1.8, 1 and
    1; their means 0.6 and 1.4."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.ReLU(), nn.Conv2d(2, 1, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, -3.0]).view(2, 1, 1, 1))
        model[2].weight.copy_(torch.tensor([-2.0, 2.0]).view(1, 2, 1, 1))
    found = magnitude(dict(model.named_parameters()), trace(model, torch.randn(1, 1, 4, 4)))
    assert len(found) == 1 and torch.allclose(found["0"], torch.tensor([0.6, 1.4], dtype=torch.float64))
