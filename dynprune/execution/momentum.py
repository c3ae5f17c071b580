"""What an optimizer keeps of every element of a parameter (momentum, squared gradients), so that it can follow arms.

Takes the function that makes the optimizer; returns the names of such tensors and what they begin with. They are found
by letting one step be made with parameters of zeros, so an optimizer from anywhere will do; one whose state is of
another shape, and so cannot be told apart by channels, is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn

from dynprune.errors import DynpruneError
from dynprune.structure.tracing import first_line

# begun anew by an arm that comes back: what it was when the arm left no longer fits (measured: worth a point)
FRESH = ("momentum_buffer", "exp_avg")

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def state_kinds(
    make: MakeOptimizer, parameters: Mapping[str, nn.Parameter], narrowed: Collection[str]
) -> dict[str, float]:
    """The names of the tensors that the optimizer keeps of every element, each with its first value.

    parameters: what it will train. narrowed: the names of those whose channels move. Raises DynpruneError for an
    optimizer that cannot be used.
    """
    twins = [
        nn.Parameter(torch.zeros_like(value, memory_format=torch.contiguous_format), requires_grad=value.requires_grad)
        for value in parameters.values()
    ]
    optimizer = make(twins)
    name = type(optimizer).__name__
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise DynpruneError(f"optimizer(parameters) returned a {name}. Expected a torch.optim.Optimizer.")
    held = [value for group in optimizer.param_groups for value in group["params"]]
    if not held or not {id(value) for value in held} <= {id(twin) for twin in twins}:
        raise DynpruneError(
            "optimizer(parameters) returned an optimizer of other tensors than those it was given. Make it of its "
            "argument: optimizer=lambda parameters: torch.optim.AdamW(parameters, 1e-3)."
        )
    for twin in twins:
        twin.grad = torch.zeros_like(twin) if twin.requires_grad else None
    try:
        optimizer.step()
    except Exception as error:
        raise DynpruneError(
            f"{name} cannot make a step by itself ({type(error).__name__}: {first_line(error)[:150]}). Use one that "
            "needs no closure, such as SGD, AdamW or RMSprop."
        ) from error
    kinds: dict[str, float] = {}
    for own, twin in zip(parameters, twins):
        for key, value in optimizer.state.get(twin, {}).items():
            if isinstance(value, Tensor) and value.shape == twin.shape and value.ndim and value.numel():
                kinds[key] = float(value.reshape(-1)[0])
            elif own in narrowed and not is_shared(value):
                raise DynpruneError(
                    f"{name} keeps {describe(key, value)} of a parameter of shape {tuple(twin.shape)}, which cannot "
                    "follow its channels when they are exchanged. Use one whose state has the parameter's shape, such "
                    "as SGD, AdamW, RMSprop or Adagrad."
                )
    return kinds


def is_shared(value: object) -> bool:
    """Whether a piece of state is of a parameter as a whole, such as a count of steps."""
    return (
        value is None or isinstance(value, bool | int | float | str) or isinstance(value, Tensor) and value.numel() == 1
    )


def describe(key: str, value: object) -> str:
    return f'"{key}" of ' + (f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__)


def rebound(optimizer: torch.optim.Optimizer, before: Mapping[str, nn.Parameter], after: Mapping[str, nn.Parameter]):
    """Let the optimizer train other parameters of the same names, in place: its groups, and schedulers that hold it,
    stay. Its state begins anew."""
    now = {id(before[name]): after[name] for name in before}
    for group in optimizer.param_groups:
        group["params"] = [now[id(value)] for value in group["params"]]
    optimizer.state.clear()
    return optimizer
