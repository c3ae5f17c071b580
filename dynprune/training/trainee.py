"""What the training loop, its rehearsal and its messages need of whatever is trained: a type, and no code.

`Session` has this face, and so has the session of gates that decide per image (`gates/session.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from dynprune.data.loading import Data
from dynprune.runs.config import Recipe
from dynprune.runs.directory import RunDirectory
from dynprune.structure.channels import ChannelGraph
from dynprune.training.distributed import Ranks
from dynprune.training.pace import Clock

if TYPE_CHECKING:
    from dynprune.training.checkpoint import History


class Trainee(Protocol):
    """graph: of the full-width network. part: this process's images of a batch. stop: asked after every step;
    stopping: what it said. train_macs: of all steps, forward and backward. sent_bytes: by this process in a
    step. right: images of the last step's batch that were classified right, of all processes, still on the device.
    keeps_best: whether the best epoch's weights are kept, of those that were `settled`: with all that is still to be
    decided decided. clock: of a run that was given a time."""

    data: Data
    graph: ChannelGraph
    device: torch.device
    dtype: torch.dtype
    bfloat16: bool
    ranks: Ranks
    part: slice
    steps_per_epoch: int
    stop: Callable[[], bool]
    stopping: bool
    sent_bytes: int
    right: Tensor

    keeps_best: bool
    clock: Clock | None

    @property
    def config(self) -> Recipe: ...

    @property
    def settled(self) -> bool: ...

    @property
    def step(self) -> int: ...

    @property
    def steps(self) -> int: ...

    @property
    def train_macs(self) -> int: ...

    @property
    def model(self) -> nn.Module: ...

    @property
    def policy(self) -> str: ...

    @property
    def macs(self) -> int: ...

    def phase(self, step: int) -> str: ...

    def rate(self, step: int) -> float: ...

    def look(self, spent: float) -> None: ...

    def compile(self, note: Callable[[str], None], /) -> dict | None: ...

    def autocast(self) -> contextlib.AbstractContextManager: ...

    def train_step(self, images: Tensor, labels: Tensor) -> Tensor: ...

    def save(self, run: RunDirectory, history: History) -> None: ...

    def restore(self, run: RunDirectory, *, override: bool = ..., note: Callable[[str], None] = ...) -> History: ...
