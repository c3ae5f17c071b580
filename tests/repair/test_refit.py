"""Repair makes up for what is gone, exactly where that is possible."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dynprune.repair.following import follow
from dynprune.repair.refit import Ridge, repair, targets_of
from dynprune.structure.surgery import slim
from dynprune.structure.tracing import trace
from tests.models import Tiny, perturb


class Block(nn.Module):
    """A stem, two residual blocks (one whose shortcut is computed last), a transposed and a depthwise layer."""

    def __init__(self, wide=16):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.a1, self.a2 = nn.Conv2d(8, wide, 3, padding=1, bias=False), nn.Conv2d(wide, 8, 3, padding=1, bias=False)
        self.an1, self.an2 = nn.BatchNorm2d(wide), nn.BatchNorm2d(8)
        self.b1, self.b2 = nn.Conv2d(8, wide, 1), nn.Conv2d(wide, 12, 1, bias=False)
        self.bn2, self.short = nn.BatchNorm2d(12), nn.Conv2d(8, 12, 1)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.up = nn.ConvTranspose2d(12, 10, 2, stride=2)
        self.head = nn.Linear(10, 4)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.an2(self.a2(F.relu(self.an1(self.a1(x))))) + x)
        y = self.bn2(self.b2(F.relu(self.b1(x))))
        y += self.short(x)
        y = F.relu(self.depthwise(F.relu(y)))
        return self.head(self.up(y).mean((2, 3)))


@pytest.fixture
def block():
    torch.manual_seed(0)
    return perturb(Block())


@pytest.fixture
def images():
    return torch.randn(48, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def duplicate(model, norm_and_conv, reader):
    """Make the second half of a layer's channels copies of the first half."""
    for name in norm_and_conv:
        module = model.get_submodule(name)
        for value in (*module.parameters(), *module.buffers()):
            if value.ndim:
                half = len(value) // 2
                value.data[half:] = value.data[:half]
    return model


def halves(graph, *names):
    return {graph_group(graph, name): np.arange(graph.groups[graph_group(graph, name)].arms // 2) for name in names}


def graph_group(graph, layer):
    return next(group.name for group in graph if layer in group.makers)


def test_what_follows_each_layer(block, images):
    found = follow(block, (images[:2],))
    assert found["stem"].norm == "norm" and found["stem"].passes and found["stem"].added is None
    assert found["a1"].norm == "an1" and found["a1"].passes
    assert found["a2"].norm == "an2" and found["a2"].added is not None and found["a2"].passes
    assert found["b1"].norm is None and found["b1"].passes
    # the shortcut runs last, so it aims at the sum, and the branch cannot
    assert found["b2"].added is None and found["short"].added is not None and found["short"].passes
    assert found["depthwise"].passes and found["up"].added is None and not found["up"].passes


@pytest.mark.parametrize(
    ("function", "passes"),
    [
        (F.relu, (0.0, math.inf)),
        (nn.ReLU6(), (0.0, 6.0)),
        (nn.ReLU6(inplace=True), (0.0, 6.0)),
        (F.relu6, (0.0, 6.0)),
        (nn.Hardtanh(-2, 0.5), (-2.0, 0.5)),
        (lambda x: F.hardtanh(x, max_val=2.0), (-1.0, 2.0)),
        (lambda x: x.clamp(min=0), (0.0, math.inf)),
        (lambda x: torch.clip(x, -1, 1), (-1.0, 1.0)),
        (lambda x: x.clamp_(max=3), (-math.inf, 3.0)),
        (nn.Hardswish(), (-3.0, math.inf)),
        (nn.Hardsigmoid(), (-3.0, 3.0)),
        (lambda x: x.clamp(torch.zeros(())), None),
        (F.silu, None),
        (lambda x: F.leaky_relu(x), None),
    ],
)
def test_functions_that_are_constant_somewhere_are_known(function, passes):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            return self.head(function(self.conv(x)))

    with torch.no_grad():
        assert follow(Net().eval(), (torch.randn(2, 3, 8, 8),))["conv"].passes == passes


@pytest.mark.parametrize("function", [nn.ReLU6(), nn.Hardtanh(-0.5, 0.5), nn.Hardswish(), lambda x: x.clamp(-1, 0.2)])
def test_what_is_cut_off_on_either_side_need_not_be_fitted(function):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.mid, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 24, 3), nn.Conv2d(24, 5, 1)
            self.norm = nn.BatchNorm2d(24)
            nn.init.normal_(self.norm.weight)  # of either sign
            with torch.no_grad():
                self.norm.weight.mul_(12)

        def forward(self, x):
            return self.head(function(self.norm(self.mid(F.relu(self.stem(x))))))

    torch.manual_seed(0)
    model, (images, fresh) = Net().eval(), torch.randn(2, 96, 3, 12, 12)
    graph = trace(model, images[:1])
    kept = graph.kept({graph_group(graph, "stem"): np.arange(0, 16, 2)})
    targets, far = targets_of(model, (images,)), {}
    with torch.no_grad():
        for rounds in (0, 4):
            narrow = slim(model, kept).eval()
            repair(narrow, kept, targets, rounds=rounds)
            far[rounds] = distance(narrow, model, fresh)
    assert far[4] < 0.995 * far[0]


def test_copies_of_channels_are_made_up_for_exactly(block, images):
    duplicate(block, ["a1", "an1"], "a2")
    duplicate(block, ["b1"], "b2")
    graph, before = trace(block, images[:1]), copy.deepcopy(block.state_dict())
    kept = graph.kept(halves(graph, "a1", "b1"))
    narrow = slim(block, kept).eval()
    cut = float((narrow(images) - block(images)).detach().abs().max())
    repair(narrow, kept, targets_of(block, (images,)), ridge=1e-7)
    fresh = torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(2))
    assert float((narrow(fresh) - block(fresh)).detach().abs().max()) < 0.01 * cut
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


def test_nothing_cut_is_nothing_changed(block, images):
    narrow = copy.deepcopy(block)
    repair(narrow, {}, targets_of(block, (images,)))
    torch.testing.assert_close(narrow(images), block(images), atol=1e-4, rtol=1e-4)


class Residual(nn.Module):
    """One residual block whose shortcut cannot be exact once the stem is cut, seen at every place."""

    def __init__(self):
        super().__init__()
        self.stem, self.mid = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 12, 3, padding=1)
        self.a1, self.a2, self.head = nn.Conv2d(12, 16, 3, padding=1), nn.Conv2d(16, 12, 1), nn.Conv2d(12, 5, 1)
        for module in self.children():
            nn.init.kaiming_normal_(module.weight)

    def forward(self, x):
        x = F.relu(self.mid(F.relu(self.stem(x))))
        return self.head(F.relu(self.a2(F.relu(self.a1(x))) + x))


def test_every_part_of_repair_brings_the_network_nearer(images):
    torch.manual_seed(0)
    model = Residual().eval()
    graph = trace(model, images[:1])
    kept = graph.kept({group.name: np.arange(0, group.arms, 2) for group in graph})
    targets, fresh = (
        targets_of(model, (images,)),
        torch.randn(64, 3, 12, 12, generator=torch.Generator().manual_seed(2)),
    )
    far, last = {}, slim(model, kept).eval()
    with torch.no_grad():
        far["cut"] = distance(last, model, fresh)
        for part, options in {"plain": dict(sums=False, rounds=0), "sums": dict(rounds=0), "all": {}}.items():
            narrow = slim(model, kept).eval()
            repair(narrow, kept, targets, **options)
            far[part] = distance(narrow, model, fresh)
    assert far["plain"] < 0.8 * far["cut"] and far["sums"] < far["plain"] and far["all"] < 0.99 * far["sums"], far


def distance(narrow, model, images):
    return float((narrow(images) - model(images)).square().mean())


def test_repair_works_on_every_kind_of_layer(images):
    torch.manual_seed(0)
    for network in (Block, Tiny):
        model = perturb(network())
        graph = trace(model, images[:1])
        kept = graph.kept({group.name: np.arange(0, group.arms, 2) for group in graph})
        narrow = slim(model, kept).eval()
        with torch.no_grad():
            cut = distance(narrow, model, images)
            repair(narrow, kept, targets_of(model, (images,)))
            assert distance(narrow, model, images) < 0.5 * cut


def test_a_layer_that_runs_twice_or_does_more_is_left_and_named(images):
    class Odd(Block):
        def __init__(self):
            super().__init__()
            self.a1 = nn.utils.parametrizations.weight_norm(self.a1)
            self.twice = nn.Conv2d(8, 8, 1)

        def forward(self, x):
            self.seen = F.relu(self.twice(F.relu(self.twice(F.relu(self.norm(self.stem(x)))))))
            return super().forward(x)

    torch.manual_seed(0)
    model = perturb(Odd())
    targets = targets_of(model, (images,))
    assert "twice" not in targets.layers and "a1" not in targets.layers and "stem" not in targets.layers
    assert "a2" in targets.layers


def test_ridge_is_the_same_over_places_and_over_columns():
    torch.manual_seed(0)
    rows, before, wanted = torch.randn(2, 9, 7), torch.randn(2, 7, 3), torch.randn(2, 9, 3)
    few = Ridge(rows[:, :5], before, 0.1)
    assert not few.over_columns and Ridge(rows, before, 0.1).over_columns
    for made, count in ((few, 5), (Ridge(rows, before, 0.1), 9)):
        x, y = rows[:, :count].double(), wanted[:, :count].double()
        penalty = 0.1 * x.square().sum((1, 2))[:, None, None] / 7 * torch.eye(7)
        right = x.transpose(1, 2) @ y + penalty @ before.double()
        expected = torch.linalg.solve(x.transpose(1, 2) @ x + penalty, right)
        torch.testing.assert_close(made(wanted[:, :count]).double(), expected, atol=1e-5, rtol=1e-4)
