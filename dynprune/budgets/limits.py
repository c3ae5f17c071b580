"""What a user writes behind --budget, read and checked."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from dynprune.errors import DynpruneError

SUFFIX = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}
MILLISECONDS = {"": 1, "ms": 1, "us": 1e-3, "s": 1e3}
FORMS = "0.25 or macs=0.25 (a share of the dense network), macs=80M, params=0.11, params=1.5M, latency=0.3, latency=2ms"


@dataclass(frozen=True)
class Limit:
    """One budget: at most `amount` of "macs", "params" or "latency"; a share of the dense network's, or a number (of
    milliseconds for latency) if `absolute`."""

    quantity: str
    amount: float
    absolute: bool

    def __str__(self) -> str:
        return f"{self.quantity}={self.amount:.10g}" + ("ms" if self.quantity == "latency" and self.absolute else "")

    def value(self, dense: float) -> float:
        return self.amount if self.absolute else self.amount * dense


@dataclass(frozen=True)
class Budget:
    """What a network may cost, and which widths are allowed.

    limits: each as users write it, see FORMS; all hold at once. allocation: uniform, balanced or learned. align: widths
    are multiples of this number, or of what onnxruntime runs fastest with "auto". min_width, max_width_share: of every
    layer. keep: layers that stay whole, by name or pattern. int8: milliseconds are those of int8 files.

    Raises DynpruneError where it is used, for limits in another form and for those that cannot be met.

    >>> dynprune.Budget(("macs=0.25", "params=0.11"), allocation="balanced", keep=("layer1.*",))
    """

    limits: tuple[str, ...] = ("0.25",)
    allocation: str = "uniform"
    align: str = "auto"
    min_width: int = 1
    max_width_share: float = 1.0
    keep: tuple[str, ...] = ()
    int8: bool = False


def parse_limit(text: str) -> Limit:
    """Read one --budget; see FORMS. Shares lie in (0, 1]; a larger number counts MACs or parameters and needs its
    name."""
    quantity, given, number = text.strip().rpartition("=")
    quantity = quantity or "macs"
    units = MILLISECONDS if quantity == "latency" else SUFFIX
    match = re.fullmatch(rf"([0-9]*\.?[0-9]+(?:e-?[0-9]+)?)({'|'.join(units)})", number.strip().lower())
    if (
        not match
        or quantity not in ("macs", "params", "latency")
        or quantity == "latency"
        and not match[2]
        and float(match[1]) > 1
    ):
        raise DynpruneError(f'--budget got "{text}". Expected {FORMS}.')
    amount = float(match[1]) * units[match[2]]
    absolute = amount > 1 or bool(match[2])
    if not 0 < amount < math.inf or absolute and not given:
        raise DynpruneError(f"--budget got {text}. Expected a share in (0, 1], or a number with its name: {FORMS}.")
    return Limit(quantity, amount, absolute)
