"""Everything that one training run holds, and one step of it: forward, loss, backward, reward, step, select.

Takes a TrainConfig and data, builds the full-width network, its channel graph, the widths that meet the budget, the
reservoir with its active model, the bandits and the optimizer. A checkpoint is this, written down.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynprune import zoo
from dynprune.budgets.fit import Fit, Fitter
from dynprune.budgets.latency import Report, silent
from dynprune.data.loading import Data
from dynprune.data.scores import fitting, logits
from dynprune.errors import DynpruneError, ModelFails
from dynprune.execution.dynamic import NARROW, Execution, growth_step
from dynprune.execution.explore import Explorer
from dynprune.execution.reservoir import Reservoir, scale_for_narrow_fan_in
from dynprune.execution.saliency import magnitude
from dynprune.repair.says import divergence
from dynprune.repair.shares import WHOLE, Share
from dynprune.runs.config import TrainConfig, seconds_in
from dynprune.runs.directory import RunDirectory
from dynprune.state.copies import copied
from dynprune.state.tensors import in_precision
from dynprune.structure.channels import ChannelGraph
from dynprune.structure.merging import merged
from dynprune.structure.tracing import trace
from dynprune.training import checkpoint
from dynprune.training.begin import Beginning, begin_trained, probed, searched
from dynprune.training.checkpoint import History, fits
from dynprune.training.compiling import try_compiling
from dynprune.training.distributed import ALONE, Ranks, agree, average, same_everywhere, share_norms
from dynprune.training.pace import Clock, Pace
from dynprune.training.recipe import (
    choose_device,
    learning_rate,
    make_optimizer,
    quick_step,
    set_learning_rate,
    use_bfloat16,
)
from dynprune.zoo.weights import Loaded, load_trained

# a training step multiplies about three times as often as a forward pass: forward, and backward to inputs and to
# weights
PASSES = 3


class Session:
    """Everything that one training run holds, built from its configuration or from its checkpoint."""

    def __init__(
        self,
        config: TrainConfig,
        data: Data,
        *,
        fit: Fit | None = None,
        report: Report = silent,
        ranks: Ranks = ALONE,
        full: nn.Module | None = None,
        teacher: nn.Module | None = None,
        repaired: bool | None = None,
    ):
        """fit: the widths to begin with, where they are known already; else they are found, which `report` follows.
        full: the network, with its weights, in place of the one that the settings name. teacher: from whose scores it
        learns; else that is the untouched network, where the settings give weights. repaired: whether a trained network
        begins repaired; where `fit` is given only if asked for, since a checkpoint or other weights may follow."""
        self.config, self.ranks = config.resolved(len(data.train), ranks.count), ranks
        config = self.config
        self.part = ranks.part(config.batch_size)
        self.keeps_best = config.keep_weights == "best"
        self.stop: Callable[[], bool] = lambda: False
        self.stopping, self.sent_bytes, self.right = False, 0, torch.tensor(0)
        self.device = choose_device(config.device, ranks.local)
        self.bfloat16 = use_bfloat16(config.precision, self.device)
        self.steps_per_epoch = data.steps_per_epoch(config.batch_size)
        self.dtype = torch.float64 if config.precision == "float64" else torch.float32
        given, self.loaded = full is not None, Loaded("")
        if full is None:
            full = zoo.build(config.model, len(data.classes), config.seed, size=data.size)
        full = in_precision(full, self.dtype)
        self.data = data = fitting(full, data)
        if config.weights and not given:
            self.loaded = load_trained(full, config.model, config.weights, len(data.classes), data.size)
        example = data.example.to(self.dtype)
        self.graph = trace_images(full, example)
        self.fitter = Fitter(full, self.graph, example, config.allowed, report)
        if fit is not None and not fits(fit, self.graph):
            raise DynpruneError(
                f"The run's widths are not those of {config.model}. Resume with the run's own settings."
            )
        trained = bool(config.weights) and not given
        untouched = copied(full).to(self.device).eval() if trained else None
        self.teacher = teacher.to(self.device) if teacher else untouched if self.distills else None
        if self.teacher is not None:
            self.teacher = merged(self.teacher.eval(), lambda model: logits(model(example.to(self.device))))
        begins = None
        scored = not self.loaded.anew
        if untouched is not None and self.begins_repaired and (fit is None if repaired is None else repaired):
            if self.loaded.anew:
                report("fitting the new scores to training images", 0, 0)
                layer = probed(untouched, self.loaded.anew, self.graph, data, config.seed, self.device, self.share)
                if scored := bool(layer):
                    full.get_submodule(layer).load_state_dict(untouched.get_submodule(layer).state_dict())
            report("calibrating the trained network", 0, 0)
            begins = begin_trained(untouched, self.graph, data, config.seed, self.device, self.share, self.bfloat16)
        self.fit = self.first_fit = fit or self.find_widths()
        if begins and fit is None and config.searches and scored:
            self.fit = self.first_fit = self.search_widths(begins, report)
        if not (config.weights or given):
            scale_for_narrow_fan_in(full, self.graph, self.fit.widths)
        self.known = None
        if (config.weights or given) and not config.paper:
            self.known = begins.worth if begins else magnitude(dict(full.named_parameters()), self.graph)
        self.lay_out(full, Pace(self.steps_per_epoch * config.epochs, self.steps_per_epoch * config.epochs))
        if begins:
            begins.repair(self.reservoir)
            same_everywhere(self.model, self.ranks)

    def lay_out(self, full: nn.Module, pace: Pace) -> None:
        """Prepare the steps of a run at this pace: which arms are tried out when, and the network that begins. full:
        with the weights to begin with; it becomes the reservoir's."""
        config, self.pace = self.config, pace
        self.clock: Clock | None = None
        first = self.fitter.narrower(self.fit.widths, NARROW) if config.grow else self.fit.widths
        explorer = Explorer(config.exploration, self.graph, first, pace.planned, self.known)
        self.execution = Execution(
            full,
            self.graph,
            explorer,
            lambda parameters: make_optimizer(config, parameters, self.device),
            steps=self.steps,
            final=self.fit.widths,
            growth_step=growth_step(pace.planned, config.grow, explorer),
            device=self.device,
            store_device="cpu" if config.reservoir == "cpu" else self.device,
            find_widths=self.moved_widths,
            installed=self.installed,
        )
        self.narrow_macs = self.graph.macs(first)
        self.installed()

    def plan_anew(self, config: TrainConfig, steps: int, clock: Clock) -> None:
        """Before the first step: another batch, rate, growth and number of steps, which the clock moves from then on.
        Widths and weights stay."""
        self.config = config
        self.part = self.ranks.part(config.batch_size)
        self.steps_per_epoch = self.data.steps_per_epoch(config.batch_size)
        self.reservoir.write_back()
        self.lay_out(self.reservoir.full, Pace(steps, steps))
        self.clock = clock

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return self.pace.steps

    @property
    def train_macs(self) -> int:
        """Multiply-accumulates of all steps, forward and backward, those at full width before them included."""
        growth, wide = self.execution.growth_step, self.graph.macs(self.fit.widths)
        own = growth * self.narrow_macs + (self.steps - growth) * wide
        return self.scout_macs + PASSES * self.config.batch_size * own

    @property
    def scout_macs(self) -> int:
        """Those of the steps at full width, where there are any (`scout.py`)."""
        steps = self.config.scout if self.config.scouts else 0
        return PASSES * self.config.batch_size * steps * self.graph.macs({})

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        return learning_rate(self.config, self.pace.of(step), self.pace.planned)

    def look(self, spent: float) -> None:
        """Move the end of the run to where its time is over. spent: seconds of the run so far."""
        assert self.clock is not None
        growth = self.execution.growth_step
        self.clock.measure(self.step, growth)
        growing = max(0, growth - self.step) / (self.steps - self.step)
        more = self.clock.affords(self.clock.left(spent), growing, self.steps_per_epoch)
        (more,) = agree([more], self.ranks, self.device)
        self.pace.end_at(self.step + more, self.step)
        if growing:
            self.execution.growth_step = self.step + max(1, round(growing * more))
        self.execution.steps = self.steps

    @property
    def distills(self) -> bool:
        """Whether the weights that the settings name know the classes, and are learned from."""
        return self.config.distill > 0 and self.policy != "dense" and not self.loaded.anew

    @property
    def begins_repaired(self) -> bool:
        return not (self.config.no_repair or self.config.paper or self.policy == "dense")

    @property
    def share(self) -> Share:
        """What this process looks at of the images that a trained network is calibrated on. Where the first process
        alone can tell milliseconds, it searches alone, and each sees all images."""
        return WHOLE if self.fitter.in_ms else Share(self.ranks.rank, self.ranks.count)

    def search_widths(self, begins: Beginning, report: Report) -> Fit:
        """Widths by a bandit on the frozen weights, all processes together or the first alone."""
        found = self.fit
        if self.ranks.first or self.share is not WHOLE:
            seconds = seconds_in(self.config.search_time)
            report(f"searching widths for {seconds:.0f} s", 0, 0)
            found, _ = searched(begins.compaction, self.fitter, self.fit, self.config.allowed, seconds)
        return self.agreed(found)

    def find_widths(self, loss: np.ndarray | None = None) -> Fit:
        """Widths that meet the budgets. Milliseconds are measured by the first process alone."""
        if self.policy == "dense":
            return Fit(self.graph.full_widths)
        if not (self.ranks.several and self.fitter.in_ms):
            return self.fitter.fit(loss)
        return self.agreed(self.fitter.fit(loss) if self.ranks.first else Fit(self.graph.full_widths))

    def agreed(self, found: Fit) -> Fit:
        """The widths that the first process found."""
        if not self.ranks.several:
            return found
        widths = agree(list(found.widths.values()), self.ranks, self.device)
        return dataclasses.replace(found, widths=dict(zip(found.widths, widths)))

    def moved_widths(self, loss: np.ndarray) -> dict[str, int]:
        """Widths that the arms of each group turned out to be worth."""
        self.fitter.full = self.reservoir.full
        self.fit = self.find_widths(loss)
        return self.fit.widths

    def installed(self) -> None:
        """Another active model has taken its place."""
        self.forward: Callable[..., Any] = self.model
        if self.ranks.several:
            share_norms(self.model, self.ranks)

    @property
    def policy(self) -> str:
        return self.config.policy

    @property
    def step(self) -> int:
        """Steps so far."""
        return self.execution.done

    @property
    def model(self) -> nn.Module:
        """The narrow network that runs."""
        return self.execution.model

    @property
    def reservoir(self) -> Reservoir:
        return self.execution.reservoir

    @property
    def explorer(self) -> Explorer:
        return self.execution.explorer

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return self.execution.parameters

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        assert self.execution.optimizer is not None
        return self.execution.optimizer

    @property
    def widths(self) -> dict[str, int]:
        return self.execution.widths

    @property
    def macs(self) -> int:
        return self.execution.macs

    # -- one step ------------------------------------------------------------------------------------------------------

    def autocast(self) -> contextlib.AbstractContextManager:
        return quick_step(self.model, self.device, self.bfloat16)

    def train_step(self, images: Tensor, labels: Tensor) -> Tensor:
        """One step: forward, loss, backward, reward, step, select. Returns the loss, still on the device.

        images, labels: this process's part of the batch. Afterwards `stopping` says whether any process was asked to
        stop.
        """
        set_learning_rate(self.optimizer, self.rate(self.step))
        if self.device.type == "cuda":
            images, labels = images.pin_memory(), labels.pin_memory()
        images, labels = (
            images.to(self.device, self.dtype, memory_format=torch.channels_last, non_blocking=True),
            labels.to(self.device, non_blocking=True),
        )
        with self.autocast():
            output = self.forward(images)
        scores = logits(output).to(self.dtype)
        loss = self.loss_of(scores, images, labels)
        loss.backward()
        self.right = (scores.detach().argmax(1) == labels).sum()
        loss = self.exchange(loss.detach())
        self.execution.step()
        return loss

    def loss_of(self, scores: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy, or mostly the distance from what the untouched network says, where there is one."""
        loss = F.cross_entropy(scores, labels, label_smoothing=self.config.label_smoothing)
        if self.teacher is None:
            return loss
        with torch.no_grad(), self.autocast():
            said = logits(self.teacher(images)).to(self.dtype)
        return self.config.distill * divergence(scores, said) + (1 - self.config.distill) * loss

    def exchange(self, loss: Tensor) -> Tensor:
        """With several processes: mean gradients for all, and the mean loss; one that is asked to stop stops all after
        the same step."""
        if not self.ranks.several:
            self.stopping = self.stop()
            return loss
        own = torch.stack([loss, torch.full_like(loss, float(self.stop())), self.right.to(loss)])
        (loss, stopping, right), self.sent_bytes = average(self.parameters.values(), own, self.ranks)
        self.stopping, self.right = bool(stopping > 0), right * self.ranks.count
        return loss

    @property
    def settled(self) -> bool:
        """Whether the selection stands, at the last widths."""
        return not self.explorer.explores_at(self.step) and self.execution.widths == self.execution.final

    def phase(self, step: int) -> str:
        """What a step is for, in one word."""
        if self.explorer.explores_at(step):
            return "exploring"
        return (
            "narrow"
            if self.config.grow and step < self.execution.growth_step
            else "settled"
            if self.explorer.steps
            else self.config.policy
        )

    def compile(self, note: Callable[[str], None]) -> dict[str, float | bool | str] | None:
        """With --compile, compile the forward pass if the remaining steps pay for it; returns what the trial
        measured."""
        if not self.config.compile:
            return None
        x, _ = next(iter(self.data.train_batches(self.config.batch_size, self.config.seed, 0)))
        x = x.to(self.device, memory_format=torch.channels_last)
        forward, facts = try_compiling(
            self.model, x, autocast=self.autocast, steps_left=self.steps - self.step, note=note
        )
        self.forward = forward or self.forward
        return facts

    # -- checkpoint ----------------------------------------------------------------------------------------------------

    def save(self, run: RunDirectory, history: History) -> None:
        """Write everything that is needed to go on, and how often each arm was picked; see `checkpoint.save`."""
        checkpoint.save(self, run, history)

    def restore(
        self, run: RunDirectory, *, override: bool = False, note: Callable[[str], None] = lambda _: None
    ) -> History:
        """Go on where the run's newest whole checkpoint was; see `checkpoint.restore`."""
        return checkpoint.restore(self, run, override=override, note=note)


def trace_images(network: nn.Module, example: Tensor) -> ChannelGraph:
    """As `trace`, for commands whose option --image-size sets the example."""
    try:
        return trace(network, example)
    except ModelFails as error:
        raise DynpruneError(
            f"{error} Its height and width are set with --image-size, such as --image-size 96 or 96x64."
        ) from error
