"""The run directory: what a training run leaves behind and how it is read again.

    config.toml           the resolved settings         env.json         versions, processor, threads
    metrics.jsonl         one line per epoch            result.json      the outcome of each command
    checkpoint.safetensors  full-width tensors, optimizer, bandits, slots; all that is needed to go on
    selections.json       how often each arm ran, and which arms were chosen

Files are written beside their place and renamed, so that none is ever half there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

from torch import Tensor

from dynprune.data.loading import Data, load_data
from dynprune.errors import DynpruneError, DynpruneWarning
from dynprune.files.artifact import preprocess_in
from dynprune.files.disk import read_tensors, write_tensors, write_text
from dynprune.machine import environment
from dynprune.runs.config import CompactConfig, GateConfig, Task, TrainConfig
from dynprune.zoo import runs_code


@dataclass
class RunDirectory:
    """Paths of one run directory, whichever command wrote it."""

    path: Path
    command: ClassVar[str]

    @property
    def config_file(self) -> Path:
        raise NotImplementedError

    @property
    def config(self) -> Task:
        """The settings that it was started with."""
        raise NotImplementedError

    @property
    def network_file(self) -> Path:
        """What comes out of it."""
        raise NotImplementedError

    checkpoint_file = property(lambda self: self.path / "checkpoint.safetensors")
    previous_checkpoint_file = property(lambda self: self.path / "checkpoint.previous.safetensors")

    @classmethod
    def refuse_existing(cls, path: Path, overwrite: bool) -> None:
        """An existing directory is only replaced with `overwrite`, and only if it is a run."""
        if path.exists() and any(path.iterdir() if path.is_dir() else [path]):
            if not overwrite:
                raise DynpruneError(
                    f"{path} exists. Pass --overwrite to replace it, --out for another place, or go "
                    f"on with dynprune train --resume."
                )
            if not any(kind(path).config_file.is_file() for kind in KINDS):
                raise DynpruneError(
                    f"{path} exists and is not a run directory (no config.toml), so it is not "
                    f"overwritten. Choose another --out."
                )

    @classmethod
    def create(cls, path: Path, config: Task, overwrite: bool) -> Self:
        """A new, empty run directory, with the settings and the environment written down."""
        cls.refuse_existing(path, overwrite)
        try:
            if path.exists():
                shutil.rmtree(path)
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DynpruneError(f"Cannot create {path} ({error.strerror}). Choose another --out.") from error
        run = cls(path)
        write_text(run.config_file, config.to_toml())
        write_text(path / "env.json", json.dumps(environment(), indent=2))
        return run

    @classmethod
    def open(cls, path: Path) -> Self:
        """The run in `path`. Raises DynpruneError if there is none, or one of another command."""
        run = cls(path)
        if not run.config_file.is_file():
            other = next((kind for kind in KINDS if kind(path).config_file.is_file()), None)
            what = (
                f"is a run of dynprune {other.command}"
                if other
                else f"has no {run.config_file.name}"
                if path.is_dir()
                else "is not a directory"
            )
            folder = next((words for name, words in FOLDERS.items() if (path / name).is_file()), None)
            if folder and not other:
                raise DynpruneError(f"{path} is {folder.format(path)}")
            raise DynpruneError(f"{path} {what}. Expected the run directory that dynprune {cls.command} wrote.")
        return run

    def write_config(self, config: Task) -> None:
        write_text(self.config_file, config.to_toml())

    def images(self, moved: str | Data = "") -> Data:
        """The run's data, or those that are given; a text says where they lie now."""
        if not isinstance(moved, str):
            return moved
        source = (dataclasses.replace(self.config, data=moved) if moved else self.config).source
        how = preprocess_in(self.network_file)  # whatever has become of the weights it began with
        return load_data(source.like(how) if how else source)

    def refuse_code(self, model: str = "", trust: bool = False) -> None:
        """A run's settings may name "module:factory", which would be imported and run: only if the user names it too,
        or trusts the run."""
        name = self.config.model
        if model and model != name:
            raise DynpruneError(
                f'--model got "{model}", but {self.path} was trained with "{name}". Pass that, or nothing.'
            )
        if runs_code(name) and not trust and model != name:
            raise DynpruneError(
                f'{self.path} asks to run the code "{name}". If it is yours, pass --trust or --model {name}.'
            )

    @property
    def has_checkpoint(self) -> bool:
        return self.checkpoint_file.is_file() or self.previous_checkpoint_file.is_file()

    def write_checkpoint(self, tensors: Mapping[str, Tensor], facts: Mapping) -> None:
        """The new state, with the one before kept: whenever this is interrupted, at least one whole checkpoint is
        there."""
        fresh = self.path / "checkpoint.fresh.safetensors"
        try:
            write_tensors(fresh, tensors, facts)
            if self.checkpoint_file.exists():
                os.replace(self.checkpoint_file, self.previous_checkpoint_file)
            os.replace(fresh, self.checkpoint_file)
        except OSError as error:
            raise DynpruneError(
                f"Cannot write {self.checkpoint_file} ({error.strerror}). The checkpoint before is unchanged."
            ) from error
        finally:
            with contextlib.suppress(OSError):
                fresh.unlink(missing_ok=True)

    def read_checkpoint(
        self, note: Callable[[str], None] | None = None, *, aside: bool = False
    ) -> tuple[dict[str, Tensor], dict]:
        """Tensors and facts of the last checkpoint, or, if `note` wants to hear of it, of the one before where the last
        is damaged.

        aside: put the damaged one out of the way, so that the next checkpoint does not push out the whole one.
        """
        try:
            return read_tensors(self.checkpoint_file, "checkpoint")
        except DynpruneError as error:
            if note is None or not self.previous_checkpoint_file.is_file():
                raise
            found = read_tensors(self.previous_checkpoint_file, "checkpoint")
            if aside and self.checkpoint_file.exists():
                try:
                    os.replace(self.checkpoint_file, self.path / "checkpoint.damaged.safetensors")
                except OSError as problem:
                    raise DynpruneError(
                        f"Cannot put the damaged {self.checkpoint_file} aside ({problem.strerror}). "
                        f"Make {self.path} writable."
                    ) from problem
            note(f"warning: {error} Going on from the checkpoint before, of step {found[1].get('step')}.")
            return found

    def add_metrics(self, line: Mapping) -> None:
        try:
            # a link could lead out of the run
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
            with os.fdopen(os.open(self.path / "metrics.jsonl", flags, 0o666), "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise DynpruneError(
                f"Cannot write {self.path / 'metrics.jsonl'} ({error.strerror}). The checkpoint before is unchanged."
            ) from error

    def keep_metrics_until(self, step: int) -> None:
        """Drop lines of epochs that a resumed run is going to repeat."""
        file = self.path / "metrics.jsonl"
        if file.is_file():
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            write_text(file, "".join(line for line in lines if line.endswith("\n") and step_of(line) <= step))

    @property
    def results(self) -> dict:
        """What the commands recorded so far, by command."""
        file = self.path / "result.json"
        try:
            found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        except (OSError, ValueError, RecursionError):  # absent, or damaged: it only repeats what was printed
            return {}
        return found if isinstance(found, dict) else {}

    def record(self, command: str, result: Mapping) -> None:
        """Keep a command's outcome in result.json, beside those of the others. Where that cannot be written, the result
        is still shown."""
        self.keep("result.json", json.dumps({**self.results, command: result}, indent=2))

    def keep(self, name: str, content: str) -> None:
        """Write a file that only repeats what is shown; warn where the run directory takes none."""
        try:
            write_text(self.path / name, content)
        except DynpruneError as error:
            warnings.warn(f"{error} The result is shown, but not recorded.", DynpruneWarning, stacklevel=2)


class CompactDirectory(RunDirectory):
    """Paths of a run directory that holds a compact network: compact.safetensors and its ONNX files."""

    compact_file = network_file = property(lambda self: self.path / "compact.safetensors")
    onnx_file = property(lambda self: self.path / "compact.onnx")
    dense_onnx_file = property(lambda self: self.path / "dense.onnx")

    @property
    def config(self) -> TrainConfig | CompactConfig:
        raise NotImplementedError


class Run(CompactDirectory):
    """Paths of a run directory of `dynprune train`, with config.toml."""

    command: ClassVar[str] = "train"

    config_file = property(lambda self: self.path / "config.toml")

    @property
    def config(self) -> TrainConfig:
        return TrainConfig.from_toml(self.config_file)


class CompactRun(CompactDirectory):
    """Paths of a run directory of `dynprune compact --weights`, with compact.toml in place of config.toml."""

    command: ClassVar[str] = "compact"

    config_file = property(lambda self: self.path / "compact.toml")

    @property
    def config(self) -> CompactConfig:
        return CompactConfig.from_toml(self.config_file)


class GateRun(RunDirectory):
    """Paths of a run directory of `dynprune gate`: gate.toml, gated.safetensors and its ONNX files."""

    command: ClassVar[str] = "gate"

    config_file = property(lambda self: self.path / "gate.toml")
    gated_file = network_file = property(lambda self: self.path / "gated.safetensors")
    onnx_file = property(lambda self: self.path / "gated.onnx")
    ungated_onnx_file = property(lambda self: self.path / "ungated.onnx")
    static_onnx_file = property(lambda self: self.path / "static.onnx")

    @property
    def config(self) -> GateConfig:
        return GateConfig.from_toml(self.config_file)


KINDS = (Run, CompactRun, GateRun)
FOLDERS = {  # what other commands leave, and what to do with it
    "comparison.json": "the folder of a comparison. Expected one of the runs in it, or dynprune report {0}.",
    "cascade.json": "a cascade. Its file is {0}/cascade.onnx, for dynprune predict; its page is {0}/report.html.",
}


def open_compact(path: Path) -> Run | CompactRun:
    """The run in `path`, of train or compact."""
    return CompactRun.open(path) if CompactRun(path).config_file.is_file() else Run.open(path)


def open_any(path: Path) -> Run | CompactRun | GateRun:
    """The run in `path`, of whichever command."""
    return GateRun.open(path) if GateRun(path).config_file.is_file() else open_compact(path)


def step_of(line: str) -> float:
    """The step of a line of metrics; one that is damaged comes after everything."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
