"""The metrics of a run in the forms that other tools read.

Takes the lines of metrics.jsonl, one per epoch; writes metrics.csv, and event files for TensorBoard.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from typing import Any

from dynprune.errors import DynpruneError
from dynprune.files.disk import write_text
from dynprune.runs.directory import RunDirectory


class Logs:
    """kinds: as --log takes them, "csv", "tensorboard", both with a comma, or "". first_step: of a run that is resumed;
    what was written of later ones is taken back."""

    def __init__(self, run: RunDirectory, kinds: str, first_step: int = 0):
        self.run, self.csv, self.board = run, "csv" in kinds, None
        if "tensorboard" in kinds:
            try:
                self.board = writer(str(run.path / "tensorboard"), first_step + 1)
            except OSError as error:
                raise DynpruneError(f"Cannot write {run.path / 'tensorboard'} ({error.strerror}).") from error

    def write(self, line: Mapping[str, object]) -> None:
        """Of an epoch whose line stands in metrics.jsonl already."""
        if self.csv:
            write_text(self.run.path / "metrics.csv", as_csv(self.run))
        if self.board is not None:
            for name, value in line.items():
                if isinstance(value, int | float) and name not in ("epoch", "step"):
                    self.board.add_scalar(name, float(value), line["step"])
            self.board.flush()

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


def writer(path: str, purge_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter  # an extra, and slow to import

    return SummaryWriter(path, purge_step=purge_step)


def metrics_of(run: RunDirectory) -> list[dict]:
    """The epochs of a run, in order; lines that cannot be read are left out."""
    file, lines = run.path / "metrics.jsonl", []
    if file.is_file():
        for text in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                continue
            if isinstance(line, dict):
                lines.append(line)
    return lines


def as_csv(run: RunDirectory) -> str:
    lines = metrics_of(run)
    names = list(dict.fromkeys(name for line in lines for name in line))
    out = io.StringIO()
    table = csv.DictWriter(out, names, lineterminator="\n")
    table.writeheader()
    table.writerows(lines)
    return out.getvalue()
