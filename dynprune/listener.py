"""Who hears how a long call is getting on: six functions, silent unless given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def nothing(*_: object) -> None:
    """Not heard."""


@dataclass(frozen=True)
class Listener:
    """note: what is being done now; detail: the same, of things too small for a line of their own. say: what the user
    should know. step: a `training.train.Progress` after training steps. work: what is done, how much of it, out of how
    much. stop: asked after every training step; when it says so, the state is saved and the call ends with
    `errors.Stopped`."""

    note: Callable[[str], None] = nothing
    detail: Callable[[str], None] = nothing
    say: Callable[[str], None] = nothing
    step: Callable[[Any], None] = nothing
    work: Callable[[str, int, int], None] = nothing
    stop: Callable[[], bool] = bool


SILENT = Listener()
