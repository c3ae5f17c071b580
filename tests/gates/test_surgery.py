"""What is closed for good: it stays closed, and the network without it opens and computes the same."""

import numpy as np
import onnx
import pytest
import torch

from dynprune.data.scores import Scores
from dynprune.files.onnxfile import open_session, write_onnx
from dynprune.gates.onnx import Rewriter
from dynprune.gates.surgery import RARE, all_units, close_rare, closed_for_good, cut_closed
from tests.gates.test_gating import deciding


def closing(name):
    """A gated network of which about half of the units are closed for good, some images, and how many units are
    closed."""
    model, images = deciding(name)
    rng = torch.Generator().manual_seed(2)
    rates = {gate.group: (torch.rand(1, len(gate.sizes), generator=rng) < 0.5).float() for gate in model.gates}
    return model, images, close_rare(model, {group: own.expand(200, -1) for group, own in rates.items()})


@torch.no_grad()
@pytest.mark.parametrize("name", ["tiny, every channel", "grouped", "vgg16", "densenet40", "mobilenet_v2", "alexnet"])
def test_the_cut_network_opens_and_computes_the_same(name):
    model, images, count = closing(name)
    small = cut_closed(model, images[:1])
    assert count == sum(int(own.sum()) for own in closed_for_good(model).values()) > 0
    assert small.graph.params({}) < model.graph.params({}) and small.most_share < model.most_share
    (output, choices), (ours, left) = model.run(images, model.threshold), small.run(images, small.threshold)
    assert torch.equal(all_units(model, torch.cat(left.open, 1)), torch.cat(choices.open, 1))
    assert float((ours - output).abs().max()) < 1e-5 * float(output.abs().max())
    paid, whole = (
        small.executed_share(left) * small.dense_macs - small.gate_macs,
        model.executed_share(choices) * model.dense_macs - model.gate_macs,
    )
    assert (
        torch.allclose(paid, whole, rtol=1e-9)
        and small.gate_macs < model.gate_macs
        and small.dense_macs == model.dense_macs
    )
    assert torch.allclose(
        torch.cat([small(image) for image in images.split(1)]), output, atol=1e-5 * float(output.abs().max())
    )


def test_only_what_is_rarely_open_is_closed_and_each_group_keeps_its_best_unit():
    model, _ = deciding("vgg16")
    images = round(2 / RARE)
    opened = {}
    for gate in model.gates:
        opened[gate.group] = torch.zeros(images, len(gate.sizes))
        opened[gate.group][0, 1] = 1  # less than rare, but the best one there is
        opened[gate.group][:2, 2:] = float(gate is model.gates[0])  # just not rare
    close_rare(model, opened)
    closed = closed_for_good(model)
    first, *others = model.gates
    assert closed[first.group].tolist() == [True, True] + [False] * (len(first.sizes) - 2)
    assert all(closed[gate.group].tolist() == [True, False] + [True] * (len(gate.sizes) - 2) for gate in others)


@torch.no_grad()
def test_shifting_the_threshold_does_not_open_what_is_closed():
    model, images, _ = closing("vgg16")
    model.shift.fill_(8.0)
    choices = model.run(images, model.threshold)[1]
    for gate, opened in zip(choices.gates, choices.open):
        assert not opened[:, closed_for_good(model)[gate.group]].any()


@torch.no_grad()
def test_a_group_of_which_all_is_closed_keeps_one_unit():
    model, images = deciding("vgg16")
    for predictor in model.predictors:
        predictor.spread.weight.zero_()
        predictor.spread.bias.fill_(-1e4)
    small = cut_closed(model, images[:1])
    assert all(len(gate.sizes) == 1 for gate in small.gates)
    output, ours = model(images), small(images)
    assert float((ours - output).abs().max()) < 1e-5 * float(output.abs().max())


def test_nothing_to_cut_is_the_network_itself():
    model, images = deciding("tiny")
    assert cut_closed(model, images[:1]) is model
    with torch.no_grad():
        opened = torch.cat(model.run(images, model.threshold)[1].open, 1)
    assert torch.equal(all_units(model, opened), opened)


@torch.no_grad()
def test_the_cut_network_as_onnx_is_the_whole_one(tmp_path):
    model, images, _ = closing("densenet40")
    small = cut_closed(model, images[:1])
    write_onnx(Scores(small.network), images[:1], tmp_path / "cut.onnx", None, {})
    session = open_session(
        Rewriter(onnx.load(tmp_path / "cut.onnx"), small, "model.").rewrite({}).SerializeToString(), 1
    )
    output, choices = model.run(images, model.threshold)
    for i, image in enumerate(images.split(1)):
        scores, opened = session.run(["logits", "gates"], {"input": image.numpy()})
        assert torch.equal(all_units(model, torch.from_numpy(opened))[0], torch.cat(choices.open, 1)[i])
        assert np.abs(scores[0] - output[i].numpy()).max() < 1e-5 * float(output.abs().max())
