"""The threshold of gates: one shift of all their logits, set so that images cost the target on average.

Takes a `GateSession` whose gates have settled or have ended their training, and changes the shift of its network, or
closes units for good.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dynprune.data.loading import some
from dynprune.gates.gating import Choices, GatedNetwork, Site, statistics_kept
from dynprune.gates.stats import observe
from dynprune.gates.surgery import close_rare

if TYPE_CHECKING:
    from dynprune.gates.session import GateSession

CALIBRATION_IMAGES, CALIBRATION_ROUNDS = 500, 9
RARE_IMAGES = 1000  # training images, without augmentation, that show which units are hardly ever open
SHIFT_STEP = 0.05  # of the common threshold while settled, per unit of share that is missing
CLOSE = 0.9  # share of the target that images must cost at the end; below it, as above it, the threshold is set anew
MARGIN = 0.99  # the threshold aims this far below the target, so that other images meet it too


class GatedByChance(GatedNetwork):
    """Gates that do not look: each open with the one probability that meets the target."""

    def threshold(self, scores: Tensor, _site: Site) -> Tensor:
        return (torch.rand(scores.shape, device=scores.device) < torch.sigmoid(self.shift)).to(scores.dtype)


def follow(session: GateSession) -> None:
    """While the weights learn to live with the gates: a little lower after a step that cost less than the target, a
    little higher after one that cost more."""
    session.model.shift += SHIFT_STEP * (MARGIN * session.config.target - session.share)


def close_for_good(session: GateSession) -> None:
    """Close what hardly any image opens: it can be cut then."""
    if session.config.estimator != "random":
        was_training = session.model.training
        seen = observe(session.model, session.data, some(session.data.train, RARE_IMAGES))
        close_rare(session.model, {gate.group: opened for gate, opened in zip(session.model.gates, seen.opened)})
        session.model.train(was_training)


def even_logit(model: GatedNetwork, target: float) -> float:
    """The logit at which gates that are open by chance alone cost `target` on average."""
    low, high = -8.0, 8.0
    for _ in range(30):
        middle = (low + high) / 2
        units = [torch.full((1, len(gate.sizes)), torch.sigmoid(torch.tensor(middle)).item()) for gate in model.gates]
        low, high = (
            (middle, high)
            if float(model.executed_share(Choices(model.gates, units, units))) <= target
            else (low, middle)
        )
    return low


@torch.no_grad()
def calibrate(session: GateSession) -> None:
    """Shift all logits so that validation images cost at most the target on average. Where no shift within its range
    does, gates are closed as far as it goes, and the result says that the target is missed."""
    if session.config.estimator == "random":
        session.model.shift.fill_(even_logit(session.model, MARGIN * session.config.target))
        return
    model, target = session.model, session.config.target
    was_training, settling = model.training, session.step < session.steps
    model.eval()
    # while settling, with the statistics of each batch, as the steps that follow use them
    model.network.train(settling)
    model.predictors.train(settling)
    try:
        batches = [batch for batch, _ in session.data.eval_batches(some(session.data.val, CALIBRATION_IMAGES), 100)]
        if not settling and CLOSE * target <= mean_share(session, batches) <= target:
            return  # what the weights have learned to live with meets the target as it is
        low, high = -8.0, 8.0
        for _ in range(CALIBRATION_ROUNDS):
            middle = (low + high) / 2
            model.shift.fill_(middle)
            low, high = (middle, high) if mean_share(session, batches) <= MARGIN * target else (low, middle)
        model.shift.fill_(low)
    finally:
        model.train(was_training)


def mean_share(session: GateSession, batches: list[Tensor]) -> float:
    """Mean executed share of these images under the threshold."""
    shares = []
    for batch in batches:
        batch = batch.to(session.device, memory_format=torch.channels_last)
        with session.autocast(), statistics_kept(session.model):
            shares.append(session.model.executed_share(session.model.run(batch, session.model.threshold)[1]))
    return float(torch.cat(shares).mean())
