"""The training loop: steps (`session.py`), epochs, validation, checkpoints, progress.

Takes a TrainConfig and a run directory, trains the narrow model that the policy chooses, and leaves a checkpoint from
which `compact` makes a file. The steps cost what the narrow model costs; the full-width parameters rest in the
reservoir.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from dynprune.data.loading import load_data
from dynprune.data.scores import evaluate, judge
from dynprune.errors import DynpruneError, Stopped
from dynprune.runs.config import Recipe, TrainConfig
from dynprune.runs.directory import RunDirectory
from dynprune.runs.logs import Logs
from dynprune.structure.tracing import first_line
from dynprune.training.best import Best
from dynprune.training.checkpoint import History, lost
from dynprune.training.distributed import lost_contact
from dynprune.training.rehearsal import rehearse_step
from dynprune.training.session import Session
from dynprune.training.trainee import Trainee

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
    """accuracy: on the test images, of the model that is kept: the last step's, or that of `kept_epoch` with
    --keep-weights best (None: the last); val_accuracy: on those that choices may use. train_macs: of all steps, forward
    and backward. gradient_bytes: what each process sent per step to be added up with the others', beside what the dense
    model would send."""

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
    train_macs: int
    dense_macs: int
    macs_executed_share: float
    data_wait_share: float
    precision: str
    compiled: dict | None
    processes: int
    gradient_bytes: int
    dense_gradient_bytes: int
    kept_epoch: int | None = None


def train(
    config: Recipe,
    run: RunDirectory,
    *,
    resume: bool = False,
    override: bool = False,
    report: Callable[[Progress], None] = lambda _: None,
    note: Callable[[str], None] = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
    session: Trainee | None = None,
) -> TrainResult:
    """Train from the start, or on from the checkpoint with `resume`. `stop` is asked after every step; when it says so,
    the state is saved and DynpruneError tells how to go on. override: the settings may differ from those of the
    checkpoint.

    With several processes (`session.ranks`) each calls this; the first one alone writes, validates and tests.
    """
    if session is None:
        assert isinstance(config, TrainConfig), "other methods bring their session"
        session = Session(config, load_data(config.source))
    config = session.config
    history = session.restore(run, override=override, note=note) if resume else History()
    session.stop = stop
    rehearse_step(session, note)
    with torch.random.fork_rng(), threads(config.threads), telling_what_is_left(session, run):
        started, first_step, val_accuracy, seconds_before = time.perf_counter(), session.step, None, history.seconds
        compiled = session.compile(note)
        due = Due(config)
        if session.clock is not None:
            session.clock.start(session.step)
        logs = Logs(run, config.log if session.ranks.first else "", session.step)
        best = Best(run, session.step) if session.keeps_best and session.ranks.first else None
        if session.ranks.several and not resume:
            save(session, run, history)  # so that there is something to go on from when a process dies
        while session.step < session.steps:
            epoch, start = divmod(session.step, session.steps_per_epoch)
            meter = EpochMeter(session, history)
            session.model.train()
            batches = timed(session.data.train_batches(config.batch_size, config.seed, epoch, start, session.part))
            with saving_if_data_is_lost(session, run, history, meter):
                for images, labels, waited_s in batches:
                    # dropout depends on the step alone
                    torch.manual_seed(config.seed * 1_000_003 + session.step + (session.ranks.rank << 40))
                    meter.add(session.train_step(images, labels), waited_s)
                    if session.step % LOSS_CHECK_STEPS == 0:
                        meter.check_loss(run)
                        report(progress(session, meter, epoch, started, first_step, None))
                    history.seconds = seconds_before + time.perf_counter() - started
                    if session.clock is not None and session.step % session.clock.every == 0:
                        if session.step < session.steps:
                            session.look(history.seconds)
                    if session.step == session.steps:  # a time may end within an epoch
                        break
                    if session.step % session.steps_per_epoch and (session.stopping or due.now(session.step)):
                        meter.check_loss(run)
                        save(session, run, history)
                        if session.stopping:
                            raise stopped(session, run)
            meter.check_loss(run)
            judged = time.perf_counter()
            val_accuracy = finish_epoch(session, run, meter.line(epoch), logs)
            if best:
                best.look(session, epoch + 1, val_accuracy)
            report(progress(session, meter, epoch, started, first_step, val_accuracy))
            history.start_epoch()
            due.saved = time.monotonic()
            save(session, run, history)
            if session.clock is not None:
                session.clock.judge(time.perf_counter() - judged)
            if session.stopping and session.step < session.steps:
                raise stopped(session, run)
        history.seconds = seconds_before + time.perf_counter() - started
        logs.close()
        if best and best.epoch and best.epoch != last_epoch(session):
            best.bring_back(session)
            val_accuracy = best.accuracy
            save(session, run, history)
        return conclude(session, run, history, val_accuracy, compiled, best.epoch if best and best.epoch else None)


def last_epoch(session: Trainee) -> int:
    """The number of the epoch in which the run ends."""
    return -(-session.steps // session.steps_per_epoch)


def finish_epoch(session: Trainee, run: RunDirectory, line: dict, logs: Logs) -> float:
    """Validate and write the epoch's metrics. Returns the validation accuracy, nan in processes that do not
    validate."""
    if not session.ranks.first:
        return math.nan
    accuracy, loss = judge(session.model, session.data, session.data.val, session.device)
    line = {**line, "val_loss": loss, "val_accuracy": accuracy}
    run.add_metrics(line)
    logs.write(line)
    return accuracy


def save(session: Trainee, run: RunDirectory, history: History) -> None:
    if session.ranks.first:
        session.save(run, history)


def conclude(
    session: Trainee,
    run: RunDirectory,
    history: History,
    val_accuracy: float | None,
    compiled: dict | None,
    kept_epoch: int | None,
) -> TrainResult:
    """Test the model that is kept and record the outcome; only the first of several processes does."""
    config, data, first = session.config, session.data, session.ranks.first
    accuracy = evaluate(session.model, data, data.test, session.device) if first else math.nan
    if val_accuracy is None:  # a finished run was resumed
        val_accuracy = evaluate(session.model, data, data.val, session.device) if first else math.nan
    dense, seconds = session.graph.macs({}), history.seconds
    result = TrainResult(
        str(run.path),
        session.policy,
        accuracy,
        val_accuracy,
        data.reports,
        data.chooses,
        seconds,
        session.steps * config.batch_size / max(seconds, 1e-9),
        session.steps,
        session.macs,
        session.train_macs,
        dense,
        session.macs / dense,
        history.waited_s / max(seconds, 1e-9),
        "bfloat16" if session.bfloat16 else "float32",
        compiled,
        session.ranks.count,
        session.sent_bytes,
        session.dtype.itemsize * session.graph.params({}) if session.ranks.several else 0,
        kept_epoch,
    )
    if first:
        run.record("train", asdict(result))
    return result


@contextlib.contextmanager
def telling_what_is_left(session: Trainee, run: RunDirectory) -> Iterator[None]:
    """Turn what breaks a run from outside into one line that says what is kept and how to go on."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        where, text = f"at step {session.step} of {session.steps}", str(error)
        if lost_contact(error):
            raise DynpruneError(
                f"Lost contact with another process {where} ({first_line(error)[:150]}). {left(run)} "
                f"Start all processes again with --resume."
            ) from error
        if (
            isinstance(error, torch.OutOfMemoryError | MemoryError)
            or "can't allocate memory" in text
            or "not enough memory" in text
        ):
            raise DynpruneError(
                f"Out of memory {where} with --batch-size {session.config.batch_size}. {left(run)} "
                f"Try a smaller --batch-size, a smaller --budget, --precision bfloat16, or "
                f"--reservoir cpu on a GPU."
            ) from error
        raise


class DataLost(Exception):
    """The next batch could not be read; the message says why."""


@contextlib.contextmanager
def saving_if_data_is_lost(session: Trainee, run: RunDirectory, history: History, meter: EpochMeter) -> Iterator[None]:
    """When images vanish or a process that decodes them dies, the last step was whole: keep it."""
    try:
        yield
    except DataLost as error:
        meter.check_loss(run)
        save(session, run, history)
        raise DynpruneError(
            f"{error} The state at step {session.step} of {session.steps} is saved in {run.path}. "
            f"When that is repaired, go on with: dynprune train --resume --out {run.path}"
        ) from error


def left(run: RunDirectory) -> str:
    return (
        f"The last checkpoint is in {run.path}."
        if run.checkpoint_file.exists()
        else "No checkpoint had been written yet."
    )


class Due:
    """Says after which steps a checkpoint is due, by steps or by time."""

    def __init__(self, config: Recipe):
        self.steps, self.seconds = config.checkpoint_interval
        self.saved = time.monotonic()

    def now(self, step: int) -> bool:
        if step % self.steps and time.monotonic() - self.saved < self.seconds:
            return False
        self.saved = time.monotonic()
        return True


class EpochMeter:
    """Losses and times of one epoch; losses stay on the device until they are looked at."""

    def __init__(self, session: Trainee, history: History):
        self.session, self.history, self.waited_s = session, history, 0.0
        self.losses: list[Tensor] = []
        self.right: list[Tensor] = []
        self.unread_step, self.first_step, self.started = session.step, session.step, time.perf_counter()

    @property
    def mean_loss(self) -> float:
        return self.history.loss_sum / max(1, self.history.loss_steps)

    def add(self, loss: Tensor, waited_s: float) -> None:
        self.losses.append(loss)
        self.right.append(self.session.right)
        self.waited_s += waited_s
        self.history.waited_s += waited_s

    def check_loss(self, run: RunDirectory) -> None:
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
        self.history.right += float(torch.stack(self.right).sum())
        self.history.seen += len(losses) * self.session.config.batch_size
        self.unread_step += len(losses)
        self.losses, self.right = [], []

    def line(self, epoch: int) -> dict[str, object]:
        session, seconds = self.session, time.perf_counter() - self.started
        return {
            "epoch": epoch + 1,
            "step": session.step,
            "loss": self.mean_loss,
            "accuracy": self.history.right / max(1, self.history.seen),
            "lr": session.rate(session.step - 1),
            "macs_share": session.macs / session.graph.macs({}),
            "exploring": session.phase(self.first_step) == "exploring",
            "seconds": seconds,
            "images_per_second": (session.step - self.first_step) * session.config.batch_size / seconds,
            "data_wait_share": self.waited_s / seconds,
        }


def stopped(session: Trainee, run: RunDirectory) -> Stopped:
    return Stopped(
        f"Stopped at step {session.step} of {session.steps}. The state is saved in {run.path}. "
        f"Go on with: dynprune train --resume --out {run.path}"
    )


def progress(
    session: Trainee, meter: EpochMeter, epoch: int, started: float, first_step: int, val_accuracy: float | None
) -> Progress:
    per_step = (time.perf_counter() - started) / max(1, session.step - first_step)
    return Progress(
        session.step,
        session.steps,
        epoch + 1,
        last_epoch(session),
        meter.mean_loss,
        val_accuracy,
        session.macs / session.graph.macs({}),
        session.phase(session.step),
        per_step * (session.steps - session.step),
        val_accuracy is not None,
    )


def timed(batches: Iterator) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Each batch with the seconds that were spent waiting for it. Raises DataLost where there should be one and is
    none."""
    while True:
        started = time.perf_counter()
        try:
            batch = next(batches, None)
        except DynpruneError as error:
            raise DataLost(str(error)) from error
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise DataLost(
                f"A process that decodes photos died ({first_line(error)[:150]}); often memory is short, "
                f"then try fewer --workers."
            ) from error
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
