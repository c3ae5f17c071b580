"""The training loop: steps (`session.py`), epochs, validation, checkpoints, progress.

Takes a TrainConfig and a run directory, trains the narrow model that the policy chooses, and leaves a checkpoint from which
`compact` makes a file. The steps cost what the narrow model costs; the full-width parameters rest in the reservoir.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from dynprune.config import TrainConfig
from dynprune.data import load_data
from dynprune.errors import DynpruneError
from dynprune.runs import Run
from dynprune.scores import evaluate
from dynprune.session import History, Session, learning_rate, lost

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


def train(config: TrainConfig, run: Run, *, resume: bool = False, report: Callable[[Progress], None] = lambda _: None,
          note: Callable[[str], None] = lambda _: None, stop: Callable[[], bool] = lambda: False, session: Session | None = None) -> TrainResult:
    """Train from the start, or on from the checkpoint with `resume`. `stop` is asked after every step; when it says so, the
    state is saved and DynpruneError tells how to go on."""
    session = session or Session(config, load_data(config))
    history = session.restore(run) if resume else History()
    with torch.random.fork_rng(), threads(config.threads):
        started, first_step, val_accuracy, seconds_before = time.perf_counter(), session.step, None, history.seconds
        compiled = session.compile(note) if config.compile else None
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


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
