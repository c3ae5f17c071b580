"""Several processes, each with an equal share of the images: what one process sums up, they sum up together.

Takes tensors of one process; returns the totals over all. Calibration, repair and distances are sums over images, so
that one process and several do the same, but for the order in which numbers are added.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Share:
    """Which of how many equal shares this process has."""

    rank: int = 0
    count: int = 1

    def own(self, values: Tensor) -> Tensor:
        """This process's part of (images, ...); what cannot be shared equally is left out."""
        each = len(values) // self.count
        return values[self.rank * each : (self.rank + 1) * each]

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes, of tensors of one shape; may be in place."""
        if self.count > 1:
            values = values.contiguous()
            dist.all_reduce(values)
        return values

    def gathered(self, values: Tensor) -> Tensor:
        """All parts, one behind the other."""
        if self.count == 1:
            return values
        whole = values.new_zeros(self.count * len(values), *values.shape[1:])
        self.own(whole).copy_(values)
        return self.total(whole)

    def least(self, number: int, device: torch.device) -> int:
        """The smallest of all processes' whole numbers."""
        values = torch.tensor(number, dtype=torch.int64, device=device)
        if self.count > 1:
            dist.all_reduce(values, dist.ReduceOp.MIN)
        return int(values)

    def everywhere(self, holds: bool, device: torch.device) -> bool:
        """Whether something holds in every process."""
        return self.count == 1 or float(self.total(torch.tensor(float(holds), device=device))) == self.count

    def clock(self, device: torch.device) -> Callable[[], float]:
        """A clock that shows the first process's seconds in all of them, so that all stop together."""
        if self.count == 1:
            return time.perf_counter
        return lambda: float(
            self.total(torch.tensor(time.perf_counter() * (self.rank == 0), dtype=torch.float64, device=device))
        )


WHOLE = Share()
