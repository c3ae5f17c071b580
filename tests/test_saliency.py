import torch
from torch import nn

from dynprune.saliency import normalise, taylor


def test_batchnorm_identity_holds():
    """weight * d/dweight + bias * d/dbias equals the sum of activation * gradient over the batch, per channel."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(5)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    activation = norm(torch.randn(4, 5, 3, 3))
    activation.retain_grad()
    (activation.sin() * torch.randn(4, 5, 3, 3)).sum().backward()
    expected = (activation * activation.grad).sum((0, 2, 3)).abs()
    where = torch.arange(5)[:, None]
    found = taylor(dict(norm.named_parameters()), {("weight", 0): where, ("bias", 0): where})
    torch.testing.assert_close(found, expected.detach())


def test_convolution_identity_holds():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3)
    activation = conv(torch.randn(2, 3, 6, 6))
    activation.retain_grad()
    activation.pow(3).mean().backward()
    where = torch.arange(4)[:, None]
    found = taylor(dict(conv.named_parameters()), {("weight", 0): where, ("bias", 0): where})
    torch.testing.assert_close(found, (activation * activation.grad).sum((0, 2, 3)).abs().detach(), rtol=1e-4, atol=1e-6)


def test_several_places_of_one_slot_add_up():
    weight = nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    weight.grad = torch.tensor([1.0, -1.0, 2.0, 0.5])
    assert taylor({"w": weight}, {("w", 0): torch.tensor([[0, 2], [1, 3]])}).tolist() == [7.0, 0.0]


def test_rewards_lie_between_0_and_1():
    assert normalise(torch.tensor([0.5, 2.0, 0.0])).tolist() == [0.25, 1.0, 0.0]
    assert normalise(torch.zeros(3)).tolist() == [0, 0, 0]
