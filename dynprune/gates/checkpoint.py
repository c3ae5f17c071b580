"""A session of gates written down, and read again: the gated network, both optimizers, the price.

Takes a `GateSession` and a run directory; see `training/checkpoint.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dynprune.gates import file as gated_file
from dynprune.runs.directory import RunDirectory
from dynprune.state.tensors import check_facts as check_state
from dynprune.state.tensors import fill
from dynprune.training.checkpoint import History, does_not_fit, history_in, optimizer_tensors, part, refuse_lost_weights

if TYPE_CHECKING:
    from dynprune.gates.session import GateSession


def save(session: GateSession, run: RunDirectory, history: History) -> None:
    """Write everything that is needed to go on. Weights that are not finite are refused."""
    refuse_lost_weights(session, run, session.model.parameters())
    own, state = gated_file.tensors_of(session.model, session.paths)
    tensors = {f"model.{name}": value for name, value in own.items()}
    for kind, optimizer, module in optimizers(session):
        tensors |= optimizer_tensors(kind, optimizer, dict(module.named_parameters()))
    run.write_checkpoint(
        tensors,
        {
            "kind": "checkpoint",
            "history": asdict(history),
            "step": session.step,
            "steps": session.steps,
            "classes": session.data.classes,
            "price": session.price,
            "share": session.share,
            "state": state,
        },
    )


def restore(session: GateSession, run: RunDirectory, *, note: Callable[[str], None] = lambda _: None) -> History:
    """Go on where the run's newest whole checkpoint was."""
    tensors, facts = run.read_checkpoint(note, aside=True)
    try:
        if (
            facts["classes"] != session.data.classes
            or facts["steps"] != session.steps
            or not 0 <= facts["step"] <= session.steps
        ):
            raise ValueError(
                f"{facts['steps']} steps and {len(facts['classes'])} classes, the settings and data "
                f"now give {session.steps} and {len(session.data.classes)}"
            )
        own = part(tensors, "model.")
        if facts["schema"] == 1:
            session.model.load_state_dict(own)
        else:
            fill(session.network, part(own, "network."), check_state(facts.get("state")))
            gated_file.fill_gates(session.model, own)
        for kind, optimizer, module in optimizers(session):
            restore_optimizer(optimizer, module, part(tensors, f"{kind}."))
        session.step, session.price, session.share = int(facts["step"]), float(facts["price"]), float(facts["share"])
        history = history_in(facts)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise does_not_fit(run, error) from error
    run.keep_metrics_until(session.step)
    return history


def optimizers(session: GateSession) -> list[tuple[str, torch.optim.Optimizer, nn.Module]]:
    """Each with the name of its tensors in a checkpoint and the module whose parameters it steps."""
    return [("weights", session.weights, session.network), ("gates", session.gates, session.model.predictors)]


def restore_optimizer(optimizer: torch.optim.Optimizer, module: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """saved: tensors by KEY.PARAMETER. A parameter without any starts anew."""
    for name, parameter in module.named_parameters():
        state = {
            key[: -len(name) - 1]: value
            for key, value in saved.items()
            if key.endswith("." + name) and "." not in key[: -len(name) - 1]
        }
        if any(value.ndim and value.shape != parameter.shape for value in state.values()):
            raise ValueError(f"state of another shape for {name}")
        if state:
            optimizer.state[parameter] = {
                key: value.clone().to(parameter.device, memory_format=torch.preserve_format)
                for key, value in state.items()
            }
