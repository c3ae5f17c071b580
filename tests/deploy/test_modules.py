"""Networks of any task: saved, loaded, exported and timed without facts about classes or images."""

import copy

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

import dynprune
from dynprune import zoo
from dynprune.errors import DynpruneError
from dynprune.files.onnxfile import metadata_of, open_session
from tests import models, odd
from tests.execution.test_dynamic import OPTIMIZERS, Several, X, Y

KINDS = (Y % 5)[:4]
EXAMPLE = (X[:4], KINDS, {"scale": {"by": torch.full((4, 1), 2.0)}})


def small_several():
    torch.manual_seed(0)
    execution = dynprune.DynamicExecution(
        Several(), EXAMPLE, "params=0.5", steps=6, optimizer=OPTIMIZERS["adamw"], explore=0.5, hold=1
    )
    for _ in range(6):
        said = execution.model(*EXAMPLE[:2], **EXAMPLE[2])
        (said["point"].square().mean() + F.cross_entropy(said["kind"][0], KINDS % 4)).backward()
        execution.step()
    return execution.finish()


def says(model):
    with torch.no_grad():
        return model(*EXAMPLE[:2], **EXAMPLE[2])["point"]


@pytest.mark.parametrize("copied", [False, True])  # a copy has forgotten what it was cut from
def test_any_network_comes_back_into_the_full_width_one(tmp_path, copied):
    small = small_several()
    dynprune.save(copy.deepcopy(small) if copied else small, tmp_path / "small.safetensors")
    again = dynprune.load(tmp_path / "small.safetensors", Several())
    assert type(again) is Several and not again.training and torch.equal(says(again), says(small))
    assert torch.equal(says(dynprune.load(tmp_path / "small.safetensors", again)), says(small))  # as narrow already
    with safe_open(tmp_path / "small.safetensors", "pt") as file:
        assert set(file.keys()) == set(small.state_dict())


@pytest.mark.parametrize("make", [models.Tiny, models.Grouped, odd.Asserts], ids=lambda make: make.__name__)
@pytest.mark.parametrize("copied", [False, True])
def test_numbers_that_a_network_remembers_come_back_too(tmp_path, make, copied):
    execution = dynprune.DynamicExecution(make(), X[:1], "macs=0.5", steps=2, optimizer=OPTIMIZERS["sgd"])
    small = execution.finish()
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in make().parameters())
    dynprune.save(copy.deepcopy(small) if copied else small, tmp_path / "small.safetensors")
    again = dynprune.load(tmp_path / "small.safetensors", make())
    with torch.no_grad():
        assert torch.equal(again(X), small(X))


def test_a_network_of_a_library_comes_back(tmp_path):
    execution = dynprune.DynamicExecution(
        zoo.build("torchvision:mobilenet_v3_small", 10), torch.zeros(1, 3, 32, 32), "macs=0.4", steps=2,
        optimizer=OPTIMIZERS["sgd"],
    )  # fmt: skip
    small = execution.finish()
    dynprune.save(small, tmp_path / "small.safetensors")
    again = dynprune.load(tmp_path / "small.safetensors", zoo.build("torchvision:mobilenet_v3_small", 10))
    with torch.no_grad():
        assert torch.equal(again(X[:, :, :8, :8]), small(X[:, :, :8, :8]))


def test_every_output_is_exported_and_compared(tmp_path):
    small = small_several().train()
    before = copy.deepcopy(small.state_dict())
    found = dynprune.export(small, EXAMPLE, tmp_path / "several.onnx")
    assert list(found.inputs) == ["image", "kind", "scale.by"] and found.inputs["image"] == (4, 3, 8, 8)
    assert [output.name for output in found.outputs] == ["point", "kind.0"] and found.outputs[1].shape == (4, 4)
    assert all(0 <= output.max_rel_diff < 1e-5 for output in found.outputs)
    assert found.dynamic == {name: {0: "batch"} for name in found.inputs}
    assert small.training and all(torch.equal(value, before[name]) for name, value in small.state_dict().items())
    session = onnxruntime.InferenceSession(found.path)
    feed = {"image": X.numpy(), "kind": (Y % 5).numpy(), "scale.by": np.full((16, 1), 2.0, np.float32)}
    point, kind = session.run(["point", "kind.0"], feed)
    with torch.no_grad():
        ours = small.eval()(X, Y % 5, scale={"by": torch.full((16, 1), 2.0)})
    assert np.allclose(point, ours["point"].numpy(), atol=1e-6) and np.allclose(kind, ours["kind"][0], atol=1e-6)
    assert metadata_of(open_session(tmp_path / "several.onnx"))["network"] == "Several"


def test_names_and_what_may_vary_can_be_chosen(tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    axes = {"photo": {0: "n", 2: "height", 3: "width"}}
    found = dynprune.export(
        network, X[:1], tmp_path / "net.onnx", input_names=["photo"], output_names=["mask"], dynamic=axes
    )
    assert found.dynamic == axes and found.outputs[0].name == "mask"
    (mask,) = onnxruntime.InferenceSession(found.path).run(None, {"photo": np.zeros((3, 3, 20, 12), np.float32)})
    assert mask.shape == (3, 2, 20, 12)
    fixed = dynprune.export(network, X[:1], tmp_path / "fixed.onnx", dynamic={})
    assert onnxruntime.InferenceSession(fixed.path).get_inputs()[0].shape == [1, 3, 8, 8] and fixed.dynamic == {}


class Drifts(nn.Module):
    """Says something else each time."""

    def forward(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        return x * self.calls


def test_two_networks_are_timed_on_the_same_inputs(tmp_path):
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Conv2d(3, 256, 3, padding=1), nn.ReLU(), nn.Conv2d(256, 64, 3, padding=1))
    thin = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 64, 3, padding=1))
    said = []
    listener = dynprune.listener.Listener(note=said.append)
    found = dynprune.bench(wide, thin, torch.zeros(2, 3, 32, 32), listener=listener)
    assert found.speedup_p50 > 2 and found.rows[0].batch == 2 and "faster at batch 2" in found.verdict
    assert any("exporting" in line for line in said)
    dynprune.export(thin, torch.zeros(2, 3, 32, 32), tmp_path / "thin.onnx")
    mixed = dynprune.bench(wide, tmp_path / "thin.onnx", inputs=torch.zeros(2, 3, 32, 32))
    assert mixed.speedup_p50 > 2 and mixed.compact_path.endswith("thin.onnx")


class Careless(nn.Module):
    """Does not look at one of its inputs."""

    def __init__(self, width):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, width, 3), nn.Conv2d(width, 4, 3)

    def forward(self, image, mask, scale):
        return self.b(F.relu(self.a(image))) * scale


def test_inputs_that_a_network_does_not_use_are_no_obstacle(tmp_path):
    inputs = (torch.zeros(1, 3, 32, 32), torch.zeros(1, 7), torch.full((1, 1, 1, 1), 2.0))
    assert dynprune.bench(Careless(128), Careless(8), inputs).speedup_p50 > 1.5
    found = dynprune.export(Careless(8), inputs, tmp_path / "careless.onnx")
    assert list(found.inputs) == ["image", "mask", "scale"] and found.outputs[0].max_rel_diff < 1e-5


def refusals(folder):
    network, example = nn.Sequential(nn.Conv2d(3, 4, 3)), torch.zeros(1, 3, 8, 8)
    saved = folder / "saved.safetensors"
    return {
        "no model": (lambda: dynprune.load(saved), "does not say how to build its network"),
        "another network": (lambda: dynprune.load(saved, models.Tiny()), "does not fit this Tiny"),
        "too narrow": (
            lambda: dynprune.load(saved, nn.Sequential(nn.Conv2d(3, 3, 3))),
            "4 channels in the file and 3 in the network",
        ),
        "some facts": (lambda: dynprune.save(network, saved, classes=10), "some of graph, selection, classes and size"),
        "no module": (lambda: dynprune.save({}, saved), "save got a dict"),
        "a folder": (lambda: dynprune.export(network, example, folder), "which is a folder"),
        "no tensor": (lambda: dynprune.export(network, (), folder / "a.onnx"), "holds no tensor"),
        "wrong input": (
            lambda: dynprune.export(network, torch.zeros(1, 4, 8, 8), folder / "a.onnx"),
            "fails on inputs of shape 1x4x8x8",
        ),
        "names": (lambda: dynprune.export(network, example, folder / "a.onnx", input_names=["a", "b"]), "got 2 names"),
        "axis": (lambda: dynprune.export(network, example, folder / "a.onnx", dynamic={"x": {0: "n"}}), 'got "x"'),
        "dimension": (
            lambda: dynprune.export(network, example, folder / "a.onnx", dynamic={"input": {7: "n"}}),
            "has 4 dimensions",
        ),
        "disagrees": (lambda: dynprune.export(Drifts(), example + 1, folder / "a.onnx"), "differs from torch in"),
        "no inputs": (lambda: dynprune.bench(network, network), "modules without inputs"),
        "one network": (lambda: dynprune.bench(network, inputs=example), "bench got 1 networks"),
        "other inputs": (lambda: dynprune.bench(network, folder / "b.onnx", example), "No file"),
    }


@pytest.mark.parametrize("case", list(refusals(__import__("pathlib").Path())))
def test_what_cannot_work_is_one_line(case, tmp_path):
    dynprune.save(nn.Sequential(nn.Conv2d(3, 4, 3)), tmp_path / "saved.safetensors")
    act, words = refusals(tmp_path)[case]
    with pytest.raises(DynpruneError, match=words) as caught:
        act()
    assert "\n" not in str(caught.value) and not list(tmp_path.glob("*.onnx*"))
