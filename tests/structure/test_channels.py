import copy

import numpy as np
import pytest
import torch
from torch import nn

from dynprune import trace, zoo
from dynprune.errors import DynpruneError
from dynprune.structure.surgery import slim
from dynprune.structure.tracing import masked, random_selection
from tests import models

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
# float64 sums in another order differ by about 1e-15 of the output
EXACT = 1e-10


def relative_difference(a, b, x):
    with torch.no_grad():
        one, other = a.double()(x.double()), b.double()(x.double())
    return float((one - other).abs().max() / one.abs().max())


@pytest.mark.parametrize("factory", [models.Tiny, models.Grouped, models.Shared])
@pytest.mark.parametrize("seed", range(3))
def test_masked_original_and_compact_copy_agree(factory, seed):
    model = models.perturb(factory())
    before = copy.deepcopy(model.state_dict())
    graph = trace(model, X[:1])
    selection = random_selection(graph, 0.5, seed)
    small = slim(model, graph.kept(selection))
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    assert relative_difference(masked(model, graph, selection), small, X) < EXACT
    assert all(torch.equal(value, before[name]) for name, value in model.float().state_dict().items())


@pytest.mark.parametrize(
    "name",
    [*zoo.ZOO, "torchvision:resnet18", "torchvision:vgg11_bn", "torchvision:densenet121", "torchvision:mobilenet_v2"],
)
def test_real_networks_are_exact_and_their_cost_is_counted(name):
    model = models.perturb(zoo.build(name, 10, seed=0))
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    graph = trace(model, x[:1])
    selection = random_selection(graph, 0.5, 0)
    small = slim(model, graph.kept(selection))
    widths = {name: len(arms) for name, arms in selection.items()}
    assert graph.params(widths) == sum(p.numel() for p in small.parameters())
    again = trace(small, x[:1])
    assert graph.macs(widths) == again.macs({})
    assert relative_difference(masked(model, graph, selection), small, x) < EXACT


def test_macs_agree_with_pytorchs_counter():
    from torch.utils.flop_counter import FlopCounterMode

    for factory in (models.Tiny, models.Grouped, models.Shared):
        model = factory().eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(X[:1])
        assert trace(model, X[:1]).macs({}) * 2 == counter.get_total_flops()


def test_slots_in_any_order_compute_the_same():
    """Slot i holds arm i of the selection: a shuffled selection permutes channels, never the function."""
    model = models.perturb(models.Tiny())
    graph = trace(model, X[:1])
    selection = random_selection(graph, 0.5, 0)
    shuffled = {name: np.random.default_rng(1).permutation(arms) for name, arms in selection.items()}
    one, other = slim(model, graph.kept(selection)), slim(model, graph.kept(shuffled))
    assert any((selection[n] != shuffled[n]).any() for n in selection)
    assert relative_difference(one, other, X) < EXACT


def test_slot_places_say_where_each_arm_lies():
    model = models.perturb(models.Tiny())
    graph = trace(model, X[:1])
    selection = random_selection(graph, 0.5, 0)
    shuffled = {name: np.random.default_rng(1).permutation(arms) for name, arms in selection.items()}
    kept, places = graph.kept(shuffled, selection), graph.slot_places(selection)
    for name, axes in places.items():
        for key, where in axes.items():
            assert (kept[key][where] == graph.groups[name].members[key][shuffled[name]]).all()


def test_pins_are_named():
    graph = trace(models.Sorting(), X[:1])
    assert {group.name: group.arms for group in graph} == {"up": 32}
    assert ("sort", "(model)") in {(pin.op, pin.layer) for pin in graph.pinned}
    assert "pinned by sort in (model): 8 channels" in str(graph)


def test_a_model_that_fails_on_the_input_is_named_with_its_layer():
    with pytest.raises(DynpruneError, match=r'in layer "stem.0" .*the input that it expects'):
        trace(models.Tiny(), torch.zeros(1, 5, 8, 8))


def test_tracing_leaves_the_model_as_it_was():
    model = models.Tiny().train()
    model.stem.eval()
    before = copy.deepcopy(model.state_dict())
    trace(model, X)
    assert model.training and not model.stem.training and model.bn1.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_surgery_keeps_class_names_and_hooks():
    model = models.Tiny()
    calls = []
    model.conv1.register_forward_hook(lambda *_: calls.append(1))
    graph = trace(model, X[:1])
    calls.clear()
    small = slim(model, graph.kept(random_selection(graph, 0.5, 0)))
    small(X)
    assert type(small) is models.Tiny and calls == [1]
    assert list(small.state_dict()) == list(model.state_dict())
    assert (
        small.depthwise.groups
        == small.depthwise.in_channels
        == small.conv1.out_channels
        == small.bn1.num_features
        == 12
    )


def test_shared_weights_stay_shared():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1))
    model[3].weight = model[2].weight
    graph = trace(model, X[:1])
    selection = random_selection(graph, 0.5, 0)
    small = slim(model, graph.kept(selection))
    assert small[3].weight is small[2].weight
    assert relative_difference(masked(model, graph, selection), small, X) < EXACT
