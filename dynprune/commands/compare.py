"""`dynprune compare`: what you would do instead, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dynprune.deploy.compare import Comparison
from dynprune.deploy.compare import compare as run_comparison
from dynprune.listener import SILENT, Listener
from dynprune.runs.config import TrainConfig


def compare(
    config: TrainConfig,
    policies: Sequence[str] = ("cucb", "random", "static"),
    seeds: int = 3,
    out: str | Path = "runs/comparison",
    *,
    equal: str = "images",
    untrained: bool = False,
    listener: Listener = SILENT,
) -> Comparison:
    """Train every policy with every seed, in OUT/POLICY-SEED, and say whether the difference is larger than the spread.

    policies: yours first; see `dynprune compare --help`. equal: "images" that are seen, or "cost" in multiplications.
    untrained: compare what each makes of the trained network that the settings name, before any training.
    What is finished in `out` is not repeated. Raises DynpruneError for comparisons that make no sense, before any
    training.

    >>> dynprune.compare(TrainConfig(model="resnet20", epochs=2), ["cucb", "static"], seeds=3).verdict
    """
    return run_comparison(
        config.validate(),
        list(policies),
        seeds,
        Path(out),
        equal=equal,
        untrained=untrained,
        report=listener.step,
        say=listener.say,
        stop=listener.stop,
    )
