"""A session written down, and read again: full-width tensors, optimizer, bandits, slots, widths.

Takes a `Session` and a run directory. What a file says is checked before it is believed: it may be damaged, of other
settings, or a stranger's. What any session's checkpoint needs, such as that of gates, stands at the end.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from dynprune.budgets.fit import Fit, Latency
from dynprune.data.scores import exact_scores
from dynprune.errors import DynpruneError
from dynprune.execution.reservoir import up_to_date
from dynprune.files.disk import write_text
from dynprune.runs.config import seconds_in
from dynprune.runs.directory import RunDirectory
from dynprune.state.tensors import check_facts as check_state
from dynprune.state.tensors import fill, state_of
from dynprune.structure.channels import ChannelGraph, Selection
from dynprune.structure.tracing import first_line
from dynprune.training.pace import Clock, Pace

if TYPE_CHECKING:
    from dynprune.training.session import Session
    from dynprune.training.trainee import Trainee


@dataclass
class History:
    """What a resumed run must know of the time before: seconds so far, those spent waiting for data, the current
    epoch's losses (their sum and number), and its images that were classified right, of `seen`."""

    seconds: float = 0.0
    waited_s: float = 0.0
    loss_sum: float = 0.0
    loss_steps: int = 0
    right: float = 0.0
    seen: int = 0

    def start_epoch(self) -> None:
        self.loss_sum, self.loss_steps, self.right, self.seen = 0.0, 0, 0.0, 0


def save(session: Session, run: RunDirectory, history: History) -> None:
    """Write everything that is needed to go on, and how often each arm was picked. Weights that are not finite are
    refused, so that they never replace a good checkpoint."""
    refuse_lost_weights(session, run, session.parameters.values())
    session.explorer.count(session.reservoir.slots)
    own, state = state_of(up_to_date(session.reservoir))
    tensors = {f"full.{name}": value for name, value in own.items()}
    tensors |= {f"explorer.{name}": value for name, value in session.explorer.state().items()}
    tensors |= {f"slots.{name}": torch.from_numpy(arms) for name, arms in session.reservoir.slots.items()}
    tensors |= {f"template.{name}": torch.from_numpy(arms) for name, arms in session.reservoir.template.items()}
    tensors |= optimizer_tensors("optimizer", session.optimizer, session.parameters)
    if session.execution.exploring:  # later, no arm comes back that could ask for it
        tensors |= {f"carried.{name}": value for name, value in session.reservoir.carried().items()}
    scores = (
        exact_scores(session.model, session.data.example).reshape(-1).tolist() if session.step == session.steps else []
    )
    facts = {
        "kind": "checkpoint",
        "history": asdict(history),
        "step": session.step,
        "scores": scores,
        "steps": session.steps,
        "classes": session.data.classes,
        "size": session.data.size,
        "state": state,
        "mean": session.data.mean,
        "std": session.data.std,
        "fit": asdict(session.fit),
        "first_fit": asdict(session.first_fit),
    }
    if session.clock is not None:
        facts["pace"] = asdict(session.pace) | {"growth_step": session.execution.growth_step}
        facts["clock"] = session.clock.facts()
    run.write_checkpoint(tensors, facts)
    picks = {
        name: {
            "width": session.widths[name],
            "steps_executed": counts.tolist(),
            "chosen": sorted(session.reservoir.slots[name].tolist()),
        }
        for name, counts in session.explorer.executed.items()
    }
    write_text(run.path / "selections.json", json.dumps({"steps": session.step, "groups": picks}))


def restore(
    session: Session, run: RunDirectory, *, override: bool = False, note: Callable[[str], None] = lambda _: None
) -> History:
    """Go on where the run's newest whole checkpoint was. override: its number of steps may differ from what the
    settings give now."""
    tensors, facts = run.read_checkpoint(note, aside=session.ranks.first)
    if not all(
        isinstance(facts.get(key), kind)
        for key, kind in (("step", int), ("steps", int), ("classes", list), ("history", dict))
    ):
        raise DynpruneError(
            f"{run.checkpoint_file} lacks a header entry. Expected a checkpoint written by dynprune train."
        )
    if session.config.time:
        restore_pace(session, facts)
    if facts["classes"] != session.data.classes or not override and facts["steps"] != session.steps:
        raise DynpruneError(
            f"{run.checkpoint_file} was made with {facts['steps']} steps and "
            f"{len(facts['classes'])} classes; the settings and data now give {session.steps} and "
            f"{len(session.data.classes)}. Use the same data and settings to resume."
        )
    if not 0 <= facts["step"] <= session.steps:
        raise DynpruneError(
            f"{run.path} is at step {facts['step']}, outside the {session.steps} that the settings "
            f"now give. Choose more --epochs."
        )
    try:
        session.execution.done = facts["step"]
        slots, template = slots_in(tensors, facts, session.reservoir.full, session.graph)
        session.fit = fit_in(facts, "fit")
        if not fits(session.fit, session.graph):
            raise ValueError("widths of other groups, or of more arms than there are")
        if any(len(arms) > session.fit.widths[name] for name, arms in slots.items()):
            raise ValueError("more arms than the widths allow")
        session.explorer.change_widths({name: len(arms) for name, arms in slots.items()})
        session.explorer.load_state(part(tensors, "explorer."))
        execution = session.execution
        execution.final = session.fit.widths
        execution.install(execution.new_reservoir(session.reservoir.full, slots, template))
        session.installed()
        restore_optimizer(session, tensors, must_fit=not override)
        session.reservoir.carry(part(tensors, "carried."))
        execution.turn()  # checkpoints of earlier versions may stand before an exchange
        history = history_in(facts)
    except (KeyError, TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise does_not_fit(run, error) from error
    if session.ranks.first:  # of several processes one alone writes
        run.keep_metrics_until(session.step)
    return history


def restore_pace(session: Session, facts: Mapping) -> None:
    """How far the schedule is and where its time goes, of a run that was given a time."""
    try:
        pace = dict(facts["pace"])
        growth_step = pace.pop("growth_step")
        session.lay_out(session.reservoir.full, Pace(**pace))
        session.clock = Clock(**{**facts["clock"], "total": seconds_in(session.config.time)})
        session.execution.growth_step = growth_step + 0
    except (KeyError, TypeError, ValueError) as error:
        raise DynpruneError(
            f'The checkpoint\'s header has no valid entry "pace" or "clock" ({first_line(error)[:100]}). Expected a '
            "checkpoint written by dynprune train --time."
        ) from error


def restore_optimizer(session: Session, tensors: Mapping[str, Tensor], *, must_fit: bool) -> None:
    """Momentum and the like. Without `must_fit`, what does not fit starts anew."""
    for name, parameter in session.parameters.items():
        for key, value in session.optimizer.state[parameter].items():
            saved = tensors.get(f"optimizer.{key}.{name}")
            if saved is not None and saved.shape == value.shape:
                value.copy_(saved)
            elif must_fit:
                raise ValueError(f"no state of the optimizer for {name}")


def fits(fit: Fit, graph: ChannelGraph) -> bool:
    """Whether these are widths that the network can have."""
    return fit.widths.keys() == graph.groups.keys() and all(fit.widths[group.name] <= group.arms for group in graph)


def fit_in(facts: dict, name: str) -> Fit:
    """The widths that a checkpoint's header holds under "fit" or, those to begin with, "first_fit"."""
    try:
        entry = facts[name]
        latency = entry["latency"] and Latency(**entry["latency"])
        assert all(isinstance(width, int) and width > 0 for width in entry["widths"].values())
        return Fit(entry["widths"], latency, entry["candidates"])
    except (KeyError, TypeError, AttributeError, AssertionError) as error:
        raise DynpruneError(
            f'The checkpoint\'s header has no valid entry "{name}". Expected a checkpoint written by '
            f"this version of dynprune train."
        ) from error


def slots_in(
    tensors: dict[str, Tensor], facts: Mapping, full: nn.Module, graph: ChannelGraph
) -> tuple[Selection, Selection]:
    """Fill `full` from a checkpoint's tensors and header; returns its slots and their template."""
    try:
        fill_full(full, tensors, facts)
        slots, template = (
            {group.name: arms_in(tensors[f"{kind}.{group.name}"], group.arms) for group in graph}
            for kind in ("slots", "template")
        )
        if any(len(slots[name]) != len(template[name]) or (np.diff(template[name]) <= 0).any() for name in slots):
            raise ValueError("slots and their template disagree")
    except (RuntimeError, LookupError, AttributeError, TypeError, ValueError) as error:
        raise DynpruneError(
            f"The checkpoint does not belong to this model ({first_line(error)}). Use the run's own settings."
        ) from error
    return slots, template


def fill_full(full: nn.Module, tensors: dict[str, Tensor], facts: Mapping) -> None:
    """Give the full-width network the state that a checkpoint's tensors and header hold."""
    if facts["schema"] == 1:
        full.load_state_dict(part(tensors, "full."))
    else:
        fill(full, part(tensors, "full."), check_state(facts.get("state")))


def arms_in(tensor: Tensor, count: int) -> np.ndarray:
    """Arm numbers, each at most once. Raises ValueError for anything else."""
    arms = tensor.numpy() if tensor.dtype == torch.int64 and tensor.ndim == 1 else np.array([-1])
    if not len(arms) or arms.min() < 0 or arms.max() >= count or len(np.unique(arms)) != len(arms):
        raise ValueError("arms that do not exist")
    return arms


# -- of any session ----------------------------------------------------------------------------------------------------


def history_in(facts: Mapping) -> History:
    """The time before, from a checkpoint's header. Raises KeyError, TypeError or ValueError for anything else."""
    history = History(**facts["history"])
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in asdict(history).values()):
        raise ValueError("a history of other types")
    return history


def optimizer_tensors(
    kind: str, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Momentum and the like, as KIND.KEY.PARAMETER."""
    return {
        f"{kind}.{key}.{name}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def does_not_fit(run: RunDirectory, error: Exception) -> DynpruneError:
    return DynpruneError(
        f"{run.checkpoint_file} does not fit these settings ({first_line(error)[:200]}). "
        f"Resume with the run's own settings and data."
    )


def refuse_lost_weights(session: Trainee, run: RunDirectory, parameters: Iterable[Tensor]) -> None:
    """Weights that are not finite must never replace a good checkpoint."""
    if not all(bool(torch.isfinite(parameter).all()) for parameter in parameters):
        raise lost(session, run, session.step, math.nan)


def lost(session: Trainee, run: RunDirectory, step: int, loss: float) -> DynpruneError:
    kept = (
        f"The last good checkpoint is in {run.path}"
        if run.checkpoint_file.exists()
        else "No checkpoint had been written yet"
    )
    return DynpruneError(
        f"The loss became {loss:g} at step {step} of {session.steps}. {kept}. "
        f"Try a lower --lr than {session.config.lr:g}, a longer --warmup, or --precision float32."
    )
