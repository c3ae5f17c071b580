"""Structures beyond plain 2-D networks, sizes that code remembers, and what happens where tracing cannot follow."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dynprune import trace
from dynprune.errors import DynpruneError
from dynprune.structure.inspect import inspect
from dynprune.structure.surgery import slim
from dynprune.structure.tracing import exact_part, masked, random_selection
from tests import models
from tests.structure.test_channels import EXACT, X


def check_exact(model, *inputs, fraction=0.5):
    """Trace, remove, compare; returns the graph and the compact copy."""
    graph = trace(models.perturb(model), inputs)
    selection = random_selection(graph, fraction, 0)
    small = slim(model, graph.kept(selection))
    exact = exact_part(graph, selection)
    with torch.no_grad():
        doubles = [x.double() for x in inputs]
        one, other = masked(model, graph, exact).double()(*doubles), slim(model, graph.kept(exact)).double()(*doubles)
    one, other = (value if isinstance(value, tuple) else (value,) for value in (one, other))
    for a, b in zip(one, other):
        assert float((a - b).abs().max() / a.abs().max()) < EXACT
    return graph, small


@pytest.mark.parametrize("dims", [1, 3])
def test_one_and_three_dimensional_convolutions(dims):
    conv, norm = getattr(nn, f"Conv{dims}d"), getattr(nn, f"BatchNorm{dims}d")
    model = nn.Sequential(
        conv(3, 8, 3),
        norm(8),
        nn.ReLU(),
        conv(8, 12, 3, groups=2),
        nn.PReLU(12),
        conv(12, 4, 1),
        nn.Flatten(),
        nn.Linear(4 * 4**dims, 3),
    )
    graph, _ = check_exact(model, torch.randn(2, 3, *[8] * dims))
    assert len(graph) >= 2


@pytest.mark.parametrize("groups", [1, 2, 12])
def test_transposed_convolutions(groups):
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3),
        nn.ReLU(),
        nn.ConvTranspose2d(12, 12, 2, stride=2, groups=groups),
        nn.ReLU(),
        nn.Conv2d(12, 4, 1),
    )
    graph, small = check_exact(model, X)
    assert small[2].in_channels == 6 and small[2].out_channels == 6
    assert graph.arms >= 6


def test_weight_norm_is_followed():
    torch.manual_seed(0)
    first = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3))
    model = nn.Sequential(first, nn.ReLU(), nn.Conv2d(8, 4, 1))
    graph, small = check_exact(model, X)
    assert {group.name for group in graph} and small[0].weight.shape == (4, 3, 3, 3)
    assert list(small.state_dict()) == list(model.state_dict())


class Standardised(nn.Conv2d):
    def forward(self, x):
        mean, std = self.weight.mean((1, 2, 3), keepdim=True), self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / (std + 1e-5), self.bias)


def test_weight_standardisation_mixes_what_a_filter_reads():
    model = nn.Sequential(Standardised(3, 8, 3), nn.ReLU(), Standardised(8, 12, 3), nn.ReLU(), nn.Conv2d(12, 4, 1))
    graph, small = check_exact(model, X)
    assert {group.name: group.mixed_by for group in graph} == {"0": ("weight standardisation",), "2": ()}
    assert small[2].weight.shape == (6, 4, 3, 3) and small(X).shape == (2, 4, 4, 4)


class TwoInTwoOut(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Conv2d(3, 8, 1), nn.Conv2d(2, 8, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 5, 1)

    def forward(self, x, y):
        z = F.relu(self.a(x) + self.b(y))
        return self.c(z), self.d(z)


def test_several_inputs_and_outputs():
    graph, _ = check_exact(TwoInTwoOut(), X, torch.randn(2, 2, 8, 8))
    assert [group.arms for group in graph] == [8]


class Remembers(nn.Module):
    """Sizes computed in __init__: a list for split, a bound for a slice, an int for view."""

    def __init__(self):
        super().__init__()
        self.parts, self.width = [12, 8, 4], 10
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(n, 10, 1) for n in self.parts)
        self.mix, self.head = nn.Conv2d(10, 16, 1), nn.Linear(26, 3)

    def forward(self, x):
        pieces = torch.split(F.relu(self.stem(x)), self.parts, 1)
        x = torch.cat([conv(piece) for conv, piece in zip(self.convs, pieces)], 1)
        x = F.relu(x).view(len(x), 3, self.width, 8, 8).sum(1)
        x = torch.cat([x, self.mix(x)], 1)
        return self.head(torch.cat([x[:, : self.width], x[:, self.width :]], 1).mean((2, 3)))


def test_remembered_sizes_are_repaired():
    model = Remembers()
    graph, small = check_exact(model, X)
    assert model.parts == [12, 8, 4] and type(model.parts[0]) is int and type(model.width) is int
    assert [conv.in_channels for conv in small.convs] == small.parts and sum(
        small.parts
    ) == small.stem.out_channels < 24
    assert small.width == small.convs[0].out_channels == 5
    check_exact(small, X)  # it can be traced and compacted again


class HardCoded(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right, self.head = (
            nn.Conv2d(3, 16, 3),
            nn.Conv2d(8, 12, 1),
            nn.Conv2d(8, 12, 1),
            nn.Conv2d(12, 2, 1),
        )

    def forward(self, x):
        x = self.stem(x)
        return self.head(F.relu(self.left(x[:, :8]) + self.right(x[:, 8:])))


def test_what_cannot_be_narrowed_is_pinned_and_named():
    graph, _ = check_exact(HardCoded(), X)
    assert {group.name: group.arms for group in graph} == {"left": 12}
    assert any("cannot be narrowed" in pin.op for pin in graph.pinned)


class Hidden(nn.Module):
    """A function that runs outside torch's own dispatch, as scripted code and custom kernels do."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        with torch._C.DisableTorchFunction():
            x = torch.from_numpy(self.stem(x).detach().numpy()[:, ::-1].copy())
        return self.head(x)


def test_functions_out_of_sight_pin_everything_before_them():
    assert len(trace(Hidden(), X)) == 0


def test_layer_norm_channels_are_free_but_marked():
    graph, small = check_exact(
        nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 2)),
        torch.randn(2, 6),
    )
    assert {group.name: group.mixed_by for group in graph} == {"0": ("layer_norm",), "3": ()}
    assert small[1].normalized_shape == (8,) and small(torch.randn(2, 6)).shape == (2, 2)


def test_group_norm_loses_the_same_of_each_group():
    graph, small = check_exact(
        nn.Sequential(nn.Conv2d(3, 16, 1), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 2, 1)), X
    )
    assert [(group.arms, group.mixed_by) for group in graph] == [(4, ("group_norm",))]
    assert small[1].num_channels == 8 and small[1].num_groups == 4


class Auxiliary(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.head, self.extra = (
            nn.Conv2d(3, 8, 1),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 2, 1),
            nn.Conv2d(8, 2, 1),
        )

    def forward(self, x):
        x = self.norm(self.stem(x))
        return (self.head(x), self.extra(x)) if self.training else self.head(x)


def test_heads_that_only_train_are_narrowed_too():
    model = Auxiliary()
    statistics = model.norm.running_mean.clone()
    graph = trace(model, X)
    small = slim(model, graph.kept(random_selection(graph, 0.5, 0))).train()
    assert [y.shape[1] for y in small(X)] == [2, 2] and small.extra.in_channels == 4
    assert torch.equal(model.norm.running_mean, statistics)


def test_channels_last_models_stay_so():
    model = models.Tiny().to(memory_format=torch.channels_last)
    graph = trace(model, X[:1])
    small = slim(model, graph.kept(random_selection(graph, 0.5, 0)))
    assert small.conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_inspection_adds_up():
    found = inspect("resnet20", check=True)
    assert found.check.ok and found.check.max_rel_diff < 1e-4 and found.groups == len(found.lines)
    assert found.prunable_params_share == pytest.approx(
        1 - 10 / found.params
    )  # all but the classifier's bias: its rows read arms
    assert found.pinned[0].op == "output" and 0.2 < found.check.params_kept_share < 0.35


def test_script_modules_are_refused():
    with pytest.raises(DynpruneError, match="TorchScript"):
        trace(torch.jit.script(nn.Sequential(nn.Linear(2, 2))), torch.zeros(1, 2))


def net(forward, **layers):
    """A network of the given layers with this forward(self, x)."""
    module = type("Net", (nn.Module,), {"forward": forward})()
    for name, layer in layers.items():
        module.add_module(name, layer)
    return module


def two_stems(**more):
    return dict(a=nn.Conv2d(3, 8, 3, padding=1), b=nn.Conv2d(3, 8, 3, padding=1), head=nn.Conv2d(8, 4, 1), **more)


def write_into(self, x):
    y, z = torch.zeros_like(self.a(x)), self.b(x)
    y[:, :, 1:] = z[:, :, :-1]
    y[:, :, :1] = self.a(x)[:, :, :1]
    return self.head(y)


def bounded(self, x):
    return self.head(torch.clamp(self.a(x), max=self.b(x)))


def by_keyword(self, x):
    y = torch.cat(tensors=[self.a(x), self.b(x)], dim=1)
    y = torch.mean(input=torch.stack(y.chunk(chunks=2, dim=1)), dim=0)
    return self.head(F.max_pool2d(input=y, kernel_size=2))


def norms_over_space(self, x):
    y = self.a(x)
    return self.head(y / torch.linalg.vector_norm(y, 2, (2, 3), keepdim=True) + self.b(x))


@pytest.mark.parametrize("forward", [write_into, bounded, by_keyword, norms_over_space])
def test_branches_that_meet_are_tied(forward):
    graph, _ = check_exact(net(forward, **two_stems()), X)
    assert [group.arms for group in graph] == [8]


def rolled(self, x):
    return self.head(torch.roll(self.a(x), 2, dims=1))


def strided(self, x):
    y = self.a(x)
    return self.head(torch.cat([y[:, ::2], y[:, 1::2]], 1))


def picked(self, x):
    c = self.a(x).shape[1]
    return self.head(self.a(x)[:, torch.arange(c).view(2, -1).t().reshape(-1)])


def halved(self, x):
    y = self.a(x)
    c = y.shape[1]
    return self.head(torch.cat([y[:, c // 2 :].tanh(), y[:, : c // 2]], 1))


@pytest.mark.parametrize("forward", [rolled, strided, picked, halved])
@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.75])
def test_orders_that_a_narrow_copy_would_not_keep_are_never_silently_wrong(forward, fraction):
    layers = two_stems()
    del layers["b"]
    check_exact(net(forward, **layers), X, fraction=fraction)


def tied_weight(self, x):
    hidden = torch.relu(self.first(x))
    return F.linear(self.middle(hidden), self.middle.weight.t())


def scale_of_another(self, x):
    return self.head(self.a(x) * self.norm.weight.view(1, -1, 1, 1) + self.norm(self.b(x)).mean())


def test_a_weight_in_two_roles_is_pinned():
    check_exact(net(tied_weight, first=nn.Linear(10, 32), middle=nn.Linear(32, 8)), torch.randn(4, 10))
    check_exact(net(scale_of_another, norm=nn.BatchNorm2d(8), **two_stems()), X)


class Outputs:
    def __init__(self, logits):
        self.logits = logits


def test_outputs_in_plain_objects_are_pinned():
    graph = trace(
        net(lambda self, x: Outputs(self.head(torch.relu(self.a(x)))), a=nn.Conv2d(3, 8, 1), head=nn.Conv2d(8, 4, 1)), X
    )
    assert [group.arms for group in graph] == [8]


def windows(self, x):
    y = torch.relu(self.a(x)).permute(0, 2, 3, 1).reshape(-1, 16, 8)
    return self.down(torch.relu(self.up(y))).sum((0, 1))


def test_positions_count_everything_but_the_batch():
    from torch.utils.flop_counter import FlopCounterMode

    model = net(windows, a=nn.Conv2d(3, 8, 1), up=nn.Linear(8, 12), down=nn.Linear(12, 2))
    for x in (X, X[:1]):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(x)
        assert 2 * len(x) * trace(model, x).macs({}) == counter.get_total_flops()


def test_vectors_that_are_multiplied_under_any_name_belong_together():
    class Scaled(nn.Module):
        def __init__(self, by_name):
            super().__init__()
            self.conv, self.head, self.by_name = nn.Conv2d(3, 8, 3), nn.Linear(8, 4), by_name
            self.u, self.v = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))

        def forward(self, x):
            scale = torch.dot(self.u, tensor=self.v) if self.by_name else torch.dot(self.u, self.v)
            return self.head(self.conv(x).mean((2, 3))) * scale

    one, other = (trace(Scaled(by_name), torch.zeros(1, 3, 8, 8)) for by_name in (False, True))
    assert one.full_widths == other.full_widths == {"conv": 8}
