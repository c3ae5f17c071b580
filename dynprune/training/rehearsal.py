"""What comes after training, tried before it: nothing that was trained may be lost for want of a file.

Takes a Session that has not begun. On copies of its untrained network it does one training step, brings what a
checkpoint would hold into a network that is built anew (as another process would, from other random numbers), writes
the compact file of that, reads it back into yet another one, exports it to ONNX and runs it in onnxruntime. What fails
is refused with the words of what failed; where only bfloat16 does, the run falls back to float32.
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

from dynprune import zoo
from dynprune.data.loading import Data
from dynprune.data.scores import Scores, exact_scores, logits
from dynprune.errors import DynpruneError
from dynprune.execution.reservoir import up_to_date
from dynprune.files import artifact
from dynprune.files.onnxfile import open_session, write_onnx
from dynprune.files.onnxfile import run as execute
from dynprune.state.attributes import value_at
from dynprune.state.copies import copied, same_randomness
from dynprune.state.tensors import fill, in_precision, loose_tensors, plain_values, state_of
from dynprune.structure.surgery import slim
from dynprune.structure.tracing import cause
from dynprune.training.recipe import make_optimizer
from dynprune.training.session import Session
from dynprune.training.trainee import Trainee

TRIAL_IMAGES = 4
SAME = 1e-5  # of the largest output, in float64: the file must bring back what was saved
ONNX_SAME = 1e-3  # in float32 and with untrained weights; the export after training is held to less
NOTHING = "Nothing was trained."


def rehearse(
    session: Session,
    *,
    opset: int | None = None,
    note: Callable[[str], None] = lambda _: None,
    say: Callable[[str], None] = lambda _: None,
) -> None:
    """Try a training step, the compact file and the ONNX file. opset: the one that is asked for. note: what is tried
    now. say: what users should know.

    Raises DynpruneError for what could not be trained, saved, loaded or exported afterwards. The session's weights and
    random generators stay as they are; its precision may change.
    """
    note("trying what comes after training, on the untrained network")
    with same_randomness(0):
        try_step(session, say)
        loaded = try_file(session, try_checkpoint(session), say)
        if not session.config.no_onnx:
            try_onnx(session.config.model, session.data, loaded, opset)


def rehearse_step(session: Trainee, say: Callable[[str], None] = lambda _: None) -> None:
    """The training step alone. It settles the precision, so every training begins with it."""
    with same_randomness(0):
        try_step(session, say)


# -- one training step -------------------------------------------------------------------------------------------------


def try_step(session: Trainee, say: Callable[[str], None]) -> None:
    """A step of a copy, in the session's precision or, if the settings leave it open, in float32."""
    problem = step_problem(session)
    if problem is not None and session.bfloat16 and session.config.precision == "auto":
        session.bfloat16 = False
        if step_problem(session) is None:
            say(f"training in float32: bfloat16 does not work here ({problem})")
            return
        session.bfloat16 = True
    if problem is not None:
        hint = " Try --precision float32." if session.bfloat16 and session.config.precision != "auto" else ""
        raise DynpruneError(
            f'"{session.config.model}" cannot be trained at the chosen widths: {problem}. {NOTHING}{hint}'
        )


def step_problem(session: Trainee) -> str | None:
    """What goes wrong in one step of a copy, in the words of what failed; None if nothing does."""
    model = copied(session.model)
    try:
        take_step(session, model)
    except DynpruneError as error:
        return str(error).rstrip(".")
    except Exception as error:
        return cause(error)
    strange = [
        name for name, value in model.named_parameters() if value.grad is not None and value.grad.dtype != value.dtype
    ]
    return f"the gradient of {strange[0]} is of another type" if strange else None


def take_step(session: Trainee, model: nn.Module) -> None:
    """One training step of `model`, which is at the session's widths."""
    images, labels = trial_batch(session)
    model.train()
    with session.autocast():
        output = model(images)
    scores = logits(output).to(session.dtype)
    if scores.shape != (len(labels), len(session.data.classes)):
        raise DynpruneError(
            f"in training mode it returns scores of shape {'x'.join(map(str, scores.shape))} for "
            f"{len(labels)} images of {len(session.data.classes)} classes"
        )
    F.cross_entropy(scores, labels).backward()
    make_optimizer(session.config, list(model.parameters()), session.device).step()


def trial_batch(session: Trainee) -> tuple[Tensor, Tensor]:
    """A few images of noise, with labels, on the session's device."""
    images = torch.randn(TRIAL_IMAGES, *session.data.size).to(
        session.device, session.dtype, memory_format=torch.channels_last
    )
    return images, (torch.arange(TRIAL_IMAGES) % len(session.data.classes)).to(session.device)


# -- checkpoint and compact file ---------------------------------------------------------------------------------------


def try_checkpoint(session: Session) -> nn.Module:
    """The narrow network, as what a checkpoint holds after one training step brings it back. Raises DynpruneError where
    that differs."""
    name, example = session.config.model, session.data.example.to(session.dtype)
    kept = session.graph.kept(session.reservoir.slots, session.reservoir.template)
    trained = session.execution.new_reservoir(
        copied(session.reservoir.full), session.reservoir.slots, session.reservoir.template
    )
    take_step(session, trained.active)
    full = in_precision(built_anew(name, session.data), session.dtype)
    return brought_back(
        name, trained.active, state_of(up_to_date(trained)), full, example, lambda full: slim(full, kept)
    )


def brought_back(
    name: str,
    trained: nn.Module,
    state: tuple[dict[str, Tensor], dict],
    anew: nn.Module,
    example: Tensor,
    narrowed: Callable[[nn.Module], nn.Module] = lambda network: network,
) -> nn.Module:
    """`anew`, filled with a state and narrowed. Raises DynpruneError if it then computes something else than the
    network that was trained."""
    ours = exact_scores(trained, example)
    if not close(ours, exact_scores(trained, example)):
        raise DynpruneError(
            f'"{name}" gives another output each time in evaluation mode, so no file of it could be '
            f"proven. {NOTHING} Make it deterministic after eval()."
        )
    try:
        fill(anew, *state)
        network = narrowed(anew).eval()
    except (ValueError, LookupError, AttributeError, TypeError, RuntimeError) as error:
        raise DynpruneError(
            f'"{name}" could be trained, but no checkpoint of it read: {cause(error)}. {NOTHING}'
        ) from error
    if not close(ours, exact_scores(network, example)):
        raise DynpruneError(
            f'"{name}" computes something else when it is built anew and given the same tensors: it '
            f"depends on {what_is_lost(trained, network)}, "
            f"so a file could not bring back what was trained. {NOTHING} Register those values as "
            f"buffers."
        )
    return network


def what_is_lost(trained: nn.Module, network: nn.Module) -> str:
    """What a network computes with, after a training step, that is not in its state."""
    changed = []
    for path in {**loose_tensors(trained), **plain_values(trained)}:
        try:
            same = type(value_at(network, path)) is type(value_at(trained, path))
        except (LookupError, AttributeError):
            same = False
        if not same:
            changed.append(f'"{".".join(map(str, filter(None, path[:2])))}"')
    if changed:
        return f"what a training step leaves in {', '.join(dict.fromkeys(changed[:3]))}, which was not there before"
    return (
        "values that are in no parameter, buffer or attribute, such as random numbers in a function or at the top of "
        "a file"
    )


def try_file(session: Session, network: nn.Module, say: Callable[[str], None]) -> nn.Module:
    """Save the narrow network, load it into one that is built anew, and compare. Returns what was loaded."""
    config, data, graph, reservoir = session.config, session.data, session.graph, session.reservoir
    example = data.example.to(session.dtype)
    left_out: list[str] = []
    state_of(network, left_out)
    for name in left_out:
        say(f'the extra state of "{name or "the network"}" is no plain value and is left out of the files')
    kept = artifact.kept_as_json(graph.kept(reservoir.slots, reservoir.template))
    facts = artifact.Facts(
        dataclasses.asdict(config),
        data.classes,
        list(data.size),
        list(data.mean),
        list(data.std),
        kept,
        session.widths,
        session.macs,
        graph.params(session.widths),
        graph.macs({}),
        graph.params({}),
        0.0,
    )
    try:
        with tempfile.TemporaryDirectory(prefix="dynprune-") as folder:
            path = Path(folder) / "trial.safetensors"
            artifact.save(path, network, facts)
            loaded = artifact.load(path, built_anew(config.model, data))
    except DynpruneError as error:
        raise DynpruneError(
            f'"{config.model}" could be trained, but not saved and loaded again: {error} {NOTHING}'
        ) from error
    except Exception as error:
        raise DynpruneError(f'"{config.model}" could be trained, but not saved: {cause(error)}. {NOTHING}') from error
    if not close(exact_scores(network, example), exact_scores(loaded, example)):
        raise DynpruneError(
            f'"{config.model}" computes something else when its compact file is read back. {NOTHING} '
            f"Please report the model."
        )
    return loaded


SEED = 20201  # for the network that is built anew: other random numbers than the session's


def built_anew(name: str, data: Data) -> nn.Module:
    """The full-width network as another process would build it. Code that cannot be imported twice is not imported
    again."""
    try:
        with same_randomness(SEED), zoo.imported_anew(name):
            return zoo.build(name, len(data.classes), seed=SEED, size=data.size)
    except Exception:
        return zoo.build(name, len(data.classes), seed=SEED, size=data.size)


def close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and float((one - other).abs().max()) <= SAME * float(
        one.abs().max().clamp(min=1e-30)
    )


# -- the ONNX file -----------------------------------------------------------------------------------------------------


def try_onnx(name: str, data: Data, loaded: nn.Module, opset: int | None = None) -> None:
    """Export what was loaded and run it in onnxruntime, with another batch than the example's."""
    model = Scores(loaded.float()).eval()
    advice = f"{NOTHING} Change that line, or pass --no-onnx to train without an ONNX file."
    with tempfile.TemporaryDirectory(prefix="dynprune-") as folder:
        path = Path(folder) / "trial.onnx"
        try:
            write_onnx(model, data.example, path, opset, {})
            images = torch.randn(TRIAL_IMAGES - 1, *data.size)
            found = open_session(path)
            theirs = execute(found, {found.get_inputs()[0].name: images.numpy()})
        except DynpruneError as error:
            raise DynpruneError(f'"{name}" cannot be exported: {error} {advice}') from error
        with torch.no_grad():
            ours = model(images).numpy()
        if ours.shape != theirs.shape or not float(np.abs(ours - theirs).max()) <= ONNX_SAME * float(
            np.abs(ours).max()
        ):
            raise DynpruneError(f'"{name}" computes something else in onnxruntime ({in_words(ours, theirs)}). {advice}')


def in_words(ours: np.ndarray, theirs: np.ndarray) -> str:
    if ours.shape != theirs.shape:
        return f"an output of shape {'x'.join(map(str, theirs.shape))} for {'x'.join(map(str, ours.shape))}"
    return f"a difference of {float(np.abs(ours - theirs).max()):.1e}, largest output {float(np.abs(ours).max()):.1e}"
