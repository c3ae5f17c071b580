"""BatchNorm of few channels: what it says, its gradients and statistics are those of torch, and where it is used."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from dynprune.execution import normalisation
from dynprune.execution.normalisation import FewChannels, Normalisation, few_channels, positions_together
from dynprune.state.copies import copied

CLOSE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}  # of the largest: sums in another order; two more roundings


def layer(channels, **ways):
    made = nn.BatchNorm2d(channels, **ways)
    with torch.no_grad():
        for value in made.parameters():
            value.uniform_(-2, 2)
        if made.running_mean is not None:
            made.running_mean.normal_()
            made.running_var.uniform_(0.5, 2)
    return made


def images(channels, size=16, count=8, dtype=torch.float32):
    """Means and deviations unlike from channel to channel, and from image to image."""
    made = torch.randn(count, channels, size, size) * torch.rand(channels, 1, 1) * 3 + 5 * torch.randn(channels, 1, 1)
    return (made + torch.randn(count, 1, 1, 1)).to(dtype).to(memory_format=torch.channels_last)


@pytest.fixture
def used(monkeypatch):
    """How many calls took several positions at once."""
    seen, apply = [], Normalisation.apply
    monkeypatch.setattr(normalisation.Normalisation, "apply", lambda *own: (seen.append(1), apply(*own))[1])
    return seen


def passed(module, x, gradient, mode):
    """What it says, and the gradients of its inputs and parameters."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    with mode:
        said = module(x)
    said.backward(gradient)
    return [said.detach(), x.grad, *(value.grad for value in module.parameters())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 3, 4, 7, 8, 12, 20, 31, 100])
@pytest.mark.parametrize(
    "ways", [{}, {"momentum": None}, {"track_running_stats": False}, {"eps": 0.1, "momentum": 0.5}]
)
def test_it_is_what_torch_computes(channels, dtype, ways, used, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    torch.manual_seed(channels)
    one = layer(channels, **ways)
    other = copy.deepcopy(one)
    x = images(channels, dtype=dtype)
    gradient = torch.randn_like(x)
    exact = copy.deepcopy(one).double()
    for _ in range(2):  # the second step finds what the first one left
        for value in [*one.parameters(), *other.parameters()]:
            value.grad = None
        ours = passed(one, x, gradient, FewChannels())
        torchs = passed(other, x, gradient, torch.autograd.set_grad_enabled(True))
    truth = passed(exact, x.double(), gradient.double(), torch.autograd.set_grad_enabled(True))
    assert len(used) == (2 if channels < 16 or dtype == torch.bfloat16 else 0)
    for own, their, true in zip(ours, torchs, truth, strict=True):
        assert own.dtype == their.dtype and own.shape == their.shape
        assert own.ndim < 4 or own.is_contiguous(memory_format=torch.channels_last)
        most = true.abs().max()
        assert (own.double() - true).abs().max() <= CLOSE[dtype] * most
        assert (own - their).abs().max() <= CLOSE[dtype] * most
    for own, their in zip(one.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(own, their, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("after", [nn.ReLU(inplace=True), nn.ReLU6(inplace=True), nn.Hardswish(inplace=True)])
def test_layers_behind_it_may_change_what_it_says(after, used):
    torch.manual_seed(0)
    x, gradients = images(8, dtype=torch.bfloat16), []
    one = layer(8)
    for mode in (FewChannels(), torch.autograd.set_grad_enabled(True)):
        own = copy.deepcopy(one)
        inputs = x.clone(memory_format=torch.preserve_format).requires_grad_()
        with mode:
            said = own(inputs)
            said += 1
            said = after(said)
        assert said.is_contiguous(memory_format=torch.channels_last)
        said.float().square().sum().backward()
        gradients.append([inputs.grad, *(value.grad for value in own.parameters())])
    assert len(used) == 1
    for own, other in zip(*gradients, strict=True):
        assert (own - other).abs().max() <= 2e-2 * other.abs().max()


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_is_computed_again_in_the_backward_pass_is_as_it_was(reentrant, used):
    part = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), layer(8), nn.ReLU(inplace=True))
    x = images(3, size=32).requires_grad_()
    with FewChannels():
        said = checkpoint(part, x, use_reentrant=reentrant)
    said.square().sum().backward()
    assert not used and x.grad.abs().sum() > 0
    with FewChannels():
        part(x)
    assert used


def test_means_far_from_zero_cost_no_precision(used):
    torch.manual_seed(0)
    x, module = images(8) * 0.01 + 1000, nn.BatchNorm2d(8)
    with FewChannels():
        said = module(x)
    exact = F.batch_norm(x.double(), None, None, training=True)
    theirs = (nn.BatchNorm2d(8)(x).double() - exact).abs().max()
    assert used and (said.double() - exact).abs().max() <= 2 * theirs


def together(x, **changed):
    parameters = [torch.ones(x.shape[1]) for _ in range(3)]
    return positions_together(x, *changed.get("parameters", parameters))


def test_where_it_pays(monkeypatch):
    assert together(images(8)) == 8 and together(images(4)) == 16 and together(images(12)) == 8
    assert together(images(16)) == together(images(32)) == together(images(40)) == 0  # whole vectors, or many
    assert together(images(8, size=2)) == 0  # few positions
    assert together(images(8, size=33, count=1)) == 0  # an odd number of positions
    assert together(images(8).contiguous()) == 0  # channels first
    assert together(images(8).double()) == 0 and together(images(8)[0]) == 0
    assert together(images(8), parameters=[torch.ones(8, dtype=torch.bfloat16)] * 3) == 0
    assert together(images(24)) == 0
    half = {channels: images(channels, dtype=torch.bfloat16) for channels in (8, 24, 40, 132)}
    for threads, found in ((1, [8, 4, 0, 0]), (2, [8, 4, 4, 0])):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert list(map(together, half.values())) == found
    with torch.no_grad():
        assert together(images(8)) == 0


def test_other_modes_of_the_layer_are_torchs(used):
    x = images(8)
    with FewChannels():
        layer(8).eval()(x)
        layer(8, affine=False)(x)
        layer(16)(images(16))
        with torch.no_grad():
            layer(8)(x)
        with pytest.raises(ValueError, match="more than 1 value"):
            layer(8)(x[:1, :, :1, :1])
    assert not used


def test_only_networks_on_the_cpu_with_batchnorm():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    assert isinstance(few_channels(network), FewChannels)
    assert not isinstance(few_channels(copied(network).to("meta")), FewChannels)
    assert not isinstance(few_channels(nn.Conv2d(3, 8, 3)), FewChannels)


def test_a_network_learns_as_it_would(used):
    """The gradients of a whole network, with frozen layers and a layer whose inputs ask for none."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.BatchNorm2d(3),
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        layer(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False),
        layer(12),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    ).to(memory_format=torch.channels_last)
    network[2].weight.requires_grad_(False)
    x, gradients = images(3, size=32), []
    for mode in (FewChannels(), torch.autograd.set_grad_enabled(True)):
        network.zero_grad()
        with mode:
            loss = network(x).square().mean()
        loss.backward()
        gradients.append([value.grad for value in network.parameters() if value.requires_grad])
    assert len(used) == 3 and network[2].weight.grad is None
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))
