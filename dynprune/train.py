"""The training loop: select, forward, loss, backward, step, reward.

Takes a TrainConfig and a run directory, trains the narrow model that the policy chooses, and leaves a checkpoint from which
`compact` makes a file. The steps cost what the narrow model costs; the full-width parameters rest in the reservoir.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynprune import zoo
from dynprune.budget import widths_for
from dynprune.channels import ChannelGraph, Selection
from dynprune.compiling import try_compiling
from dynprune.config import TrainConfig
from dynprune.data import Data, Images, load_data
from dynprune.errors import DynpruneError
from dynprune.explore import Explorer
from dynprune.reservoir import Reservoir, scale_for_narrow_fan_in
from dynprune.tracing import evaluating, first_line, trace
from dynprune.runs import Run, read_tensors, write_text, write_tensors
from dynprune.saliency import prepare

LOSS_CHECK_STEPS = 10  # how often the loss is looked at: reading it every step would make a GPU wait


@dataclass(frozen=True)
class Progress:
    """What a display shows after a step; `epoch_ended` when the validation accuracy is fresh."""

    step: int
    steps: int
    epoch: int
    epochs: int
    loss: float
    val_accuracy: float | None
    macs_share: float
    phase: str
    seconds_left: float
    epoch_ended: bool


@dataclass(frozen=True)
class TrainResult:
    """accuracy: on the test images, of the last step's model; val_accuracy: on those that choices may use."""

    run: str
    policy: str
    accuracy: float
    val_accuracy: float
    test_data: str
    val_data: str
    seconds: float
    images_per_second: float
    steps: int
    macs: int
    dense_macs: int
    macs_executed_share: float
    data_wait_share: float
    precision: str
    compiled: dict | None


class Session:
    """Everything that one training run holds, built from its configuration or from its checkpoint."""

    def __init__(self, config: TrainConfig, data: Data):
        self.config, self.data = config, data
        self.device = choose_device(config.device)
        self.bfloat16 = use_bfloat16(config.precision, self.device)
        self.steps_per_epoch = data.steps_per_epoch(config.batch_size)
        self.steps = self.steps_per_epoch * config.epochs
        self.step = 0
        full = zoo.build(config.model, len(data.classes), config.seed).float()
        if config.weights:
            zoo.load_weights(full, Path(config.weights))
        check_output(full, data)
        self.graph = trace(full, data.example)
        self.widths = widths_for(self.graph, config)
        if not config.weights:
            scale_for_narrow_fan_in(full, self.graph, self.widths)
        self.explorer = Explorer(config, self.graph, self.widths, self.steps)
        self.install(self.new_reservoir(full, self.explorer.first()))

    def new_reservoir(self, full: nn.Module, selection: Selection, template: Selection | None = None) -> Reservoir:
        store_device = "cpu" if self.config.reservoir == "cpu" else self.device
        return Reservoir(full, self.graph, selection, template, device=self.device, store_device=store_device)

    def install(self, reservoir: Reservoir) -> None:
        self.reservoir, self.widths = reservoir, reservoir.widths
        self.model = self.forward = reservoir.active
        self.parameters = dict(self.model.named_parameters())
        self.optimizer = make_optimizer(self.config, self.model, self.device)
        reservoir.attach(self.optimizer)
        shapes = {name: parameter.shape for name, parameter in self.parameters.items()}
        places = {name: reservoir.places[name] for name in self.widths}
        self.ledger = prepare(shapes, places, {name: self.graph.groups[name].made for name in places}, self.device)

    @property
    def macs(self) -> int:
        return self.graph.macs(self.widths)

    # -- one step ---------------------------------------------------------------------------------------------------

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16) if self.bfloat16 else contextlib.nullcontext()

    def train_step(self, images: Tensor, labels: Tensor) -> Tensor:
        """One step: select, forward, loss, backward, step, reward. Returns the loss, still on the device."""
        if self.explorer.changes_at(self.step):
            self.explorer.count(self.reservoir.slots)
            self.explorer.end_round(self.reservoir.slots)
            self.reservoir.swap(self.explorer.select(self.step))
        set_learning_rate(self.optimizer, learning_rate(self.config, self.step, self.steps))
        if self.device.type == "cuda":
            images, labels = images.pin_memory(), labels.pin_memory()
        images, labels = images.to(self.device, memory_format=torch.channels_last, non_blocking=True), labels.to(self.device, non_blocking=True)
        with self.autocast():
            output = self.forward(images)
        loss = F.cross_entropy(logits(output).float(), labels, label_smoothing=self.config.label_smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.explorer.explores_at(self.step):
            self.explorer.reward(self.parameters, self.ledger)
        self.optimizer.step()
        self.explorer.uncounted += 1
        self.step += 1
        return loss.detach()

    # -- checkpoint -------------------------------------------------------------------------------------------------

    def save(self, run: Run, history: History) -> None:
        """Write everything that is needed to go on, and how often each arm was picked. Weights that are not finite are refused, so
        that they never replace a good checkpoint."""
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.parameters.values()):
            raise lost(self, run, self.step, math.nan)
        self.explorer.count(self.reservoir.slots)
        self.reservoir.write_back()
        tensors = {f"full.{name}": value for name, value in self.reservoir.full.state_dict().items()}
        tensors |= {f"explorer.{name}": value for name, value in self.explorer.state().items()}
        tensors |= {f"slots.{name}": torch.from_numpy(arms) for name, arms in self.reservoir.slots.items()}
        tensors |= {f"template.{name}": torch.from_numpy(arms) for name, arms in self.reservoir.template.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{key}.{name}"] = value
        facts = {"kind": "checkpoint", "history": asdict(history), "step": self.step, "steps": self.steps, "classes": self.data.classes,
                 "side": self.data.side, "mean": self.data.mean, "std": self.data.std}
        write_tensors(run.checkpoint_file, tensors, facts)
        picks = {name: {"width": self.widths[name], "steps_executed": counts.tolist(), "chosen": sorted(self.reservoir.slots[name].tolist())}
                 for name, counts in self.explorer.executed.items()}
        write_text(run.path / "selections.json", json.dumps({"steps": self.step, "groups": picks}))

    def restore(self, run: Run) -> History:
        tensors, facts = read_tensors(run.checkpoint_file, "checkpoint")
        if not all(isinstance(facts.get(key), kind) for key, kind in (("step", int), ("steps", int), ("classes", list), ("history", dict))):
            raise DynpruneError(f"{run.checkpoint_file} lacks a header entry. Expected a checkpoint written by dynprune train.")
        if facts["steps"] != self.steps or facts["classes"] != self.data.classes:
            raise DynpruneError(f"{run.checkpoint_file} was made with {facts['steps']} steps and {len(facts['classes'])} classes; the settings and "
                                f"data now give {self.steps} and {len(self.data.classes)}. Use the same data and settings to resume.")
        self.step = facts["step"]
        slots, template = slots_in(tensors, self.reservoir.full, self.graph)
        self.explorer.load_state(part(tensors, "explorer."))
        self.install(self.new_reservoir(self.reservoir.full, slots, template))
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state[parameter].items():
                value.copy_(tensors[f"optimizer.{key}.{name}"])
        run.keep_metrics_until(self.step)
        return History(**facts["history"])


def slots_in(tensors: dict[str, Tensor], full: nn.Module, graph: ChannelGraph) -> tuple[Selection, Selection]:
    """Fill `full` from a checkpoint's tensors; returns its slots and their template."""
    try:
        full.load_state_dict(part(tensors, "full."))
        slots = {name: tensors[f"slots.{name}"].numpy() for name in graph.groups}
        template = {name: tensors[f"template.{name}"].numpy() for name in graph.groups}
    except (RuntimeError, KeyError) as error:
        raise DynpruneError(f"The checkpoint does not belong to this model ({first_line(error)}). Use the run's own settings.") from error
    return slots, template


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


# -- the run ------------------------------------------------------------------------------------------------------------


def train(config: TrainConfig, run: Run, *, resume: bool = False, report: Callable[[Progress], None] = lambda _: None,
          note: Callable[[str], None] = lambda _: None, stop: Callable[[], bool] = lambda: False, session: Session | None = None) -> TrainResult:
    """Train from the start, or on from the checkpoint with `resume`. `stop` is asked after every step; when it says so, the
    state is saved and DynpruneError tells how to go on."""
    session = session or Session(config, load_data(config))
    history = session.restore(run) if resume else History()
    with torch.random.fork_rng(), threads(config.threads):
        started, first_step, val_accuracy, seconds_before = time.perf_counter(), session.step, None, history.seconds
        compiled = try_compiling(session, note) if config.compile else None
        while session.step < session.steps:
            epoch, start = divmod(session.step, session.steps_per_epoch)
            meter = EpochMeter(session, history)
            session.model.train()
            batches = timed(session.data.train_batches(config.batch_size, config.seed, epoch, start))
            for images, labels, waited_s in batches:
                torch.manual_seed(config.seed * 1_000_003 + session.step)  # dropout depends on the step alone
                meter.add(session.train_step(images, labels), waited_s)
                if session.step % LOSS_CHECK_STEPS == 0:
                    meter.check_loss(run)
                    report(progress(session, meter, epoch, started, first_step, None))
                history.seconds = seconds_before + time.perf_counter() - started
                if stop() and session.step % session.steps_per_epoch:
                    meter.check_loss(run)
                    session.save(run, history)
                    raise stopped(session, run)
            meter.check_loss(run)
            line = meter.line(epoch)
            val_accuracy = evaluate(session.model, session.data, session.data.val, session.device)
            run.add_metrics({**line, "val_accuracy": val_accuracy})
            report(progress(session, meter, epoch, started, first_step, val_accuracy))
            history.start_epoch()
            session.save(run, history)
            if stop() and session.step < session.steps:
                raise stopped(session, run)
        history.seconds = seconds = seconds_before + time.perf_counter() - started
        accuracy = evaluate(session.model, session.data, session.data.test, session.device)
        if val_accuracy is None:  # a finished run was resumed
            val_accuracy = evaluate(session.model, session.data, session.data.val, session.device)
    dense = session.graph.macs({})
    result = TrainResult(
        str(run.path), config.policy, accuracy, val_accuracy, session.data.reports, session.data.chooses, seconds,
        session.steps * config.batch_size / max(seconds, 1e-9), session.steps, session.macs, dense, session.macs / dense,
        history.waited_s / max(seconds, 1e-9), "bfloat16" if session.bfloat16 else "float32", compiled)
    run.record("train", asdict(result))
    return result


@dataclass
class History:
    """What a resumed run must know of the time before: seconds so far, those spent waiting for data, and the current epoch's
    losses (their sum and number)."""

    seconds: float = 0.0
    waited_s: float = 0.0
    loss_sum: float = 0.0
    loss_steps: int = 0

    def start_epoch(self) -> None:
        self.loss_sum, self.loss_steps = 0.0, 0


class EpochMeter:
    """Losses and times of one epoch; losses stay on the device until they are looked at."""

    def __init__(self, session: Session, history: History):
        self.session, self.history, self.losses, self.waited_s = session, history, [], 0.0
        self.unread_step, self.first_step, self.started = session.step, session.step, time.perf_counter()

    @property
    def mean_loss(self) -> float:
        return self.history.loss_sum / max(1, self.history.loss_steps)

    def add(self, loss: Tensor, waited_s: float) -> None:
        self.losses.append(loss)
        self.waited_s += waited_s
        self.history.waited_s += waited_s

    def check_loss(self, run: Run) -> None:
        """Read the losses since the last look; raise when one is not finite, with its step."""
        if not self.losses:
            return
        losses = torch.stack(self.losses).cpu()
        bad = torch.nonzero(~torch.isfinite(losses))
        if len(bad):
            raise lost(self.session, run, self.unread_step + int(bad[0]) + 1, float(losses[bad[0]]))
        for loss in losses.tolist():  # one by one, so that where a run was interrupted does not show
            self.history.loss_sum += loss
        self.history.loss_steps += len(losses)
        self.unread_step += len(losses)
        self.losses = []

    def line(self, epoch: int) -> dict[str, object]:
        session, seconds = self.session, time.perf_counter() - self.started
        return {"epoch": epoch + 1, "step": session.step, "loss": self.mean_loss,
                "lr": learning_rate(session.config, session.step - 1, session.steps),
                "macs_share": session.macs / session.graph.macs({}), "exploring": session.explorer.explores_at(self.first_step),
                "seconds": seconds, "images_per_second": (session.step - self.first_step) * session.config.batch_size / seconds,
                "data_wait_share": self.waited_s / seconds}


def lost(session: Session, run: Run, step: int, loss: float) -> DynpruneError:
    kept = f"The last good checkpoint is in {run.path}" if run.checkpoint_file.exists() else "No checkpoint had been written yet"
    return DynpruneError(f"The loss became {loss:g} at step {step} of {session.steps}. {kept}. "
                         f"Try a lower --lr than {session.config.lr:g}, a longer --warmup, or --precision float32.")


def stopped(session: Session, run: Run) -> DynpruneError:
    return DynpruneError(f"Stopped at step {session.step} of {session.steps}. The state is saved in {run.path}. "
                         f"Go on with: dynprune train --resume --out {run.path}")


def progress(session: Session, meter: EpochMeter, epoch: int, started: float, first_step: int, val_accuracy: float | None) -> Progress:
    per_step = (time.perf_counter() - started) / max(1, session.step - first_step)
    phase = "exploring" if session.explorer.explores_at(session.step) else "settled" if session.explorer.steps else session.config.policy
    return Progress(session.step, session.steps, epoch + 1, session.config.epochs, meter.mean_loss, val_accuracy,
                    session.macs / session.graph.macs({}), phase, per_step * (session.steps - session.step), val_accuracy is not None)


def timed(batches: Iterator) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Each batch with the seconds that were spent waiting for it."""
    while True:
        started = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return
        yield (*batch, time.perf_counter() - started)


@torch.no_grad()
def evaluate(model: nn.Module, data: Data, images: Images, device: torch.device | str = "cpu") -> float:
    """Share of the images whose class is predicted right, in float32. The model's mode is restored."""
    was_training, right = model.training, 0
    model.eval()
    try:
        for batch, labels in data.eval_batches(images):
            batch = batch.to(device, memory_format=torch.channels_last)
            right += int((logits(model(batch)).argmax(1).cpu() == labels).sum())
    finally:
        model.train(was_training)
    return right / len(images)


def logits(output: object) -> Tensor:
    """The class scores of a model that returns a tensor, or a tuple or object with auxiliary outputs behind it."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, (tuple, list)):
        return output[0]
    if hasattr(output, "logits"):
        return output.logits
    raise DynpruneError(f"The model returns {type(output).__name__}. Expected class scores as a tensor, or first in a tuple.")


# -- settings to objects ------------------------------------------------------------------------------------------------


@torch.no_grad()
def check_output(model: nn.Module, data: Data) -> None:
    """Refuse a network whose output cannot be trained on these classes, before the long work starts."""
    with evaluating(model):
        try:
            output = model(data.example)
        except Exception:
            return  # tracing names the layer
    shape = tuple(logits(output).shape)
    if len(shape) != 2 or shape[1] < len(data.classes):
        raise DynpruneError(f"The model gives an output of shape {'x'.join(map(str, shape))} for one image. Expected one score per class: "
                            f"1x{len(data.classes)}. A factory should take num_classes.")


def choose_device(name: str) -> torch.device:
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise DynpruneError(f'--device got "{name}", which is not usable here ({first_line(error)}). Try --device cpu.') from error
    return device


def use_bfloat16(precision: str, device: torch.device) -> bool:
    """auto: where the processor has bfloat16 instructions. Elsewhere autocast would be slower than float32."""
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


def make_optimizer(config: TrainConfig, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer of the recipe, in its fused form: one kernel for all parameters."""
    fused = device.type in ("cpu", "cuda")
    if config.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), config.lr, weight_decay=config.weight_decay, fused=fused)
    return torch.optim.SGD(model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay, nesterov=config.momentum > 0,
                           fused=fused)


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Linear warm-up to the peak, then the schedule down to zero at the last step."""
    warmup = round(config.warmup * steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return config.lr * {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[config.schedule]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
