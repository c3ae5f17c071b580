"""`dynprune train`: from settings to a trained run directory."""

from __future__ import annotations

import dataclasses
import os
import re
import time
from collections.abc import Collection
from pathlib import Path
from typing import TypeVar

from dynprune.budgets.fit import Fit
from dynprune.data.loading import load_data
from dynprune.errors import DynpruneError
from dynprune.listener import SILENT, Listener
from dynprune.runs.config import ENOUGH, Recipe, Task, TrainConfig, anchored
from dynprune.runs.directory import Run
from dynprune.training import distributed
from dynprune.training.checkpoint import fit_in
from dynprune.training.rehearsal import rehearse
from dynprune.training.scout import scouted
from dynprune.training.session import Session
from dynprune.training.train import TrainResult
from dynprune.training.train import train as run_training
from dynprune.training.within import find_rate, fit_into

PLACES = ("data", "data_root", "workers", "threads")  # where the data lie and the machine that reads them may change
WIDTHS = ("budget", "allocation", "min_width", "max_width_share", "keep", "align")  # settings that decide the widths
Settings = TypeVar("Settings", bound=Recipe)


def train(
    config: TrainConfig,
    out: str | Path | None = None,
    *,
    overwrite: bool = False,
    opset: int | None = None,
    began: float | None = None,
    listener: Listener = SILENT,
) -> TrainResult | None:
    """Train with dynamic channel execution and leave a run directory.

    out: the directory, runs/MODEL-DATA-POLICY if none is given; overwrite: it may replace a run. opset: of the ONNX
    file that is wanted later, tried before training. began: when the time of `config.time` began, as
    `time.perf_counter()` tells it; now, if it is not given. Under torchrun each process calls this, and all but the
    first get None.

    Raises DynpruneError for settings, data or networks that cannot be trained, saved and exported, before training;
    `errors.Stopped` when the listener asks to stop.

    >>> dynprune.train(TrainConfig(model="resnet20", data="photos", budget=("0.25",)), "runs/mine").accuracy
    """
    began = time.perf_counter() if began is None else began
    config = config.validate()
    path = Path(out) if out else run_name(config, config.policy)
    ranks = distributed.join(os.environ, config.device)
    try:
        if ranks.first:
            Run.refuse_existing(path, overwrite)
        session = begin(config, listener, ranks)
        rehearse(session, opset=opset, note=listener.note, say=listener.say)
        lay_out(session, config, began, listener)
        run = Run.create(path, session.config, overwrite) if ranks.first else Run(path)
        return go(session, run, listener, resume=False)
    finally:
        distributed.leave()


def resume(
    out: str | Path,
    changes: dict | None = None,
    *,
    override: bool = False,
    model: str = "",
    trust: bool = False,
    listener: Listener = SILENT,
) -> TrainResult | None:
    """Go on with the stopped run in `out`, with its settings.

    changes: settings that must agree with the run's own, or are taken in their place with `override`; where the data
    lie may always change. model, trust: name the run's own code, or trust it. Raises DynpruneError where the run cannot
    go on.
    """
    began, path, changes = time.perf_counter(), Path(out), changes or {}
    run = Run.open(path)
    run.refuse_code(model, trust)
    config = resumed(run.config, changes, path, override)
    again = run.has_checkpoint
    ranks = distributed.join(os.environ, config.device)
    try:
        if not again:
            listener.say(f"{path} was stopped before its first checkpoint: it begins anew")
        fit = fit_in(run.read_checkpoint(lambda _: None)[1], "first_fit") if again else None
        session = begin(config, listener, ranks, fit)
        if not again:
            rehearse(session, note=listener.note, say=listener.say)
            lay_out(session, config, began, listener)
        if (changes or not again) and ranks.first:
            run.write_config(session.config)
        return go(session, run, listener, resume=again, override=override)
    finally:
        distributed.leave()


def begin(config: TrainConfig, listener: Listener, ranks: distributed.Ranks, fit: Fit | None = None) -> Session:
    """A session on the data that the settings name, with what there is to say of both."""
    listener.note(f"reading {config.data}")
    data = load_data(config.source)
    session = Session(config, data, fit=fit, report=listener.work, ranks=ranks)
    if config.scouts and fit is None:
        session = Session(config, data, fit=scouted(session, listener.work, listener.stop), ranks=ranks)
    for remark in data.remarks:
        listener.say(remark)
    return session


def lay_out(session: Session, config: TrainConfig, began: float, listener: Listener) -> None:
    """Choose what the settings leave open, before the first step: what fits into a time, and the learning rate."""
    if config.time:
        listener.note("measuring steps")
        fit_into(session, config, began, listener.say, listener.note)
    elif config.finds_rate:
        find_rate(session, listener.note)


def go(session: Session, run: Run, listener: Listener, *, resume: bool, override: bool = False) -> TrainResult | None:
    config, data, ranks = session.config, session.data, session.ranks
    listener.say(
        f"{config.model} on {config.data}: {len(data.train)} images to train, validation is {data.chooses}, "
        f"test is {data.reports}" + (f"; {ranks.count} processes" if ranks.several else "")
    )
    listener.say(
        f"{session.steps} steps of {config.batch_size} images, learning rate {config.lr:g}"
        + (f"; {session.loaded.words}" if session.loaded.words else "")
    )
    if session.steps < ENOUGH // 2 and not resume:
        listener.say(
            f"warning: {session.steps} steps are few to learn from. Expect little, or choose more --epochs"
            + (" or a smaller --batch-size." if config.batch_size > 8 else ".")
        )
    result = run_training(
        config,
        run,
        resume=resume,
        override=override,
        report=listener.step,
        note=listener.say if resume else listener.note,
        stop=listener.stop,
        session=session,
    )
    return result if ranks.first else None


def run_name(config: Task, method: str) -> Path:
    """Where a run goes that is given no place: runs/MODEL-DATA-METHOD."""
    return Path("runs") / "-".join(
        re.sub(r"[:/?&=,()\s]+", "-", part) for part in (config.model, Path(config.data).name, method)
    )


def resumed(
    config: Settings, given: dict, path: Path, override: bool, free: Collection[str] = ("checkpoint_every", *PLACES)
) -> Settings:
    """The run's own settings; those given beside them must agree, or are taken with `override`."""
    config, given = config.anchored(), {name: anchored(name, value) for name, value in given.items()}
    differing = [
        f"--{name.replace('_', '-')} {value} (the run has {getattr(config, name)})"
        for name, value in given.items()
        if value != getattr(config, name) and name not in free
    ]
    if differing and not override:
        raise DynpruneError(
            f"--resume goes on with the settings that {path} was started with, which differ: "
            f"{', '.join(differing)}. Drop those options, or pass --override to go on with them."
        )
    fixed = [
        name
        for name in ("model", "image_size", "policy", "seed", "optimizer", *WIDTHS)
        if name in given and given[name] != getattr(config, name)
    ]
    if "time" in given and bool(given["time"]) != bool(getattr(config, "time", "")):
        fixed.append("time")
    if fixed:
        raise DynpruneError(
            f"--override cannot change --{fixed[0].replace('_', '-')}: the checkpoint in {path} would "
            f"not fit. Start a new run with another --out."
        )
    return dataclasses.replace(config, **given).validate()
