"""Everything that one run of `dynprune gate` holds, and one step of it: decide, forward, loss, backward, step.

Takes a GateConfig, data, and a network (new, or that of a finished run); trains weights by back-propagation and gates
by the chosen estimator, on a price per multiply-accumulate that steers the mean cost of an image to the target. The
steps fall into phases:

    warming   with `gates_first`: the weights rest while the gates learn what each unit is worth
    gating    both learn; the target falls from 1 to the one asked for in the first half
    settled   the gates are set to the threshold that meets the target, and stay but for that threshold and the
              statistics that normalise what they see; the weights learn to live with them

After the last step, units that hardly any training image opens are closed for good, and the threshold is set once more
(`threshold.py`).

It has the face of a `Session`, so that the training loop and its resume serve both methods.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynprune import zoo
from dynprune.data.loading import Data
from dynprune.data.scores import fitting, logits
from dynprune.deploy.export import check_classes, load_compact
from dynprune.errors import DynpruneError
from dynprune.execution.saliency import magnitude
from dynprune.files import artifact
from dynprune.gates import checkpoint, estimators, supervised, threshold
from dynprune.gates.gating import Choices, Choose, GatedNetwork, statistics_kept
from dynprune.gates.threshold import GatedByChance
from dynprune.runs.config import GateConfig
from dynprune.runs.directory import RunDirectory, open_compact
from dynprune.state.copies import copied
from dynprune.state.tensors import paths_of
from dynprune.structure.merging import merged
from dynprune.structure.tracing import trace
from dynprune.training.checkpoint import History
from dynprune.training.distributed import ALONE
from dynprune.training.pace import Clock
from dynprune.training.recipe import (
    choose_device,
    learning_rate,
    make_optimizer,
    quick_step,
    set_learning_rate,
    use_bfloat16,
)
from dynprune.training.session import PASSES
from dynprune.zoo.weights import load_trained

FALLING = 0.5  # share of the gating phase in which the target falls to its value
COLDEST = 0.2  # temperature at which gates stop learning
# of the price per MAC: how fast it moves with the excess, and how hard an excess pulls at once
PRICE_STEP, PRICE_PULL = 0.2, 20.0
# divides the logits of teacher and student, so that what the teacher holds for less likely counts too (Hinton, Vinyals
# & Dean, 2015)
SOFTER = 2.0
ALWAYS = 1e4  # a shift that opens every gate


def base_network(
    config: GateConfig, classes: list[str], size: tuple[int, int, int]
) -> tuple[nn.Module, artifact.Facts | None]:
    """The network to gate: of the run in `base`, as compacted, or a new one; with what its file knows."""
    if not config.base:
        network = zoo.build(config.model, len(classes), config.seed, size=size)
        if config.weights:
            load_trained(network, config.model, config.weights, len(classes), size)
        return network, None
    run = open_compact(Path(config.base))
    if not run.compact_file.is_file():
        raise DynpruneError(f"{run.path} has no compact model yet. Run: dynprune compact {run.path}")
    network, facts = load_compact(run)
    check_classes(run.compact_file, facts, classes)
    return network, facts


class GateSession:
    """Everything that one run of gates holds, built from its configuration or from its checkpoint."""

    ranks, sent_bytes, dtype = ALONE, 0, torch.float32
    clock: Clock | None = None

    def __init__(self, config: GateConfig, data: Data):
        self.config = config = config.resolved(len(data.train))
        self.policy = f"gate-{config.estimator}"
        self.part = self.ranks.part(config.batch_size)
        self.stop: Callable[[], bool] = lambda: False
        self.stopping, self.step, self.right = False, 0, torch.tensor(0)
        self.keeps_best = self.settled = False  # gates close for good at the end
        self.device = choose_device(config.device)
        self.bfloat16 = use_bfloat16(config.precision, self.device)
        self.steps_per_epoch = data.steps_per_epoch(config.batch_size)
        self.steps = self.steps_per_epoch * config.epochs
        network, self.facts = base_network(config, data.classes, data.size)
        self.paths = paths_of(network)
        self.data = data = fitting(network, data)
        self.graph = trace(network, data.example)
        self.trained = bool(config.base or config.weights)
        # a network that stays as it is would only be held back by itself
        distills = self.trained and config.distill > 0 and not self.ungated
        self.teacher = None
        if distills:
            answering, example = copied(network).to(self.device).eval(), data.example.to(self.device)
            answering = merged(answering, lambda model: logits(model(example)))
            self.teacher = answering.to(memory_format=torch.channels_last)
        kind = GatedByChance if config.estimator == "random" and not self.ungated else GatedNetwork
        self.model = kind(
            network, self.graph, data.example, block=config.block, hidden=config.hidden, seed=config.seed
        ).to(self.device)
        self.network = self.model.network
        if self.trained:
            self.model.begin_with(magnitude(dict(self.network.named_parameters()), self.graph))
        if config.target < self.model.least_share:
            raise DynpruneError(
                f"--target {config.target} is below what gates can reach here: with as little open as "
                f"possible an image costs {self.model.least_share:.3f} of the ungated network. Choose "
                f"more, or gate a compact network."
            )
        self.weights = make_optimizer(config, list(self.network.parameters()), self.device)
        self.gates = torch.optim.Adam(self.model.predictors.parameters(), config.gate_lr)
        self.price, self.share = 0.0, 1.0
        # passes of every gate open, or of another sample, in the steps in which gates learn
        warming = round(config.gates_first * self.steps) if config.estimator != "random" else 0
        others = {"reinforce": 1, "supervised": PASSES}.get(config.estimator, 0) * (self.settled_at - warming)
        others = 0 if self.ungated else others + PASSES * warming
        self.train_macs = (
            config.batch_size * self.model.dense_macs * (PASSES * self.steps + others + self.steps * distills)
        )
        if self.ungated:
            self.model.shift.fill_(ALWAYS)

    @property
    def ungated(self) -> bool:
        return self.config.target >= 1

    @property
    def macs(self) -> int:
        """Mean multiply-accumulates of an image in the last step."""
        return round(self.share * self.model.dense_macs)

    def phase(self, step: int) -> str:
        if self.ungated:
            return "ungated"
        if step < round(self.config.gates_first * self.steps):
            return "warming"
        return "gating" if step < self.settled_at else "settled"

    @property
    def settled_at(self) -> int:
        return self.steps - round(self.config.settle * self.steps)

    @property
    def entropy_weight(self) -> float:
        """Falls to 0 while gates learn, so that they are decided when they settle."""
        return self.config.entropy * max(0.0, 1 - self.step / max(1, self.settled_at))

    @property
    def temperature(self) -> float:
        """Divides the logits while gates learn, falling from 1, so that what they draw becomes what the threshold will
        say."""
        return 1 + (COLDEST - 1) * min(1.0, self.step / max(1, self.settled_at))

    def target_at(self, step: int) -> float:
        """The mean share that gates are steered to now."""
        done = min(1.0, step / max(1, FALLING * self.settled_at))
        return 1 + (self.config.target - 1) * done

    def rate(self, step: int) -> float:
        """The learning rate of the weights."""
        return learning_rate(self.config, step, self.steps)

    def look(self, spent: float) -> None:
        """Nothing: gates are trained for a number of steps."""

    def compile(self, _note: Callable[[str], None]) -> None:
        return None

    def autocast(self) -> contextlib.AbstractContextManager:
        return quick_step(self.network, self.device, self.bfloat16)

    # -- one step ------------------------------------------------------------------------------------------------------

    def train_step(self, images: Tensor, labels: Tensor) -> Tensor:
        """One step: decide, forward, loss of weights and gates, backward, step. Returns the loss of the classes."""
        phase = self.phase(self.step)
        if phase == "settled" and self.step == self.settled_at:
            threshold.calibrate(self)
        set_learning_rate(self.weights, 0.0 if phase == "warming" else self.rate(self.step))
        images, labels = images.to(self.device, memory_format=torch.channels_last), labels.to(self.device)
        with self.autocast():
            output, choices = (
                (self.network(images), Choices()) if phase == "ungated" else self.model.run(images, self.choose(phase))
            )
        self.right = (logits(output).detach().argmax(1) == labels).sum()
        taught = self.teach(images)
        each = self.loss_of(output, labels, taught)
        loss = each.mean()
        if phase != "ungated":
            self.share = float(
                self.model.executed_share(
                    Choices(choices.gates, choices.logits, [value.detach() for value in choices.open])
                ).mean()
            )
        total = loss
        if phase in ("warming", "gating") and self.config.estimator != "random":
            told = phase == "warming" or self.config.estimator == "supervised"
            total = loss + (
                self.loss_of_told(choices, images, labels, taught)
                if told
                else self.loss_of_gates(choices, each, images, labels, taught)
            )
        self.weights.zero_grad(set_to_none=True)
        self.gates.zero_grad(set_to_none=True)
        total.backward()
        self.weights.step()
        if total is not loss:
            self.gates.step()
        if phase == "settled" and self.config.estimator != "random":
            threshold.follow(self)
        self.stopping = self.stop()
        self.step += 1
        if self.step == self.steps and not self.ungated:
            threshold.close_for_good(self)
            threshold.calibrate(self)
        return loss.detach()

    @torch.no_grad()
    def teach(self, images: Tensor) -> Tensor | None:
        """What the network said before it had gates: (batch, classes); None where there is nothing to distill."""
        if self.teacher is None:
            return None
        with self.autocast():
            return logits(self.teacher(images)).float()

    def loss_of(self, output: object, labels: Tensor, taught: Tensor | None) -> Tensor:
        """Loss of each image, (batch,): from its label and, where there is a teacher, from what that says of it."""
        scores = logits(output).float()
        each = F.cross_entropy(scores, labels, reduction="none", label_smoothing=self.config.label_smoothing)
        if taught is None:
            return each
        apart = F.kl_div(
            F.log_softmax(scores / SOFTER, 1), F.log_softmax(taught / SOFTER, 1), reduction="none", log_target=True
        ).sum(1)
        return torch.lerp(each, SOFTER**2 * apart, self.config.distill)

    def choose(self, phase: str) -> Choose:
        """How gates open in this phase."""
        if self.config.estimator == "random":
            if phase != "settled":
                self.model.shift.fill_(threshold.even_logit(self.model, self.target_at(self.step)))
            return self.model.threshold
        if phase == "settled":
            return lambda scores, site: self.model.threshold(scores, site).detach()
        learns = self.config.estimator == "gumbel" and phase != "warming"
        draw = estimators.straight_through if learns else estimators.sample
        temperature = self.temperature
        return lambda scores, _: draw(scores / temperature)

    def loss_of_gates(
        self, choices: Choices, each: Tensor, images: Tensor, labels: Tensor, taught: Tensor | None
    ) -> Tensor:
        """What the gates are to lower: the price of what they open, and with REINFORCE the images' loss. each: that
        loss, (batch,)."""
        cooled = [own / self.temperature for own in choices.logits]
        expected = self.model.executed_share(choices, [torch.sigmoid(own) for own in cooled])
        spent = expected if self.config.estimator == "reinforce" else self.model.executed_share(choices)
        # of what was really opened; the expectation takes gates for independent
        excess = self.share - self.target_at(self.step)
        self.price = max(0.0, self.price + PRICE_STEP * excess)
        cost = max(0.0, self.price + PRICE_PULL * excess) * spent.mean().float()
        cost = cost - self.entropy_weight * estimators.entropy(cooled)
        if self.config.estimator == "gumbel":
            return cost
        with self.autocast(), statistics_kept(self.model):
            output, again = self.model.run(images, self.choose("gating"), gates_alone=True)
        cooled_again = [own / self.temperature for own in again.logits]
        losses = each.detach(), self.loss_of(output, labels, taught).detach()
        return cost + estimators.leave_one_out((cooled, cooled_again), (choices.open, again.open), losses)

    def loss_of_told(self, choices: Choices, images: Tensor, labels: Tensor, taught: Tensor | None) -> Tensor:
        """How far the gates are from what they are told: the units that are worth most at this step's cost."""
        with self.autocast():
            every, by_gate = supervised.worth(self.model, images, lambda output: self.loss_of(output, labels, taught))
        wanted = supervised.answers(self.model, every, by_gate, self.target_at(self.step))
        return supervised.loss([own / self.temperature for own in choices.logits], wanted)

    # -- checkpoint ----------------------------------------------------------------------------------------------------

    def save(self, run: RunDirectory, history: History) -> None:
        """Write everything that is needed to go on; see `checkpoint.save`."""
        checkpoint.save(self, run, history)

    def restore(
        self, run: RunDirectory, *, override: bool = False, note: Callable[[str], None] = lambda _: None
    ) -> History:
        """Go on where the run's newest whole checkpoint was; see `checkpoint.restore`. override: other numbers of steps
        are refused all the same."""
        return checkpoint.restore(self, run, note=note)
