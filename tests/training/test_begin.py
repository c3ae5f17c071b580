"""What training begins with where a network is trained, but not on these classes."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dynprune import zoo
from dynprune.budgets.fit import Fitter
from dynprune.budgets.limits import Budget
from dynprune.data.loading import Source, load_data
from dynprune.data.scores import evaluate
from dynprune.repair.scores import fit_to_labels
from dynprune.repair.shares import Share
from dynprune.repair.widths import Found
from dynprune.runs.config import TrainConfig
from dynprune.structure.tracing import trace
from dynprune.training.begin import probed, searched
from dynprune.training.session import Session
from tests.models import perturb

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data():
    return load_data(Source("digits", image_size="16"))


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Of a network of seven classes that has not seen these images: its features are random ones."""
    path = tmp_path_factory.mktemp("weights") / "seven.pt"
    torch.manual_seed(0)
    torch.save(perturb(zoo.build("resnet20", 7, size=(3, 16, 16))).state_dict(), path)
    settings = TrainConfig(
        model="resnet20", weights=str(path), image_size="16", epochs=1, budget=("0.6",), threads=1, search_time="1s"
    )
    return settings.validate()


@pytest.mark.parametrize("policy", ["static", "cucb"])
def test_new_scores_are_fitted_to_the_labels_before_anything_is_cut(data, config, policy):
    session = Session(dataclasses.replace(config, policy=policy), data)
    known = evaluate(session.model.eval(), session.data, session.data.val)
    untouched = Session(dataclasses.replace(config, policy=policy, no_repair=True), data)
    chance = evaluate(untouched.model.eval(), untouched.data, untouched.data.val)
    assert known > chance + 0.1 and session.teacher is None  # random features tell digits apart a little


def test_a_resumed_run_and_dense_training_begin_without(data, config, monkeypatch):
    fitted = []
    monkeypatch.setattr("dynprune.training.session.probed", lambda *_: fitted.append(1) or "")
    Session(dataclasses.replace(config, policy="dense"), data)
    fit = Session(dataclasses.replace(config, no_repair=True), data).fit
    Session(config, data, fit=fit)
    assert not fitted
    Session(config, data)
    assert fitted


def test_scores_of_several_layers_are_left(data):
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.one, self.two = nn.Conv2d(3, 8, 3), nn.Linear(8, 10), nn.Linear(8, 10)

        def forward(self, x):
            features = self.body(x).relu().mean((2, 3))
            return self.one(features) + self.two(features)

    model = TwoHeads().eval()
    graph, before = trace(model, data.example), {name: own.clone() for name, own in model.state_dict().items()}
    assert probed(model, ["one", "two"], graph, data, 0, CPU) == ""
    assert all(torch.equal(own, before[name]) for name, own in model.state_dict().items())


def test_a_linear_probe_finds_what_separates_classes_and_each_share_counts():
    torch.manual_seed(0)
    labels = torch.arange(3).repeat(40)
    rows = torch.randn(120, 5) * 0.3 + torch.eye(3, 5)[labels] * 2
    model = nn.Sequential(nn.Linear(5, 3))
    fit_to_labels(model, "0", rows, labels)
    assert (model(rows).argmax(1) == labels).float().mean() > 0.98

    class Halved(Share):
        """Of two processes; the other one's half is known here."""

        def gathered(self, values):
            return torch.cat([values, rows[60:] if values.ndim == 2 else labels[60:]])

    again = nn.Sequential(nn.Linear(5, 3))
    fit_to_labels(again, "0", rows[:60], labels[:60], Halved(0, 2))
    torch.testing.assert_close(again[0].weight, model[0].weight)


@pytest.mark.parametrize("more", [True, False])
def test_a_search_within_several_limits_begins_where_the_network_is_nearer(more):
    """more: whether more multiply-accumulates bring it nearer."""
    example = torch.randn(2, 3, 32, 32)
    full = zoo.build("vgg16", 10).eval()
    budget, graph = Budget(("macs=0.25", "params=0.11")), trace(full, example)
    fitter = Fitter(full, graph, example, budget)
    fit = fitter.fit()
    begun = []

    def find_widths(start, *_given, **_named):
        begun.append(start)
        return Found(start, 0.0)

    compaction = SimpleNamespace(pull=lambda widths: (-1) ** more * graph.macs(widths), find_widths=find_widths)
    searched(compaction, fitter, fit, budget, 1.0)
    macs = graph.macs({})
    assert graph.macs(fit.widths) < 0.2 * macs and graph.params(fit.widths) <= 0.11 * graph.params({})
    assert (graph.macs(begun[0]) > 0.2 * macs) == more
    assert graph.macs(begun[0]) <= 0.25 * macs and graph.params(begun[0]) <= 0.11 * graph.params({})
    one = Budget(("macs=0.25",))
    fitter = Fitter(full, graph, example, one)
    searched(compaction, fitter, fitter.fit(), one, 1.0)
    assert begun[1] == fitter.fit().widths  # of one limit the allocation is the start
