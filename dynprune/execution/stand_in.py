"""An execution in the place of an optimizer, for trainers that call `optimizer.step()` themselves.

Takes an execution; returns a `torch.optim.Optimizer` whose step is the execution's. Parameter groups and state are
those of the optimizer inside, so schedulers, gradient clipping and progress bars see what they expect.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dynprune.errors import DynpruneError

if TYPE_CHECKING:
    from dynprune.execution.dynamic import Execution


class StandIn(torch.optim.Optimizer):
    """See `DynamicExecution.as_optimizer`."""

    def __init__(self, execution: Execution):
        self.execution = execution
        super().__init__(self.inner.param_groups, self.inner.defaults)

    @property
    def inner(self) -> torch.optim.Optimizer:
        assert self.execution.optimizer is not None
        return self.execution.optimizer

    # the base class sets both; what counts is inside
    param_groups = property(lambda self: self.inner.param_groups, lambda self, _groups: None)
    state = property(lambda self: self.inner.state, lambda self, _state: None)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Nothing, of a group that is there; another one is refused."""
        if not any(own is param_group for own in self.inner.param_groups):
            raise DynpruneError(
                "A group of parameters was added to the optimizer of an execution. Give all to the optimizer that "
                "DynamicExecution makes."
            )

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """The execution's step. closure: makes the loss and its gradients first, as Lightning asks for."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.execution.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing where it is the state that is there, as trainers do at the beginning; else a DynpruneError."""
        if not same(state_dict["state"], self.inner.state_dict()["state"]):
            raise DynpruneError(
                "The state of an optimizer alone does not bring an execution back: arms have moved. Keep "
                "execution.state_dict() beside the trainer's checkpoint, and give it to execution.load_state_dict() "
                "before training goes on."
            )


def same(one: Any, other: Any) -> bool:
    """Whether nested dicts hold the same tensors and values."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other.to(one))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    return type(one) is type(other) and one == other
