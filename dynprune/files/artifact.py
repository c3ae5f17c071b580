"""The compact model as a file, and back.

A compact file is safetensors: the weights, and in its header one JSON string that says how to build the original
network, which positions to keep along each dimension of each of its tensors, and what the images look like. Nothing is
unpickled. `load(path)` gives back an instance of the network's own class.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dynprune import zoo
from dynprune.data.loading import IN_MEMORY_SIDE
from dynprune.data.photos import Resize
from dynprune.data.preprocess import Preprocess
from dynprune.errors import DynpruneError
from dynprune.files.disk import kind_of, read_facts, read_tensors, write_tensors
from dynprune.state.tensors import check_facts as check_state
from dynprune.state.tensors import fill, named_tensors, state_of, unfilled
from dynprune.structure.numbers import named_as_before
from dynprune.structure.record import AxisKey
from dynprune.structure.surgery import slim
from dynprune.structure.tracing import first_line
from dynprune.zoo import runs_code


@dataclass(frozen=True)
class Facts:
    """What a compact file knows of itself. kept: "tensor:dimension" to positions; settings: what the run was trained
    with; input_size: channels, height, width; state: what the network computes with beside its tensors
    (`state/tensors.py`); resize: interpolation and margin by which photos got their size (`data/photos.Resize`); white:
    which number is white in images deeper than 8 bits (`data/photos.Depth`)."""

    settings: dict
    classes: list[str]
    input_size: list[int]
    mean: list[float]
    std: list[float]
    kept: dict[str, list[int]]
    widths: dict[str, int]
    macs: int
    params: int
    dense_macs: int
    dense_params: int
    accuracy: float
    state: dict = dataclasses.field(default_factory=dict)
    resize: dict = dataclasses.field(default_factory=dict)
    white: dict = dataclasses.field(default_factory=dict)

    @property
    def preprocess(self) -> Preprocess:
        """From a photo to the network's input."""
        channels, height, width = self.input_size
        resize = Resize(**self.resize) if self.resize else Resize()
        return Preprocess((channels, height, width), tuple(self.mean), tuple(self.std), resize, self.white)

    @property
    def example(self) -> Tensor:
        """An input of the network, (1, channels, height, width)."""
        return torch.randn(1, *self.input_size, generator=torch.Generator().manual_seed(0))

    @property
    def model(self) -> str:
        """The name of the network."""
        return self.settings["model"]

    @property
    def limits(self) -> tuple[str, ...]:
        """The budgets that it was made for."""
        return () if self.settings.get("policy") == "dense" else tuple(self.settings.get("budget", ()))


def save(path: Path, model: nn.Module, facts: Facts, *, within: Collection[tuple] | None = None) -> None:
    """within: see `state_of`."""
    tensors, state = state_of(model, within=within)
    write_tensors(path, tensors, {"kind": "compact", **dataclasses.asdict(dataclasses.replace(facts, state=state))})


def tensor_shape(model: nn.Module, name: str) -> tuple[int, ...] | None:
    """The shape of a parameter or buffer, None where there is none of this name."""
    value = named_tensors(model).get(name)
    return None if value is None else tuple(value.shape)


def load(path: str | Path, model: nn.Module | None = None, *, trust: bool = False) -> nn.Module:
    """The compact network in `path`, in eval mode on the CPU.

    The original is built by its name: from the zoo, torchvision or timm. A file that names your own code
    ("package.module:factory") does not get to run it: pass the full-width `model`, or `trust=True` for a file of your
    own. Raises DynpruneError when the file is damaged, foreign, or does not fit the model.
    """
    return load_with_facts(Path(path), model, trust=trust)[0]


def load_with_facts(path: Path, model: nn.Module | None = None, *, trust: bool = False) -> tuple[nn.Module, Facts]:
    """As `load`, with what else the file knows. Shapes are checked against the tensors in the file before memory is
    taken for any."""
    tensors, header = read_tensors(path, "compact")
    facts, name, kept = facts_in(path, header)
    if model is None and not name:
        raise DynpruneError(f"{path} does not name its network. Pass the full-width one: load(path, model).")
    if model is None and runs_code(name) and not trust:
        raise DynpruneError(
            f'{path} asks to run the code "{name}". Pass the model yourself, load(path, model), or '
            f"trust=True if the file is yours."
        )
    try:
        if model is None:
            small = built(name, kept, tensors, facts, header["schema"])
        else:
            small = slim(model, kept)
        fill_from(small, tensors, facts, header["schema"])
    except (RuntimeError, LookupError, AttributeError, ValueError, TypeError, ZeroDivisionError) as error:
        raise DynpruneError(
            f'{path} does not fit the model "{name}" ({first_line(error)[:200]}). Is it the version it was made with?'
        ) from error
    return small.eval(), facts


def facts_in(path: Path, header: Mapping) -> tuple[Facts, str, Mapping[AxisKey, np.ndarray]]:
    """What a file's header says, the name of its network, and the positions that were kept. Raises DynpruneError for
    entries that are absent or wrong."""
    try:
        known = as_now(header)
        facts = Facts(**{field.name: known[field.name] for field in dataclasses.fields(Facts)})
        name, kept = facts.model, kept_of(facts)
        check_facts(facts)
    except (KeyError, TypeError, AttributeError, ValueError, AssertionError, OverflowError) as error:
        raise DynpruneError(
            f"{path} lacks or garbles a header entry ({str(error)[:200]}). Write it again with "
            f"dynprune {header['kind'].replace('gated', 'gate')}."
        ) from error
    return facts, name, kept


def preprocess_in(path: str | Path) -> Preprocess | None:
    """How photos become inputs of the network in a compact or gated file; None of any other file. Raises DynpruneError
    for one that is damaged."""
    path = Path(path)
    kind = kind_of(path)
    return facts_in(path, read_facts(path, kind))[0].preprocess if kind in ("compact", "gated") else None


def as_now(header: Mapping) -> dict:
    """A header's entries in today's form."""
    entries = dict(header)
    if header["schema"] == 1:
        names = (
            (named_as_before(name), name, dim, positions)
            for (name, _, dim), positions in ((key.rpartition(":"), own) for key, own in header["kept"].items())
        )
        entries["kept"] = {
            now + (":-1" if name.startswith("#") and now != name else f":{dim}"): positions
            for now, name, dim, positions in names
        }
        entries |= {"input_size": [3, header["side"], header["side"]], "state": {}}
    if "white" not in header:  # then small images, which are resized without a margin, were noted with one
        entries = {"resize": {}, **entries, "white": {}}
        if max(entries["input_size"]) <= IN_MEMORY_SIDE:
            entries["resize"] = {**dataclasses.asdict(Resize()), **entries["resize"], "margin": 1.0}
    return entries


def built(
    name: str, kept: Mapping[AxisKey, np.ndarray], tensors: Mapping[str, Tensor], facts: Facts, schema: int
) -> nn.Module:
    """The compact network with any weights, in the precision of the file's. Taken from `without_memory` where that
    works."""
    small = without_memory(name, kept, tensors, facts, schema)
    if small is not None:
        return small
    return slim(zoo.build(name, len(facts.classes), size=facts.input_size), kept)


def fill_from(small: nn.Module, tensors: Mapping[str, Tensor], facts: Facts, schema: int) -> None:
    if schema == 1:
        small.load_state_dict(tensors)
    else:
        fill(small, tensors, facts.state)


def without_memory(
    name: str, kept: Mapping[AxisKey, np.ndarray], tensors: Mapping[str, Tensor], facts: Facts, schema: int
) -> nn.Module | None:
    """The compact network, built on the meta device where the full one takes no memory, with unfilled tensors.

    Raises ValueError if the file's tensors have other shapes. None if the network has values that its state does not
    hold, or cannot be built there; then it has to be built in full, which the check before has shown to be what the
    file is about. None for code of the user's own: what that keeps as it is built, such as a table in a cache, would
    stay on the meta device.
    """
    if runs_code(name):
        return None
    try:
        with torch.device("meta"):
            full = zoo.build(name, len(facts.classes), size=facts.input_size)
    except (RuntimeError, NotImplementedError, TypeError):
        return None
    whole = {key: value.shape for key, value in (named_tensors(full) if schema != 1 else full.state_dict()).items()}
    shapes = {key: list(shape) for key, shape in whole.items()}
    for (tensor, dim), positions in kept.items():
        if dim >= 0:
            if (
                not 0 <= dim < len(shapes[tensor])
                or len(positions)
                and not 0 <= positions.min() <= positions.max() < whole[tensor][dim]
            ):
                raise ValueError(f"positions beyond dimension {dim} of {tensor}")
            shapes[tensor][dim] = len(positions)
    found = {key: list(value.shape) for key, value in tensors.items() if key not in facts.state.get("loose", {})}
    shapes |= {key: found[key] for key in shapes if key in found and 0 in shapes[key]}  # empty until the network runs
    if shapes != found:
        wrong = next(key for key in [*shapes, *found] if shapes.get(key) != found.get(key))
        raise ValueError(f"{wrong} has shape {found.get(wrong)}, expected {shapes.get(wrong)}")
    held = (
        {id(value) for value in full.state_dict(keep_vars=True).values()}
        if schema == 1
        else {id(value) for value in named_tensors(full).values()}
    )
    loose = unfilled(full) or any(id(value) not in held for value in full.buffers())
    return None if loose else with_memory(slim(full, kept))


def with_memory(model: nn.Module) -> nn.Module:
    """A model of the meta device on the CPU, with any numbers. Unlike Module.to_empty, it leaves shared tensors
    shared."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for store in stores:
            for name, value in store.items():
                if value is not None and id(value) not in made:
                    new = torch.empty_like(value, device="cpu")
                    made[id(value)] = (
                        nn.Parameter(new, requires_grad=value.requires_grad) if isinstance(value, nn.Parameter) else new
                    )
                store[name] = None if value is None else made[id(value)]
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()
    return model


def check_facts(facts: Facts) -> None:
    """Raises AssertionError or TypeError for entries of another type, or sizes that no network has."""
    settings = facts.settings
    assert (
        isinstance(settings, dict)
        and isinstance(settings.get("model"), str)
        and isinstance(settings.get("policy", ""), str)
    ), "settings"
    assert isinstance(settings.get("budget", []), list) and all(
        isinstance(text, str) for text in settings.get("budget", [])
    ), "settings"
    assert (
        isinstance(facts.classes, list)
        and all(isinstance(label, str) for label in facts.classes)
        and 0 < len(facts.classes) <= 1_000_000
    ), "classes"
    size = facts.input_size
    assert (
        isinstance(size, list)
        and len(size) == 3
        and all(type(value) is int for value in size)
        and size[0] in (1, 3)
        and all(0 < value <= 4096 for value in size[1:])
    ), "input_size"
    check_state(facts.state)
    assert isinstance(facts.resize, dict) and facts.resize.keys() <= {"interpolation", "margin"}, "resize"
    assert isinstance(facts.white, dict) and all(isinstance(v, int | float) for v in facts.white.values()), "white"
    for name, values in (("mean", facts.mean), ("std", facts.std)):
        assert (
            isinstance(values, list)
            and len(values) == size[0]
            and all(isinstance(value, int | float) and math.isfinite(value) for value in values)
        ), name
    for name in ("macs", "params", "dense_macs", "dense_params"):
        assert isinstance(getattr(facts, name), int), name
    assert isinstance(facts.accuracy, int | float), "accuracy"
    assert isinstance(facts.widths, dict) and all(isinstance(width, int) for width in facts.widths.values()), "widths"


def kept_of(facts: Facts) -> Mapping[AxisKey, np.ndarray]:
    return kept_in(facts.kept)


def kept_in(entries: Mapping[str, list[int]]) -> dict[AxisKey, np.ndarray]:
    """What `kept_as_json` wrote. Raises AssertionError, ValueError or AttributeError for anything else."""
    result = {}
    for key, positions in entries.items():
        tensor, _, dim = key.rpartition(":")
        assert isinstance(positions, list) and all(type(position) is int for position in positions), "kept"
        result[tensor, int(dim)] = np.array(positions, dtype=np.int64)
    return result


def kept_as_json(kept: Mapping[AxisKey, np.ndarray]) -> dict[str, list[int]]:
    return {f"{tensor}:{dim}": positions.tolist() for (tensor, dim), positions in kept.items()}
