"""A full disk at each place where a run writes: one clear line, and the earlier checkpoint still resumes."""

import builtins
import contextlib
import errno
import io
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from safetensors import safe_open

from dynprune.data import loading as sources
from dynprune.deploy import compact as compacting
from dynprune.deploy import export as exporting
from dynprune.errors import DynpruneError
from dynprune.runs.config import TrainConfig
from dynprune.runs.directory import Run
from dynprune.training.train import train
from tests.cli.test_commands import TINY, dynprune, refused

CONFIG = TrainConfig(model="tests.models:tiny", image_size=8, batch_size=64, epochs=2, threads=1)


@pytest.fixture(scope="module")
def data():
    return sources.load_data(CONFIG.source)


@pytest.fixture
def finished(tmp_path):
    run = Run.create(tmp_path / "run", CONFIG, overwrite=False)
    train(CONFIG, run)
    return run


class Full:
    """From the `allowed`-th write on, every write into the folder fails as on a full disk."""

    def __init__(self, monkeypatch, folder: Path, allowed: int):
        self.folder, self.left, self.refused = str(folder), allowed, 0
        for module, name in ((builtins, "open"), (io, "open"), (os, "open"), (os, "replace")):
            monkeypatch.setattr(module, name, self.watch(getattr(module, name)))

    def watch(self, function):
        def guarded(first, *args, **kwargs):
            writes = (
                function.__name__ == "replace"
                or any(isinstance(a, str) and set(a) & set("wax") for a in args[:1])
                or any(isinstance(a, int) and a & (os.O_WRONLY | os.O_RDWR) for a in args[:1])
            )
            if writes and isinstance(first, (str, os.PathLike)) and str(first).startswith(self.folder):
                self.left -= 1
                if self.left < 0:
                    self.refused += 1
                    raise OSError(errno.ENOSPC, "No space left on device")
            return function(first, *args, **kwargs)

        return guarded


@pytest.mark.parametrize("allowed", range(8))
def test_a_checkpoint_that_cannot_be_written_leaves_one_that_resumes(finished, allowed, monkeypatch):
    """Every write of an epoch's end in turn: metrics, the fresh checkpoint, the two renames, the selections."""
    longer = Run(finished.path)
    config = TrainConfig(**{**CONFIG.__dict__, "epochs": 3})
    with monkeypatch.context() as patch:
        disk = Full(patch, finished.path, allowed)
        try:
            train(config, longer, resume=True, override=True)
        except DynpruneError as error:
            assert "Cannot write" in str(error) and "No space left" in str(error)
        assert disk.refused or allowed >= 6, "all writes were allowed"
    result = train(config, longer, resume=True, override=True)
    assert result.steps == 63 and len((finished.path / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("allowed", range(4))
def test_compact_and_export_keep_what_was_there(finished, data, allowed, monkeypatch):
    compacting.compact(finished, data=data)
    exporting.export(finished, data=data)
    before = {
        name: (finished.path / name).read_bytes()
        for name in ("checkpoint.safetensors", "compact.safetensors", "compact.onnx")
    }
    for command, kept in (
        (lambda: exporting.export(finished, data=data), before),
        (lambda: compacting.compact(finished, data=data), before),
    ):
        with monkeypatch.context() as patch:
            Full(patch, finished.path, allowed)
            try:
                command()
            except DynpruneError as error:
                assert "Cannot write" in str(error)
        assert (finished.path / "checkpoint.safetensors").read_bytes() == kept["checkpoint.safetensors"]
        with safe_open(finished.path / "compact.safetensors", "pt") as file:
            assert file.keys()
        assert not [file for file in finished.path.iterdir() if "partial" in file.name or "unproven" in file.name]
    compacting.compact(finished, data=data)
    exporting.export(finished, data=data)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        shutil.which("mount") is None
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True).returncode
    ):
        pytest.skip("mounting a small file system needs the rights to do so")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_really_full(small_disk):
    run = small_disk / "run"
    dynprune("train", *TINY, "--epochs", 2, "--out", run)
    filler = os.open(small_disk / "filler", os.O_WRONLY | os.O_CREAT)
    with contextlib.suppress(OSError):
        while os.write(filler, bytes(4096)):
            pass
    os.close(filler)
    line = refused("train", "--resume", "--override", "--epochs", 4, "--out", run)
    assert "Cannot write" in line and "No space left on device" in line
    (small_disk / "filler").unlink()
    dynprune("train", "--resume", "--override", "--epochs", 4, "--out", run)
