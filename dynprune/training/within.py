"""What fits into a time: how many steps, of how many images, at which rate, growing or not.

Takes a session that has not begun and the time that is left, makes a few steps of copies, and lays the session out
anew. What the settings give stays; while it trains, the session's clock moves the end (`pace.py`).
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from itertools import count, islice
from statistics import fmean, median

import numpy as np
import torch
from torch import nn

from dynprune.data.scores import evaluate, logits
from dynprune.errors import DynpruneError
from dynprune.execution.dynamic import NARROW
from dynprune.runs.config import TrainConfig, seconds_in
from dynprune.state.copies import copied, same_randomness
from dynprune.training.distributed import agree
from dynprune.training.pace import LEAST, LOOKS, Clock
from dynprune.training.recipe import learning_rate, make_optimizer, set_learning_rate
from dynprune.training.session import Session
from dynprune.training.train import threads
from dynprune.units import duration

STEPS = 500  # with fewer, smaller batches are tried: more steps for as many images
SMALLEST = 16  # images
WORTH = 0.75  # of the seconds of a step, those of one with half of the images: else it sees too few
GROWS = 0.667  # share of the steps that layers are narrow for
PAYS = 0.6  # of the seconds of a step, those of one before layers grow: with less to gain, growing costs accuracy
FEW_EPOCHS = 8  # that fit without growing: with more, what counts is how wide the network is while it learns
SHORT, SHORTEST, LONGEST = 0.025, 30, 100  # a schedule that tries a rate: share of the steps, and bounds
FACTORS, SEARCH = 4, 0.12  # of two, up or down, that rates are tried for; share of the time that this may take
TRIAL = 0.02  # share of the time that trials of one kind of step may take
TRIAL_STEPS = 6
FEWEST = 20  # steps, or a time is too short
FINISHING = 1.0  # seconds for what comes after the last evaluation: files, tables, the end of the process


def fit_into(
    session: Session,
    asked: TrainConfig,
    began: float,
    say: Callable[[str], None] = lambda _: None,
    note: Callable[[str], None] = lambda _: None,
) -> None:
    """Lay out a session that has not begun so that it ends `asked.time` after `began` (of `time.perf_counter`).

    asked: the settings before anything was chosen for them. Raises DynpruneError where the time is over before anything
    could be learned.
    """
    seconds = seconds_in(asked.time)
    with threads(asked.threads), same_randomness(0):
        judging, after = (agreed(own, session) for own in seconds_of_judging(session))
        left = seconds - (time.perf_counter() - began) - after - FINISHING
        left = agreed(left, session)
        config, wide = batch_that_fits(session, asked, left)
        narrow = wide
        if config.grow or asked.may_grow:
            begins = session.fitter.narrower(session.fit.widths, NARROW)
            narrow = seconds_of_step(session, config.batch_size, begins, left)
            few = left / wide < FEW_EPOCHS * session.data.steps_per_epoch(config.batch_size)
            if asked.may_grow and few and narrow < PAYS * wide:
                config = dataclasses.replace(config, grow=GROWS)
            elif not config.grow:
                narrow = wide
        if asked.finds_rate:
            steps = Clock(left, 0, 0, judging, narrow, wide).affords(left, config.grow, session.steps_per_epoch)
            config = rate_that_fits(session, config, steps, left, note)
    clock = Clock(seconds, time.perf_counter() - began, after + FINISHING, judging, narrow, wide, began=began)
    per_epoch = session.data.steps_per_epoch(config.batch_size)
    (steps,) = agree([clock.affords(clock.left(0), config.grow, per_epoch)], session.ranks, session.device)
    if steps < FEWEST:
        needed = clock.before + clock.after + 10 * FEWEST * wide
        raise DynpruneError(
            f"--time {asked.time} is too short: {clock.before:.0f} s were over before the first step, the last takes "
            f"{clock.after:.0f} s more, and each {wide:.2g} s for {config.batch_size} images. Nothing was trained. "
            f"Expected {math.ceil(needed)}s or more."
        )
    clock.every = max(1, steps // LOOKS)
    session.plan_anew(dataclasses.replace(config, epochs=-(-steps // per_epoch)), steps, clock)
    say(
        f"--time {asked.time}: {duration(clock.left(0))} for steps of {1000 * wide:.0f} ms, "
        f"{steps / per_epoch:.1f} epochs in batches of {config.batch_size} at rate {config.lr:g}"
        + (f", the first {config.grow:.0%} narrow, {1000 * narrow:.0f} ms each" if config.grow else "")
    )


def batch_that_fits(session: Session, asked: TrainConfig, left: float) -> tuple[TrainConfig, float]:
    """The settings with batch and rate chosen, and the seconds of a step."""
    batch = session.config.batch_size
    each = seconds_of_step(session, batch, session.fit.widths, left)
    while not asked.batch_size and left / each < STEPS and batch > SMALLEST:
        smaller = seconds_of_step(session, batch // 2, session.fit.widths, left)
        if smaller / each > WORTH:
            break
        batch, each = batch // 2, smaller
    chosen = dataclasses.replace(asked, batch_size=batch)
    return chosen.resolved(len(session.data.train), session.ranks.count), each


def rate_that_fits(
    session: Session,
    config: TrainConfig,
    steps: int,
    left: float = math.inf,
    note: Callable[[str], None] = lambda _: None,
) -> TrainConfig:
    """The settings with the learning rate at whose short schedules the training loss falls lowest.

    From the usual rate it is doubled as long as that helps. A short schedule is a whole one, with warm-up and down to
    zero, and favours low rates: so lower ones are tried only where the usual one learns nothing. The same images come
    in each. Of a run that is too short for them the rate stays. left: seconds, of which trials may take a share.
    """
    length = min(LONGEST, round(SHORT * steps))
    if length < SHORTEST:
        return config
    best = 0
    if session.ranks.first:
        found: dict[int, float] = {}
        began, power, turn = time.perf_counter(), 0, 1
        while abs(power) <= FACTORS and time.perf_counter() - began < SEARCH * left:
            rate = config.lr * 2.0**power
            note(f"trying learning rate {rate:g} for {length} steps")
            found[power] = loss_after(session, dataclasses.replace(config, lr=rate), length)
            if power == 0 and not found[0] < math.log(len(session.data.classes)):
                turn = -1
            if found[power] > found[best] or power and math.isinf(found[power]) and turn > 0:
                break
            best = power
            power += turn
    (best,) = agree([best], session.ranks, session.device)
    return dataclasses.replace(config, lr=config.lr * 2.0**best)


def find_rate(session: Session, note: Callable[[str], None] = lambda _: None) -> None:
    """Give a session that has not begun the rate that fits its number of steps."""
    with threads(session.config.threads), same_randomness(0):
        session.config = rate_that_fits(session, session.config, session.steps, note=note)


def loss_after(session: Session, config: TrainConfig, steps: int) -> float:
    """The training loss at the end of a schedule of so many steps, of a copy; infinite where it was lost."""
    widths = session.fit.widths
    model = trial_model(session, session.fitter.narrower(widths, NARROW) if config.grow else widths)
    optimizer = make_optimizer(config, list(model.parameters()), session.device)
    losses: list[float] = []
    for epoch in count():
        for images, labels in session.data.train_batches(config.batch_size, config.seed, epoch):
            set_learning_rate(optimizer, learning_rate(config, len(losses), steps))
            losses.append(train_once(session, model, optimizer, images, labels))
            if not math.isfinite(losses[-1]):
                return math.inf
            if len(losses) == steps:
                return fmean(losses[-max(1, steps // 5) :])
    raise AssertionError("epochs are endless")


def trial_model(session: Session, widths: dict[str, int]) -> nn.Module:
    """A copy of the network at these widths, to be trained and thrown away."""
    arms = {name: np.arange(width) for name, width in widths.items()}
    return session.execution.new_reservoir(copied(session.reservoir.full), arms).active.train()


def seconds_of_judging(session: Session) -> tuple[float, float]:
    """Of a validation and, after the last step, of the test; from as many images as show it."""
    data, model = session.data, copied(session.model)
    for _ in range(2):  # the first is slower than any other
        began = time.perf_counter()
        some = data.val.take(torch.arange(min(500, len(data.val))))
        evaluate(model, data, some, session.device)
        each = (time.perf_counter() - began) / len(some)
    return each * len(data.val), each * (len(data.val) + len(data.test))


def seconds_of_step(session: Session, batch: int, widths: dict[str, int], left: float) -> float:
    """Of a training step of a copy at these widths, with waiting for its images; the median of a few."""
    model = trial_model(session, widths)
    optimizer = make_optimizer(session.config, list(model.parameters()), session.device)
    part, taken, began = session.ranks.part(batch), [], time.perf_counter()
    batches = session.data.train_batches(batch, session.config.seed, 0, part=part)
    since = began
    for images, labels in islice(batches, TRIAL_STEPS):
        train_once(session, model, optimizer, images, labels)
        taken.append(time.perf_counter() - since)
        since = time.perf_counter()
        if len(taken) > 1 and since - began > TRIAL * left:
            break
    return agreed(median(taken[1:] or taken), session)


def agreed(seconds: float, session: Session) -> float:
    """What the first process measured, in all; to a microsecond."""
    (microseconds,) = agree([round(1e6 * seconds)], session.ranks, session.device)
    return max(LEAST, microseconds / 1e6)


def train_once(
    session: Session, model: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor, labels: torch.Tensor
) -> float:
    """A step as the session makes it, of another network. Returns the loss."""
    images = images.to(session.device, session.dtype, memory_format=torch.channels_last)
    with session.autocast():
        output = model(images)
    loss = session.loss_of(logits(output).to(session.dtype), images, labels.to(session.device))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())  # waits for it
