"""Gated networks as ONNX: every form of every layer computes the same, and a closed gate means less work."""

import numpy as np
import onnx
import pytest
import torch

from dynprune.data.scores import Scores
from dynprune.files.onnxfile import open_session, write_onnx
from dynprune.gates.onnx import FORMS, Rewriter, choose_forms, with_pairs
from tests.gates.test_gating import deciding


@pytest.fixture(scope="module", params=["tiny", "grouped", "densenet40", "resnet18", "mobilenet_v2"])
def exported(request, tmp_path_factory):
    model, images = deciding(request.param)
    path = tmp_path_factory.mktemp("onnx") / "network.onnx"
    write_onnx(Scores(model.network), images[:1], path, None, {})
    return model, images, Rewriter(onnx.load(path), model, "model.")


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_every_form_computes_what_torch_computes(exported, form):
    model, images, rewriter = exported
    session = open_session(rewriter.rewrite({weight: form for weight in model.sites}).SerializeToString(), 1)
    output, choices = model.run(images, model.threshold)
    for i, image in enumerate(images.split(1)):
        scores, opened = session.run(["logits", "gates"], {"input": image.numpy()})
        assert (opened[0] == torch.cat(choices.open, 1)[i].numpy()).all()
        assert np.abs(scores[0] - output[i].numpy()).max() < 1e-5 * float(output.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("state", [0.0, 1.0])
def test_all_closed_and_all_open(exported, form, state):
    model, images, rewriter = exported
    kept = model.shift.clone()
    try:
        model.shift.fill_(1e4 if state else -1e4)
        session = open_session(rewriter.rewrite({weight: form for weight in model.sites}).SerializeToString(), 1)
        scores, opened = session.run(["logits", "gates"], {"input": images[:1].numpy()})
        assert opened.mean() == 1 if state else opened.sum() == sum(gate.cuts for gate in model.gates)
        expected = model.network(images[:1]) if state else model(images[:1])
        assert np.abs(scores - expected.numpy()).max() < 1e-5 * float(expected.abs().max())
    finally:
        model.shift.copy_(kept)


def test_pairs_are_the_two_layers_of_a_residual_branch(exported, request):
    """In resnet18 both convolutions of a block, in mobilenet_v2 the expansion and the projection around the depthwise
    layer; where layers decide themselves, none."""
    rewriter = exported[2]
    kinds = {"resnet18": ("Conv", "Relu", "Conv"), "mobilenet_v2": ("Conv", "Clip", "Conv", "Clip", "Conv")}.get(
        request.node.callspec.params["exported"]
    )
    assert {tuple(node.op_type for node in chain) for chain in rewriter.pairs.values()} == ({kinds} if kinds else set())
    assert kinds != ("Conv", "Relu", "Conv") or set(rewriter.pairs) == {
        f"layer{i}.{j}.conv1.weight" for i in range(1, 5) for j in range(2)
    }


def test_a_pair_is_taken_where_it_is_quicker_than_both_layers():
    layers = {
        "a": {"ms": {"full": 3.0, "blocks": 2.0}, "pair_ms": 2.5, "reader": "b"},
        "b": {"ms": {"full": 1.0, "gather": 0.4}},
    }
    assert [line["form"] for line in with_pairs(layers, FORMS).values()] == ["blocks", "gather"]
    assert [line["form"] for line in with_pairs(layers, ("full", "pair")).values()] == ["pair", "pair"]
    assert [line["form"] for line in with_pairs(layers, ("full", "gather")).values()] == ["full", "gather"]


def test_forms_are_chosen_among_those_that_were_timed(exported):
    model, images, rewriter = exported
    with torch.no_grad():
        choices = model.run(images[:2], model.threshold)[1]
    chosen = choose_forms(rewriter, choices, lambda *_: None)
    assert chosen.keys() <= model.sites.keys() and chosen
    assert all(
        line["form"] in (min(line["ms"], key=line["ms"].get), "pair") and "full" in line["ms"]
        for line in chosen.values()
    )
    assert {weight for weight, line in chosen.items() if "reader" in line} == rewriter.pairs.keys()


def executed(proto, feed, tmp_path):
    """Names of the node kinds that onnxruntime really ran, with counts."""
    import json
    from collections import Counter

    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix, options.log_severity_level = (
        True,
        str(tmp_path / "profile"),
        3,
    )
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    session.run(None, feed)
    events = json.loads(open(session.end_profiling()).read())
    return Counter(
        event["args"]["op_name"]
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
    )


def test_closed_layers_are_not_executed(tmp_path):
    model, images = deciding("densenet40")
    path = tmp_path / "network.onnx"
    write_onnx(Scores(model.network), images[:1], path, None, {})
    rewriter, feed = Rewriter(onnx.load(path), model, "model."), {"input": images[:1].numpy()}
    counts = {}
    for shift in (-1e4, 1e4):
        model.shift.fill_(shift)
        counts[shift] = executed(rewriter.rewrite({weight: "layer" for weight in model.sites}), feed, tmp_path)["Conv"]
    # the first convolution and the two transitions, which carry everything
    assert counts[1e4] == 39 and counts[-1e4] == 3


def test_closed_units_of_a_pair_are_not_executed(exported, tmp_path):
    model, images, rewriter = exported
    feed, counts, kept = {"input": images[:1].numpy()}, {}, model.shift.clone()
    try:
        for shift in (-1e4, 1e4):
            model.shift.fill_(shift)
            counts[shift] = executed(rewriter.rewrite({weight: "pair" for weight in rewriter.pairs}), feed, tmp_path)[
                "Conv"
            ]
    finally:
        model.shift.copy_(kept)
    expected = sum(
        sum(node.op_type == "Conv" for node in chain) * (len(gate.sizes) - gate.cuts)
        for weight, chain in rewriter.pairs.items()
        for gate in model.sites[weight].decides
    )
    assert counts[1e4] - counts[-1e4] == expected and (expected > 0) == bool(rewriter.pairs)
