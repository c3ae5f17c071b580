"""Modules of every kind through the whole way: compacted, or refused in a line, and left as they were."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dynprune
from dynprune.errors import DynpruneError


class Plain(nn.Module):
    def __init__(self, classes=4):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(16, classes)

    def forward(self, x):
        return self.c(F.relu(self.b(F.relu(self.a(x)))).mean((2, 3)))


class ByName(Plain):
    """Layers that are given their input by its name, which hooks do not see."""

    def forward(self, x):
        return self.c(input=F.relu(self.b(F.relu(self.a(input=x)))).mean((2, 3)))


class Map(Plain):
    def forward(self, x):
        return self.b(F.relu(self.a(x)))


class Dead(Plain):
    """Channels that are always zero: their Gram matrix is singular."""

    def __init__(self):
        super().__init__()
        self.a.weight.data[4:], self.a.bias.data[4:] = 0, 0


class NoStatistics(Plain):
    def __init__(self):
        super().__init__()
        self.b = nn.Sequential(nn.Conv2d(16, 16, 3, bias=False), nn.BatchNorm2d(16, track_running_stats=False))


class Normed(Plain):
    def __init__(self):
        super().__init__()
        self.a = nn.utils.parametrizations.weight_norm(self.a)


def batches(dtype=torch.float32, labels=4):
    torch.manual_seed(1)
    return [(torch.randn(32, 3, 12, 12, dtype=dtype), torch.randint(0, labels, (32,))) for _ in range(4)]


@pytest.mark.parametrize("network", [Plain, ByName, Map, Dead, NoStatistics, Normed, lambda: Plain(1)])
def test_modules_become_compact_and_stay_as_they_were(network):
    torch.manual_seed(0)
    model = network().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = dynprune.compact(model, torch.randn(1, 3, 12, 12), batches(), "macs=0.5", images=32, search=0.2, tune=0.2)
    assert found.macs < 0.6 * dynprune.trace(network(), torch.randn(1, 3, 12, 12)).macs({}) and found.tune_steps > 0
    assert found.model(batches()[0][0]).isfinite().all() and model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_precision_stays(dtype):
    torch.manual_seed(0)
    example = torch.randn(1, 3, 12, 12, dtype=dtype)
    found = dynprune.compact(Plain().to(dtype), example, batches(dtype), "macs=0.5", images=32, search=0.2, tune=0.2)
    assert {parameter.dtype for parameter in found.model.parameters()} == {dtype}


def not_finite(model):
    model.b.weight.data[0, 0, 0, 0] = float("nan")
    return model


@pytest.mark.parametrize(
    "network, data, words",
    [
        (lambda: not_finite(Plain()), batches, "b.weight holds numbers that are not finite"),
        (Plain, lambda: [x / 0 for x, _ in batches()], "is not finite. Expected a network that computes finite"),
        (Plain, lambda: batches(labels=9), "gave the label 8, and the network has 4 classes"),
        (Plain, lambda: batches()[:0], "data gave 0 images"),
        (Plain, lambda: ["text"], "data gave a str"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_in_a_line(network, data, words):
    with pytest.raises(DynpruneError, match=words):
        dynprune.compact(network(), torch.randn(1, 3, 12, 12), data(), "macs=0.5", images=32, search=0.2, tune=0.2)


def test_tuning_that_diverges_says_so():
    torch.manual_seed(0)
    with pytest.raises(DynpruneError, match="The loss became .* Choose a smaller --tune-lr"):
        dynprune.compact(
            Plain(), torch.randn(1, 3, 12, 12), batches(), "macs=0.5", images=32, search=0, tune=9, tune_lr=1e9
        )
