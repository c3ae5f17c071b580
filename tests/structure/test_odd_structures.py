"""Structure of networks as people write them: nothing of theirs is changed, constants and scales are followed, reasons
are told."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dynprune import trace
from dynprune.structure.inspect import check_exactness
from dynprune.structure.surgery import slim
from dynprune.structure.tracing import random_selection
from tests import odd

X = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def everything_of(model: nn.Module) -> dict:
    """All that tracing could change, as values that can be compared."""
    tensors = {name: value.clone() for name, value in [*model.named_parameters(), *model.named_buffers()]}
    places = {name: value.data_ptr() for name, value in [*model.named_parameters(), *model.named_buffers()]}
    modes = {name: module.training for name, module in model.named_modules()}
    hooks = {
        name: len(module._forward_hooks) + len(module._forward_pre_hooks) for name, module in model.named_modules()
    }
    plain = {
        f"{name}.{key}": copy.deepcopy(value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, (int, float, str, list, tuple)) and not key.startswith("_")
    }
    return {"tensors": tensors, "places": places, "modes": modes, "hooks": hooks, "plain": plain}


def assert_same(before: dict, after: dict) -> None:
    for name, value in before["tensors"].items():
        assert torch.equal(value, after["tensors"][name]), name
    for kind in ("places", "modes", "hooks"):
        assert before[kind] == after[kind]
    assert str(before["plain"]) == str(after["plain"])


@pytest.mark.parametrize(
    "make",
    [
        odd.Statistics,
        odd.rewrites,
        odd.Hooked,
        odd.InPlace,
        odd.NoiseInTraining,
        odd.Locked,
        odd.InContainers,
        odd.SideHead,
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_trace_and_check_leave_everything_as_it_was(make, training):
    model = make().train(training)
    x, kept = X.clone(), (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())
    before = everything_of(model)
    graph = trace(model, x)
    check_exactness(model, graph, (x,), 0.5, 0, 0.0)
    assert_same(before, everything_of(model))
    assert torch.equal(x, X) and torch.equal(torch.get_rng_state(), kept[0]) and random.getstate() == kept[1]
    assert (np.random.get_state()[1] == kept[2]).all()


class Nested(nn.Module):
    """Writes into tensors and lists deep inside its arguments."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, images, extra):
        images[0] = self.a(images[0].mul_(2))
        extra["deep"][1] = self.b(extra["deep"][1])
        return self.c(images[0] + extra["deep"].pop())


def test_nested_inputs_stay_as_they_are():
    images, extra = [X.clone()], {"deep": [None, X.clone()]}
    graph = trace(Nested(), (images, extra))
    assert [group.arms for group in graph] == [8]
    assert torch.equal(images[0], X) and torch.equal(extra["deep"][1], X) and len(extra["deep"]) == 2
    assert check_exactness(Nested(), graph, (images, extra), 0.5, 0, 0.0).ok


@pytest.mark.parametrize(
    "make, groups",
    [
        (odd.Encoded, [16, 24]),
        (odd.InPlace, [16, 24]),
        (odd.Asserts, [16, 24]),
        (odd.Locked, [16, 24]),
        (odd.odd_names, [16, 8, 8]),
        (odd.Alias, [16, 24]),
        (odd.NoiseInTraining, [16, 24]),
        (odd.FixedNoiseInTraining, [16]),
        (odd.SideHead, [16, 24]),
        (odd.Statistics, [16]),
        (odd.NarrowedNonPersistent, [16, 24]),
        (odd.HardAssert, [16]),
        (odd.InContainers, [16, 24]),
        (odd.Shared, [16]),
    ],
)
def test_what_can_be_removed(make, groups):
    torch.manual_seed(0)
    model = make()
    graph = trace(model, X)
    assert sorted(group.arms for group in graph) == sorted(groups)
    check = check_exactness(model, graph, (X,), 0.5, 0, 0.0)
    assert check.ok and check.effect > 0.01, check


@pytest.mark.parametrize("shape", [(1, 16, 1, 1), (16, 1, 1), (1, 16, 14, 1)])
@pytest.mark.parametrize("name", ["weight", "weights", "gamma"])
def test_a_scale_is_a_scale_whatever_its_name(shape, name):
    graph = trace(odd.scaled(shape=shape, name=name), X)
    assert [group.arms for group in graph] == [16, 24]


def test_a_pinned_size_says_why():
    graph = trace(odd.HardAssert(), X)
    assert "assertion in `features`: twenty-four channels, please" in {pin.op for pin in graph.pinned}
    assert all("cannot be narrowed" not in pin.op for pin in graph.pinned)


def test_blocks_that_fold_themselves_still_can_after_compaction():
    model = odd.foldable().eval()
    graph = trace(model, X)
    small = slim(model, graph.kept(random_selection(graph, 0.5, 0)))
    with torch.no_grad():
        before = small(X)
        for block in small:
            if isinstance(block, odd.Foldable):
                assert (block.in_channels, block.out_channels) == (
                    block.branches[0].in_channels,
                    block.branches[0].out_channels,
                )
                block.switch_to_deploy()
        assert torch.allclose(small(X), before, atol=1e-6)
    assert model[1].in_channels == 16 and type(model[1].in_channels) is int


@pytest.mark.parametrize(
    "make, words",
    [
        (odd.all_zero, "changes nothing"),
        (odd.all_mixed, "is mixed by group_norm"),
        (odd.rewrites, "no channel of this network"),
    ],
)
def test_a_check_that_shows_nothing_says_so(make, words):
    model = make()
    check = check_exactness(model, trace(model, X), (X,), 0.5, 0, 0.0)
    assert not check.ok and words in check.not_shown


def test_a_fraction_that_removes_nothing_shows_nothing():
    model = odd.Base()
    check = check_exactness(model, trace(model, X), (X,), 0.001, 0, 0.0)
    assert not check.ok and "no channel is removed" in check.not_shown


def test_weights_that_grow_back_are_pinned_with_the_reason():
    assert any("rewrites 0.eval_conv.weight" in pin.op for pin in trace(odd.rewrites(), X).pinned)


# -- layers that had no rule -------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.conv, self.recurrent = nn.Conv2d(3, 12, 3, padding=1), kind(12, 10, batch_first=True, **options)
        self.head = nn.Linear(10 * (2 if options.get("bidirectional") else 1), 4)

    def forward(self, x):
        return self.head(self.recurrent(self.conv(x).relu().mean(3).transpose(1, 2))[0].mean(1))


class Cells(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.conv, self.cell, self.head, self.hidden = nn.Conv2d(3, 12, 3), kind(12, 10), nn.Linear(10, 4), 10

    def forward(self, x):
        y, state = self.conv(x).relu().mean(3), torch.zeros(len(x), self.hidden)
        for t in range(3):
            state = self.cell(y[:, :, t], state)
        return self.head(state)


class Columns(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.mix, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv1d(8 * 9, 12, 1), nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return self.c(F.fold(self.mix(F.unfold(self.a(x).relu(), 3, padding=1)), (32, 32), 2, stride=2))


def spectral(norm):
    return nn.Sequential(
        norm(nn.Conv2d(3, 16, 3)),
        nn.ReLU(),
        norm(nn.Conv2d(16, 8, 3)),
        nn.ReLU(),
        nn.Conv2d(8, 6, 1),
        nn.ReLU(),
        nn.Conv2d(6, 2, 1),
    )


class FakeQuantised(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3), nn.Conv2d(12, 4, 1)
        self.register_buffer("scale", torch.rand(12) * 0.01 + 0.01)
        self.register_buffer("zero", torch.zeros(12, dtype=torch.int32))

    def forward(self, x):
        y = torch.fake_quantize_per_tensor_affine(self.a(x).relu(), 0.01, 0, 0, 255)
        return self.c(
            F.conv2d(
                y,
                torch.fake_quantize_per_channel_affine(self.b.weight, self.scale, self.zero, 0, -128, 127),
                self.b.bias,
            )
        )


@pytest.mark.parametrize(
    "make, groups",
    [
        (lambda: Recurrent(nn.LSTM), [12, 10]),
        (lambda: Recurrent(nn.LSTM, bidirectional=True, num_layers=2), [12, 10]),
        (lambda: Recurrent(nn.GRU), [12, 10]),
        (lambda: Recurrent(nn.RNN, bias=False), [12, 10]),
        (lambda: Recurrent(nn.GRU, num_layers=2), [12, 10]),
        (lambda: Cells(nn.GRUCell), [12, 10]),
        (
            lambda: nn.Sequential(
                nn.Conv2d(3, 16, 3),
                nn.PixelShuffle(2),
                nn.ReLU(),
                nn.Conv2d(4, 6, 3),
                nn.PixelUnshuffle(2),
                nn.Conv2d(24, 5, 1),
            ),
            [4, 6],
        ),
        (Columns, [8, 3]),
        (FakeQuantised, [8, 12]),
        (
            lambda: nn.Sequential(
                nn.Conv2d(3, 16, 3), nn.LocalResponseNorm(3), nn.Conv2d(16, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1)
            ),
            [16, 8],
        ),
        (lambda: spectral(nn.utils.spectral_norm), [16, 8, 6]),
        (lambda: spectral(nn.utils.parametrizations.spectral_norm), [16, 8, 6]),
        (
            lambda: nn.Sequential(
                nn.Conv2d(3, 16, 3),
                nn.BatchNorm2d(16, affine=False),
                nn.InstanceNorm2d(16),
                nn.Conv2d(16, 12, 1),
                nn.GroupNorm(3, 12, affine=False),
                nn.Conv2d(12, 8, 1),
                nn.ReLU(),
                nn.Conv2d(8, 4, 1),
            ),
            [16, 4, 8],
        ),
    ],
)
def test_layers_that_had_no_rule(make, groups):
    torch.manual_seed(0)
    model = make().eval()
    graph = trace(model, X)
    assert [group.arms for group in graph] == groups
    check = check_exactness(model, graph, (X,), 0.5, 0, 0.0)
    assert check.ok, check
    small = slim(model, graph.kept(random_selection(graph, 0.5, 0))).train()
    small(torch.randn(2, 3, 16, 16)).sum().backward()


def test_what_layers_without_weights_remember_is_repaired():
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.BatchNorm2d(16, affine=False, track_running_stats=False),
        nn.GroupNorm(1, 16, affine=False),
        nn.Conv2d(16, 4, 1),
    )
    graph = trace(model, X)
    small = slim(model, graph.kept(random_selection(graph, 0.5, 0)))
    assert small[1].num_features == small[2].num_channels == small[0].out_channels == 8
    recurrent = Recurrent(nn.GRU, num_layers=2)
    graph = trace(recurrent, X)
    small = slim(recurrent, graph.kept(random_selection(graph, 0.5, 0)))
    assert (small.recurrent.input_size, small.recurrent.hidden_size) == (6, 5)


def test_values_that_leave_torch_keep_their_channels():
    class Leaves(odd.Base):
        def features(self, x):
            y = self.b(self.a(x).relu()).relu()
            return torch.from_numpy(y.mean((2, 3)).detach().numpy() * 2)

    graph = trace(Leaves(), X)
    assert [group.name for group in graph] == ["a"] and ("numpy", "(model)") in {
        (pin.op, pin.layer) for pin in graph.pinned
    }
