"""Convolutions as products: the same sums, and only where they are meant to be."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dynprune.execution import convolutions
from dynprune.execution.convolutions import (
    Convolution,
    SmallMaps,
    input_gradient,
    product,
    profits,
    small_maps,
    weight_gradient,
    wholly,
)

SQUARE = [(256, 4), (512, 4), (256, 2), (128, 2), (1024, 1), (512, 8)]  # channels, and size of a map


def inputs(images, weight, dtype=torch.float64, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype) for shape in (images, weight)]


@pytest.mark.parametrize("padding", [(0, 0), (1, 1), (2, 0), (0, 3)])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 3), (4, 1)])
def test_the_sums_are_those_of_the_definition(kernel, padding):
    images, weight = (value.requires_grad_() for value in inputs((3, 5, 6, 7), (4, 5, *kernel)))
    said = F.conv2d(images, weight, padding=padding)
    gradient = torch.randn(said.shape, dtype=said.dtype, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad(said, (images, weight), gradient)
    for memory in (torch.contiguous_format, torch.channels_last):
        own, back, kernels = (value.detach().contiguous(memory_format=memory) for value in (images, gradient, weight))
        assert torch.allclose(product(own, kernels, None, padding), said, rtol=1e-10)
        assert torch.allclose(input_gradient(own, back, kernels, padding), expected[0], rtol=1e-10)
        assert torch.allclose(weight_gradient(own, back, kernels, padding), expected[1], rtol=1e-10)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_all_gradients_of_a_convolution(monkeypatch, bias, whole):
    monkeypatch.setattr(convolutions, "wholly", lambda *_: whole)
    images, weight = inputs((2, 3, 4, 4), (5, 3, 3, 3))
    values = [value.requires_grad_() for value in (images, weight, torch.ones(5, dtype=images.dtype))]
    own = Convolution.apply(images, weight, values[2] if bias else None, (1, 1))
    said = F.conv2d(images, weight, values[2] if bias else None, padding=1)
    assert torch.allclose(own, said, rtol=1e-10)
    for one, other in zip(
        torch.autograd.grad(own.square().sum(), values[: 2 + bias]),
        torch.autograd.grad(said.square().sum(), values[: 2 + bias]),
        strict=True,
    ):
        assert torch.allclose(one, other, rtol=1e-10)


def test_only_wide_layers_on_small_maps_profit():
    def said(size, inputs, outputs, kernel=3, pad=1):
        return profits(torch.empty(8, inputs, size, size), torch.empty(outputs, inputs, kernel, kernel), (pad, pad))

    assert said(4, 128, 128) and said(2, 64, 512) and said(8, 256, 512) and said(8, 128, 256, 1, 0)
    assert not said(8, 128, 512) and not said(16, 512, 512) and not said(4, 64, 64) and not said(4, 32, 32, 1, 0)
    assert not said(14, 512, 512, 1, 0) and not said(2, 512, 512, 5, 0)  # nothing comes out of the last one
    whole = [wholly(torch.empty(8, own, size, size), torch.empty(own, own, 3, 3), (1, 1)) for own, size in SQUARE]
    assert whole == [False, True, True, False, True, False]
    assert not wholly(torch.empty(8, 512, 2, 2), torch.empty(512, 512, 1, 1), (0, 0))


class Counted(nn.Module):
    def __init__(self, **ways):
        super().__init__()
        self.layer = nn.Conv2d(128, kernel_size=3, **{"out_channels": 128, "padding": 1} | ways)

    def forward(self, x):
        return self.layer(x).float().square().mean()


@pytest.fixture
def products(monkeypatch):
    """Runs a pass and gives how many weight gradients were products, and all gradients."""
    seen = []
    monkeypatch.setattr(convolutions, "weight_gradient", lambda *own: (seen.append(1), weight_gradient(*own))[1])

    def run(model, images, *, precision=torch.bfloat16, grad=True):
        model.zero_grad()
        seen.clear()
        with torch.autocast("cpu", precision, enabled=precision == torch.bfloat16), SmallMaps():
            with torch.set_grad_enabled(grad):
                loss = model(images)
        if loss.requires_grad:
            loss.backward()
        return len(seen), [value.grad for value in model.parameters()]

    return run


@pytest.mark.parametrize(
    "ways, used",
    [
        ({}, True),
        ({"out_channels": 1024}, True),
        ({"bias": False}, True),
        ({"padding": "same"}, False),
        ({"stride": 2}, False),
        ({"groups": 2}, False),
        ({"dilation": 2, "padding": 2}, False),
        ({"padding_mode": "circular"}, True),
    ],
)
def test_which_layers_are_products(products, ways, used):
    torch.manual_seed(0)
    model, images = Counted(**ways), torch.randn(8, 128, 4, 4)
    found, own = products(model, images)
    assert found == used
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        model(images).backward()
    for one, other in zip(own, [value.grad for value in model.parameters()], strict=True):
        assert one.dtype == torch.float32 and (one - other).abs().max() <= 0.01 * other.abs().max()


def test_where_nothing_is_learned_or_precision_is_another_all_is_as_it_was(products):
    model, images = Counted(), torch.randn(8, 128, 4, 4)
    assert products(model, images, precision=torch.float32)[0] == 0
    assert products(model, images, grad=False)[0] == 0
    assert products(model, images[0])[0] == products(model, images[:0])[0] == 0
    model.layer.weight.requires_grad_(False)
    assert products(model, images)[0] == 0


def test_only_processors_that_were_measured_and_networks_that_are_wide(monkeypatch):
    wide, thin = Counted(), nn.Conv2d(64, 64, 3)
    for amx in (True, False):
        monkeypatch.setattr(convolutions.torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        assert isinstance(small_maps(wide, True), SmallMaps) == amx
        assert not isinstance(small_maps(wide, False), SmallMaps)
        assert not isinstance(small_maps(thin, True), SmallMaps)
        assert not isinstance(small_maps(Counted().to("meta"), True), SmallMaps)
