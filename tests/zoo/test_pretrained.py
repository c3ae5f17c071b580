"""Weights by name, and weights of another number of classes."""

import logging

import pytest
import torch
import torchvision
from torch import nn

from dynprune import zoo
from dynprune.errors import DynpruneError
from dynprune.runs.config import TrainConfig
from dynprune.zoo import pretrained
from dynprune.zoo.pretrained import is_name, preprocessing_of
from dynprune.zoo.weights import load_trained

NET = "torchvision:shufflenet_v2_x0_5"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A place where torchvision keeps its files, with weights of our own under the name of the published ones."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    entry = torchvision.models.ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1
    torch.manual_seed(3)
    model = torchvision.models.shufflenet_v2_x0_5()
    torch.save(model.state_dict(), tmp_path / "hub" / "checkpoints" / entry.url.rpartition("/")[2])
    return model


@pytest.mark.parametrize("name", ["pretrained", "IMAGENET1K_V1"])
def test_named_weights_fill_all_but_the_scores(hub, name):
    model = zoo.build(NET, 7, 0)
    before = model.fc.weight.clone()
    loaded = load_trained(model, NET, name, 7)
    assert loaded.anew == ("fc",) and loaded.classes == 1000
    assert loaded.words == "weights are of 1000 classes: fc begins anew"
    theirs = hub.state_dict()
    assert torch.equal(model.fc.weight, before)
    assert all(
        torch.equal(value, theirs[key]) for key, value in model.state_dict().items() if not key.startswith("fc.")
    )
    whole = zoo.build(NET, 1000, 0)
    assert load_trained(whole, NET, name, 1000).words == "" and torch.equal(whole.fc.weight, hub.fc.weight)


def test_a_file_of_another_number_of_classes_too(tmp_path):
    torch.save(
        {"state_dict": {"module." + k: v for k, v in zoo.build("resnet20", 100, 1).state_dict().items()}},
        tmp_path / "w.pt",
    )
    model = zoo.build("resnet20", 10, 0)
    loaded = load_trained(model, "resnet20", str(tmp_path / "w.pt"), 10)
    assert loaded.anew == ("classifier",) and loaded.classes == 100 and loaded.place == "state_dict"


def two_heads(num_classes=5, width=8):
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(6, width)
            self.scores, self.more = nn.Linear(width, num_classes), nn.Linear(width, num_classes)

        def forward(self, x):
            return self.scores(self.body(x)), self.more(self.body(x))

    return TwoHeads()


def test_every_layer_that_makes_scores_begins_anew_and_any_other_misfit_stays_an_error(tmp_path):
    here = f"{__name__}:two_heads"
    torch.save(two_heads(9).state_dict(), tmp_path / "nine.pt")
    assert load_trained(two_heads(5), here, str(tmp_path / "nine.pt"), 5).anew == ("scores", "more")
    torch.save(two_heads(9, width=7).state_dict(), tmp_path / "thin.pt")
    with pytest.raises(DynpruneError, match=r"does not fit the model.*body.weight is \[7, 6\], the model has \[8, 6\]"):
        load_trained(two_heads(5), here, str(tmp_path / "thin.pt"), 5)
    state = two_heads(9).state_dict()
    del state["body.bias"]
    torch.save(state, tmp_path / "lacks.pt")
    with pytest.raises(DynpruneError, match="missing 1: body.bias"):
        load_trained(two_heads(5), here, str(tmp_path / "lacks.pt"), 5)
    state = two_heads(9).state_dict()
    state["scores.weight"][0, 0] = float("inf")
    torch.save(state, tmp_path / "inf.pt")
    with pytest.raises(DynpruneError, match="not finite"):
        load_trained(two_heads(5), here, str(tmp_path / "inf.pt"), 5)


def test_without_a_connection_one_line_says_which_file_belongs_where(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def no_connection(*_args, **_options):
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_connection)
    entry = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    file = entry.url.rpartition("/")[2]
    with pytest.raises(DynpruneError, match=rf"cannot be fetched.*{file} at {tmp_path}/hub/checkpoints/{file}"):
        pretrained.fetch("torchvision:resnet18", "pretrained")


def test_of_timm_too(monkeypatch):
    timm = pytest.importorskip("timm")
    assert preprocessing_of("timm:resnet18", "a1_in1k").interpolation == "bicubic"
    with pytest.raises(DynpruneError, match="no weights of that tag for resnet18. It has pretrained, a1_in1k"):
        preprocessing_of("timm:resnet18", "v9_in1k")
    asked = []

    def create(name, pretrained=False, **options):
        asked.append((name, pretrained))
        raise OSError("offline")

    monkeypatch.setattr(timm, "create_model", create)
    level = logging.getLogger("huggingface_hub").level
    with pytest.raises(
        DynpruneError, match=r"Put model.safetensors of timm/resnet18.a1_in1k anywhere, and pass it as --weights"
    ):
        pretrained.fetch("timm:resnet18", "pretrained")
    assert asked == [("resnet18.a1_in1k", True)] and logging.getLogger("huggingface_hub").level == level


def test_images_are_made_as_for_the_weights():
    source = TrainConfig(model="torchvision:mobilenet_v2", weights="IMAGENET1K_V2").source
    assert source.image_size == "224x224" and source.resize.interpolation == "bilinear"
    assert source.resize.margin == pytest.approx(232 / 224) and source.mean == (0.485, 0.456, 0.406)
    assert (
        TrainConfig(model="torchvision:mobilenet_v2", weights="pretrained", image_size="96").source.image_size == "96"
    )
    assert TrainConfig(model="torchvision:googlenet", weights="pretrained").source.mean == (0.5, 0.5, 0.5)
    assert TrainConfig(model="resnet20").source.mean == ()


@pytest.mark.parametrize(
    ("model", "weights", "says"),
    [
        ("resnet20", "pretrained", '"resnet20" has no published weights'),
        ("torchvision:resnet18", "IMAGENET1K_V7", "It has pretrained, IMAGENET1K_V1"),
        ("torchvision:mnasnet0_75x", "pretrained", "has no weights"),
    ],
)
def test_names_that_lead_nowhere(model, weights, says):
    with pytest.raises(DynpruneError, match=says):
        preprocessing_of(model, weights)


def test_a_name_is_told_from_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_name("pretrained") and is_name("IMAGENET1K_V1") and is_name("a1_in1k")
    assert not is_name("") and not is_name("runs/best.pt") and not is_name("best.safetensors")
    (tmp_path / "pretrained").write_bytes(b"")
    assert not is_name("pretrained")
