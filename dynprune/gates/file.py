"""A gated network as a file, and back; `load` opens this and a compact file alike.

A gated file is safetensors: the network's weights under "network.", the gates' under "predictors.", and in its header
what a compact file says (how to build the network, what was kept of it) and how the gates are laid out. Nothing is
unpickled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor, nn

from dynprune.errors import DynpruneError
from dynprune.files import artifact
from dynprune.files.disk import kind_of, read_tensors, write_tensors
from dynprune.files.modules import load_module
from dynprune.gates.gating import GatedNetwork
from dynprune.gates.surgery import cut_closed
from dynprune.runs.config import TrainConfig
from dynprune.state.tensors import state_of
from dynprune.structure.surgery import slim
from dynprune.structure.tracing import first_line, trace
from dynprune.training.checkpoint import part
from dynprune.zoo import runs_code


@dataclass(frozen=True)
class GateFacts:
    """How the gates are laid out and what they were trained for. cuts: groups of which one unit is always open. share:
    mean cost of a test image over the ungated network's."""

    block: int
    hidden: int
    cuts: list[str]
    estimator: str
    target: float
    share: float


def save(
    path: Path, model: GatedNetwork, facts: artifact.Facts, gates: GateFacts, *, within: Collection[tuple] | None = None
) -> None:
    """within: see `state_of`."""
    tensors, state = tensors_of(model, within)
    write_tensors(
        path, tensors, {"kind": "gated", **asdict(dataclasses.replace(facts, state=state)), "gates": asdict(gates)}
    )


def tensors_of(model: GatedNetwork, within: Collection[tuple] | None = None) -> tuple[dict[str, Tensor], dict]:
    """The network's state under "network.", and what belongs to the gates; see `state_of`."""
    tensors, state = state_of(model.network, within=within)
    return {f"network.{name}": value for name, value in tensors.items()} | gate_tensors(model), state


def gate_tensors(model: GatedNetwork) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if not name.startswith("network.")}


def fill_gates(model: GatedNetwork, tensors: Mapping[str, Tensor]) -> None:
    """Give the gates their tensors. Raises ValueError for tensors that are absent or left over, RuntimeError for other
    shapes."""
    given = {name: value for name, value in tensors.items() if not name.startswith("network.")}
    if given.keys() != gate_tensors(model).keys():
        raise ValueError(f"tensors of other gates: {', '.join(sorted(given.keys() ^ gate_tensors(model).keys())[:3])}")
    model.load_state_dict(given, strict=False)


def load(path: str | Path, model: nn.Module | None = None, *, trust: bool = False) -> nn.Module:
    """The network in a compact or gated file, or one that `save` wrote, in eval mode on the CPU.

    model: the network at full width, which the files of `save` want (`modules.load_module`), and others take in place
    of building it by its name. See `artifact.load` for the rules.

    A gated network comes without what its gates have closed for good. It computes of a single image (under
    `torch.no_grad()`) only what its gates open, and masks larger batches.

    Of a file of the commands, `model.classes` are the class names, and `model.preprocess(path)` is the input for one
    photo, float32, (channels, height, width).

    Raises DynpruneError for files that are absent, garbled or of another network, and for one that asks to run code
    which was neither passed nor trusted.

    >>> model = dynprune.load("runs/mine/compact.safetensors")
    >>> model = dynprune.load("small.safetensors", torchvision.models.resnet18(num_classes=10))
    """
    path = Path(path)
    if kind_of(path) == "module":
        if model is None:
            raise DynpruneError(f"{path} does not say how to build its network. Pass it: load(path, model).")
        return load_module(path, model)
    try:
        return described(*artifact.load_with_facts(path, model, trust=trust))
    except DynpruneError as error:
        if "of another kind" not in str(error):
            raise
    gated, facts, _ = load_gated(path, model, trust=trust)
    return described(cut_closed(gated, facts.example), facts)


def described(model: nn.Module, facts: artifact.Facts) -> nn.Module:
    """The same model, which knows its class names and how photos become its inputs, unless its class uses these words
    for something else."""
    for name, value in (("classes", facts.classes), ("preprocess", facts.preprocess)):
        if not hasattr(model, name):
            setattr(model, name, value)
    return model


def load_gated(
    path: Path, full: nn.Module | None = None, *, trust: bool = False
) -> tuple[GatedNetwork, artifact.Facts, GateFacts]:
    """The gated network in `path`, what its file says of the network, and of the gates."""
    tensors, header = read_tensors(path, "gated")
    facts, name, kept = artifact.facts_in(path, header)
    try:
        gates = GateFacts(**header["gates"])
        check_gates(gates)
    except (KeyError, TypeError, AssertionError) as error:
        raise DynpruneError(
            f"{path} lacks or garbles a header entry ({str(error)[:200]}). Write it again with dynprune gate."
        ) from error
    if full is None and runs_code(name) and not trust:
        raise DynpruneError(
            f'{path} asks to run the code "{name}". Pass the model yourself, load(path, model), or '
            f"trust=True if the file is yours."
        )
    try:
        weights = part(tensors, "network.")
        if full is None:
            network = artifact.built(name, kept, weights, facts, header["schema"])
        else:
            network = slim(full, kept)
        artifact.fill_from(network, weights, facts, header["schema"])
        network.eval()
        example = facts.example
        model = GatedNetwork(
            network, trace(network, example), example, block=gates.block, hidden=gates.hidden, cuts=gates.cuts
        )
        fill_gates(model, tensors)
    except (RuntimeError, LookupError, AttributeError, ValueError, TypeError, ZeroDivisionError) as error:
        raise DynpruneError(
            f'{path} does not fit the model "{name}" ({first_line(error)[:200]}). Is it the version it was made with?'
        ) from error
    return model.eval(), facts, gates


def check_gates(gates: GateFacts) -> None:
    """Raises AssertionError for entries of another type or size."""
    assert type(gates.block) is int and 0 <= gates.block <= 4096, "block"
    assert type(gates.hidden) is int and 0 < gates.hidden <= 4096, "hidden"
    assert isinstance(gates.cuts, list) and all(isinstance(name, str) for name in gates.cuts), "cuts"
    assert isinstance(gates.estimator, str), "estimator"
    assert all(isinstance(value, int | float) for value in (gates.target, gates.share)), "target"


def facts_of_new(
    settings: dict,
    classes: list[str],
    size: list[int],
    mean: list[float],
    std: list[float],
    macs: int,
    params: int,
    accuracy: float,
) -> artifact.Facts:
    """What a file says of a network that was never narrowed. settings: of any kind of training."""
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    config = TrainConfig(policy="dense", **{name: value for name, value in settings.items() if name in known})
    return artifact.Facts(asdict(config), classes, size, mean, std, {}, {}, macs, params, macs, params, accuracy)
