"""A training step in whatever way is quickest on this machine: the same sums, other roundings."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from dynprune.execution.convolutions import small_maps
from dynprune.execution.normalisation import few_channels


@contextlib.contextmanager
def quick_layers(model: nn.Module, *, bfloat16: bool = False) -> Iterator[None]:
    """Inside, layers of `model` for which torch's kernels are slow are computed in other ways; the commands' own
    training steps are. On a CPU these are BatchNorms of few channels (`execution.normalisation`) and, in bfloat16 on
    processors with AMX, wide convolutions on small maps (`execution.convolutions`).

    bfloat16: whether this is inside an autocast to bfloat16. The backward pass may be outside. Losses that are
    differentiated twice cannot be computed inside: torch raises RuntimeError in the second pass. Nothing else is
    raised, and nothing is changed that is not quicker.

    >>> with dynprune.quick_layers(model):
    ...     loss = loss_of(model(images), labels)
    """
    with small_maps(model, bfloat16), few_channels(model):
        yield
