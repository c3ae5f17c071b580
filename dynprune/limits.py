"""What a user writes behind --budget, read and checked."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from dynprune.errors import DynpruneError

SUFFIX = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}
FORMS = "0.25 or macs=0.25 (a share of the dense network), macs=80M, params=0.11, params=1.5M"


@dataclass(frozen=True)
class Limit:
    """One budget: at most `amount` of "macs" or "params"; a share of the dense network's, or a number if `absolute`."""

    quantity: str
    amount: float
    absolute: bool

    def __str__(self) -> str:
        return f"{self.quantity}={self.amount:.10g}"

    def value(self, dense: float) -> float:
        return self.amount if self.absolute else self.amount * dense


def parse_limit(text: str) -> Limit:
    """Read one --budget; see FORMS. Shares lie in (0, 1]; a larger number counts MACs or parameters and needs its name."""
    quantity, given, number = text.strip().rpartition("=")
    quantity = quantity or "macs"
    match = re.fullmatch(r"([0-9]*\.?[0-9]+(?:e-?[0-9]+)?)([kmg]?)", number.strip().lower())
    if not match or quantity not in ("macs", "params"):
        raise DynpruneError(f'--budget got "{text}". Expected {FORMS}.')
    amount = float(match[1]) * SUFFIX[match[2]]
    absolute = amount > 1 or bool(match[2])
    if not 0 < amount < math.inf or absolute and not given:
        raise DynpruneError(f"--budget got {text}. Expected a share in (0, 1], or a number with its name: {FORMS}.")
    return Limit(quantity, amount, absolute)
