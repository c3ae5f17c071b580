"""What comes after training, tried before it: nothing that was trained may be lost for want of a file.

Takes a Session that has not begun. On copies of its untrained narrow network it does one training step, writes the compact file, reads it
back into a network that is built anew (as another process would, from other random numbers), exports that to ONNX and runs it in
onnxruntime. What fails is refused with the words of what failed; where only bfloat16 does, the run falls back to float32.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynprune import artifact, zoo
from dynprune.copies import copied, same_randomness
from dynprune.errors import DynpruneError
from dynprune.onnxfile import open_session, run as execute, write_onnx
from dynprune.scores import Scores, exact_scores, logits
from dynprune.session import Session, make_optimizer
from dynprune.state import state_of
from dynprune.tracing import cause

TRIAL_IMAGES = 4
SAME = 1e-5  # of the largest output, in float64: the file must bring back what was saved
ONNX_SAME = 1e-3  # in float32 and with untrained weights; the export after training is held to less
NOTHING = "Nothing was trained."


def rehearse(session: Session, *, opset: int | None = None, note: Callable[[str], None] = lambda _: None, say: Callable[[str], None] = lambda _: None) -> None:
    """Try a training step, the compact file and the ONNX file. opset: the one that is asked for. note: what is tried now. say: what users
    should know.

    Raises DynpruneError for what could not be trained, saved, loaded or exported afterwards. The session's weights and random
    generators stay as they are; its precision may change.
    """
    note("trying what comes after training, on the untrained network")
    with same_randomness(0):
        try_step(session, say)
        network = copied(session.model).cpu().eval()
        loaded = try_file(session, network, say)
        if not session.config.no_onnx:
            try_onnx(session, loaded, opset)


def rehearse_step(session: Session, say: Callable[[str], None] = lambda _: None) -> None:
    """The training step alone. It settles the precision, so every training begins with it."""
    with same_randomness(0):
        try_step(session, say)


# -- one training step ------------------------------------------------------------------------------------------------------


def try_step(session: Session, say: Callable[[str], None]) -> None:
    """A step of a copy, in the session's precision or, if the settings leave it open, in float32."""
    problem = step_problem(session)
    if problem is not None and session.bfloat16 and session.config.precision == "auto":
        session.bfloat16 = False
        if step_problem(session) is None:
            say(f"training in float32: bfloat16 does not work here ({problem})")
            return
        session.bfloat16 = True
    if problem is not None:
        hint = " Try --precision float32." if session.bfloat16 else ""
        raise DynpruneError(f'"{session.config.model}" cannot be trained at the chosen widths: {problem}. {NOTHING}{hint}')


def step_problem(session: Session) -> str | None:
    """What goes wrong in one step, in the words of what failed; None if nothing does."""
    model = copied(session.model).train()
    images, labels = trial_batch(session)
    try:
        with session.autocast():
            output = model(images)
        scores = logits(output).to(session.dtype)
        if scores.shape != (len(labels), len(session.data.classes)):
            return f"in training mode it returns scores of shape {'x'.join(map(str, scores.shape))} for {len(labels)} images of {len(session.data.classes)} classes"
        F.cross_entropy(scores, labels).backward()
        make_optimizer(session.config, model, session.device).step()
    except Exception as error:
        return cause(error)
    strange = [name for name, value in model.named_parameters() if value.grad is not None and value.grad.dtype != value.dtype]
    return f"the gradient of {strange[0]} is of another type" if strange else None


def trial_batch(session: Session) -> tuple[Tensor, Tensor]:
    """A few images of noise, with labels, on the session's device."""
    images = torch.randn(TRIAL_IMAGES, *session.data.size).to(session.device, session.dtype, memory_format=torch.channels_last)
    return images, (torch.arange(TRIAL_IMAGES) % len(session.data.classes)).to(session.device)


# -- the compact file -------------------------------------------------------------------------------------------------------


def try_file(session: Session, network: nn.Module, say: Callable[[str], None]) -> nn.Module:
    """Save the narrow network, load it into one that is built anew, and compare. Returns what was loaded."""
    config, data, graph, reservoir = session.config, session.data, session.graph, session.reservoir
    example = data.example.to(session.dtype)
    ours = exact_scores(network, example)
    if not close(ours, exact_scores(network, example)):
        raise DynpruneError(f'"{config.model}" gives another output each time in evaluation mode, so no file of it could be proven. {NOTHING} Make it deterministic after eval().')
    left_out: list[str] = []
    state_of(network, left_out)
    for name in left_out:
        say(f'the extra state of "{name or "the network"}" is no plain value and is left out of the files')
    kept = artifact.kept_as_json(graph.kept(reservoir.slots, reservoir.template))
    facts = artifact.Facts(dataclasses.asdict(config), data.classes, list(data.size), list(data.mean), list(data.std), kept, session.widths,
                           session.macs, graph.params(session.widths), graph.macs({}), graph.params({}), 0.0)
    try:
        with tempfile.TemporaryDirectory(prefix="dynprune-") as folder:
            path = Path(folder) / "trial.safetensors"
            artifact.save(path, network, facts)
            loaded = artifact.load(path, zoo.build(config.model, len(data.classes), seed=SEED, size=data.size))
    except DynpruneError as error:
        raise DynpruneError(f'"{config.model}" could be trained, but not saved and loaded again: {error} {NOTHING}') from error
    except Exception as error:
        raise DynpruneError(f'"{config.model}" could be trained, but not saved: {cause(error)}. {NOTHING}') from error
    if not close(ours, exact_scores(loaded, example)):
        raise DynpruneError(f'"{config.model}" computes something else when it is built anew and given the same tensors: it depends on values that are in no parameter, buffer or '
                            f"attribute, such as random numbers in a function, so a file could not bring back what was trained. {NOTHING} Register those values as buffers.")
    return loaded


SEED = 20201  # for the network that is built anew: other random numbers than the session's


def close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and float((one - other).abs().max()) <= SAME * float(one.abs().max().clamp(min=1e-30))


# -- the ONNX file ----------------------------------------------------------------------------------------------------------


def try_onnx(session: Session, loaded: nn.Module, opset: int | None) -> None:
    """Export what was loaded and run it in onnxruntime, with another batch than the example's."""
    model = Scores(loaded.float()).eval()
    advice = f"{NOTHING} Change that line, or pass --no-onnx to train without an ONNX file."
    with tempfile.TemporaryDirectory(prefix="dynprune-") as folder:
        path = Path(folder) / "trial.onnx"
        try:
            write_onnx(model, session.data.example, path, opset, {})
            images = torch.randn(TRIAL_IMAGES - 1, *session.data.size)
            found = open_session(path)
            theirs = execute(found, {found.get_inputs()[0].name: images.numpy()})
        except DynpruneError as error:
            raise DynpruneError(f'"{session.config.model}" cannot be exported: {error} {advice}') from error
        with torch.no_grad():
            ours = model(images).numpy()
        if ours.shape != theirs.shape or not float(np.abs(ours - theirs).max()) <= ONNX_SAME * float(np.abs(ours).max()):
            raise DynpruneError(f'"{session.config.model}" computes something else in onnxruntime ({in_words(ours, theirs)}). {advice}')


def in_words(ours: np.ndarray, theirs: np.ndarray) -> str:
    if ours.shape != theirs.shape:
        return f"an output of shape {'x'.join(map(str, theirs.shape))} for {'x'.join(map(str, ours.shape))}"
    return f"a difference of {float(np.abs(ours - theirs).max()):.1e}, largest output {float(np.abs(ours).max()):.1e}"
