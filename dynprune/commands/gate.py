"""`dynprune gate`: gates that decide for each image which channels to compute."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from dynprune.commands.train import resumed, run_name
from dynprune.data.loading import load_data
from dynprune.errors import DynpruneError
from dynprune.gates.beside import beside
from dynprune.gates.rehearsal import rehearse_gates
from dynprune.gates.session import GateSession
from dynprune.gates.training import GateResult
from dynprune.gates.training import gate as run_gate
from dynprune.listener import SILENT, Listener
from dynprune.runs.config import GateConfig
from dynprune.runs.directory import GateRun, Run, open_compact

# settings that a run of gates takes over from the run that is gated
INHERITED = (
    "data",
    "data_root",
    "image_size",
    "val_fraction",
    "augment",
    "workers",
    "batch_size",
    "label_smoothing",
    "threads",
    "seed",
)
GENTLE_LR = 0.05  # for a network that is trained already


def gate(
    config: GateConfig, out: str | Path | None = None, *, overwrite: bool = False, listener: Listener = SILENT
) -> GateResult:
    """Put gates into a network and train both to a mean cost; leave a run directory.

    config.base names the finished and compacted run that gets the gates (`based_on` takes over its settings); without
    one, a new network of config.model. out: the directory, runs/MODEL-DATA-gate if none is given.

    Raises DynpruneError for what cannot be gated, trained, saved and exported, before training.

    >>> dynprune.gate(GateConfig(model="resnet20", target=0.5, epochs=2)).stats.share
    """
    alone()
    config = config.validate()
    path = Path(out) if out else run_name(config, "gate")
    Run.refuse_existing(path, overwrite)
    session = begin(config, listener)
    rehearse_gates(session, note=listener.note, say=listener.say)
    return go(session, GateRun.create(path, session.config, overwrite), listener, again=False)


def resume(
    out: str | Path, changes: dict | None = None, *, model: str = "", trust: bool = False, listener: Listener = SILENT
) -> GateResult:
    """Go on with the stopped run of gates in `out`, with its settings; see `commands.train.resume`."""
    alone()
    run = GateRun.open(Path(out))
    run.refuse_code(model, trust)
    session = begin(resumed(run.config, changes or {}, run.path, False), listener)
    if not run.has_checkpoint:
        listener.say(f"{run.path} was stopped before its first checkpoint: it begins anew")
        rehearse_gates(session, note=listener.note, say=listener.say)
    return go(session, run, listener, again=run.has_checkpoint)


def begin(config: GateConfig, listener: Listener) -> GateSession:
    listener.note(f"reading {config.data}")
    return GateSession(config, load_data(config.source))


def go(session: GateSession, run: GateRun, listener: Listener, *, again: bool) -> GateResult:
    config, gates = session.config, session.model.gates
    listener.say(
        f"{config.base or config.model} on {config.data}: {len(gates)} gated groups with "
        f"{sum(len(gate.sizes) for gate in gates)} gates; validation is {session.data.chooses}, test is "
        f"{session.data.reports}"
    )
    result = run_gate(
        config,
        run,
        resume=again,
        report=listener.step,
        note=listener.say if again else listener.note,
        stop=listener.stop,
        session=session,
    )
    if config.no_static:
        return result
    return beside(session, result, run, report=listener.step, say=listener.say, note=listener.note, stop=listener.stop)


def based_on(base: str | Path, given: dict, *, trust: bool = False) -> GateConfig:
    """Settings for gates on the network of the run in `base`: those given, and for the rest what that run was trained
    with.

    Raises DynpruneError for settings that name another network or other weights, and for code of the user's own without
    `trust`.
    """
    source = open_compact(Path(base))
    source.refuse_code(given.get("model", ""), trust)
    known = source.config
    if given.get("model", known.model) != known.model:
        raise DynpruneError(
            f'--model got "{given["model"]}", but {base} is of "{known.model}". Leave one of the two out.'
        )
    if "weights" in given:
        raise DynpruneError(
            f"--weights got {given['weights']}, but the weights are those of {base}. Leave one of the two out."
        )
    settings = {
        "lr": GENTLE_LR,
        **{name: getattr(known, name) for name in INHERITED if hasattr(known, name)},
        **given,
        "model": known.model,
        "base": str(base),
    }
    return dataclasses.replace(GateConfig(), **settings)


def alone() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise DynpruneError("gate works in one process. Start it without torchrun.")
