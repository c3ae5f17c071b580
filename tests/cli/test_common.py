"""Options of every command: settings from a file, and how much is said."""

import io
import json
import os
import subprocess
import sys

import pytest
from rich.console import Console

from dynprune.display.progress import Display
from dynprune.runs.config import TrainConfig
from dynprune.training.train import Progress
from tests.cli.test_commands import ROOT as HERE
from tests.cli.test_commands import TINY, dynprune, refused, write_folder


def write(path, text):
    path.write_text(text)
    return path


def test_a_runs_own_settings_repeat_it_bit_for_bit_from_another_folder(tmp_path):
    """Data by a relative path, as one types it; the second run starts elsewhere."""
    write_folder(tmp_path / "photos", side=12)
    options = [*TINY[2:], "--model", "resnet20", "--workers", 0, "--threads", 1, "--batch-size", 8, "--explore", 0.2]
    ours = dict(os.environ, PYTHONPATH=str(HERE))

    def run(*args, cwd):
        done = subprocess.run(
            [sys.executable, "-m", "dynprune", *map(str, args)], cwd=cwd, capture_output=True, text=True, env=ours
        )
        assert done.returncode == 0, done.stderr
        return done

    run("train", "--data", "photos", *options, "--epochs", 2, "--out", "first", cwd=tmp_path)
    (tmp_path / "elsewhere").mkdir()
    run("train", "--config", "../first/config.toml", "--out", "second", cwd=tmp_path / "elsewhere")
    for command in ("first", "elsewhere/second"):
        run("compact", tmp_path / command, cwd="/")
    one, other = (tmp_path / command / "compact.safetensors" for command in ("first", "elsewhere/second"))
    assert one.read_bytes() == other.read_bytes()
    assert (tmp_path / "first/config.toml").read_text() == (tmp_path / "elsewhere/second/config.toml").read_text()
    assert TrainConfig.from_toml(tmp_path / "first/config.toml").data == str(tmp_path / "photos")


def test_options_come_before_the_file_and_a_table_before_its_top(tmp_path):
    settings = write(
        tmp_path / "s.toml",
        'epochs = 7\nmodel = "tests.models:tiny"\nimage-size = 8\nno_onnx = true\nlr = 0.0\nbudget = 0.5\nseed = 1\n'
        "[train]\nseed = 2\n[bench]\nbatch = 4\n",
    )
    out = tmp_path / "run"
    dynprune("train", "--config", settings, "--epochs", 1, "--batch-size", 64, "--out", out)
    config = TrainConfig.from_toml(out / "config.toml")
    assert (config.epochs, config.seed, config.budget, config.no_onnx) == (1, 2, ("0.5",), True)
    assert config.image_size == "8" and config.lr > 0
    dynprune("compact", out, "--config", settings)  # settings of other commands are left to them


def test_bad_settings_files_are_refused_in_one_line(tmp_path):
    for text, said in (
        ("epohcs = 3", 'unknown setting "epohcs"'),
        ("[trian]\nepochs = 3", "has a table [trian]"),
        ("[train]\nbatch = '1'", 'unknown setting "batch" in [train]'),
        ("epochs = true", "epochs is True. Expected one value"),
        ("paper = 1", "paper is 1. Expected true or false"),
        ("epochs = [1]", "epochs is [1]. Expected one value"),
        ("epochs = ", "is not TOML"),
    ):
        assert said in refused("train", "--config", write(tmp_path / "s.toml", text))
    assert "cannot be read (No such file" in refused("train", "--config", tmp_path / "none.toml")
    assert "--quiet and --verbose exclude each other" in refused("train", "--quiet", "--verbose")
    assert "--log got xml. Expected csv, tensorboard" in refused("train", "--log", "xml")


def test_quiet_and_verbose(tmp_path):
    quiet = dynprune("train", *TINY, "--epochs", 1, "--out", tmp_path / "a", "--quiet", "--json")
    assert quiet.stderr == "" and json.loads(quiet.stdout)["steps"] > 0
    loud = dynprune("train", *TINY, "--epochs", 1, "--out", tmp_path / "b", "--verbose")
    assert any(line.startswith("0:0") and "reading digits" in line for line in loud.stderr.splitlines())
    done = dynprune("train", *TINY, "--data", tmp_path / "none", "--verbose", check=False)
    assert done.returncode == 1 and "Traceback" in done.stderr and "error: --data got" in done.stderr


def progress(step, ended=False):
    return Progress(step, 20, 1 + step // 5, 4, 0.5, 0.9 if ended else None, 0.25, "settled", 3.0, ended)


@pytest.fixture
def display():
    return Display(Console(file=io.StringIO(), force_terminal=True, width=120))


def shown(display):
    console = Console(file=io.StringIO(), width=120)
    console.print(display.bar.get_renderable())
    return console.file.getvalue()


def test_the_live_line_follows_short_epochs_and_each_phase_its_own_time(display):
    display.work("reading photos", 0, 50)
    display.work("reading photos", 25, 50)
    assert "reading photos" in shown(display) and "50 %" in shown(display) and "left" in shown(display)
    display.step(progress(5, ended=True))  # an epoch of five steps: nothing was reported before its end
    assert "reading photos" not in shown(display) and "epoch" in shown(display) and "25 %" in shown(display)
    display.note("compacting and proving")
    assert "compacting" in shown(display) and "%" not in shown(display)  # its length is not known: its time is shown
    assert "0:00" in shown(display)


def test_a_phase_begins_its_time_anew(display):
    display.work("first", 1, 2)
    task = display.bar.tasks[0]
    before = task.start_time
    display.work("second", 0, 2)
    assert display.bar.tasks[0].start_time > before and display.bar.tasks[0].completed == 0
