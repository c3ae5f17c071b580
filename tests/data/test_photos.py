"""Photos as people have them: deep, turned, transparent, in odd kinds and shapes."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dynprune.data.loading import load_data
from dynprune.data.photos import Depth, depth_of, files_in, in_words, open_image, resized, shown_size
from dynprune.errors import DynpruneError
from dynprune.runs.config import TrainConfig
from tests.cli.test_commands import write_folder

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)


@pytest.mark.parametrize(
    "name, pixels",
    [
        ("a.png", (GREY.astype(np.uint16) * 257)),
        ("a.tif", (GREY.astype(np.uint16) * 257)),
        ("a.tif", GREY.astype(np.int32) * 257),
        ("a.tif", (GREY / 255).astype(np.float32)),
        ("a.tif", GREY.astype(np.float32)),
        ("a.tif", GREY.astype(np.int32)),
        ("a.tif", GREY.astype(np.uint16) * 16 + (GREY >> 4)),
    ],
)
def test_deep_images_keep_their_shades(tmp_path, name, pixels):
    path = str(tmp_path / name)
    Image.fromarray(pixels).save(path)
    shown = np.asarray(open_image(path, depth_of([path])))
    assert shown.shape == (16, 16, 3) and np.abs(shown[..., 0].astype(int) - GREY).max() <= 1


def test_white_is_the_same_for_all_images_of_a_folder(tmp_path):
    """A dark picture is dark, not stretched to what its brightest pixel would allow."""
    for name, top in (("dark.png", 2000), ("bright.png", 60000)):
        Image.fromarray(np.linspace(0, top, 256).astype(np.uint16).reshape(16, 16)).save(tmp_path / name)
    depth = depth_of([str(tmp_path / name) for name in ("dark.png", "bright.png")])
    assert depth.white == {"I": 65535.0}
    assert np.asarray(open_image(str(tmp_path / "dark.png"), depth)).max() == 8


@pytest.mark.parametrize(
    "pixels, words",
    [
        (np.array([[0.0, np.nan]], np.float32), "no finite numbers"),
        (np.array([[-1.0, 1.0]], np.float32), "down to -1"),
        (np.array([[0, 2e10]], np.float32), "no usual white"),
        (np.array([[-5, 7]], np.int32), "down to -5"),
    ],
)
def test_images_without_a_range_are_refused_by_name(tmp_path, pixels, words):
    Image.fromarray(pixels).save(tmp_path / "odd.tif")
    with pytest.raises(DynpruneError, match=f"odd.tif.*{words}"):
        open_image(str(tmp_path / "odd.tif"))


@pytest.mark.parametrize("orientation, turned", [(1, False), (3, False), (6, True), (8, True)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_orientation_is_followed(tmp_path, orientation, turned, mode):
    image = Image.new("RGB", (80, 40), (255, 0, 0))
    image.paste((0, 0, 255), (0, 0, 40, 40))
    exif = image.getexif()
    exif[0x0112] = orientation
    path = str(tmp_path / ("turned.jpg" if mode in ("RGB", "L") else "turned.png"))
    image.convert(mode).save(path, exif=exif)
    shown = open_image(path)
    assert shown.size == shown_size(path) == ((40, 80) if turned else (80, 40)) and shown.mode == "RGB"
    if orientation == 3 and mode == "RGB":
        assert shown.getpixel((70, 20))[2] > 200  # what was left is right


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA"])
def test_what_is_transparent_shows_the_background(tmp_path, mode):
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[..., 0], pixels[4:, :, 3] = 255, 255
    Image.fromarray(pixels).convert("RGBA").convert(mode if mode not in ("PA", "P") else "RGBA").save(
        path := str(tmp_path / "x.png")
    )
    if mode in ("P", "PA"):
        palette = Image.fromarray(np.repeat([[0], [1]], 4, 0).repeat(8, 1).astype(np.uint8))
        palette.putpalette([255, 0, 0, 255, 0, 0])
        palette.save(path, transparency=0)
    shown = np.asarray(open_image(path)).astype(int)
    # white above; below it what is opaque: red, or its grey
    assert (shown[0] == 255).all() and shown[-1, :, 1].max() < 90


def test_every_kind_that_is_read_is_found_and_the_rest_is_told(tmp_path):
    write_folder(tmp_path, images=6)
    for number, kind in enumerate(("gif", "webp", "tiff", "bmp", "jp2")):
        Image.fromarray(GREY).convert("RGB").save(tmp_path / "train" / "cat" / f"more{number}.{kind}")
    (
        (tmp_path / "train" / "cat" / "list.txt").write_text("x"),
        (tmp_path / "val" / "dog" / "Thumbs.db").write_text("x"),
        (tmp_path / "train" / "dog" / ".hidden").write_text("x"),
    )
    data = load_data(TrainConfig(data=str(tmp_path), batch_size=4, image_size=16).source)
    assert len(data.train) + len(data.val) == 12 + 5
    assert data.remarks == (
        f"2 files of kinds that are not read were skipped (.txt 1, .db 1); images are "
        f"{data.remarks[0].partition('images are ')[2]}",
    )


def test_skipped_files_in_words():
    assert in_words(Counter({".txt": 1})).startswith("1 file of kinds that are not read was skipped (.txt 1)")
    assert (
        "(.a 4, .b 3, .c 2, ...)" in in_words(Counter({".a": 4, ".b": 3, ".c": 2, ".d": 1}))
        and in_words(Counter()) == ""
    )


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    def walk(top, onerror, followlinks):
        onerror(PermissionError(13, "Permission denied", "photos/train/cat"))
        return iter(())

    monkeypatch.setattr(os, "walk", walk)
    with pytest.raises(DynpruneError, match="photos/train/cat .Permission denied."):
        files_in(tmp_path, Counter())


@pytest.mark.parametrize("size", [(120, 2), (2, 120), (64, 48)])
def test_other_shapes_are_cut_in_the_middle(size):
    image = Image.new("RGB", size, (10, 10, 10))
    image.paste((200, 200, 200), (size[0] // 2 - 1, size[1] // 2 - 1, size[0] // 2 + 1, size[1] // 2 + 1))
    shown = np.asarray(resized(image, 32, 48))
    assert shown.shape == (32, 48, 3) and shown[16, 24].max() > shown[0, 0].max()


def test_a_panorama_takes_little_memory(tmp_path):
    write_folder(tmp_path, images=4, side=120)
    (
        Image.new("RGB", (12000, 2)).save(tmp_path / "train" / "cat" / "wide.png"),
        Image.new("RGB", (2, 12000)).save(tmp_path / "val" / "cat" / "high.png"),
    )
    code = (
        f"import resource, sys; from dynprune.runs.config import TrainConfig; from dynprune.data.loading import "
        f"load_data; before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;data = "
        f"load_data(TrainConfig(data={str(tmp_path)!r}, image_size=224, workers=0, batch_size=2, "
        f"val_fraction=0.4).source); list(data.train_batches(2, 0, 0)); "
        f"list(data.eval_batches(data.test));print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) "
        f"// 1024)"
    )
    used = int(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
        ).stdout
    )
    assert used < 300, f"{used} MiB"


@pytest.mark.parametrize(
    "held, chooses, reports",
    [
        (("valid",), "10 % of train/", "valid/"),
        (("valid", "test"), "valid/", "test/"),
        (("Test",), "10 % of train/", "Test/"),
        (("validation", "testing"), "validation/", "testing/"),
    ],
)
def test_other_names_of_held_out_folders(tmp_path, held, chooses, reports):
    data = load_data(
        TrainConfig(data=str(write_folder(tmp_path, splits=("train", *held), images=20)), batch_size=4).source
    )
    assert (data.chooses, data.reports) == (chooses, reports)


@pytest.mark.parametrize("side", [20, 120])
def test_images_need_not_be_square(tmp_path, side):
    data = load_data(
        TrainConfig(
            data=str(write_folder(tmp_path, side=side)),
            batch_size=4,
            image_size="128x64" if side == 120 else "24x16",
            workers=0,
        ).source
    )
    images, _ = next(iter(data.train_batches(4, 0, 0)))
    assert (
        images.shape == ((4, 3, 128, 64) if side == 120 else (4, 3, 24, 16))
        and data.example.shape[1:] == images.shape[1:]
    )
    assert next(iter(data.eval_batches(data.test)))[0].shape[1:] == images.shape[1:]


@pytest.mark.parametrize("text", ["0", "96x", "x96", "96x64x3", "-5", "9999", "big", "1e2"])
def test_sizes_that_make_no_sense_are_refused(text):
    with pytest.raises(DynpruneError, match="--image-size got"):
        TrainConfig(image_size=text).validate()


def test_grey_networks_get_luminance(tmp_path):
    data = load_data(TrainConfig(data=str(write_folder(tmp_path)), batch_size=4, augment="none").source)
    grey = data.with_channels(1)
    images = grey.normalise(data.train.pixels)
    assert (
        images.shape[1] == 1
        and abs(float(images.mean())) < 0.02
        and abs(float(images.std()) - 1) < 0.02
        and grey.example.shape[1] == 1
    )
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    expected = (data.train.pixels.float() * weights).sum(1, keepdim=True)
    torch.testing.assert_close(images * grey.std[0] * 255 + grey.mean[0] * 255, expected, atol=1e-3, rtol=0)
    with pytest.raises(DynpruneError, match="images of 5 channels"):
        data.with_channels(5)


# -- small folders -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "images, epochs, batch",
    [(194, 20, 16), (1293, 20, 128), (50_000, 1, 128), (100, 1, 8), (12, 20, 8), (5, 20, 5), (1000, 30, 128)],
)
def test_the_batch_follows_from_the_data(images, epochs, batch):
    settled = TrainConfig(epochs=epochs).resolved(images)
    assert settled.batch_size == batch and settled.lr == pytest.approx(0.1 * min(1, batch / 128) ** 0.5)
    assert settled.resolved(images) == settled
    given = TrainConfig(epochs=epochs, batch_size=128, lr=0.3).resolved(images)
    assert (given.batch_size, given.lr) == (128, 0.3)
    assert TrainConfig(epochs=epochs).resolved(images, processes=3).batch_size % 3 == 0


@pytest.mark.parametrize("side, size", [(16, 16), (120, 112)])
def test_every_image_is_used_in_an_epoch_and_every_batch_is_full(tmp_path, side, size):
    data = load_data(
        TrainConfig(
            data=str(write_folder(tmp_path, images=13, side=side)),
            batch_size=4,
            image_size=size,
            augment="none",
            workers=0,
        ).source
    )
    batches = [images for images, _ in data.train_batches(4, seed=1, epoch=3)]
    assert len(batches) == data.steps_per_epoch(4) == -(-len(data.train) // 4) and all(
        len(images) == 4 for images in batches
    )
    seen = {image.numpy().tobytes() for image in torch.cat(batches)}
    assert len(seen) == len(data.train)


def test_depth_says_what_is_white():
    assert str(Depth({"I": 65535.0, "F": 1.0})) == "whole numbers from 0 to 65535, real numbers from 0 to 1"
