"""Example inputs, as torch.onnx.export takes its `args`: a tensor, or a tuple of arguments.

The last of the arguments may be a dict of named ones. One whose keys the network's `forward` does not know is an
argument itself, as is a dict that stands alone or is followed by an empty one.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

Inputs = Tensor | tuple | dict | list


def arguments(example_inputs: Inputs) -> tuple:
    """The arguments, as `call` takes them."""
    if isinstance(example_inputs, tuple):
        return example_inputs
    return (example_inputs, {}) if isinstance(example_inputs, dict) else (example_inputs,)


def call(model: nn.Module, inputs: tuple) -> Any:
    """What a model returns for `arguments`."""
    if inputs and isinstance(inputs[-1], dict) and knows(model, inputs[-1]):
        return model(*inputs[:-1], **inputs[-1])
    return model(*inputs)


def knows(model: nn.Module, named: dict) -> bool:
    """Whether `forward` takes arguments of these names."""
    try:
        parameters = inspect.signature(model.forward).parameters
    except (TypeError, ValueError):  # code without a signature
        return True
    if any(own.kind is own.VAR_KEYWORD for own in parameters.values()):
        return all(isinstance(name, str) for name in named)
    by_name = {name for name, own in parameters.items() if own.kind in (own.POSITIONAL_OR_KEYWORD, own.KEYWORD_ONLY)}
    return named.keys() <= by_name
