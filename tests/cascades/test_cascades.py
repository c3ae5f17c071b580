"""Cascades of small networks that were trained on digits within seconds: what is chosen, written, and refused."""

import csv
import itertools
import json

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import dynprune
from dynprune.cascades import build
from dynprune.cascades.choice import Goal, Plan, choose, cost_at, costs_of, plans, quantiles, steps_taken, weigh
from dynprune.cascades.latency import latencies
from dynprune.cascades.networks import Said, margin_of, nested_in, open_network
from dynprune.cli.program import app
from dynprune.data.loading import Source, load_data
from dynprune.errors import DynpruneError
from dynprune.files.onnxfile import macs_in, write_onnx
from dynprune.files.quantized import Quantiser


@pytest.fixture(scope="module")
def data():
    return load_data(Source("digits"))


def network(data, width, steps, seed=0):
    """A network of `width` channels after so many steps."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(width * (data.size[1] // 4) ** 2, 10),
    )
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    batches = itertools.cycle(data.train_batches(64, seed, 0))
    for images, labels in itertools.islice(batches, steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model.eval()


def write(model, data, path, **changed):
    facts = {"classes": json.dumps(data.classes), "preprocess": data.preprocess.as_json(), "mean": "x", **changed}
    opset = facts.pop("opset", None)
    write_onnx(model, data.example, path, opset, facts)
    return path


@pytest.fixture(scope="module")
def files(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    sizes = {"small": (2, 60), "middle": (6, 60), "large": (24, 150)}
    return {name: write(network(data, *size), data, folder / f"{name}.onnx") for name, size in sizes.items()}


def invented(networks=3, images=400):
    """Networks that are better the larger they are, and right more often where they are sure."""
    chance = np.random.default_rng(networks)  # the same for every test, in whatever order they run
    labels = chance.integers(0, 5, images)
    margin = chance.random((networks, images))
    unsure = np.linspace(0.2, 0.8, networks)[:, None]
    right = chance.random((networks, images)) < np.where(margin > 0.5, 0.95, unsure)
    return Said(margin, np.where(right, labels, (labels + 1) % 5), labels)


def test_weighing_counts_every_pass():
    said, macs = invented(), (10, 30, 100)
    plan = weigh((0, 1, 2), (0.6, 0.3), said, macs)
    cost = right = 0
    for image in range(400):
        chosen, cost = 0, cost + 10
        if said.margin[0, image] < 0.6:
            chosen, cost = 1, cost + 30
            if said.margin[1, image] < 0.3:
                chosen, cost = 2, cost + 100
        right += int(said.said[chosen, image] == said.labels[image])
    assert plan.cost == pytest.approx(cost / 400) and plan.accuracy == pytest.approx(right / 400)


def test_a_network_that_goes_on_from_another_costs_what_it_adds():
    said, macs = invented(3), (10, 30, 100)
    reached = weigh((0, 2), (0.5,), said, macs)
    part = (reached.cost - 10) / 100  # of the images
    assert weigh((0, 2), (0.5,), said, macs, {(0, 2): 60}).cost == pytest.approx(10 + 60 * part)
    assert weigh((0, 2), (0.5,), said, macs, {(1, 2): 60}) == reached
    both = {(0, 1): 12, (1, 2): 60}  # of three, the second goes on from the first, and the third begins anew
    assert costs_of((0, 1, 2), macs, both) == [10, 12, 100]
    assert costs_of((0, 1, 2), macs, {(1, 2): 60}) == [10, 30, 60]


@pytest.mark.parametrize("target", [0.3, 0.5, 0.8])
def test_the_most_accurate_within_the_target_is_taken(target):
    said, macs = invented(), (10, 40, 100)
    found = list(plans(said, macs))
    best = choose(found, Goal(target=target), macs, "abc")
    assert best.cost <= target * 100
    assert best.accuracy == max(plan.accuracy for plan in found if plan.cost <= 0.99 * target * 100)


def test_the_cheapest_that_is_accurate_enough_is_taken():
    said, macs = invented(), (10, 40, 100)
    found = list(plans(said, macs))
    wanted = float(said.right[2].mean())
    best = choose(found, Goal(accuracy=wanted), macs, "abc")
    assert best.accuracy >= wanted
    assert not [plan for plan in found if plan.accuracy >= wanted and plan.cost < best.cost]


def test_milliseconds_are_those_of_one_file(data, tmp_path):
    """Of a network that takes much longer than asking for it, going on costs what it takes alone."""
    paths = [write(network(data, width, 0), data, tmp_path / f"{width}.onnx") for width in (2, 16, 384)]
    costs, added = latencies([open_network(path) for path in paths], data, 1, lambda *_: None)
    assert set(added) == {(0, 1), (0, 2), (1, 2)} and 0 < costs[0] < costs[2]
    for pair in ((0, 2), (1, 2)):
        assert 0.5 * costs[2] < added[pair] < 2 * costs[2]


def test_what_is_small_but_slow_is_left_out(files, tmp_path, monkeypatch):
    """Networks that are chosen by time, where the middle one takes as long as the large one."""
    slow = [1.0, 9.9, 10.0], {(0, 1): 9.9, (0, 2): 10.0, (1, 2): 10.0}
    monkeypatch.setattr(build, "latencies", lambda *_: slow)
    paths = list(files.values())
    result = dynprune.cascade(*paths, out=tmp_path / "out", target=0.6, cost="latency", data="digits")
    assert result.chain == ["small", "large"] and result.cost == "latency"
    on = sum(row.images_share for row in result.rows[1:-1])  # of the test images
    assert 0 < on and 0.1 + on < 0.65  # other images than those that the target was met on
    assert result.ms_share == pytest.approx(result.rows[-1].mean_ms / result.rows[-2].mean_ms)
    words = result.verdict
    assert f"{result.ms_share:.3f} of large's milliseconds" in words and "multiply" not in words
    assert f"a static network as quick: {100 * result.static_as_quick:.2f} %" in words
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert f"at {result.rows[-1].mean_ms:.2f} ms" in page


def test_three_networks_only_where_two_are_not_enough():
    said, macs = invented(), (10, 90, 100)
    same = Said(said.margin[[0, 2, 2]], said.said[[0, 2, 2]], said.labels)  # the middle one is worth its cost
    best = choose(list(plans(same, macs)), Goal(target=0.6), macs, "abc")
    assert best.chain == (0, 1)


def test_thresholds_lie_between_margins():
    margin = np.array([0.1, 0.1, 0.4, 0.9])
    assert quantiles(margin, 10) == pytest.approx([0.25, 0.65])
    assert quantiles(np.array([0.5]), 10) == []


def test_margins_that_are_all_alike_leave_no_cascade():
    said = invented(2)
    alike = Said(np.full_like(said.margin, 0.5), said.said, said.labels)
    with pytest.raises(DynpruneError, match="a alone is the best of these"):
        choose(list(plans(alike, (10, 100))), Goal(target=0.5), (10, 100), "ab")


def test_one_network_that_is_best_alone_is_said():
    said = invented(2)
    worse = Said(said.margin, np.stack([said.labels, said.said[1]]), said.labels)
    with pytest.raises(DynpruneError, match="a alone is the best of these"):
        choose(list(plans(worse, (10, 100))), Goal(accuracy=0.5), (10, 100), "ab")


def test_a_static_network_as_accurate_is_read_off_the_best_ones():
    costs, accuracies = [1.0, 2.0, 3.0, 5.0], [0.6, 0.5, 0.8, 0.9]  # the second costs more for less
    assert cost_at(0.7, costs, accuracies) == pytest.approx(2.0)
    assert cost_at(0.85, costs, accuracies) == pytest.approx(4.0)
    assert cost_at(0.3, costs, accuracies) == 1.0 and cost_at(0.9, costs, accuracies) == 5.0
    assert cost_at(0.91, costs, accuracies) is None


def parts(paths, pixels):
    """Scores of every network, (networks, images, classes)."""
    return np.stack([onnxruntime.InferenceSession(str(path)).run(None, {"input": pixels})[0] for path in paths])


@pytest.mark.parametrize("names", [("small", "large"), ("small", "middle", "large")])
def test_the_file_computes_what_its_parts_say(files, data, tmp_path, names):
    paths = [files[name] for name in names]
    result = dynprune.cascade(*paths, out=tmp_path / "out", target=0.6, data="digits")
    chosen = [files[name] for name in result.chain]
    session = onnxruntime.InferenceSession(result.path)
    pixels = next(iter(data.eval_batches(data.test, 200)))[0].numpy()
    scores = parts(chosen, pixels)
    step = np.zeros(len(pixels), np.int64)
    for number, threshold in enumerate(result.thresholds):
        step[(step == number) & (margin_of(scores[number]) < threshold)] = number + 1
    assert len(set(step)) > 1, "nothing goes on: this shows nothing"
    for size in (1, 7, 200):
        logits, said = session.run(["logits", "step"], {"input": pixels[:size]})
        assert (said == step[:size]).all()
        np.testing.assert_allclose(logits, scores[step[:size], np.arange(size)], rtol=1e-4, atol=1e-4)
    for place in (int(np.argmin(step)), int(np.argmax(step))):
        assert session.run(["step"], {"input": pixels[place : place + 1]})[0] == step[place]
    assert result.val_share <= 0.6 and 0 < result.accuracy <= 1


def test_three_steps_in_one_file(files, data):
    from dynprune.cascades.graph import joined

    chosen = [open_network(files[name]) for name in ("small", "middle", "large")]
    pixels = next(iter(data.eval_batches(data.test, 100)))[0].numpy()
    scores = parts([own.path for own in chosen], pixels)
    said = Said(np.stack([margin_of(own) for own in scores]), scores.argmax(2), np.zeros(100, int))
    thresholds = [float(np.median(said.margin[0])), float(np.median(said.margin[1]))]
    step = steps_taken((0, 1, 2), thresholds, said)
    assert set(step) == {0, 1, 2}
    session = onnxruntime.InferenceSession(joined([own.proto for own in chosen], thresholds, {}))
    logits, found = session.run(None, {"input": pixels})
    assert (found == step).all()
    np.testing.assert_allclose(logits, scores[step, np.arange(100)], rtol=1e-4, atol=1e-4)


def test_static_networks_of_its_cost_are_those_beside_it(files, tmp_path):
    """Networks of one kind that have no weight in common do not lie in one another: all of them are static rivals."""
    found = [open_network(path) for path in files.values()]
    assert nested_in(found) == {}
    result = dynprune.cascade(*files.values(), out=tmp_path / "out", target=0.5, data="digits")
    rows, own = result.rows[:-1], result.rows[-1]
    below, above = max(row.accuracy for row in rows if row.macs <= own.macs), rows[-1].accuracy
    assert below <= result.static_accuracy <= above and below < above and not result.goes_on_from
    kept = [row for row in rows if all(row.accuracy > other.accuracy for other in rows if other.macs < row.macs)]
    line = np.interp(own.macs, [row.macs for row in kept], [row.accuracy for row in kept])
    assert result.static_accuracy == pytest.approx(line)


def test_the_mean_time_is_not_that_of_what_ran_beside_it():
    times, ends = np.full(200, 1.0), np.zeros(200, int)
    times[:50], ends[:50] = 5.0, 1
    assert build.spread(times, ends)[0] == pytest.approx(2.0)
    times[::40] += 100  # the processor was busy with something else
    assert build.spread(times, ends)[0] == pytest.approx(2.0)


def test_what_stays_costs_no_second_pass(files, data, tmp_path):
    result = dynprune.cascade(files["small"], files["large"], out=tmp_path / "out", target=0.6, data="digits")
    pixels = next(iter(data.eval_batches(data.test, 200)))[0].numpy()
    step = onnxruntime.InferenceSession(result.path).run(["step"], {"input": pixels})[0]
    layers = {}
    for kind in (0, 1):
        options = onnxruntime.SessionOptions()
        options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / f"profile{kind}")
        session = onnxruntime.InferenceSession(result.path, options)
        place = int(np.argmax(step == kind))
        session.run(None, {"input": pixels[place : place + 1]})
        events = json.loads(open(session.end_profiling()).read())
        layers[kind] = sum(event.get("args", {}).get("op_name") in ("Conv", "FusedConv") for event in events)
    assert layers[1] == 2 * layers[0] > 0


def test_int8_files_join_too(files, data, tmp_path):
    small, large = (tmp_path / f"{name}.int8.onnx" for name in ("small", "large"))
    for name, path in (("small", small), ("large", large)):
        feeds = [{"input": batch.numpy()} for batch, _ in data.eval_batches(data.val, 32)]
        path.write_bytes(Quantiser(files[name], feeds).quantised())
    result = dynprune.cascade(small, large, out=tmp_path / "out", target=0.6, data="digits")
    assert result.rows[1].macs == macs_in(open_network(files["large"]).proto) and result.agreement > 0.98


def test_files_and_page_of_a_cascade(files, data, tmp_path):
    out = tmp_path / "out"
    asked = [
        "gate",
        "--form",
        "cascade",
        str(files["small"]),
        str(files["large"]),
        "--data",
        "digits",
        "--target",
        "0.6",
    ]
    done = CliRunner().invoke(app, [*asked, "--out", str(out), "--json"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    with open(out / "cascade.csv", encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(data.test)
    right = np.mean([line["class"] == line["predicted"] for line in lines])
    assert right == pytest.approx(result["accuracy"])
    on = [line["answered_by"] == "large" for line in lines if line["class"] == "3"]
    assert np.mean(on) == pytest.approx(result["goes_on"]["3"])
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 2 and page.count("<img") == 24 and "http" not in page.replace("http://www.w3.org", "")
    assert result["verdict"].replace("'", "&#x27;") in page
    assert "--overwrite" in str(CliRunner().invoke(app, [*asked, "--out", str(out)]).exception)
    for command in ("report", "bench"):
        words = str(CliRunner().invoke(app, [command, str(out)]).exception)
        assert "is a cascade. Its file is" in words and "cascade.onnx" in words
    assert CliRunner().invoke(app, [*asked, "--out", str(out), "--overwrite", "--json"]).exit_code == 0
    said = onnxruntime.InferenceSession(str(out / "cascade.onnx")).get_modelmeta().custom_metadata_map
    assert [step["network"] for step in json.loads(said["cascade"])] == ["small", "large"]


def refused(tmp_path, *networks, **options):
    with pytest.raises(DynpruneError) as caught:
        dynprune.cascade(*networks, out=tmp_path / "refused", **{"data": "digits", **options})
    assert not (tmp_path / "refused").exists()
    return str(caught.value)


def test_what_cannot_be_joined_is_refused(files, data, tmp_path):
    small, large = files["small"], files["large"]
    model = network(data, 30, 1)
    other = write(model, data, tmp_path / "other.onnx", classes=json.dumps([*data.classes[1:], data.classes[0]]))
    sized = json.loads(data.preprocess.as_json()) | {"mean": [0.1, 0.2, 0.3]}
    shifted = write(model, data, tmp_path / "shifted.onnx", preprocess=json.dumps(sized))
    older = write(model, data, tmp_path / "older.onnx", opset=18)
    assert "smallest network first" in refused(tmp_path, large, small)
    assert "Expected 2 to 8" in refused(tmp_path, small)
    assert "same order" in refused(tmp_path, small, other)
    assert "same inputs" in refused(tmp_path, small, shifted)
    assert "same --opset" in refused(tmp_path, small, older, target=0.9)
    assert "--data" in refused(tmp_path, small, large, data="")
    assert "at least" in refused(tmp_path, small, large, target=0.001)
    assert "best comes to" in refused(tmp_path, small, large, min_accuracy=100.0)
    assert "one of them" in refused(tmp_path, small, large, min_accuracy=50.0, target=0.5)
    assert "--max-drop" in refused(tmp_path, small, large, max_drop=-1.0)
    assert "--target" in refused(tmp_path, small, large, target=float("nan"))
    assert "macs, latency" in refused(tmp_path, small, large, target=0.5, cost="ms")
    assert "large's milliseconds at least" in refused(tmp_path, small, large, target=0.001, cost="latency")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--form", "cascade", "a", "b", "--epochs", "3"], "--epochs"),
        (["--form", "cascade", "a", "b", "--resume"], "--resume"),
        (["--form", "cascades"], "gates, cascade or nested"),
        (["a", "b"], "gate got 2 runs"),
        (["a", "--max-drop", "1"], "--form cascade"),
        (["a", "--cost", "latency"], "--form cascade"),
        (["--form", "cascade", "a", "b", "--cost", "seconds"], "macs, latency"),
    ],
)
def test_options_of_the_other_form_are_refused(arguments, said):
    error = CliRunner().invoke(app, ["gate", *arguments]).exception
    assert isinstance(error, DynpruneError) and said in str(error)


def test_a_plan_says_what_it_is():
    assert weigh((1,), (), invented(2), (10, 20)) == Plan((1,), (), 20.0, pytest.approx(0.87, abs=0.1))
