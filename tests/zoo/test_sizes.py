"""Transformers with a fixed number of patches are built for the images that they will get."""

import pytest
import torch

from dynprune import zoo
from dynprune.errors import DynpruneError


@pytest.mark.parametrize(("name", "side"), [("torchvision:vit_b_16", 64), ("torchvision:vit_b_32", 384)])
def test_torchvisions_follow_the_size(name, side):
    with torch.device("meta"):
        model = zoo.build(name, 5, size=(3, side, side))
        assert model.eval()(torch.zeros(1, 3, side, side)).shape == (1, 5)
        usual = zoo.build(name, 5)
        assert usual.eval()(torch.zeros(1, 3, 224, 224)).shape == (1, 5)


def test_what_is_asked_for_by_name_comes_first():
    with torch.device("meta"):
        model = zoo.build("torchvision:vit_b_32?image_size=96", 5, size=(3, 64, 64))
    assert model.image_size == 96


def test_a_size_of_no_whole_patches_is_one_line():
    with pytest.raises(DynpruneError, match="cannot be built: AssertionError.*patch"):
        zoo.build("torchvision:vit_b_32", 5, size=(3, 65, 65))


@pytest.mark.parametrize(("name", "size"), [("vit_tiny_patch16_224", (32, 64)), ("mixer_s32_224", (64, 64))])
def test_timms_follow_it_too(name, size):
    pytest.importorskip("timm")
    model = zoo.build(f"timm:{name}", 5, size=(3, *size))
    assert model.eval()(torch.zeros(2, 3, *size)).shape == (2, 5)


def test_a_timm_network_that_takes_any_size_stays_as_its_weights_are():
    pytest.importorskip("timm")
    model = zoo.build("timm:vit_tiny_patch16_224?dynamic_img_size=True", 5, size=(3, 64, 64))
    assert model.pos_embed.shape[1] == 14 * 14 + 1
    assert model.eval()(torch.zeros(2, 3, 64, 64)).shape == (2, 5)


def test_convolutional_networks_are_as_they_were():
    pytest.importorskip("timm")
    for name in ("timm:resnet18", "torchvision:resnet18"):
        one, other = zoo.build(name, 5, 0), zoo.build(name, 5, 0, size=(3, 40, 40))
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
