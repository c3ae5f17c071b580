"""What comes after training gates, tried before it: see `training/rehearsal.py`.

Takes a GateSession that has not begun. On copies it does one training step, brings the network's state into one that is
built anew, reads a gated file back, and exports the network under the gates to ONNX. What fails is refused with the
words of what failed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from torch import nn

from dynprune.errors import DynpruneError
from dynprune.files import artifact
from dynprune.gates import file as gated_file
from dynprune.gates.session import GateSession
from dynprune.gates.training import FILE_TOLERANCE, facts_of, file_difference
from dynprune.state.copies import copied, same_randomness
from dynprune.state.tensors import state_of
from dynprune.structure.surgery import slim
from dynprune.training.rehearsal import NOTHING, brought_back, built_anew, take_step, try_onnx, try_step


def rehearse_gates(
    session: GateSession, *, note: Callable[[str], None] = lambda _: None, say: Callable[[str], None] = lambda _: None
) -> None:
    """Try a training step, the gated file and the ONNX file. note: what is tried now. say: what users should know.

    Raises DynpruneError for what could not be trained, saved, loaded or exported afterwards. The session stays as it
    is, but for its precision.
    """
    note("trying what comes after training, on the untrained network")
    with same_randomness(0):
        try_step(session, say)
        loaded = try_state(session)
        try_gated_file(session)
        if not session.config.no_onnx:
            try_onnx(session.config.model, session.data, loaded)


def try_state(session: GateSession) -> nn.Module:
    """The network under the gates, as its state after one training step brings it back."""
    network = copied(session.network)
    take_step(session, network)
    name, data = session.config.model, session.data
    anew = built_anew(name, data)
    if session.facts is not None:
        anew = slim(anew, artifact.kept_of(session.facts))
    return brought_back(name, network, state_of(network, within=session.paths), anew, data.example)


def try_gated_file(session: GateSession) -> None:
    """Save the gated network and read it back."""
    model, config = copied(session.model).cpu().eval(), session.config
    gates = gated_file.GateFacts(
        config.block,
        config.hidden,
        [own.group for own in model.gates if own.cuts],
        config.estimator,
        config.target,
        1.0,
    )
    try:
        with tempfile.TemporaryDirectory(prefix="dynprune-") as folder:
            path = Path(folder) / "trial.safetensors"
            gated_file.save(path, model, facts_of(session, 0.0), gates, within=session.paths)
            difference = file_difference(path, model, session.data, config)
    except DynpruneError as error:
        raise DynpruneError(
            f'"{config.model}" could be trained, but not saved and loaded again: {error} {NOTHING}'
        ) from error
    if not difference < FILE_TOLERANCE:
        raise DynpruneError(
            f'"{config.model}" computes something else when its gated file is read back. {NOTHING} '
            f"Please report the model."
        )
