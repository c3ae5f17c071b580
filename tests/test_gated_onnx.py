"""Gated networks as ONNX: every form of every layer computes the same, and a closed gate means less work."""

import numpy as np
import onnx
import pytest
import torch

from dynprune.gated_onnx import FORMS, Rewriter, choose_forms
from dynprune.onnxfile import open_session, write_onnx
from dynprune.scores import Scores
from tests.test_gating import deciding


@pytest.fixture(scope="module", params=["tiny", "grouped", "densenet40", "resnet18"])
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


def test_forms_are_chosen_among_those_that_were_timed(exported):
    model, images, rewriter = exported
    with torch.no_grad():
        choices = model.run(images[:2], model.threshold)[1]
    chosen = choose_forms(rewriter, choices, lambda *_: None)
    assert chosen.keys() <= model.sites.keys() and chosen
    assert all(line["form"] == min(line["ms"], key=line["ms"].get) and "full" in line["ms"] for line in chosen.values())


def executed(proto, feed, tmp_path):
    """Names of the node kinds that onnxruntime really ran, with counts."""
    import json
    from collections import Counter

    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix, options.log_severity_level = True, str(tmp_path / "profile"), 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    session.run(None, feed)
    events = json.loads(open(session.end_profiling()).read())
    return Counter(event["args"]["op_name"] for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"))


def test_closed_layers_are_not_executed(tmp_path):
    model, images = deciding("densenet40")
    path = tmp_path / "network.onnx"
    write_onnx(Scores(model.network), images[:1], path, None, {})
    rewriter, feed = Rewriter(onnx.load(path), model, "model."), {"input": images[:1].numpy()}
    counts = {}
    for shift in (-1e4, 1e4):
        model.shift.fill_(shift)
        counts[shift] = executed(rewriter.rewrite({weight: "layer" for weight in model.sites}), feed, tmp_path)["Conv"]
    assert counts[1e4] == 39 and counts[-1e4] == 3  # the first convolution and the two transitions, which carry everything
