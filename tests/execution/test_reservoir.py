import copy

import numpy as np
import torch
import torch.nn.functional as F

from dynprune import trace
from dynprune.execution.reservoir import Reservoir, by_tensor, scale_for_narrow_fan_in
from dynprune.structure.surgery import slim
from dynprune.structure.tracing import random_selection
from tests import models
from tests.structure.test_channels import X


def make(seed=0):
    torch.manual_seed(0)
    model = models.perturb(models.Tiny())
    graph = trace(model, X[:1])
    return model, graph, Reservoir(copy.deepcopy(model), graph, random_selection(graph, 0.5, seed))


def gather_back(full, small, graph, reservoir):
    """The plain way: write every tensor of the narrow model into its place in the full one."""
    kept = by_tensor(graph.kept(reservoir.slots, reservoir.template))
    state = full.state_dict()
    for name, value in small.state_dict().items():
        index = [kept.get(name, {}).get(d, torch.arange(size)) for d, size in enumerate(state[name].shape)]
        state[name][torch.meshgrid(*index, indexing="ij") if index else ()] = value


def test_swapping_equals_gathering_everything_anew():
    """Train between swaps; a reference rebuilds the whole narrow model and writes all of it back each time."""
    model, graph, reservoir = make()
    optimizer = torch.optim.SGD(reservoir.active.parameters(), 0.05, momentum=0.9)
    reservoir.attach(optimizer)
    reference = copy.deepcopy(model)
    for seed in range(1, 5):
        selection = random_selection(graph, 0.5, seed)
        swapped = reservoir.swap(selection)
        assert swapped > 0
        assert all(set(reservoir.slots[n]) == set(selection[n]) for n in selection)
        small = slim(reference, graph.kept(reservoir.slots, reservoir.template)).train()
        for buffers in reservoir.buffers.values():
            for state in buffers.states.values():
                state.live.zero_()  # the reference has no momentum to carry on
        plain = torch.optim.SGD(small.parameters(), 0.05, momentum=0.9)
        for net, opt in ((reservoir.active.train(), optimizer), (small, plain)):
            for _ in range(2):
                opt.zero_grad()
                F.cross_entropy(net(X), torch.tensor([1, 2])).backward()
                opt.step()
            if net is reservoir.active:
                for group in (
                    reservoir.active.head,
                ):  # shared with the full model: its momentum is the optimizer's own
                    for p in group.parameters():
                        optimizer.state[p]["momentum_buffer"].zero_()
        gather_back(reference, small, graph, reservoir)
        reservoir.write_back()
        for name, value in reservoir.full.state_dict().items():
            torch.testing.assert_close(value, reference.state_dict()[name])


def test_arms_that_stay_keep_their_slots_and_swapping_back_restores():
    model, graph, reservoir = make()
    first = {name: arms.copy() for name, arms in reservoir.slots.items()}
    before = copy.deepcopy(reservoir.active.state_dict())
    reservoir.swap(random_selection(graph, 0.5, 3))
    for name, arms in reservoir.slots.items():
        stayed = np.isin(first[name], arms)
        assert (arms[stayed] == first[name][stayed]).all()
    reservoir.swap(first)
    restored = slim(reservoir.full, graph.kept(first))
    assert reservoir.swap(first) == 0
    with torch.no_grad():
        torch.testing.assert_close(reservoir.active.eval()(X), restored.eval()(X))
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in reservoir.active.state_dict().items()}


def test_newcomers_start_without_momentum_and_others_keep_theirs():
    _, graph, reservoir = make()
    optimizer = torch.optim.SGD(reservoir.active.parameters(), 0.1, momentum=0.9)
    reservoir.attach(optimizer)
    F.cross_entropy(reservoir.active(X), torch.tensor([1, 2])).backward()
    optimizer.step()
    slots = reservoir.slots["conv1"].copy()
    newcomer = next(a for a in range(24) if a not in slots)
    before = optimizer.state[reservoir.active.conv1.weight]["momentum_buffer"].clone()
    reservoir.swap({"conv1": np.sort([newcomer, *slots[1:]])})
    after = optimizer.state[reservoir.active.conv1.weight]["momentum_buffer"]
    place = int(np.flatnonzero(reservoir.slots["conv1"] == newcomer)[0])
    others = [i for i in range(len(slots)) if i != place]
    assert after[place].abs().sum() == 0 and before[place].abs().sum() > 0
    assert torch.equal(after[others], before[others])


def test_initial_weights_are_scaled_to_the_narrow_fan_in():
    model, graph, _ = make()
    widths = {group.name: group.arms // 2 for group in graph}
    scaled = copy.deepcopy(model)
    scale_for_narrow_fan_in(scaled, graph, widths)
    torch.testing.assert_close(scaled.conv2.weight, model.conv2.weight * 2**0.5)
    assert torch.equal(scaled.stem[0].weight, model.stem[0].weight)
