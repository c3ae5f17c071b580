"""Predictions by a file alone: the command, both kinds of file and ten lines of others' code agree, on any photo."""

import ast
import copy
import csv
import io
import json
import re
import shutil

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

import dynprune
from dynprune.data.photos import Resize
from dynprune.data.preprocess import Preprocess
from dynprune.deploy.photos import only_resizing
from dynprune.errors import DynpruneError
from dynprune.files.onnxfile import open_session, run_all
from dynprune.files.resizing import INPUT, refuse_interpolation
from dynprune.guide import page
from tests.cli.test_commands import dynprune as command
from tests.cli.test_commands import refused, write_folder

TRAIN = [
    "--model",
    "resnet20",
    "--batch-size",
    16,
    "--epochs",
    2,
    "--image-size",
    "48x40",
    "--budget",
    0.5,
    "--workers",
    0,
]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder to train on, and photos of every kind to predict."""
    root = tmp_path_factory.mktemp("photos")
    write_folder(root / "data", side=60)
    rng = np.random.default_rng(1)
    for split in ("train", "val"):  # photos of 16 bits, of which 4095 is white
        for i in range(4):
            values = rng.integers(0, 4096, (50, 70)).astype(np.uint16)
            values[0, 0] = 4095
            Image.fromarray(values).save(root / "data" / split / "cat" / f"deep{i}.png")
    new = root / "new"
    new.mkdir()
    for number in range(30):
        size = rng.integers(5, 300, 2)
        pixels = rng.integers(0, 256, (*size, 3)).astype(np.uint8) // (1 + number % 2)
        image = Image.fromarray(pixels)
        if number % 3 == 0:
            exif = image.getexif()
            exif[0x0112] = 1 + number % 8
            image.save(new / f"{number}.jpg", exif=exif)
        elif number % 3 == 1:
            image.convert("L" if number % 2 else "P").save(new / f"{number}.png")
        else:
            image.save(new / f"{number}.webp", lossless=True)
    return root


@pytest.fixture(scope="module")
def finished(photos):
    path = photos / "run"
    command("run", *TRAIN, "--data", photos / "data", "--out", path, "--batch", 1)
    return path


def hard(photos):
    """What ten lines do not handle: transparent and deeper than 8 bits."""
    rng = np.random.default_rng(2)
    folder = photos / "hard"
    folder.mkdir(exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (90, 50, 4)).astype(np.uint8)).save(folder / "alpha.png")
    Image.fromarray(rng.integers(0, 4096, (50, 70)).astype(np.uint16)).save(folder / "deep.png")
    return folder


def test_onnx_file_compact_file_and_run_agree(photos, finished):
    images = [photos / "new", hard(photos)]
    by_onnx = dynprune.predict(finished / "compact.onnx", images, top=2)
    assert len(by_onnx) == 32 and by_onnx[0].classes[0][1] >= by_onnx[0].classes[1][1]
    for other in (finished, finished / "compact.safetensors"):
        for one, own in zip(by_onnx, dynprune.predict(other, images, top=2), strict=True):
            assert one.path == own.path
            np.testing.assert_allclose([p for _, p in one.classes], [p for _, p in own.classes], atol=1e-4)
            if abs(one.classes[0][1] - 0.5) > 1e-3:
                assert one.classes[0][0] == own.classes[0][0]
    command("export", finished, "--onnx", "--fold-normalization", "--out", photos / "folded.onnx")
    folded = dynprune.predict(photos / "folded.onnx", images, top=1)
    for one, own in zip(by_onnx, folded, strict=True):
        assert own.classes[0][1] == pytest.approx(one.classes[0][1], abs=1e-4)


def test_predictions_are_those_of_the_accuracy(photos, finished):
    """Validation images, as training read them: the share that is right is the accuracy in the file."""
    truth = json.loads((finished / "result.json").read_text())["compact"]["accuracy"]
    found = dynprune.predict(finished / "compact.onnx", photos / "data" / "val", top=1)
    right = [own.classes[0][0] in own.path for own in found]
    assert sum(right) / len(right) == pytest.approx(truth, abs=1e-6)


def test_ten_lines_without_this_library_give_the_same_classes(photos, finished, capsys):
    (program,) = re.findall(r"^```python\n(.*?)^```$", page("predict"), re.MULTILINE | re.DOTALL)
    assert "dynprune" not in program
    statements = [own for own in ast.parse(program).body if not isinstance(own, ast.Import | ast.ImportFrom)]
    assert len(statements) == 10
    expected = dynprune.predict(finished / "compact.onnx", photos / "new", top=1)
    for own in expected:
        code = program.replace("compact.onnx", str(finished / "compact.onnx")).replace("photo.jpg", own.path)
        exec(compile(code, "predict.md", "exec"), {})  # noqa: S102 (our own page)
        name, chance = capsys.readouterr().out.split()
        assert float(chance) == pytest.approx(own.classes[0][1], abs=1e-3)
        assert name == own.classes[0][0] or abs(float(chance) - 0.5) < 1e-3


def test_the_command_prints_tables_json_and_csv(photos, finished):
    shown = command("predict", finished, photos / "new", "--top", 1)
    assert "cat" in shown.stdout or "dog" in shown.stdout
    told = json.loads(command("predict", finished / "compact.onnx", photos / "new", "--json").stdout)
    rows = list(csv.DictReader(io.StringIO(command("predict", finished, photos / "new", "--csv").stdout)))
    assert len(told["images"]) == 30 and len(rows) == 60  # two classes
    first = told["images"][0]
    assert rows[0]["path"] == first["path"] and rows[0]["class"] == first["classes"][0]["class"]
    assert sum(own["probability"] for own in first["classes"]) == pytest.approx(1)


def test_what_cannot_be_predicted_is_one_line(photos, finished, tmp_path):
    new, file = photos / "new", finished / "compact.onnx"
    both = command("predict", file, new, "--csv", "--json", check=False)
    assert both.returncode == 1 and "--csv and --json exclude each other" in both.stderr
    assert "--top got 0" in refused("predict", file, new, "--top", 0)
    assert "There is no file or folder nowhere" in refused("predict", file, "nowhere")
    (tmp_path / "empty").mkdir()
    assert "holds no images" in refused("predict", file, tmp_path / "empty")
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    assert "Cannot read the image" in refused("predict", file, tmp_path / "broken.jpg")
    assert "There is no" in refused("predict", tmp_path / "none.safetensors", new)
    other = onnx.load(file)
    del other.metadata_props[:]
    onnx.save(other, tmp_path / "other.onnx")
    assert "does not say how images become inputs" in refused("predict", tmp_path / "other.onnx", new)


@pytest.mark.parametrize(
    "change", [{"schema": 9}, {"size": [3, 8]}, {"interpolation": "best"}, {"std": [0, 1, 1]}, {"white": 3}]
)
def test_a_garbled_entry_is_refused(change):
    how = json.loads(Preprocess((3, 8, 8), (0.5,) * 3, (0.2,) * 3).as_json())
    assert Preprocess.from_metadata({"preprocess": json.dumps(how)}, "x").size == (3, 8, 8)
    with pytest.raises(DynpruneError, match="garbles its entry preprocess"):
        Preprocess.from_metadata({"preprocess": json.dumps({**how, **change})}, "x")


def test_a_loaded_network_knows_its_classes_and_its_preprocessing(photos, finished, tmp_path):
    model = dynprune.load(finished / "compact.safetensors")
    (expected,) = dynprune.predict(finished, photos / "new" / "0.jpg", top=1)
    with torch.no_grad():
        chances = model(torch.from_numpy(model.preprocess(photos / "new" / "0.jpg"))[None]).softmax(1)[0]
    assert model.classes == ["cat", "dog"]
    assert model.classes[int(chances.argmax())] == expected.classes[0][0]
    assert float(chances.max()) == pytest.approx(expected.classes[0][1], abs=1e-5)
    graph = dynprune.trace(model, torch.zeros(1, 3, 48, 40))  # what it knows is in nobody's way
    assert len(graph.groups) > 5
    dynprune.save(model, tmp_path / "again.safetensors")
    again = dynprune.load(tmp_path / "again.safetensors", copy.deepcopy(model))
    x = torch.randn(2, 3, 48, 40)
    assert torch.equal(again(x), model(x))


def test_a_graph_that_resizes_agrees_on_photos_of_every_size(photos, finished, tmp_path):
    """--fold-resize: the file takes decoded photos; the plain one what this library makes of them."""
    made = dynprune.export(finished, out=tmp_path / "own.onnx", fold_resize=True, int8=True, calibration=16).photos
    assert [own.path for own in made] == [str(tmp_path / name) for name in ("own.photos.onnx", "own.int8.photos.onnx")]
    assert made[0].top1_agreement >= 0.9 and made[0].off_share <= 0.01
    images = [photos / "new", hard(photos)]
    plain = {own.path: dict(own.classes) for own in dynprune.predict(tmp_path / "own.onnx", images)}
    folded = {own.path: dict(own.classes) for own in dynprune.predict(tmp_path / "own.photos.onnx", images)}
    assert plain.keys() == folded.keys() and len(plain) >= 30
    for path, chances in plain.items():
        for name, chance in chances.items():
            assert folded[path][name] == pytest.approx(chance, abs=0.03), path


def test_files_with_resizing_do_not_outlive_what_they_were_made_from(finished, tmp_path):
    out, forms = tmp_path / "own.onnx", ("own.photos.onnx", "own.int8.photos.onnx")
    dynprune.export(finished, out=out, fold_resize=True, int8=True, calibration=16)
    dynprune.export(finished, out=out)  # the same file again
    assert all((tmp_path / name).is_file() for name in forms)
    dynprune.export(finished, out=out, fold_normalization=True)  # another
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own.onnx"]


def test_the_lines_of_the_page_on_shipping_run(photos, finished, tmp_path, monkeypatch, capsys):
    dynprune.export(finished, out=tmp_path / "compact.onnx", fold_resize=True)
    shutil.copy(photos / "new" / "0.jpg", tmp_path / "photo.jpg")
    lines = re.search(r"```python\n(import numpy.*?)```", page("ship"), re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    exec(compile(lines, "ship.md", "exec"), {})
    assert re.match(r"\[\[ *-?\d", capsys.readouterr().out)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(3, 32, 40), (1, 24, 24), (3, 7, 50)])
@pytest.mark.parametrize("margin", [1.0, 8 / 7])
def test_resizing_in_a_graph_is_pillows(interpolation, size, margin, tmp_path):
    how = Preprocess(size, (0.2,) * size[0], (0.3,) * size[0], Resize(interpolation, margin))
    session = open_session(only_resizing(how))
    rng = np.random.default_rng(0)
    for shape in ((50, 70), (120, 300), (20, 15), (5, 200), (1, 1)):
        smooth = Image.fromarray(rng.integers(0, 256, (9, 9, 3)).astype(np.uint8)).resize(shape[::-1], 2)
        smooth.save(tmp_path / "photo.png")
        expected = how(str(tmp_path / "photo.png"))
        own = run_all(session, {INPUT: np.asarray(smooth)[None]})[0][0]
        assert own.shape == size
        assert np.abs(own - expected).max() * 0.3 * 255 <= 2.01 and np.abs(own - expected).mean() * 0.3 * 255 < 0.5


def test_an_interpolation_that_no_graph_knows_is_refused_first():
    with pytest.raises(DynpruneError, match="--fold-resize knows bilinear and bicubic, and .* resized by hamming"):
        refuse_interpolation(Preprocess((3, 8, 8), (0.0,) * 3, (1.0,) * 3, Resize("hamming")))
