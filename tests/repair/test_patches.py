"""A layer is the product of its patches and its matrix, whatever its strides, paddings and groups."""

import pytest
import torch
from torch import nn

from dynprune.repair.calibration import MORE, sample_rows
from dynprune.repair.patches import (
    by_position,
    explains,
    gram_of,
    matrix_of,
    patches,
    positions_of,
    size_of,
    weight_from,
)

LAYERS = {
    "linear": (nn.Linear(6, 5), (4, 6)),
    "linear over tokens": (nn.Linear(6, 5, bias=False), (4, 7, 6)),
    "plain": (nn.Conv2d(4, 6, 3), (3, 4, 9, 7)),
    "stride, dilation, padding": (
        nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(2, 3)),
        (3, 4, 11, 9),
    ),
    "same": (nn.Conv2d(4, 6, (4, 3), padding="same"), (3, 4, 8, 9)),
    "valid": (nn.Conv2d(4, 6, 3, padding="valid"), (3, 4, 8, 9)),
    "circular": (nn.Conv2d(4, 6, 3, padding=2, padding_mode="circular"), (3, 4, 8, 9)),
    "reflect": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (3, 4, 8, 9)),
    "grouped": (nn.Conv2d(6, 9, 3, padding=1, groups=3), (3, 6, 5, 5)),
    "depthwise": (nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), (3, 6, 5, 5)),
    "depthwise with a multiplier": (nn.Conv2d(6, 12, 3, padding=1, groups=6), (3, 6, 5, 5)),
    "1-d": (nn.Conv1d(4, 6, 5, stride=2, padding=3), (3, 4, 17)),
    "3-d": (nn.Conv3d(2, 3, (1, 2, 3), padding=1), (2, 2, 4, 5, 6)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3), (3, 4, 5, 6)),
    "transposed, all at once": (
        nn.ConvTranspose2d(
            4, 6, (3, 4), stride=(2, 3), padding=(1, 2), output_padding=(1, 0), dilation=(2, 1), groups=2
        ),
        (3, 4, 5, 6),
    ),
    "transposed 1-d": (nn.ConvTranspose1d(4, 2, 4, stride=3, padding=1), (3, 4, 9)),
    "transposed 3-d": (nn.ConvTranspose3d(2, 4, 2, stride=2, groups=2), (2, 2, 3, 4, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_patches_times_matrix_is_the_layer(name):
    torch.manual_seed(0)
    layer, shape = LAYERS[name]
    x = torch.randn(shape)
    with torch.no_grad():
        output = layer(x)
        rows = torch.arange(0, len(x) * positions_of(layer, output), 2)
        read = patches(layer, x, size_of(layer, output), rows)
        said = torch.cat(list(read @ matrix_of(layer)), dim=1) + (0 if layer.bias is None else layer.bias)
    torch.testing.assert_close(said, by_position(layer, output)[rows], atol=1e-5, rtol=1e-5)  # sums in another order
    assert explains(layer, x, output, rows)
    assert torch.equal(weight_from(layer, matrix_of(layer)), layer.weight)


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, weight, self.bias)


class PadsItself(nn.Conv2d):
    def forward(self, x):
        return super().forward(nn.functional.pad(x, [1, 1, 1, 1]))


@pytest.mark.parametrize("kind", [Standardised, PadsItself])
def test_a_layer_that_does_more_is_known(kind):
    layer, x = kind(4, 6, 3), torch.randn(3, 4, 8, 8)
    output = layer(x)
    assert not explains(layer, x, output, torch.arange(positions_of(layer, output)))


def test_rows_come_from_every_image_and_are_the_same_again():
    layer = nn.Conv2d(4, 6, 3)
    rows = sample_rows(layer, 64, 1000, seed=3)
    assert len(rows) == 4096 and torch.equal(rows, rows.unique())  # sorted, none twice
    assert torch.equal(torch.bincount(rows // 1000), torch.full((64,), 64))
    assert torch.equal(rows, sample_rows(layer, 64, 1000, seed=3))
    assert not torch.equal(rows, sample_rows(layer, 64, 1000, seed=4))
    assert torch.equal(sample_rows(layer, 3, 10, seed=0), torch.arange(30))  # all there are
    assert len(sample_rows(nn.Linear(2000, 5), 64, 1000, 0)) == 64 * 256  # more for more columns, up to a bound


@pytest.mark.parametrize(
    ("layer", "times"), [(nn.Conv2d(4, 6, 3), MORE), (nn.Linear(2000, 5), 1), (nn.Linear(900, 5), 1)]
)
def test_a_thorough_look_takes_more_places_where_they_cost_little(layer, times):
    usual = sample_rows(layer, 64, 1000, seed=3)
    thorough = sample_rows(layer, 64, 1000, seed=3, thorough=True)
    assert len(thorough) == times * len(usual)
    assert torch.isin(usual, thorough).all()  # the same and others


def test_a_thorough_look_at_grouped_layers_stays_within_memory():
    layer = nn.Conv2d(512, 512, 3, groups=512)
    rows = sample_rows(layer, 64, 4000, seed=0, thorough=True)
    assert len(rows) * 512 * 10 <= 2**25 * 1.1


@pytest.mark.parametrize("shape", [(1, 40, 30), (3, 50, 20), (1, 60, 1024), (2, 30, 1300), (1, 20, 1537)])
def test_gram_matrices_are_products_and_symmetric(shape):
    rows = torch.randn(shape, dtype=torch.float64)
    found = gram_of(rows)
    torch.testing.assert_close(found, rows.transpose(1, 2) @ rows)
    torch.testing.assert_close(found, found.transpose(1, 2), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gram_of(rows.transpose(1, 2)), rows @ rows.transpose(1, 2))
