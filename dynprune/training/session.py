"""Everything that one training run holds, and one step of it: select, forward, loss, backward, step, reward.

Takes a TrainConfig and data, builds the full-width network, its channel graph, the widths that meet the budget, the
reservoir with its active model, the bandits and the optimizer. A checkpoint is this, written down.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynprune import zoo
from dynprune.budgets.fit import Fit, Fitter, Latency
from dynprune.budgets.latency import Report, silent
from dynprune.data.loading import Data
from dynprune.data.scores import exact_scores, fitting, logits
from dynprune.errors import DynpruneError, ModelFails
from dynprune.execution.explore import Explorer
from dynprune.execution.reservoir import Reservoir, scale_for_narrow_fan_in, silence
from dynprune.execution.saliency import magnitude, prepare
from dynprune.files.disk import write_text
from dynprune.runs.config import TrainConfig
from dynprune.runs.directory import Run
from dynprune.state.tensors import carry_over, fill, in_precision, state_of
from dynprune.state.tensors import check_facts as check_state
from dynprune.structure.channels import ChannelGraph, Selection
from dynprune.structure.numbers import parse_number
from dynprune.structure.tracing import first_line, trace
from dynprune.training.compiling import try_compiling
from dynprune.training.distributed import ALONE, Ranks, agree, average, share_norms
from dynprune.zoo.weights import load_weights

NARROW = 0.5  # share of the budgeted multiplications at which training begins with --grow
# a training step multiplies about three times as often as a forward pass: forward, and backward to inputs and to
# weights
PASSES = 3


@dataclass
class History:
    """What a resumed run must know of the time before: seconds so far, those spent waiting for data, and the current
    epoch's losses (their sum and number)."""

    seconds: float = 0.0
    waited_s: float = 0.0
    loss_sum: float = 0.0
    loss_steps: int = 0

    def start_epoch(self) -> None:
        self.loss_sum, self.loss_steps = 0.0, 0


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
    ):
        """fit: the widths to begin with, where they are known already; else they are found, which `report` follows.
        full: the network, with its weights, in place of the one that the settings name."""
        self.config, self.ranks = config.resolved(len(data.train), ranks.count), ranks
        config = self.config
        self.part = ranks.part(config.batch_size)
        self.stop: Callable[[], bool] = lambda: False
        self.stopping, self.sent_bytes = False, 0
        self.device = choose_device(config.device, ranks.local)
        self.bfloat16 = use_bfloat16(config.precision, self.device)
        self.steps_per_epoch = data.steps_per_epoch(config.batch_size)
        self.steps = self.steps_per_epoch * config.epochs
        self.step = 0
        self.dtype = torch.float64 if config.precision == "float64" else torch.float32
        given, self.weights_from = full is not None, ""
        full = in_precision(
            full if given else zoo.build(config.model, len(data.classes), config.seed, size=data.size), self.dtype
        )
        self.data = data = fitting(full, data)
        if config.weights and not given:
            self.weights_from = load_weights(full, Path(config.weights))
        example = data.example.to(self.dtype)
        self.graph = trace_images(full, example)
        self.fitter = Fitter(full, self.graph, example, config.allowed, report)
        if fit is not None and not fits(fit, self.graph):
            raise DynpruneError(
                f"The run's widths are not those of {config.model}. Resume with the run's own settings."
            )
        self.fit = self.first_fit = fit or self.find_widths()
        if not (config.weights or given):
            scale_for_narrow_fan_in(full, self.graph, self.fit.widths)
        self.widths = self.fitter.narrower(self.fit.widths, NARROW) if config.grow else self.fit.widths
        trained = (
            magnitude(dict(full.named_parameters()), self.graph)
            if (config.weights or given) and not config.paper
            else None
        )
        self.explorer = Explorer(config.exploration, self.graph, self.widths, self.steps, trained)
        self.growth_step = min(self.steps - 1, max(round(config.grow * self.steps), self.explorer.steps))
        self.train_macs = self.growth_step * self.macs + (self.steps - self.growth_step) * self.graph.macs(
            self.fit.widths
        )
        self.train_macs *= PASSES * config.batch_size
        self.install(self.new_reservoir(full, self.explorer.first()))

    def find_widths(self, loss: np.ndarray | None = None) -> Fit:
        """Widths that meet the budgets. Milliseconds are measured by the first process alone."""
        if self.policy == "dense":
            return Fit(self.graph.full_widths)
        if not (self.ranks.several and self.fitter.in_ms):
            return self.fitter.fit(loss)
        found = self.fitter.fit(loss) if self.ranks.first else Fit(self.graph.full_widths)
        return dataclasses.replace(
            found, widths=dict(zip(found.widths, agree(list(found.widths.values()), self.ranks, self.device)))
        )

    def new_reservoir(self, full: nn.Module, selection: Selection, template: Selection | None = None) -> Reservoir:
        store_device = "cpu" if self.config.reservoir == "cpu" else self.device
        return Reservoir(full, self.graph, selection, template, device=self.device, store_device=store_device)

    def install(self, reservoir: Reservoir) -> None:
        self.reservoir, self.widths = reservoir, reservoir.widths
        self.model = self.forward = reservoir.active
        if self.ranks.several:
            share_norms(self.model, self.ranks)
        self.parameters = dict(self.model.named_parameters())
        self.optimizer = make_optimizer(self.config, self.model, self.device)
        reservoir.attach(self.optimizer)
        shapes = {name: parameter.shape for name, parameter in self.parameters.items()}
        places = {name: reservoir.places[name] for name in self.widths}
        self.ledger = prepare(shapes, places, {name: self.graph.groups[name].made for name in places}, self.device)

    @property
    def policy(self) -> str:
        return self.config.policy

    @property
    def macs(self) -> int:
        return self.graph.macs(self.widths)

    # -- one step ---------------------------------------------------------------------------------------------------

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16) if self.bfloat16 else contextlib.nullcontext()

    def train_step(self, images: Tensor, labels: Tensor) -> Tensor:
        """One step: select, forward, loss, backward, step, reward. Returns the loss, still on the device.

        images, labels: this process's part of the batch. Afterwards `stopping` says whether any process was asked to
        stop.
        """
        if self.explorer.changes_at(self.step):
            self.explorer.count(self.reservoir.slots)
            self.explorer.end_round(self.reservoir.slots)
            if self.step == self.explorer.reallocation_step:
                self.reallocate()
            else:
                self.reservoir.swap(self.explorer.select(self.step))
        if self.step >= self.growth_step and self.widths != self.fit.widths:
            self.grow()
        set_learning_rate(self.optimizer, learning_rate(self.config, self.step, self.steps))
        if self.device.type == "cuda":
            images, labels = images.pin_memory(), labels.pin_memory()
        images, labels = (
            images.to(self.device, self.dtype, memory_format=torch.channels_last, non_blocking=True),
            labels.to(self.device, non_blocking=True),
        )
        with self.autocast():
            output = self.forward(images)
        loss = F.cross_entropy(logits(output).to(self.dtype), labels, label_smoothing=self.config.label_smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        loss = self.exchange(loss.detach())
        if self.explorer.explores_at(self.step):
            self.explorer.reward(self.parameters, self.ledger)
        self.optimizer.step()
        self.explorer.uncounted += 1
        self.step += 1
        return loss

    def exchange(self, loss: Tensor) -> Tensor:
        """With several processes: mean gradients for all, and the mean loss; one that is asked to stop stops all after
        the same step."""
        if not self.ranks.several:
            self.stopping = self.stop()
            return loss
        own = torch.stack([loss, torch.full_like(loss, float(self.stop()))])
        (loss, stopping), self.sent_bytes = average(self.parameters.values(), own, self.ranks)
        self.stopping = bool(stopping > 0)
        return loss

    def reallocate(self) -> None:
        """Give every group the width that its arms turned out to be worth, and rebuild the active model. Momentum
        starts at zero."""
        self.reservoir.write_back()
        self.fitter.full = self.reservoir.full
        self.fit = self.find_widths(self.explorer.loss_per_arm())
        self.explorer.change_widths(self.fit.widths)
        self.install(self.new_reservoir(self.reservoir.full, self.explorer.select(self.step)))
        self.model.train()

    def grow(self) -> None:
        """Widen every layer to its width. What the network computes stays the same; momentum starts at zero."""
        self.explorer.count(self.reservoir.slots)
        self.reservoir.write_back()
        slots, full = self.reservoir.slots, self.reservoir.full
        selection = self.explorer.more(self.step, slots, self.fit.widths)
        silence(full, self.graph, {name: np.setdiff1d(arms, slots[name]) for name, arms in selection.items()})
        self.explorer.change_widths(self.fit.widths)
        self.install(self.new_reservoir(full, selection))
        self.model.train()

    def phase(self, step: int) -> str:
        """What a step is for, in one word."""
        if self.explorer.explores_at(step):
            return "exploring"
        return (
            "narrow"
            if self.config.grow and step < self.growth_step
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

    # -- checkpoint -------------------------------------------------------------------------------------------------

    def save(self, run: Run, history: History) -> None:
        """Write everything that is needed to go on, and how often each arm was picked. Weights that are not finite are
        refused, so that they never replace a good checkpoint."""
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.parameters.values()):
            raise lost(self, run, self.step, math.nan)
        self.explorer.count(self.reservoir.slots)
        own, state = state_of(up_to_date(self.reservoir))
        tensors = {f"full.{name}": value for name, value in own.items()}
        tensors |= {f"explorer.{name}": value for name, value in self.explorer.state().items()}
        tensors |= {f"slots.{name}": torch.from_numpy(arms) for name, arms in self.reservoir.slots.items()}
        tensors |= {f"template.{name}": torch.from_numpy(arms) for name, arms in self.reservoir.template.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{key}.{name}"] = value
        scores = exact_scores(self.model, self.data.example).reshape(-1).tolist() if self.step == self.steps else []
        facts = {
            "kind": "checkpoint",
            "history": asdict(history),
            "step": self.step,
            "scores": scores,
            "steps": self.steps,
            "classes": self.data.classes,
            "size": self.data.size,
            "state": state,
            "mean": self.data.mean,
            "std": self.data.std,
            "fit": asdict(self.fit),
            "first_fit": asdict(self.first_fit),
        }
        run.write_checkpoint(tensors, facts)
        picks = {
            name: {
                "width": self.widths[name],
                "steps_executed": counts.tolist(),
                "chosen": sorted(self.reservoir.slots[name].tolist()),
            }
            for name, counts in self.explorer.executed.items()
        }
        write_text(run.path / "selections.json", json.dumps({"steps": self.step, "groups": picks}))

    def restore(self, run: Run, *, override: bool = False, note: Callable[[str], None] = lambda _: None) -> History:
        """Go on where the run's newest whole checkpoint was. override: its number of steps may differ from what the
        settings give now."""
        tensors, facts = run.read_checkpoint(note, aside=self.ranks.first)
        if not all(
            isinstance(facts.get(key), kind)
            for key, kind in (("step", int), ("steps", int), ("classes", list), ("history", dict))
        ):
            raise DynpruneError(
                f"{run.checkpoint_file} lacks a header entry. Expected a checkpoint written by dynprune train."
            )
        if facts["classes"] != self.data.classes or not override and facts["steps"] != self.steps:
            raise DynpruneError(
                f"{run.checkpoint_file} was made with {facts['steps']} steps and "
                f"{len(facts['classes'])} classes; the settings and data now give {self.steps} and "
                f"{len(self.data.classes)}. Use the same data and settings to resume."
            )
        if not 0 <= facts["step"] <= self.steps:
            raise DynpruneError(
                f"{run.path} is at step {facts['step']}, outside the {self.steps} that the settings "
                f"now give. Choose more --epochs."
            )
        try:
            self.step = facts["step"]
            slots, template = slots_in(tensors, facts, self.reservoir.full, self.graph)
            self.fit = fit_in(facts, "fit")
            if not fits(self.fit, self.graph):
                raise ValueError("widths of other groups, or of more arms than there are")
            if any(len(arms) > self.fit.widths[name] for name, arms in slots.items()):
                raise ValueError("more arms than the widths allow")
            self.explorer.change_widths({name: len(arms) for name, arms in slots.items()})
            self.explorer.load_state(part(tensors, "explorer."))
            self.install(self.new_reservoir(self.reservoir.full, slots, template))
            self.restore_optimizer(tensors, must_fit=not override)
            history = History(**facts["history"])
            if not all(
                isinstance(value, int | float) and not isinstance(value, bool) for value in asdict(history).values()
            ):
                raise ValueError("a history of other types")
        except (KeyError, TypeError, ValueError, RuntimeError, AssertionError) as error:
            raise DynpruneError(
                f"{run.checkpoint_file} does not fit these settings ({first_line(error)[:200]}). "
                f"Resume with the run's own settings and data."
            ) from error
        run.keep_metrics_until(self.step)
        return history

    def restore_optimizer(self, tensors: Mapping[str, Tensor], *, must_fit: bool) -> None:
        """Momentum and the like. Without `must_fit`, what does not fit starts anew."""
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state[parameter].items():
                saved = tensors.get(f"optimizer.{key}.{name}")
                if saved is not None and saved.shape == value.shape:
                    value.copy_(saved)
                elif must_fit:
                    raise ValueError(f"no state of the optimizer for {name}")


def fits(fit: Fit, graph: ChannelGraph) -> bool:
    """Whether these are widths that the network can have."""
    return fit.widths.keys() == graph.groups.keys() and all(fit.widths[group.name] <= group.arms for group in graph)


def fit_in(facts: dict, name: str) -> Fit:
    """The widths that a checkpoint's header holds under "fit" or, those to begin with, "first_fit"."""
    try:
        entry = facts[name]
        latency = entry["latency"] and Latency(**entry["latency"])
        assert all(isinstance(width, int) and width > 0 for width in entry["widths"].values())
        return Fit(entry["widths"], latency, entry["candidates"])
    except (KeyError, TypeError, AttributeError, AssertionError) as error:
        raise DynpruneError(
            f'The checkpoint\'s header has no valid entry "{name}". Expected a checkpoint written by '
            f"this version of dynprune train."
        ) from error


def slots_in(
    tensors: dict[str, Tensor], facts: Mapping, full: nn.Module, graph: ChannelGraph
) -> tuple[Selection, Selection]:
    """Fill `full` from a checkpoint's tensors and header; returns its slots and their template."""
    try:
        fill_full(full, tensors, facts)
        slots, template = (
            {group.name: arms_in(tensors[f"{kind}.{group.name}"], group.arms) for group in graph}
            for kind in ("slots", "template")
        )
        if any(len(slots[name]) != len(template[name]) or (np.diff(template[name]) <= 0).any() for name in slots):
            raise ValueError("slots and their template disagree")
    except (RuntimeError, LookupError, AttributeError, TypeError, ValueError) as error:
        raise DynpruneError(
            f"The checkpoint does not belong to this model ({first_line(error)}). Use the run's own settings."
        ) from error
    return slots, template


def fill_full(full: nn.Module, tensors: dict[str, Tensor], facts: Mapping) -> None:
    """Give the full-width network the state that a checkpoint's tensors and header hold."""
    if facts["schema"] == 1:
        full.load_state_dict(part(tensors, "full."))
    else:
        fill(full, part(tensors, "full."), check_state(facts.get("state")))


def arms_in(tensor: Tensor, count: int) -> np.ndarray:
    """Arm numbers, each at most once. Raises ValueError for anything else."""
    arms = tensor.numpy() if tensor.dtype == torch.int64 and tensor.ndim == 1 else np.array([-1])
    if not len(arms) or arms.min() < 0 or arms.max() >= count or len(np.unique(arms)) != len(arms):
        raise ValueError("arms that do not exist")
    return arms


def trace_images(network: nn.Module, example: Tensor) -> ChannelGraph:
    """As `trace`, for commands whose option --image-size sets the example."""
    try:
        return trace(network, example)
    except ModelFails as error:
        raise DynpruneError(
            f"{error} Its height and width are set with --image-size, such as --image-size 96 or 96x64."
        ) from error


def up_to_date(reservoir: Reservoir) -> nn.Module:
    """The full-width network with all that training changed in the active one: parameters, statistics, attributes."""
    reservoir.write_back()
    carry_over(
        reservoir.active,
        reservoir.full,
        sizes={parse_number(name)[0].path for name, dim in reservoir.graph.axes if dim < 0},
    )
    return reservoir.full


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def lost(session: Session, run: Run, step: int, loss: float) -> DynpruneError:
    kept = (
        f"The last good checkpoint is in {run.path}"
        if run.checkpoint_file.exists()
        else "No checkpoint had been written yet"
    )
    return DynpruneError(
        f"The loss became {loss:g} at step {step} of {session.steps}. {kept}. "
        f"Try a lower --lr than {session.config.lr:g}, a longer --warmup, or --precision float32."
    )


# -- settings to objects ----------------------------------------------------------------------------------------------


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device that a setting names; without a number, each process of a machine takes its own GPU."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        device = torch.device("cuda", local_rank) if device.type == "cuda" and device.index is None else device
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise DynpruneError(
            f'--device got "{name}", which is not usable here ({first_line(error)}). Try --device cpu.'
        ) from error
    return device


def use_bfloat16(precision: str, device: torch.device) -> bool:
    """auto: where the processor has bfloat16 instructions. Elsewhere autocast would be slower than float32."""
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and any(
        getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )


def make_optimizer(config: TrainConfig, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer of the recipe, in its fused form: one kernel for all parameters."""
    fused = device.type in ("cpu", "cuda") and not any(parameter.is_complex() for parameter in model.parameters())
    if config.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), config.lr, weight_decay=config.weight_decay, fused=fused)
    return torch.optim.SGD(
        model.parameters(),
        config.lr,
        config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.momentum > 0,
        fused=fused,
    )


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Linear warm-up to the peak, then the schedule down to zero at the last step."""
    warmup = round(config.warmup * steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return (
        config.lr
        * {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[config.schedule]
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
