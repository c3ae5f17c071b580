import pytest
import torch

from dynprune import trace, zoo
from dynprune.budget import alignment, smallest_widths, uniform_widths
from dynprune.errors import DynpruneError
from tests import models


@pytest.mark.parametrize("budget", [0.5, 0.25, 0.1])
@pytest.mark.parametrize("name", ["vgg16", "resnet20", "densenet40"])
def test_budget_is_kept_and_used(name, budget):
    graph = trace(zoo.build(name, 10), torch.zeros(1, 3, 32, 32))
    for align, within in ((1, 0.03), (0, 0.25)):
        widths = uniform_widths(graph, budget, align)
        share = graph.macs(widths) / graph.macs({})
        assert budget * (1 - within) <= share <= budget
        assert all(width % alignment(graph.groups[n].arms, align) == 0 or width == graph.groups[n].arms for n, width in widths.items())


def test_widths_are_uniform():
    graph = trace(zoo.build("vgg16", 10), torch.zeros(1, 3, 32, 32))
    shares = [width / graph.groups[name].arms for name, width in uniform_widths(graph, 0.25, 1).items()]
    assert max(shares) - min(shares) < 0.05


def test_a_whole_budget_takes_everything():
    graph = trace(models.Tiny(), torch.zeros(1, 3, 8, 8))
    assert uniform_widths(graph, 1.0) == graph.full_widths


def test_a_budget_below_the_narrowest_network_names_what_is_reachable():
    graph = trace(models.Tiny(), torch.zeros(1, 3, 8, 8))
    with pytest.raises(DynpruneError, match=r"below what this network can reach.*Choose at least (0\.\d+)") as caught:
        uniform_widths(graph, 0.001)
    named = float(str(caught.value).partition("Choose at least ")[2].partition(",")[0])
    assert uniform_widths(graph, named) == smallest_widths(graph, 0)


def test_alignment_falls_back_for_narrow_layers():
    assert [alignment(arms, 0) for arms in (512, 64, 48, 32, 16, 12, 6)] == [16, 16, 8, 8, 4, 4, 1]
    assert alignment(512, 7) == 7 and alignment(4, 8) == 4
