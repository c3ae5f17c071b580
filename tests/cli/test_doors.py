"""How commands end and what they say: exit codes, errors as JSON, names of models, runs and data that moved, places
that cannot be written."""

import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import onnx
import pytest
import torch

from dynprune import zoo
from dynprune.cli import program as cli
from dynprune.deploy import bench
from dynprune.errors import DynpruneError, DynpruneWarning
from dynprune.files.onnxfile import size_bytes, write_onnx
from dynprune.runs.config import TrainConfig
from dynprune.runs.directory import Run
from dynprune.zoo import runs_code
from tests import invent, odd
from tests.cli.test_commands import TINY, dynprune, refused, write_folder

ROOT = Path(__file__).parents[2]


def call(*options, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "dynprune", *map(str, options)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize(
    "options, code, words",
    [
        (("bench", "nowhere", "--json"), 1, "nowhere is not a directory"),
        (("train", "--epochs", "many", "--json"), 2, "--epochs"),
        (("train", "--batch-size", "0", "--json"), 1, "--batch-size got 0"),
        (("train", "--lr", "0", "--json"), 1, "Expected auto, or more than 0"),
        (("train", "--no-such", "--json"), 2, "--no-such"),
    ],
)
def test_errors_are_json_too(options, code, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dynprune", *options])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, errors = capsys.readouterr()
    found = json.loads(out)
    assert ended.value.code == code == found["exit_code"] and words in found["error"] and words in errors


@pytest.fixture(autouse=True)
def same_handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    shown = warnings.showwarning
    yield
    warnings.showwarning = shown
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_command_with_its_code(number, code, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dynprune", "plan", "--json"])
    monkeypatch.setattr(cli, "app", lambda **_: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == code and json.loads(capsys.readouterr().out)["exit_code"] == code


def test_permission_denied_says_so(monkeypatch, capsys):
    def denied(**_):
        raise PermissionError(13, "Permission denied", "runs/mine")

    monkeypatch.setattr(sys, "argv", ["dynprune", "plan"])
    monkeypatch.setattr(cli, "app", denied)
    with pytest.raises(SystemExit):
        cli.main()
    assert "error: Permission denied: runs/mine" in capsys.readouterr().err


def test_results_are_shown_where_they_cannot_be_recorded(tmp_path, monkeypatch):
    run = Run.create(tmp_path / "run", TrainConfig(), False)
    monkeypatch.setattr(
        "dynprune.files.disk.write_bytes",
        lambda path, _: (_ for _ in ()).throw(DynpruneError(f"Cannot write {path} (Read-only file system).")),
    )
    with pytest.warns(DynpruneWarning, match="Read-only file system.*shown, but not recorded"):
        run.record("bench", {"a": 1})


@pytest.mark.parametrize(
    "name, words",
    [
        ("resnet18", "Did you mean torchvision:resnet18"),
        ("resnet21", "Did you mean resnet20"),
        ("convnext_femto", "convnext"),
        ("tests.odd:nothing", 'has no callable "nothing"'),
        ("tests.odd:needs_depth", "needs_depth.*depth=18"),
        ("tests.odd:raises", "KeyError in odd.py"),
        ("timm:resnet18?pretrained=True", "pretrained, which would read files or the network"),
        ("torchvision:resnet18?weights=DEFAULT", "weights"),
        ("vgg16?depth=3", "takes no arguments"),
        ("tests.odd:Base?broken", "Expected arguments such as"),
        ("no.such.module:x", "Cannot import"),
    ],
)
def test_names_that_lead_nowhere_are_refused_in_one_line(name, words):
    with pytest.raises(DynpruneError, match=words) as refusal:
        zoo.build(name, 4)
    assert "\n" not in str(refusal.value)


def test_a_syntax_error_names_the_line(tmp_path, monkeypatch):
    (tmp_path / "broken_module.py").write_text("import torch\ndef build(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DynpruneError, match=r"Cannot import \"broken_module\": .*broken_module.py:2"):
        zoo.build("broken_module:build", 4)


@pytest.mark.parametrize(
    "name, channels",
    [
        ("tests.odd:Factories.make", 3),
        ("tests.odd:Factories.make?into=1", 1),
        ("tests.odd:needs_depth?depth=18", 3),
        ("torchvision:resnet18?width_per_group=64", 3),
        ("tests.odd:grey", 1),
    ],
)
def test_names_with_arguments_and_methods(name, channels):
    model = zoo.build(name, 4)
    assert next(model.parameters()).shape[1] == channels and model.eval()(torch.zeros(1, channels, 64, 64)).shape == (
        1,
        4,
    )


def test_only_the_users_own_code_needs_trust():
    assert runs_code("tests.odd:Base") and not any(
        map(runs_code, ("timm:resnet18?in_chans=1", "transformers:resnet", "torchvision:resnet18", "vgg16"))
    )


def test_a_run_and_its_data_can_move(tmp_path):
    photos = write_folder(tmp_path / "photos", images=12)
    dynprune(
        "train", "--data", photos, *TINY[:2], "--batch-size", 8, "--epochs", 1, "--out", tmp_path / "run", "--no-onnx"
    )
    photos.rename(tmp_path / "moved")
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    assert "does not exist" in refused("compact", tmp_path / "elsewhere", "--trust")
    for command in (("compact",), ("export", "--onnx"), ("bench", "--batch", "1")):
        dynprune(command[0], tmp_path / "elsewhere", *command[1:], "--trust", "--data", tmp_path / "moved")


def test_names_of_files_need_not_be_utf8_nor_the_terminal(tmp_path):
    folder = os.fsdecode(os.fsencode(str(tmp_path)) + b"/ph\xffotos")
    os.mkdir(folder)
    write_folder(Path(folder), classes=("k\xe4tze", os.fsdecode(b"h\xffnd")), images=12)
    done = call(
        "train",
        "--data",
        folder,
        *TINY[:2],
        "--batch-size",
        8,
        "--epochs",
        1,
        "--out",
        tmp_path / "run",
        "--no-onnx",
        PYTHONIOENCODING="ascii",
    )
    assert done.returncode == 0, done.stderr
    done = call("compact", tmp_path / "run", "--trust", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr


# -- ONNX files that are not ours --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("onnx")
    for name, size in (("small", 8), ("large", 16)):
        write_onnx(odd.Base(4, 3).eval(), torch.zeros(1, 3, size, size), root / f"{name}.onnx", None, {})
    onnx.save_model(
        onnx.load(root / "small.onnx"),
        root / "beside.onnx",
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=256,
    )
    return root


def test_weights_beside_a_file_count(files):
    assert size_bytes(files / "small.onnx") == (files / "small.onnx").stat().st_size
    assert (
        size_bytes(files / "beside.onnx")
        == sum((files / name).stat().st_size for name in ("beside.onnx", "weights.bin"))
        > (files / "beside.onnx").stat().st_size
    )


def test_unlike_inputs_are_not_called_the_same_work(files, monkeypatch):
    monkeypatch.setattr(bench, "SECONDS_PER_BATCH_SIZE", 0.05)
    same = bench.bench_files(files / "small.onnx", files / "beside.onnx", batches=[1], threads=1)
    other = bench.bench_files(files / "large.onnx", files / "small.onnx", batches=[1], threads=1)
    assert "not the same work" not in same.verdict and "about the same work" not in same.verdict
    assert "they are not the same work: large.onnx takes images of 3x16x16, small.onnx of 3x8x8" in other.verdict


# -- invented networks -------------------------------------------------------------------------------------------------


RECIPES = [
    {
        "blocks": [
            {"kind": "residual", "width": 12, "norm": "spectral"},
            {"kind": "depthwise", "width": 8, "norm": "batch without weights"},
        ],
        "names": "a:{}",
        "constant": "object",
        "training": "side",
        "extras": ["alias", "writes input"],
    },
    {
        "blocks": [{"kind": "concat", "width": 8, "norm": "batch"}, {"kind": "split", "width": 16, "norm": "none"}],
        "names": "#{}",
        "constant": "array",
        "training": "noise",
        "extras": ["asserts", "encoding", "extra state"],
    },
]


def test_invented_networks_go_through_everything(tmp_path):
    """Two of those that `python -m tests.measure.fuzz --networks 300` draws."""
    folders = [tmp_path / str(number) for number in range(len(RECIPES))]
    assert [invent.tried(recipe, folder) for recipe, folder in zip(RECIPES, folders)] == ["went through"] * 2
    assert max(invent.loaded_elsewhere(folders).values()) < 1e-4


def test_the_shell_can_complete_commands():
    done = call(
        _DYNPRUNE_COMPLETE="complete_bash",
        COMP_WORDS="dynprune co",
        COMP_CWORD="1",
        _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1",
    )
    assert {"compact", "compare"} <= set(done.stdout.split())
