import gzip
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from dynprune.data.loading import ImagesInMemory, augment_batch, decode, fit, load_data, scan, some
from dynprune.errors import DynpruneError
from dynprune.runs.config import TrainConfig
from dynprune.state.copies import generator
from tests.cli.test_commands import write_folder


def test_digits_splits_are_disjoint_and_reporting_does_not_depend_on_the_seed():
    one, other = (load_data(TrainConfig(seed=seed).source) for seed in (0, 1))
    assert (len(one.train), len(one.val), len(one.test)) == (1293, 144, 360)
    assert torch.equal(one.test.pixels, other.test.pixels) and not torch.equal(one.val.pixels, other.val.pixels)
    seen = {image.numpy().tobytes() for image in one.train.pixels}
    assert not seen & {image.numpy().tobytes() for part in (one.val, one.test) for image in part.pixels}
    assert torch.bincount(one.test.labels).min() >= 34  # each class has its share


def test_batches_are_a_function_of_seed_epoch_and_step():
    data = load_data(TrainConfig().source)
    whole = list(data.train_batches(128, seed=3, epoch=2))
    rest = list(data.train_batches(128, seed=3, epoch=2, start=4))
    assert len(whole) == data.steps_per_epoch(128) == 11
    assert all(torch.equal(a, b) and torch.equal(c, d) for (a, c), (b, d) in zip(whole[4:], rest))
    assert not torch.equal(whole[0][1], next(iter(data.train_batches(128, 3, 3)))[1])


def test_each_image_gets_its_own_crop_and_mirror():
    pixels = torch.arange(1, 65, dtype=torch.uint8).view(1, 1, 8, 8).expand(200, 3, 8, 8).contiguous()
    out = augment_batch(pixels, "crop+flip", generator(0))
    assert len({image.numpy().tobytes() for image in out}) == 18  # 3 x 3 shifts, mirrored or not
    assert torch.equal(augment_batch(pixels, "none", generator(0)), pixels)
    unshifted = augment_batch(pixels, "crop", generator(1))
    assert any(torch.equal(image, pixels[0]) for image in unshifted)


def test_normalised_images_have_mean_0_and_deviation_1():
    data = load_data(TrainConfig(augment="none").source)
    images = data.normalise(data.train.pixels)
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(3), atol=2e-3, rtol=0)
    torch.testing.assert_close(images.std((0, 2, 3)), torch.ones(3), atol=2e-3, rtol=0)


def test_folders_with_val_and_test_keep_them_apart(tmp_path):
    data = load_data(
        TrainConfig(data=str(write_folder(tmp_path, splits=("train", "val", "test"))), batch_size=4).source
    )
    assert (len(data.train), len(data.val), len(data.test)) == (24, 24, 24) and (data.chooses, data.reports) == (
        "val/",
        "test/",
    )
    assert data.classes == ["cat", "dog"] and data.size == (3, 32, 32) and data.augment == "crop+flip"


def test_one_folder_per_class_is_split_by_fraction_and_seed(tmp_path):
    write_folder(tmp_path, splits=(".",), images=30)
    one, same, other = (
        load_data(TrainConfig(data=str(tmp_path), batch_size=4, val_fraction=0.2, seed=seed).source)
        for seed in (0, 0, 1)
    )
    assert (len(one.test), len(one.val), len(one.train)) == (12, 10, 38)
    assert torch.equal(one.test.pixels, same.test.pixels) and not torch.equal(one.test.pixels, other.test.pixels)


def test_photos_are_resized_by_their_shorter_side_and_cropped_in_the_middle(tmp_path):
    wide = np.zeros((40, 80, 3), np.uint8)
    wide[:, 20:60] = 255
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    Image.fromarray(wide).save(tmp_path / "a" / "x.png")
    Image.fromarray(wide[:, :, 0]).save(tmp_path / "b" / "grey.png")
    images = decode(scan(tmp_path, None)[0], 20, 20)
    assert images.pixels.shape == (2, 3, 20, 20) and images.pixels[:, :, :, 1:-1].min() == 255


def test_fashion_mnist_is_read_where_it_lies(tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 60), ("t10k", 20)):
        images, labels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8), (np.arange(count) % 10).astype(np.uint8)
        for name, magic, array in (
            (f"{prefix}-images-idx3-ubyte", 2051, images),
            (f"{prefix}-labels-idx1-ubyte", 2049, labels),
        ):
            content = struct.pack(f">{1 + array.ndim}I", magic, *array.shape) + array.tobytes()
            (raw / name).write_bytes(content)
            with gzip.open(raw / f"{name}.gz", "wb") as file:
                file.write(content)
    data = load_data(TrainConfig(data="fashion-mnist", data_root=str(tmp_path), batch_size=8, val_fraction=0.2).source)
    assert (len(data.train), len(data.val), len(data.test)) == (48, 12, 20) and data.train.pixels.shape[1:] == (
        3,
        32,
        32,
    )
    assert data.test.pixels[:, :, :2].max() == 0 and "Sneaker" in data.classes


def test_small_images_are_framed_and_large_ones_resized():
    assert fit(torch.full((1, 3, 28, 28), 9, dtype=torch.uint8), 32, 32)[0, 0, [0, 2, 15], [0, 2, 15]].tolist() == [
        0,
        9,
        9,
    ]
    assert fit(torch.full((1, 3, 64, 64), 9, dtype=torch.uint8), 32, 32).shape == (1, 3, 32, 32)


def test_classes_too_small_to_split_are_refused(tmp_path):
    with pytest.raises(DynpruneError, match="cannot be split"):
        load_data(TrainConfig(data=str(write_folder(tmp_path, splits=(".",), images=1)), batch_size=2).source)


def test_some_images_are_of_many_classes_and_always_the_same():
    """Folders are sorted by class: the first images would all be of one."""
    sorted_by_class = ImagesInMemory(
        torch.zeros(1000, 3, 2, 2, dtype=torch.uint8), torch.arange(10).repeat_interleave(100)
    )
    chosen = some(sorted_by_class, 200)
    assert len(chosen) == 200 and torch.bincount(chosen.labels, minlength=10).min() > 8
    assert torch.equal(chosen.labels, some(sorted_by_class, 200).labels) and len(some(sorted_by_class, 5000)) == 1000
