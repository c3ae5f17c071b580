import json

import numpy as np
import pytest
import torch
from torch import nn

from dynprune import trace, zoo
from dynprune.budgets import fit as fitting
from dynprune.budgets.allocation import CostModel, constraints
from dynprune.budgets.fit import Fitter, Latency, budgets_met
from dynprune.budgets.latency import LatencyModel, LayerTable, Stopwatch, grid
from dynprune.errors import DynpruneError
from dynprune.files.onnxfile import open_session
from dynprune.runs.config import TrainConfig
from tests import models


@pytest.fixture(scope="module")
def graph():
    return trace(zoo.build("resnet20", 10), torch.randn(1, 3, 32, 32))


class Counting(LayerTable):
    """Instead of timing, a layer takes a millionth of its multiplications in ms."""

    def measure(self, layers, report):
        for layer in layers:
            self.ms[layer.key] = (
                1e-6 * layer.inputs * layer.outputs / layer.groups * np.prod(layer.kernel) * np.prod(layer.op.size)
            )


def test_layers_add_up_and_are_interpolated(graph, tmp_path):
    """Costs that are bilinear in the two widths come out exactly, anywhere between the measured points."""
    cost, allowed = CostModel(graph), constraints(graph)
    model = LatencyModel(graph, cost, allowed.smallest, Counting(tmp_path / "layers.json"))
    rng = np.random.default_rng(0)
    for _ in range(5):
        widths = rng.integers(allowed.smallest, cost.arms + 1)
        named = dict(zip(cost.names, widths.tolist()))
        expected = sum(1e-6 * graph.tensor_size(op.weight, named) * np.prod(op.size) for op in graph.ops)
        assert model.total(cost.axis_sizes(widths)) == pytest.approx(expected)
    model.correction = 2.0
    assert model.total(cost.axis_sizes(widths)) == pytest.approx(2 * expected)


@pytest.mark.parametrize(
    "factory, shape",
    [
        (models.Tiny, (3, 8, 8)),
        (models.Grouped, (3, 8, 8)),
        (lambda: zoo.build("torchvision:mobilenet_v2", 10), (3, 32, 32)),
    ],
)
def test_every_layer_can_be_timed_alone(factory, shape):
    """The one-layer model gives the output that the layer's multiplications say, at full and at narrow widths."""
    graph = trace(factory(), torch.randn(1, *shape))
    for op in graph.ops[:12]:
        first, second = graph.shapes[op.weight][:2]
        layer = LatencyModel.layer(graph, op, first, second)
        session = open_session(layer.onnx(), 1)
        x = np.zeros(session.get_inputs()[0].shape, dtype=np.float32)
        output = session.run(None, {"x": x})[0]
        assert output.size // layer.outputs == op.positions
        narrow = LatencyModel.layer(graph, op, max(1, first // 2), second)
        assert narrow.outputs == max(1, first // 2)


def test_measured_layers_are_kept_and_a_damaged_table_is_measured_anew(graph, tmp_path, monkeypatch):
    from dynprune.budgets import latency

    calls = []
    monkeypatch.setattr(latency, "time_layer", lambda layer: calls.append(layer.key) or 0.5)
    layer = LatencyModel.layer(graph, graph.ops[0], 16, 3)
    path = tmp_path / "cache" / "layers.json"
    LayerTable(path).measure([layer, layer], latency.silent)
    LayerTable(path).measure([layer], latency.silent)
    assert calls == [layer.key] and json.loads(path.read_text())["ms"] == {layer.key: 0.5}
    path.write_text("{")
    LayerTable(path).measure([layer], latency.silent)
    assert len(calls) == 2


def test_a_layer_is_measured_from_its_narrowest_to_its_full_size():
    assert grid(4, 512) == [64, 128, 256, 384, 512] and grid(64, 64) == [64] and grid(1, 3) == [1, 2, 3]
    assert grid(100, 512)[0] == 100


class Fake(Stopwatch):
    """A machine on which everything takes a fixed time and the layers' own, which the table underestimates more at
    narrow widths."""

    def __init__(self, full, graph, example, whole=False, int8=False):
        self.full, self.graph, self.example, self.seen = full, graph, example, []

    def measure_dense(self):
        return self.of(self.full)

    def measure(self, model):
        self.seen.append(model)
        return self.of(self.full), self.of(model)

    @staticmethod
    def of(model):
        return 0.2 + 2e-6 * sum(p.numel() for p in model.parameters())


@pytest.fixture
def machine(monkeypatch, tmp_path):
    monkeypatch.setattr(fitting, "Stopwatch", Fake)
    monkeypatch.setattr(fitting, "LayerTable", lambda: Counting(tmp_path / "layers.json"))


def fitter(graph, *budget, **settings):
    return Fitter(
        zoo.build("resnet20", 10),
        graph,
        torch.randn(1, 3, 32, 32),
        TrainConfig(model="resnet20", budget=budget, **settings).allowed,
    )


@pytest.mark.parametrize("budget", ["latency=0.5", "latency=0.4", "latency=0.4ms"])
def test_candidates_are_corrected_until_they_use_the_budget(graph, machine, budget):
    own = fitter(graph, budget, align="1")
    found = own.fit()
    limit = own.in_ms[0].value(found.latency.dense_ms)
    assert 0.9 * limit <= found.latency.measured_ms <= limit
    assert found.latency.measured_ms == pytest.approx(Fake.of(own.stopwatch.candidate(found.widths)))
    assert 2 <= found.candidates <= fitting.CANDIDATES, "the first prediction is wrong on this machine"


def test_other_budgets_hold_beside_milliseconds(graph, machine):
    own = fitter(graph, "latency=0.9", "macs=0.25", align="1")
    found = own.fit()
    lines = budgets_met(graph, own.budget.limits, found.widths, found.latency)
    assert [line["met"] for line in lines] == [True, True] and lines[1]["actual"] > 0.97 * lines[1]["limit"]


def test_a_time_below_the_narrowest_network_is_refused_with_what_is_reachable(graph, machine):
    with pytest.raises(
        DynpruneError,
        match=r"latency=0.05ms is below what this network can reach: its narrowest form "
        r"takes .* ms.*Choose at least [0-9.]+ms",
    ):
        fitter(graph, "latency=0.05ms").fit()
    with pytest.raises(DynpruneError, match="--budget macs=0.01 is below"):
        fitter(graph, "latency=0.5", "macs=0.01").fit()


def test_a_missed_time_is_said(graph):
    # within what two measurements differ
    assert budgets_met(graph, ["latency=0.5"], {}, Latency(1.0, 0.5, 0.54))[0]["met"]
    assert not budgets_met(graph, ["latency=0.5"], {}, Latency(1.0, 0.5, 0.56))[0]["met"]


def test_whole_networks_are_timed_beside_the_dense_one(graph):
    full, example = zoo.build("resnet20", 10), torch.randn(1, 3, 32, 32)
    watch = Stopwatch(full.train(), graph, (example,))
    dense, narrow = watch.measure(
        watch.candidate({name: max(1, width // 4) for name, width in graph.full_widths.items()})
    )
    assert dense > 0 and narrow > 0 and full.training


class TwoHeads(nn.Module):
    """A dict of outputs, the second of which takes most of the time."""

    def __init__(self):
        super().__init__()
        self.body, self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 2, 1), nn.Conv2d(16, 8, 3)

    def forward(self, x):
        y = self.body(x).relu()
        return {"few": self.first(y), "many": [self.second(y)]}


def test_time_is_that_of_all_outputs_of_a_network_of_any_task():
    model, example = TwoHeads().eval(), torch.zeros(1, 3, 8, 8)
    watch = Stopwatch(model, trace(model, example), (example,), whole=True)
    assert [entry.shape[1] for entry in watch.dense[0].get_outputs()] == [2, 8]
    assert watch.measure_dense() > 0 and watch.measure(model)[1] > 0
