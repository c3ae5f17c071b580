"""The report of a gated network: what its gates decide, on which images, and beside what."""

import json
import re

import numpy as np
import pytest

from dynprune.gates.export import load_run
from dynprune.gates.stats import observe
from dynprune.pages import charts
from dynprune.pages.survey import survey
from dynprune.runs.directory import GateRun
from tests.cli.test_commands import dynprune as command
from tests.pages.test_report import Page


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "gates"
    options = ["--model", "resnet20", "--image-size", 16, "--epochs", 2, "--threads", 1, "--target", 0.7]
    command("gate", *options, "--out", path)
    command("export", path, "--onnx")
    command("bench", path)
    return path


@pytest.fixture(scope="module")
def page(run):
    found = json.loads(command("report", run, "--json").stdout)
    assert found == {"page": str(run / "report.html"), "card": str(run / "MODEL_CARD.md")}
    return Page((run / "report.html").read_text())


def test_the_page_says_what_the_gates_do(run, page):
    text = " ".join(" ".join(page.text).split())
    result, bench = json.loads((run / "result.json").read_text()), json.loads((run / "bench.json").read_text())
    gates = result["gate"]
    for said in (
        gates["verdict"],
        f"{100 * gates['stats']['share']:.2f} % (target 70.00 %",
        f"{100 * gates['static_accuracy']:.2f} % at",
        f"{100 * gates['stats']['frozen_accuracy']:.2f} % at",
        *(line["group"] for line in gates["stats"]["layers"]),
        f"{gates['stats']['layers'][0]['entropy_bits']:.3f}",
        *(f"{row['mean_ms']:.3g}" for row in bench["rows"]),
        "Easy images",
        "Hard images",
        "Cost of each image",
        "bits in the mean",
        "dynprune gate --config",
        "dynprune bench",
    ):
        assert said in text, said
    assert "Not compacted" not in text
    assert len(page.ids) == len(set(page.ids)) and all(page.alts) and page.tags.count("img") == 24


def test_easy_and_hard_images_are_those_that_cost_least_and_most(run):
    told = survey(GateRun.open(run)).gated
    model, data = load_run(GateRun.open(run))[0], GateRun.open(run).images()
    seen = observe(model, data, data.test)
    ordered = np.sort(seen.shares.numpy())
    assert [own.share for own in told.easiest] == pytest.approx(ordered[:12].tolist())
    assert [own.share for own in told.hardest] == pytest.approx(ordered[::-1][:12].tolist())
    assert told.shares.mean() == pytest.approx(json.loads((run / "result.json").read_text())["gate"]["stats"]["share"])
    for own in (*told.easiest, *told.hardest):
        place = int(re.search(r"\d+", own.name)[0])
        assert own.label == data.classes[int(seen.labels[place])] and own.said == data.classes[int(seen.said[place])]
        assert own.share == pytest.approx(float(seen.shares[place]))


def test_the_card_speaks_of_gates(run, page):
    text = (run / "MODEL_CARD.md").read_text()
    result = json.loads((run / "result.json").read_text())["gate"]
    assert "gated.onnx" in text and "compact.onnx" not in text and "removed" not in text
    assert f"{100 * result['accuracy']:.2f} % ({result['test_data']})" in text and result["verdict"] in text
    assert f"{result['macs'] / result['dense_macs']:.3f} of without gates" in text


def test_gates_that_were_stopped_or_not_exported_are_told_as_far_as_they_went(run, tmp_path):
    for name in ("gate.toml", "metrics.jsonl", "env.json", "result.json", "gated.safetensors"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    command("report", tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert "Easy images" in text and "Time in onnxruntime" not in text
    (tmp_path / "gated.safetensors").unlink()
    (tmp_path / "result.json").unlink()
    command("report", tmp_path)
    assert "Easy images" not in (tmp_path / "report.html").read_text()


def test_many_classes_and_layers_stay_legible():
    costs = {f"class {number}": 0.2 + number / 400 for number in range(200)}
    lines = [dict(units=4, open_share=0.5, entropy_bits=0.3, information_bits=0.1) for _ in range(90)]
    assert "the most costly 25 of 200 classes" in charts.class_costs(costs).svg
    assert "carries 0.30 bits" in charts.gate_layers(lines).alt
