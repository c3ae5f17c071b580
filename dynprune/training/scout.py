"""Widths for a network that is not trained yet: searched for on one that was trained at full width for some steps.

Takes a session that has not begun; trains another one at full width for `--scout` steps, searches widths on its frozen
weights as for any trained network (`begin.py`), and throws it away. What is trained then begins anew at these widths.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from dynprune.budgets.fit import Fit
from dynprune.budgets.latency import Report, silent
from dynprune.errors import Stopped
from dynprune.runs.config import seconds_in
from dynprune.training.begin import begin_trained, searched
from dynprune.training.pace import Pace
from dynprune.training.rehearsal import rehearse_step
from dynprune.training.session import Session
from dynprune.training.train import threads


def scouted(session: Session, report: Report = silent, stop: Callable[[], bool] = lambda: False) -> Fit:
    """Better widths than those that were allocated. With several processes the first one looks for all.

    Raises Stopped where it is asked to stop; nothing was trained then that could be kept.
    """
    config, found = session.config, session.fit
    if session.ranks.first:
        with threads(config.threads), torch.random.fork_rng():
            dense = at_full_width(session, report, stop)
            report("calibrating it", 0, 0)
            begins = begin_trained(
                dense.model.eval(), dense.graph, dense.data, config.seed, dense.device, bfloat16=dense.bfloat16
            )
            seconds = seconds_in(config.search_time)
            report(f"searching widths for {seconds:.0f} s", 0, 0)
            found, _ = searched(begins.compaction, session.fitter, session.fit, config.allowed, seconds)
    return session.agreed(found)


def at_full_width(session: Session, report: Report, stop: Callable[[], bool]) -> Session:
    """A session of the same settings that has made its steps with all channels."""
    settings = dataclasses.replace(session.config, policy="dense", allocation="uniform", grow=0.0)
    dense, steps = Session(settings, session.data), settings.scout
    rehearse_step(dense)
    dense.lay_out(dense.reservoir.full, Pace(steps, steps))
    dense.model.train()
    while dense.step < steps:
        epoch, start = divmod(dense.step, dense.steps_per_epoch)
        for images, labels in dense.data.train_batches(settings.batch_size, settings.seed, epoch, start):
            torch.manual_seed(settings.seed * 1_000_003 + dense.step)
            dense.train_step(images, labels)
            report("some steps at full width, to search widths on", dense.step, steps)
            if stop():
                raise Stopped(
                    f"Stopped at step {dense.step} of {steps} at full width, before training. Nothing was saved: start "
                    "the same command again."
                )
            if dense.step == steps:
                break
    return dense
