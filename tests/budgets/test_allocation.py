import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dynprune import trace, zoo
from dynprune.budgets.allocation import CostModel, alignment, allocate, constraints
from dynprune.budgets.fit import budgets_met
from dynprune.budgets.limits import parse_limit
from dynprune.errors import DynpruneError
from dynprune.structure.surgery import slim
from tests import models


@pytest.fixture(scope="module")
def graphs():
    return {name: trace(zoo.build(name, 10), torch.randn(1, 3, 32, 32)) for name in ("vgg16", "resnet20", "densenet40")}


@pytest.mark.parametrize(
    "text, quantity, amount, absolute",
    [
        ("0.25", "macs", 0.25, False),
        ("macs=0.25", "macs", 0.25, False),
        ("macs=80M", "macs", 80e6, True),
        ("params=0.11", "params", 0.11, False),
        ("params=1.5M", "params", 1.5e6, True),
        ("params=20k", "params", 20e3, True),
        ("latency=0.3", "latency", 0.3, False),
        ("latency=2ms", "latency", 2.0, True),
        ("latency=500us", "latency", 0.5, True),
        ("latency=0.5ms", "latency", 0.5, True),
        ("macs=1", "macs", 1.0, False),
        ("macs=5000000", "macs", 5e6, True),
    ],
)
def test_budgets_are_read(text, quantity, amount, absolute):
    limit = parse_limit(text)
    assert (limit.quantity, limit.amount, limit.absolute) == (quantity, pytest.approx(amount), absolute)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "-1",
        "1.5",
        "80M",
        "macs=",
        "flops=3",
        "macs=nan",
        "macs=inf",
        "params=0",
        "1e400",
        "latency=2",
        "latency=0ms",
        "latency=2M",
        "macs=2ms",
    ],
)
def test_budgets_that_make_no_sense_are_refused(text):
    with pytest.raises(DynpruneError, match="--budget got .*Expected"):
        parse_limit(text)


@pytest.mark.parametrize("factory", [models.Tiny, models.Grouped, models.Shared])
def test_the_cost_model_is_exact(factory):
    """Against the graph, against PyTorch's counter on the narrow network, and its slopes against differences."""
    model = models.perturb(factory())
    x = torch.randn(1, 3, 8, 8)
    graph = trace(model, x)
    cost, rng = CostModel(graph), np.random.default_rng(0)
    for _ in range(5):
        widths = rng.integers(1, cost.arms)
        named = dict(zip(cost.names, widths.tolist()))
        small = slim(model, graph.kept({name: np.arange(width) for name, width in named.items()}))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            small(x)
        assert 2 * cost.cost("macs", widths) == 2 * graph.macs(named) == counter.get_total_flops()
        assert cost.cost("params", widths) == graph.params(named) == sum(p.numel() for p in small.parameters())
        for quantity in ("macs", "params"):
            step = np.eye(len(widths), dtype=np.int64)
            differences = [(cost.cost(quantity, widths + e) - cost.cost(quantity, widths - e)) / 2 for e in step]
            assert np.allclose(cost.slopes(quantity, widths), differences)


@pytest.mark.parametrize("budget", [0.5, 0.25, 0.1])
@pytest.mark.parametrize("name", ["vgg16", "resnet20", "densenet40"])
@pytest.mark.parametrize("allocation", ["uniform", "balanced"])
def test_budgets_are_kept_and_used(graphs, name, budget, allocation):
    graph = graphs[name]
    for quantity, dense in (("macs", graph.macs({})), ("params", graph.params({}))):
        for align, within in (("1", 0.02), ("auto", 0.05 if name == "vgg16" else 0.4)):
            allowed = constraints(graph, align=align)
            widths = allocate(graph, [f"{quantity}={budget}"], allocation, allowed)
            share = getattr(graph, quantity)(widths) / dense
            assert budget * (1 - within) <= share <= budget
            assert all(
                width % step == 0 or width == graph.groups[n].arms
                for (n, width), step in zip(widths.items(), allowed.steps)
            )


def test_several_budgets_hold_at_once(graphs):
    graph = graphs["vgg16"]
    widths = allocate(graph, ["macs=0.25", "params=0.11"], "balanced")
    lines = budgets_met(graph, ["macs=0.25", "params=0.11"], widths)
    assert all(line["met"] and line["actual"] > 0.95 * line["limit"] for line in lines)
    # bound by its parameters
    assert graph.macs(allocate(graph, ["macs=0.25", "params=0.11"], "uniform")) < 0.2 * graph.macs({})
    neighbours = list(widths.values())
    assert all(a <= 2 * b for a, b in zip(neighbours, neighbours[1:])), "no bottlenecks"


def test_uniform_widths_are_uniform(graphs):
    widths = allocate(graphs["vgg16"], ["0.25"], "uniform", constraints(graphs["vgg16"], align="1"))
    shares = [width / graphs["vgg16"].groups[name].arms for name, width in widths.items()]
    assert max(shares) - min(shares) < 0.05


def test_a_whole_budget_takes_everything(graphs):
    assert allocate(graphs["resnet20"], ["1"]) == graphs["resnet20"].full_widths


def test_constraints_are_kept(graphs):
    graph = graphs["vgg16"]
    allowed = constraints(graph, min_width=40, max_width_share=0.9, keep=["features.0", "features.1[047]"])
    widths = allocate(graph, ["0.5"], "balanced", allowed)
    assert widths["features.0"] == 64 and widths["features.10"] == 128 and min(widths.values()) >= 48
    kept = ("features.0", "features.10", "features.14", "features.17")
    assert all(
        width == graph.groups[name].arms if name in kept else width <= 0.9 * graph.groups[name].arms
        for name, width in widths.items()
    )


def test_a_budget_below_the_narrowest_network_names_what_is_reachable():
    graph = trace(models.Tiny(), torch.randn(1, 3, 8, 8))
    with pytest.raises(DynpruneError, match=r"below what this network can reach.*Choose at least (0\.\d+)") as caught:
        allocate(graph, ["0.001"])
    named = str(caught.value).partition("Choose at least ")[2].partition(",")[0]
    assert list(allocate(graph, [named]).values()) == constraints(graph).smallest.tolist()


def test_unknown_layers_are_refused(graphs):
    with pytest.raises(DynpruneError, match=r'--keep got "stage9".*Groups: conv1'):
        constraints(graphs["resnet20"], keep=["stage9"])


def test_alignment_falls_back_for_narrow_layers():
    widest = alignment(512)
    assert widest in (8, 16)  # what the processor's vectors hold
    assert [alignment(arms) for arms in (512, 64, 48, 32, 16, 12, 6)] == [widest, widest, 8, 8, 4, 4, 1]
    assert [alignment(arms, "12") for arms in (512, 6)] == [12, 6]
    assert [alignment(arms, "fine") for arms in (256, 128, 64, 16, 6)] == [widest, 8, 4, 4, 1]


def test_learned_widths_follow_the_worth_of_a_channel(graphs):
    """Equal worth per cost gives the balanced widths; a group worth more gets wider, at most twice, and the budget
    stays used."""
    graph, budget = graphs["vgg16"], ["macs=0.25", "params=0.11"]
    model, allowed = CostModel(graph), constraints(graph)
    balanced = allocate(graph, budget, "balanced")
    own = np.array(list(balanced.values()))
    price = sum(model.slopes(q, own) / (share * model.dense(q)) for q, share in (("macs", 0.25), ("params", 0.11)))
    indifferent = allocate(graph, budget, "learned", loss=price)
    assert all(abs(indifferent[name] - balanced[name]) <= 2 * step for name, step in zip(balanced, allowed.steps))
    favoured = list(graph.groups)[6]
    loss = np.where(np.arange(len(own)) == 6, 3 * price, price)
    widths = allocate(graph, budget, "learned", loss=loss)
    assert balanced[favoured] * 1.2 < widths[favoured] <= 2 * balanced[favoured] + 16
    assert all(line["met"] and line["actual"] > 0.93 * line["limit"] for line in budgets_met(graph, budget, widths))
    assert allocate(graph, budget, "learned") == balanced  # before anything was learned
    assert alignment(512, 7) == 7 and alignment(4, 8) == 4
