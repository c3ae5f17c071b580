"""`dynprune report`: what came out of runs, as a page to look at and a card to publish."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dynprune.data.loading import Data
from dynprune.deploy.compare import read_comparison
from dynprune.errors import DynpruneError
from dynprune.listener import SILENT, Listener
from dynprune.pages.card import write_card
from dynprune.pages.page import write_page
from dynprune.pages.survey import survey
from dynprune.runs.directory import CompactRun, GateRun, Run, open_any


@dataclass(frozen=True)
class ReportResult:
    """page: the HTML file. card: the model card, in Markdown; None for several runs."""

    page: str
    card: str | None


def report(
    *runs: str | Path, out: str | Path | None = None, data: str | Data = "", listener: Listener = SILENT
) -> ReportResult:
    """Write one self-contained HTML page about a run, or about several side by side, and for one run MODEL_CARD.md.

    runs: run directories of train, compact or gate, or the folder of a comparison, which stands for its runs. out: the
    page, RUN/report.html if none is given, report.html here for several runs. data: where the runs' data lie now, or
    the data themselves: the test images are looked at once more. Raises DynpruneError for runs that have nothing to
    tell yet, and where files cannot be written.

    >>> dynprune.report("runs/mine").page
    """
    if not runs:
        raise DynpruneError("report got no run. Expected one run directory or several.")
    folders = [Path(run) for run in runs]
    compared = [own for folder in folders if (own := read_comparison(folder))]
    found = [run for folder in folders for run in runs_in(folder)]
    path = Path(out) if out else folders[0] / "report.html" if len(folders) == 1 else Path("report.html")
    if path.is_dir():
        raise DynpruneError(
            f"--out got {path}, which is a folder. Expected a file name such as {path / 'report.html'}."
        )
    surveys = []
    for run in found:
        listener.note(f"gathering what {run.path} has to tell")
        surveys.append(survey(run, data=data, report=listener.work))
    alone = len(surveys) == 1 and not compared
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DynpruneError(f"Cannot write {path} ({error.strerror}). Choose another --out.") from error
    write_page(path, surveys, compared)
    card = path.with_name("MODEL_CARD.md") if alone else None
    if card:
        write_card(card, surveys[0])
    return ReportResult(str(path), str(card) if card else None)


def runs_in(folder: Path) -> list[Run | CompactRun | GateRun]:
    """The run in a folder, or those of the comparison there, of which some may have been removed."""
    comparison = read_comparison(folder)
    if comparison is None:
        return [open_any(folder)]
    own = [folder / f"{run.policy}-{run.seed}" for run in comparison.runs]
    return [open_any(path) for path in own if (path / "config.toml").is_file()]
