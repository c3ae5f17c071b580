"""The compact model as a file, and back.

A compact file is safetensors: the weights, and in its header one JSON string that says how to build the original
network, which positions to keep along each dimension of each of its tensors, and what the images look like. Nothing is
unpickled. `load(path)` gives back an instance of the network's own class.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from dynprune import zoo
from dynprune.labels import AxisKey
from dynprune.config import TrainConfig
from dynprune.errors import DynpruneError
from dynprune.runs import read_tensors, write_tensors
from dynprune.surgery import slim


@dataclass(frozen=True)
class Facts:
    """What a compact file knows of itself. kept: "tensor:dimension" to positions; settings: the run's TrainConfig as a dict."""

    settings: dict
    classes: list[str]
    side: int
    mean: list[float]
    std: list[float]
    kept: dict[str, list[int]]
    widths: dict[str, int]
    macs: int
    params: int
    dense_macs: int
    dense_params: int
    accuracy: float

    @property
    def config(self) -> TrainConfig:
        settings = {name: tuple(value) if isinstance(value, list) else value for name, value in self.settings.items()}
        return TrainConfig(**settings).validate()


def save(path: Path, model: nn.Module, facts: Facts) -> None:
    write_tensors(path, model.state_dict(), {"kind": "compact", **dataclasses.asdict(facts)})


def load(path: str | Path, model: nn.Module | None = None, *, trust: bool = False) -> nn.Module:
    """The compact network in `path`, in eval mode on the CPU.

    The original is built by its name: from the zoo, torchvision or timm. A file that names your own code
    ("package.module:factory") does not get to run it: pass the full-width `model`, or `trust=True` for a file of your own.
    Raises DynpruneError when the file is damaged, foreign, or does not fit the model.
    """
    return load_with_facts(Path(path), model, trust=trust)[0]


def load_with_facts(path: Path, model: nn.Module | None = None, *, trust: bool = False) -> tuple[nn.Module, Facts]:
    tensors, header = read_tensors(path, "compact")
    try:
        facts = Facts(**{field.name: header[field.name] for field in dataclasses.fields(Facts)})
        name, kept = facts.config.model, kept_of(facts)
        assert all(isinstance(label, str) for label in facts.classes) and isinstance(facts.side, int) and len(facts.mean) == len(facts.std) == 3
    except (KeyError, TypeError, AttributeError, ValueError, AssertionError, OverflowError) as error:
        raise DynpruneError(f"{path} lacks or garbles a header entry ({error}). Write it again with dynprune compact.") from error
    if model is None:
        if ":" in name and not name.startswith(("torchvision:", "timm:")) and not trust:
            raise DynpruneError(f'{path} asks to run the code "{name}". Pass the model yourself, load(path, model), or trust=True if the file is yours.')
        model = zoo.build(name, len(facts.classes))
    try:
        small = slim(model, kept)
        small.load_state_dict(tensors)
    except (RuntimeError, IndexError, AttributeError, ValueError, TypeError) as error:
        raise DynpruneError(f'{path} does not fit the model "{name}" ({str(error).splitlines()[0]}). Is it the version it was made with?') from error
    return small.eval(), facts


def kept_of(facts: Facts) -> Mapping[AxisKey, np.ndarray]:
    result = {}
    for key, positions in facts.kept.items():
        tensor, _, dim = key.rpartition(":")
        result[tensor, int(dim)] = np.asarray(positions, dtype=np.int64)
    return result


def kept_as_json(kept: Mapping[AxisKey, np.ndarray]) -> dict[str, list[int]]:
    return {f"{tensor}:{dim}": positions.tolist() for (tensor, dim), positions in kept.items()}
