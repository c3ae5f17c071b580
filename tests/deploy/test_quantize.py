"""int8 and half precision: as accurate as asked, or with layers left in float32; never of another network."""

import dataclasses
import json

import numpy as np
import onnx
import pytest
import torch
from rich.console import Console
from torch import nn

import dynprune
from dynprune.budgets import fit, latency
from dynprune.budgets.limits import Budget
from dynprune.data.loading import Source, load_data
from dynprune.deploy.answers import classes_of
from dynprune.deploy.quantize import beside, fewest, is_of, write_variants
from dynprune.display.tables import bench_table
from dynprune.errors import DynpruneError
from dynprune.files.onnxfile import open_session, write_onnx
from dynprune.files.quantized import Quantiser
from dynprune.listener import Listener
from dynprune.structure.record import Op
from tests.cli.test_commands import dynprune as command
from tests.cli.test_commands import refused

TRAIN = ["--model", "resnet20", "--image-size", 16, "--epochs", 4, "--threads", 1, "--budget", 0.5]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("int8") / "run"
    command("train", *TRAIN, "--out", path)
    command("compact", path)
    return path


@pytest.fixture(scope="module")
def exported(run):
    return json.loads(
        command(
            "export", run, "--onnx", "--int8", "--fp16", "--calibration", 200, "--json", "--fold-normalization"
        ).stdout
    )


def test_both_precisions_are_measured_beside_float32(run, exported):
    int8, fp16 = exported["variants"]
    assert int8["kind"] == "int8" and fp16["kind"] == "fp16"
    assert int8["size_bytes"] < 0.5 * exported["size_bytes"] and fp16["size_bytes"] < 0.65 * exported["size_bytes"]
    for made in (int8, fp16):
        assert made["float32_val_accuracy"] - made["val_accuracy"] <= 0.01
        assert made["agreement"] > 0.95 and made["ms"] > 0
        data = load_data(Source("digits", image_size="16"))
        said, right = classes_of(run / f"compact.{made['kind']}.onnx", data, data.test)
        assert made["accuracy"] == pytest.approx((said == right).mean())
    assert int8["calibration"] == 200
    weights = onnx.load(run / "compact.int8.onnx").graph.initializer
    assert sum(tensor.data_type == onnx.TensorProto.INT8 for tensor in weights) >= int8["layers"]
    assert json.loads((run / "result.json").read_text())["export"]["variants"] == exported["variants"]


def test_predictions_of_every_precision_are_the_same_network(run, exported, tmp_path):
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 255, (40, 30, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    said = [
        dynprune.predict(run / name, [tmp_path / "a.png"])[0].classes for name in ("compact.onnx", "compact.int8.onnx")
    ]
    assert {name for name, _ in said[0]} & {name for name, _ in said[1]}
    assert dict(said[1])[said[0][0][0]] == pytest.approx(said[0][0][1], abs=0.1)


def test_bench_shows_four_files_in_turn(run, exported):
    result = dynprune.bench(run, batches=(1, 2))
    found = result.without_samples()
    for row in found["rows"]:
        assert all(row[side]["p50_ms"] > 0 for side in ("dense", "compact", "dense_int8", "compact_int8"))
        assert row["speedup_int8_p50"] == pytest.approx(row["dense"]["p50_ms"] / row["compact_int8"]["p50_ms"])
    assert found["int8"]["dense_bytes"] > found["int8"]["compact_bytes"] == exported["variants"][0]["size_bytes"]
    assert "int8" in found["verdict"]
    with open(run / "table.txt", "w") as file:
        Console(file=file, width=100).print(bench_table(result))
    table = (run / "table.txt").read_text()
    assert "dense int8" in table and "compact int8" in table


def test_an_int8_file_of_another_export_is_not_used(run, tmp_path):
    for name in ("config.toml", "compact.safetensors", "dense.onnx"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    dynprune.export(tmp_path, int8=True, calibration=32)
    old = (tmp_path / "compact.int8.onnx").read_bytes()
    dynprune.export(tmp_path, fold_normalization=True)  # another graph
    assert not (tmp_path / "compact.int8.onnx").exists()
    (tmp_path / "compact.int8.onnx").write_bytes(old)
    said = []
    found = dynprune.bench(tmp_path, batches=[1], listener=Listener(note=said.append))
    assert found.int8 is None and any("of an earlier export" in line for line in said)


class Uneven(nn.Module):
    """A network that int8 ruins in one layer: a few inputs are a thousand times as large as those that matter."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.spoiled = nn.Conv2d(3, 3, 1, bias=False)
        self.spoiled.weight.data = torch.eye(3).view(3, 3, 1, 1)

    def forward(self, x):
        big = torch.zeros_like(x)
        big[:, :, 0, 0] = 3000.0
        return self.inner(self.spoiled(x + big) - big)


def test_layers_that_int8_ruins_stay_in_float32_and_are_named(run, tmp_path):
    data = load_data(Source("digits", image_size="16"))
    model = Uneven(dynprune.load(run / "compact.safetensors")).eval()
    path = tmp_path / "uneven.onnx"
    write_onnx(
        model, data.example, path, None, {"mean": json.dumps(list(data.mean)), "std": json.dumps(list(data.std))}
    )
    whole = write_variants(["int8"], path, data, max_drop=99.0)[0]
    made = write_variants(["int8"], path, data, max_drop=1.0)[0]
    assert whole.float32_val_accuracy - whole.val_accuracy > 0.2  # it is ruined
    assert made.float32_val_accuracy - made.val_accuracy <= 0.01
    assert 1 <= len(made.float32_layers) < made.layers and whole.float32_layers == []
    first = next(node.name for node in onnx.load(path).graph.node if node.op_type == "Conv")
    assert made.float32_layers[0] == first
    assert is_of(beside(path, "int8"), path)


@pytest.mark.parametrize("needed", [1, 2, 3, 5, 8, 12, 13])
def test_as_few_layers_as_needed_stay(needed):
    order = [str(number) for number in range(13)]
    asked = []

    def enough(skipped):
        asked.append(len(skipped))
        return len(skipped) >= needed

    assert len(fewest(order, enough, latency.silent)) == needed
    assert len(asked) <= 8


@pytest.mark.parametrize("kind", ["conv", "linear", "depthwise", "conv_transpose"])
def test_layers_are_timed_in_int8(kind, tmp_path):
    if kind == "linear":
        made = latency.Layer(Op("layer", "w", 4, size=(4,)), (), 16, 16, 1, int8=True)
    else:
        function = "conv_transpose2d" if "transpose" in kind else "conv2d"
        op = Op("layer", "w", 36, function, (6, 6), (1, 1), (1, 1), (1, 1))
        made = latency.Layer(op, (3, 3), 16, 16, 16 if kind == "depthwise" else 1, int8=True)
    table = latency.LayerTable(tmp_path / "layers.json")
    table.measure([made], latency.silent)
    assert table.ms[made.key] > 0 and made.key.endswith(" int8")
    kinds = {node.op_type for node in onnx.load_from_string(made.onnx()).graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} < kinds


def test_a_budget_in_milliseconds_of_int8(run, tmp_path, monkeypatch):
    model = dynprune.load(run / "compact.safetensors")
    graph, example = dynprune.trace(model, torch.zeros(1, 3, 16, 16)), torch.zeros(1, 3, 16, 16)
    monkeypatch.setattr(latency, "NETWORK_SECONDS", 0.1)
    monkeypatch.setattr(fit, "LayerTable", lambda: latency.LayerTable(tmp_path / "layers.json"))
    fitter = fit.Fitter(model, graph, example, Budget(("latency=0.95",), int8=True))
    fitter.time_dense()
    names = json.loads((tmp_path / "layers.json").read_text())["ms"]
    assert names and all(name.endswith(" int8") for name in names)
    path = tmp_path / "run"
    path.mkdir()
    (path / "compact.safetensors").write_bytes((run / "compact.safetensors").read_bytes())
    config = dataclasses.replace(dynprune.TrainConfig.from_toml(run / "config.toml"), int8=True)
    (path / "config.toml").write_text(config.to_toml())
    made = dynprune.export(path, calibration=32)
    assert [own.kind for own in made.variants] == ["int8"]  # the settings say so


def test_int8_of_a_network_without_layers_says_so(tmp_path):
    class Sum(nn.Module):
        def forward(self, x):
            return x.mean((2, 3)).repeat(1, 4)[:, :10]

    data = load_data(Source("digits", image_size="16"))
    path = tmp_path / "sum.onnx"
    write_onnx(Sum(), data.example, path, None, {})
    with pytest.raises(DynpruneError, match="no convolution or linear layer to quantise"):
        write_variants(["int8"], path, data)
    assert not beside(path, "int8").exists()


def test_bad_input(run, tmp_path):
    assert "--calibration belongs to --int8" in refused("export", run, "--onnx", "--calibration", 100)
    for options, said in (
        ({"calibration": 0}, "--calibration got 0. Expected 1 to"),
        ({"max_drop": -1}, "--max-drop got -1. Expected points"),
        ({"max_drop": float("nan")}, "--max-drop got nan. Expected points"),
    ):
        with pytest.raises(DynpruneError, match=said):
            dynprune.export(run, int8=True, **options)
    gated = tmp_path / "gated"
    gated.mkdir()
    (gated / "gate.toml").write_text(dynprune.GateConfig(data="digits").to_toml())
    with pytest.raises(DynpruneError, match="is gated: .* in float32 only. Drop --int8"):
        dynprune.export(gated, int8=True)


def test_ranges_come_from_what_was_shown(run, exported):
    session = open_session(run / "compact.onnx")
    name = session.get_inputs()[0].name
    shape = (8, *session.get_inputs()[0].shape[1:])
    feeds = [{name: np.full(shape, value, np.float32)} for value in (0.1, 0.9)]
    quantiser = Quantiser(run / "compact.onnx", feeds)
    low, high = (np.ravel(value) for value in quantiser.ranges[name].range_value)
    assert low == pytest.approx(0.1) and high == pytest.approx(0.9)
