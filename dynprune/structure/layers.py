"""Which layer of a network runs, so that pins and failures can name it.

Takes a module; while it is watched, every forward pass tells which submodule it enters and leaves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


class RunningLayer:
    """The submodule that runs now. The stack of those around it stays where a failure left it."""

    def __init__(self, model: nn.Module):
        self.modules = dict(model.named_modules())
        self.names = {id(module): name for name, module in self.modules.items()}
        self.stack: list[str] = []

    @property
    def name(self) -> str:
        return (self.stack[-1] if self.stack else "") or "(model)"

    @property
    def module(self) -> nn.Module | None:
        """None outside the network, and in a module that it does not register."""
        return self.modules.get(self.stack[-1]) if self.stack else None

    @contextmanager
    def watched(self) -> Iterator[None]:
        def enter(module: nn.Module, _inputs: object) -> None:
            self.stack.append(self.names.get(id(module), type(module).__name__))

        def leave(_module: nn.Module, _inputs: object, _output: object) -> None:
            if self.stack:
                self.stack.pop()

        handles = [
            nn.modules.module.register_module_forward_pre_hook(enter),
            nn.modules.module.register_module_forward_hook(leave),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
