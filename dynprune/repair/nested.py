"""A wide network with a narrow one inside: what the narrow one has computed, the wide one need not compute again.

Takes a trained network, a narrow one that was cut from it, and the positions that this kept; makes a copy of the first
in which the narrow one's weights stand where they were cut from. These channels read no others; the others read all.
First the others are refitted, then both learn in one pass to say what the untouched network says: the layer that makes
the scores has one form for all channels, and one for the narrow network's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from dynprune.data.scores import logits
from dynprune.repair.patches import Conv
from dynprune.repair.refit import repair
from dynprune.repair.scores import refit_scores
from dynprune.repair.trained import Compaction
from dynprune.state.copies import copied
from dynprune.state.tensors import named_tensors
from dynprune.structure.record import AxisKey


class Nested(nn.Module):
    """Both networks in one. Called with images it gives the scores of both, the wide one's first, (2 * images,
    classes), in one pass: what the narrow one computes is among what the wide one computes."""

    def __init__(self, model: nn.Module, narrow: nn.Module, kept: Mapping[AxisKey, np.ndarray], head: str):
        """model: the untouched network, which stays as it is. narrow: cut from it, in whatever state. kept: positions
        of the untouched tensors that it holds. head: the linear layer that makes the scores."""
        super().__init__()
        self.wide, self.narrow, self.head = copied(model), narrow, head
        last = self.wide.get_submodule(head)
        assert isinstance(last, nn.Linear), head
        self.reads = torch.from_numpy(kept.get((f"{head}.weight", 1), np.arange(last.in_features)))
        self.reads = self.reads.to(last.weight.device)
        outputs = {f"{name}.weight": 1 for name, layer in self.wide.named_modules() if transposed(layer)}
        self.shared: list[Shared] = []
        inner = named_tensors(narrow)
        for name, value in named_tensors(self.wide).items():
            if value.ndim and value.is_floating_point() and not name.startswith(f"{head}."):
                at = [kept.get((name, dim), np.arange(size)) for dim, size in enumerate(value.shape)]
                self.shared.append(Shared(value, inner[name], at, outputs.get(name, 0)))
        self.hold()

    def forward(self, images: Tensor) -> Tensor:
        heard: list[Tensor] = []
        last = self.wide.get_submodule(self.head)
        hook = last.register_forward_pre_hook(lambda _layer, given: heard.append(given[0]))
        try:
            wide = logits(self.wide(images))
        finally:
            hook.remove()
        return torch.cat([wide, self.narrow.get_submodule(self.head)(heard[0][:, self.reads])])

    @torch.no_grad()
    def hold(self) -> None:
        """Put the narrow network's weights where they belong in the wide one."""
        for own in self.shared:
            own.wide[own.at] = own.narrow
        self.settle()

    @torch.no_grad()
    def settle(self) -> None:
        """The narrow network's channels read no others."""
        for own in self.shared:
            if own.blind is not None:
                own.wide.masked_fill_(own.blind, 0)

    @torch.no_grad()
    def hand_over(self) -> nn.Module:
        """The narrow network with what the wide one has learned for it, in eval mode."""
        for own in self.shared:
            own.narrow.copy_(own.wide[own.at])
        self.wide.eval()
        return self.narrow.eval()


class Shared:
    """A tensor of the wide network, and the narrow one's, which stands in it at the places `at`. blind: places of the
    wide one that stay zero, if there are any."""

    def __init__(self, wide: Tensor, narrow: Tensor, at: Sequence[np.ndarray], outputs: int):
        """outputs: the dimension of the output channels."""
        self.wide, self.narrow = wide, narrow
        grid = np.ix_(*at)
        self.at = tuple(torch.from_numpy(own).to(wide.device) for own in grid)
        blind = np.zeros(wide.shape, dtype=bool)
        blind.swapaxes(0, outputs)[at[outputs]] = True
        blind[grid] = False
        self.blind = torch.from_numpy(blind).to(wide.device) if blind.any() else None


@torch.no_grad()
def refit_wide(nested: Nested, compaction: Compaction) -> None:
    """Refit the channels that the narrow network lacks, and the layer that makes the scores, to what the untouched
    network says."""
    nested.wide.eval()
    repair(nested.wide, {}, compaction.targets, settle=nested.hold)
    refit_scores(nested.wide, nested.head, compaction.fitted, compaction.taught, compaction.images.share)


def transposed(layer: nn.Module) -> bool:
    return isinstance(layer, Conv) and layer.transposed
