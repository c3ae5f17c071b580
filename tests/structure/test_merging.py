"""BatchNorm merged into the layer before it: only where nothing else would be said."""

import pytest
import torch
import torchvision
from torch import nn

from dynprune import zoo
from dynprune.structure.merging import followed, merge, mergeable, merged
from tests.models import perturb


def called(example):
    return lambda model: model(example)


def norms(model):
    return sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


@pytest.mark.parametrize(
    "build, size, left",
    [
        (lambda: zoo.build("resnet20", 10, size=(32, 32)), 32, 0),
        (lambda: torchvision.models.mobilenet_v3_small(), 64, 0),
        (lambda: torchvision.models.shufflenet_v2_x0_5(), 64, 0),
        (lambda: torchvision.models.densenet121(), 64, 62),  # of 121: half of them come before their layers
        (lambda: torchvision.models.vgg11(), 64, 0),
    ],
)
def test_real_networks_say_the_same_without_batchnorm(build, size, left):
    torch.manual_seed(0)
    model = perturb(build()).eval()
    images = torch.randn(2, 3, size, size)
    small = merged(model, called(images))
    assert norms(small) == left and (norms(model) > left) == (small is not model)
    with torch.no_grad():
        assert torch.allclose(small(images), model(images), rtol=1e-3, atol=1e-4)


class Odd(nn.Module):
    """A layer and the BatchNorm behind it, called in a way of its own."""

    def __init__(self, layer, norm, way):
        super().__init__()
        self.layer, self.norm, self.way = layer, norm, way

    def forward(self, x):
        said = self.layer(x)
        return self.way(self, x, said, self.norm(said))


IMAGES, ROWS = torch.randn(4, 6, 5, 5), torch.randn(4, 6)
AFTER = {
    "straight": (lambda own, x, said, after: after, True),
    "both are used": (lambda own, x, said, after: after + said, False),
    "the norm twice": (lambda own, x, said, after: after + own.norm(said), False),
    "the layer twice": (lambda own, x, said, after: after + own.layer(x), False),
    "its numbers are used": (lambda own, x, said, after: after + own.norm.running_mean.mean(), False),
    "its weight too": (lambda own, x, said, after: after * own.layer.weight.mean(), False),
    "no tensor": (lambda own, x, said, after: {"said": [after]}, True),
}


@pytest.mark.parametrize("way", AFTER)
@pytest.mark.parametrize(
    "layer, norm, inputs",
    [
        (nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), IMAGES),
        (nn.Conv2d(6, 6, 3, groups=3, bias=False), nn.BatchNorm2d(6, affine=False), IMAGES),
        (nn.ConvTranspose2d(6, 4, 3, stride=2), nn.BatchNorm2d(4), IMAGES),
        (nn.Linear(6, 4), nn.BatchNorm1d(4), ROWS),
        (nn.Conv1d(6, 4, 3), nn.BatchNorm1d(4), IMAGES.flatten(2)),
        (nn.Conv3d(6, 4, 3), nn.BatchNorm3d(4), IMAGES.unsqueeze(2).repeat(1, 1, 5, 1, 1)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_only_what_nothing_else_uses_is_merged(layer, norm, inputs, way):
    torch.manual_seed(0)
    own, can = AFTER[way]
    model = perturb(Odd(layer, norm, own)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = mergeable(model, called(inputs))
    assert found == ({"layer": "norm"} if can else {})
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    if not can:
        assert merged(model, called(inputs)) is model


def test_a_layer_that_learns_or_is_more_than_it_seems_is_left():
    grouped = nn.Sequential(nn.ConvTranspose2d(6, 6, 3, groups=2), nn.BatchNorm2d(6))
    learning = nn.Sequential(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)).train()
    without = nn.Sequential(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 4, 3)), nn.BatchNorm2d(4))
    places = nn.Sequential(nn.Flatten(2), nn.Linear(25, 3), nn.BatchNorm1d(6))  # its channels are not what Linear makes
    hooked = nn.Sequential(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4))
    hooked[0].register_forward_hook(lambda _module, _given, output: output * 2)
    for model in (grouped, without, normed, places, hooked):
        assert mergeable(model.eval(), called(IMAGES)) == {}
    assert followed(learning, called(IMAGES)) == {}


def test_found_on_one_network_and_merged_in_a_narrower_one():
    wide, narrow = (nn.Sequential(nn.Conv2d(6, n, 3), nn.BatchNorm2d(n), nn.ReLU()).eval() for n in (8, 3))
    perturb(narrow)
    with torch.no_grad():
        said = narrow(IMAGES)
        assert torch.allclose(merge(narrow, mergeable(wide, called(IMAGES)))(IMAGES), said, atol=1e-5)
    assert norms(narrow) == 0
