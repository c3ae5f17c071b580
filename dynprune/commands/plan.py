"""`dynprune plan`: which widths a budget gives and what they cost, before any training."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from dynprune.budgets.limits import Budget
from dynprune.errors import DynpruneError
from dynprune.listener import SILENT, Listener
from dynprune.runs.config import TrainConfig
from dynprune.runs.directory import Run
from dynprune.training.plan import Plan
from dynprune.training.plan import plan as make_plan


def plan(
    model: str,
    budget: str | Budget = "0.25",
    *,
    shape: str = "",
    classes: int = 0,
    latency: bool = False,
    learned_by: str | Path | None = None,
    listener: Listener = SILENT,
) -> Plan:
    """Trace the network and allocate widths; nothing is trained. A budget that cannot be met gives a plan that says
    why.

    model: a name as for `train`. budget: one limit as users write it, or a `Budget`. shape: of one example, such as
    "3x224x224". classes: 0 takes what the source is used to. latency: predict milliseconds even if no budget asks for
    them. learned_by: a run whose bandit says what a channel of each layer is worth.

    Raises DynpruneError for constraints that make no sense.

    >>> dynprune.plan("torchvision:resnet18", Budget(("macs=0.25", "params=0.11"), "balanced")).widths
    """
    allowed = Budget((budget,)) if isinstance(budget, str) else budget
    if learned_by is not None:
        allowed = dataclasses.replace(allowed, allocation="learned")
    elif allowed.allocation == "learned":
        raise DynpruneError(
            "--allocation learned needs --from RUN, a run of --policy cucb to learn from. Before any "
            "training, choose uniform or balanced."
        )
    TrainConfig(
        model=model,
        budget=allowed.limits,
        allocation=allowed.allocation,
        align=allowed.align,
        min_width=allowed.min_width,
        max_width_share=allowed.max_width_share,
        keep=allowed.keep,
    ).validate()
    return make_plan(
        model,
        allowed,
        shape=shape,
        classes=classes,
        latency=latency,
        learned_by=Run.open(Path(learned_by)) if learned_by else None,
        report=listener.work,
    )
