"""Any module as a file, and back into a network of its own class.

The file is safetensors: the tensors, and in its header what the network computes with beside them, and which positions
of the full-width network it has kept where that is known. No facts about classes or images are needed, and nothing is
unpickled. `load_module` takes the full-width network, or one that is as narrow already.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from dynprune.errors import DynpruneError
from dynprune.files.artifact import kept_as_json, kept_in
from dynprune.files.disk import read_tensors, write_tensors
from dynprune.state.tensors import check_facts, fill, named_tensors, refuse_strange, state_of
from dynprune.structure.record import AxisKey
from dynprune.structure.surgery import cut_of, slim
from dynprune.structure.tracing import first_line


def save_module(path: Path, model: nn.Module) -> None:
    """Write a module's state. Raises DynpruneError for tensors that no file can hold, or where none can be written."""
    refuse_strange(model, type(model).__name__)
    tensors, state = state_of(model)
    write_tensors(path, tensors, {"kind": "module", "state": state, "kept": kept_as_json(cut_of(model))})


def load_module(path: Path, model: nn.Module) -> nn.Module:
    """A copy of `model`, as narrow as the one in the file and with its state, in eval mode on the CPU.

    model: of the class that was saved, at full width or at its widths; its weights do not matter. Raises DynpruneError
    where the two do not fit, and for a file that is damaged or foreign.
    """
    tensors, header = read_tensors(path, "module")
    try:
        state, recorded = check_facts(header["state"]), kept_in(header["kept"])
    except (KeyError, TypeError, AttributeError, ValueError, AssertionError) as error:
        raise DynpruneError(
            f"{path} lacks or garbles a header entry ({str(error)[:200]}). Write it again with dynprune.save."
        ) from error
    try:
        small = slim(model, kept_for(model, tensors, recorded)).cpu()
        fill(small, tensors, state)
    except (RuntimeError, LookupError, AttributeError, ValueError, TypeError, ZeroDivisionError) as error:
        raise DynpruneError(
            f"{path} does not fit this {type(model).__name__} ({first_line(error)[:200]}). Expected the network that "
            "was saved, at full width or at its own."
        ) from error
    return small.eval()


def kept_for(
    model: nn.Module, tensors: Mapping[str, Tensor], recorded: Mapping[AxisKey, np.ndarray]
) -> Mapping[AxisKey, np.ndarray]:
    """What must be kept of `model` for tensors of these shapes: what was recorded, where that leads there; else as many
    positions as there are, since their numbers come from the file. Raises ValueError where the model is too small."""
    sizes: dict[AxisKey, tuple[int, int]] = {}
    for name, value in named_tensors(model).items():
        given = tensors.get(name)
        if given is None or given.ndim != value.ndim or not value.numel():
            continue
        for dim, (full, small) in enumerate(zip(value.shape, given.shape)):
            if small > full:
                raise ValueError(f"{name} has {small} channels in the file and {full} in the network")
            if small < full:
                sizes[name, dim] = (full, small)
    cut = {key: own for key, own in recorded.items() if key[1] < 0 or key in sizes}
    if sizes and all(
        key in cut and len(cut[key]) == small and 0 <= cut[key].min() <= cut[key].max() < full
        for key, (full, small) in sizes.items()
    ):
        return cut
    return {key: np.arange(small) for key, (_, small) in sizes.items()}
