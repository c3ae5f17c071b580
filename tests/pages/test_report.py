"""The report: one file with everything in it, right about the run, and readable in a browser."""

import dataclasses
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

import dynprune
from dynprune.data.loading import Source, load_data
from dynprune.deploy.answers import classes_of
from dynprune.errors import DynpruneError
from dynprune.pages import charts
from dynprune.pages.survey import Answers, Picks, survey
from dynprune.runs.directory import Run
from tests.cli.test_commands import dynprune as command
from tests.cli.test_commands import refused

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "mine <run>"
    options = ["--model", "resnet20", "--image-size", 16, "--epochs", 3, "--threads", 1, "--explore", 0.3]
    command("run", *options, "--out", path, "--batch", "1,2")
    return path


@pytest.fixture(scope="module")
def told(run):
    return survey(Run.open(run))


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.ids, self.alts, self.text = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        own = dict(attributes)
        self.tags.append(tag)
        self.links += [own[name] for name in ("src", "href", "xlink:href") if name in own]
        self.ids += [own["id"]] if "id" in own else []
        self.alts += [own["alt"]] if tag == "img" else []

    def handle_data(self, data):
        self.text.append(data)


def test_run_writes_a_page_that_needs_nothing_else(run):
    text = (run / "report.html").read_text()
    page = Page(text)
    assert "script" not in page.tags and "link" not in page.tags and "iframe" not in page.tags
    assert all(link.startswith(("#", "data:image/")) for link in page.links), page.links
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    assert len(page.ids) == len(set(page.ids)), "ids of different charts collide"
    named = {link[1:] for link in page.links if link.startswith("#")} | set(re.findall(r"url\(#([^)]*)\)", text))
    assert named and named <= set(page.ids)
    assert "currentColor" in text and "var(--line)" in text and charts.INK not in text and charts.FAINT not in text
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text and '<html lang="en">' in text
    assert all(alt for alt in page.alts)
    assert page.tags.count("svg") == page.tags.count("figcaption") - page.tags.count("img")
    assert "<run>" not in text and len(text) < 3_000_000


def test_the_page_says_what_the_run_did(run):
    results = json.loads((run / "result.json").read_text())
    text = " ".join(" ".join(Page((run / "report.html").read_text()).text).split())
    for said in (
        f"{100 * results['compact']['accuracy']:.2f} % right on the test images",
        results["bench"]["verdict"],
        results["compact"]["test_data"],
        f"{results['compact']['dense_macs'] / results['compact']['macs']:.2f}x fewer",
        "Accuracy over 3 epochs: training from",
        "Loss over 3 epochs: training from",
        "budget macs=0.25",
        f"{results['bench']['rows'][1]['compact']['p50_ms']:.3g}",
        "dynprune train --config",
        "explore = 0.3",
    ):
        assert said in text, said


def test_what_is_told_is_what_is_there(run, told):
    data = load_data(Source("digits", image_size="16"))
    said, right = classes_of(run / "compact.onnx", data, data.test)
    assert told.answers.confusion.sum() == len(right) and told.answers.accuracy == pytest.approx((said == right).mean())
    for label, guess in ((0, 0), (3, 5), (9, 9)):
        assert told.answers.confusion[label, guess] == ((right == label) & (said == guess)).sum()
    assert len(told.answers.worst) == min(12, (said != right).sum())
    result = json.loads((run / "result.json").read_text())["compact"]
    assert sum(layer.macs for layer in told.layers) == result["macs"]
    assert sum(layer.dense_macs for layer in told.layers) == result["dense_macs"]
    assert sum(layer.params for layer in told.layers) == result["params"]
    multiplying = [layer for layer in told.layers if layer.macs]
    assert len(multiplying) == 22 and all(layer.ms and layer.dense_ms for layer in multiplying)
    assert sum(layer.ms for layer in multiplying) < 5 * told.bench["compact_p50_ms"]
    assert all(0 < own <= full for _, full, own in told.widths)


def test_what_was_picked_is_what_ran(run, told):
    picks = told.picks
    chosen = json.loads((run / "selections.json").read_text())["groups"]
    last = np.concatenate([np.isin(np.arange(arms), chosen[name]["chosen"]) for name, arms in picks.groups])
    assert picks.steps[0] == 0 and picks.steps == sorted(picks.steps) and len(picks.steps) > 3
    assert np.array_equal(picks.chosen[-1], last)
    widths = {name: own for name, _, own in told.widths}
    at = 0
    for name, arms in picks.groups:
        assert (picks.chosen[:, at : at + arms].sum(1) == widths[name]).all()
        at += arms
    # the steps between two selections add up to how often each channel ran
    steps = np.diff([*picks.steps, json.loads((run / "selections.json").read_text())["steps"]])
    assert np.allclose(steps @ picks.chosen / steps.sum(), picks.executed)


def test_several_runs_stand_side_by_side(run, tmp_path):
    shutil.copytree(run, tmp_path / "other")
    done = command("report", run, tmp_path / "other", "--out", tmp_path / "both.html", "--json")
    found = json.loads(done.stdout)
    assert found == {"page": str(tmp_path / "both.html"), "card": None}
    text = " ".join(Page((tmp_path / "both.html").read_text()).text)
    assert "Side by side" in text and "Accuracy over million MACs" in text and "other" in text
    page = Page((tmp_path / "both.html").read_text())
    assert len(page.ids) == len(set(page.ids))


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    path = tmp_path_factory.mktemp("compared") / "mine"
    options = ["--model", "resnet20", "--image-size", 8, "--epochs", 1, "--threads", 1, "--batch-size", 256]
    command("compare", *options, "--policies", "cucb,static,dense", "--seeds", 2, "--out", path)
    return path


def test_a_comparison_is_told_as_a_whole(comparison):
    assert json.loads(command("report", comparison, "--json").stdout)["page"] == str(comparison / "report.html")
    found, text = json.loads((comparison / "comparison.json").read_text()), (comparison / "report.html").read_text()
    said = " ".join(Page(text).text)
    assert "Policies" in said and "Side by side" in said and "Accuracy over trillion training MACs" in said
    for own in found["policies"]:
        assert f"{100 * own['accuracy']:.2f} %" in said and f"{100 * own['spread']:.2f}" in said
    assert all(line in said for line in found["verdict"].splitlines())
    assert all(f"{own['policy']}-{own['seed']}" in said for own in found["runs"])
    assert not (comparison / "MODEL_CARD.md").exists()


def test_a_comparison_without_some_of_its_runs_is_told_all_the_same(comparison, run, tmp_path):
    shutil.copytree(comparison, tmp_path / "some")
    for name in ("cucb-0", "dense-1", "static-0", "static-1", "cucb-1"):
        shutil.rmtree(tmp_path / "some" / name)
    dynprune.report(tmp_path / "some")
    text = (tmp_path / "some" / "report.html").read_text()
    assert "dense-0" in text and "cucb-1" not in text and "static" in text
    assert "is the folder of a comparison. Expected one of the runs in it" in refused("bench", tmp_path / "some")
    dynprune.report(tmp_path / "some", run, out=tmp_path / "both.html")
    text = (tmp_path / "both.html").read_text()
    assert "Policies" in text and "Side by side" in text and "mine &lt;run&gt;" in text
    for content in ("{", "[]", '{"runs": [], "policies": []}', '{"runs": 3, "policies": []}'):
        (tmp_path / "some" / "comparison.json").write_text(content)
        assert "comparison.json is damaged" in refused("report", tmp_path / "some")


def test_a_run_that_only_trained_is_told_too(run, tmp_path):
    for name in ("config.toml", "metrics.jsonl", "env.json"):
        shutil.copy(run / name, tmp_path / name)
    assert dynprune.report(tmp_path).page == str(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "Accuracy over 3 epochs" in text and "Not compacted" in text


def test_damaged_notes_leave_out_what_they_held(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    for name, content in (("bench.json", "{"), ("env.json", "[1]"), ("selections.json", '{"groups": 3}')):
        (tmp_path / "run" / name).write_text(content)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write("garbage\n[]\n")
    text = (tmp_path / "run" / "report.html").read_text()
    dynprune.report(tmp_path / "run")
    damaged = (tmp_path / "run" / "report.html").read_text()
    assert "How often each channel" in text and "How often each channel" not in damaged
    assert "Accuracy over 3 epochs" in damaged and "Confusion" in damaged


def test_the_card_is_what_hubs_read(run):
    yaml = pytest.importorskip("yaml")
    text = (run / "MODEL_CARD.md").read_text()
    _, front, body = text.split("---\n", 2)
    found = yaml.safe_load(front)
    assert found["library_name"] == "dynprune" and found["pipeline_tag"] == "image-classification"
    value = found["model-index"][0]["results"][0]["metrics"][0]["value"]
    assert value == pytest.approx(json.loads((run / "result.json").read_text())["compact"]["accuracy"], abs=1e-4)
    assert body.lstrip().startswith("# resnet20-digits-compact") and "upload_folder" in body


def test_many_classes_and_layers_stay_legible():
    rng = np.random.default_rng(0)
    classes = [f"class {number}" for number in range(200)]
    answers = Answers(classes, rng.integers(0, 9, (200, 200)) + 40 * np.eye(200, dtype=int), [], 9, 9, "x", "y")
    picks = Picks([0, 4], rng.integers(0, 2, (2, 5000)).astype(np.uint8), [("g", 5000)], rng.random(5000))
    for chart in (charts.confusion(answers), charts.by_class(answers), charts.picks(picks)):
        ET.fromstring(chart.svg)
        assert len(chart.svg) < 400_000 and chart.alt.endswith(".")
    assert "the worst 25 of 200 classes" in charts.by_class(answers).svg
    some = dataclasses.replace(answers, confusion=np.zeros((200, 200), dtype=int) + np.diag([0] * 100 + [1] * 100))
    assert "100.0 %" in charts.by_class(some).alt  # classes without test images are left out


def test_bad_input(run, tmp_path):
    assert "has no config.toml" in refused("report", tmp_path)
    assert "which is a folder" in refused("report", run, "--out", tmp_path)
    (tmp_path / "config.toml").write_text((run / "config.toml").read_text())
    with pytest.raises(DynpruneError, match="has nothing to report yet. Let dynprune train finish first"):
        dynprune.report(tmp_path)
    with pytest.raises(DynpruneError, match="report got no run"):
        dynprune.report()


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here to open the page with")
@pytest.mark.parametrize("width", [500, 1400])
@pytest.mark.parametrize("which", ["run", "comparison"])
def test_a_browser_shows_it_without_anything_sticking_out(which, request, tmp_path, width):
    """The page is measured by the browser, which writes its own width and the picture's."""
    page, run = tmp_path / "page.html", request.getfixturevalue(which)
    dynprune.report(run)
    probe = "<script>document.title=[document.documentElement.scrollWidth,innerWidth].join(' ')</script>"
    page.write_text((run / "report.html").read_text().replace("</body>", probe + "</body>"))
    options = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    options += f" --disable-component-update --disable-sync --user-data-dir={tmp_path}/user --window-size={width},3000"
    done = subprocess.run(
        [BROWSER, *options.split(), "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=100
    )
    wide, shown = map(int, re.search(r"<title>(\d+) (\d+)</title>", done.stdout).groups())
    assert wide <= shown
    picture = tmp_path / "picture.png"
    subprocess.run(
        [BROWSER, *options.split(), f"--screenshot={picture}", (run / "report.html").as_uri()],
        capture_output=True,
        timeout=100,
    )
    pixels = np.asarray(Image.open(picture).convert("L"))
    assert pixels.shape[1] == width and len(np.unique(pixels)) > 50  # drawn, and not one colour
