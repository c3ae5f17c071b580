"""What will a run save? The training step of the dense network, of a thin one, and of dynamic execution, side by side.

Takes a TrainConfig, builds one session per policy on the same data, and runs their steps in turn in one process (dense,
static, dynamic, dense, ...). `static` is the floor: an ordinary network of the same widths. Dynamic execution is timed
at its most expensive, while it explores: rewards at every step, a swap at the end of every round. Peak memory is
measured in a process of its own for each.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from statistics import median

import numpy as np
import torch

from dynprune.budgets.fit import Fit
from dynprune.data.loading import Data, load_data
from dynprune.errors import DynpruneError
from dynprune.machine import environment
from dynprune.runs.config import TrainConfig
from dynprune.training.rehearsal import rehearse_step
from dynprune.training.session import Session
from dynprune.training.train import threads

WARM_UP = 3
FIRST_STEP = 100  # steps of the dynamic session before it is timed, so that its bandit has learned what it swaps by
MEMORY_STEPS = 4
POLICIES = {"dense": "dense", "static": "static", "dynamic": "cucb", "swapping": "cucb"}


@dataclass(frozen=True)
class TrainingBench:
    """Milliseconds per step and peak MiB above an idle process of each policy; see the module's text.

    dynamic_ms: a step of a round of `hold` steps, its swap included in proportion. swapping_ms: with a share
    `swap_share` of the executed arms exchanged at every single step. reservoir_mib: the full-width tensors. overhead:
    milliseconds per step spent on selecting, swapping and rewards (swaps per step, averaged over a round) and on
    waiting for data. samples_ms: raw.
    """

    model: str
    batch_size: int
    image_size: str
    budget: str
    precision: str
    hold: int
    dense_ms: float
    static_ms: float
    dynamic_ms: float
    swapping_ms: float
    dynamic_over_static: float
    swapping_over_static: float
    swap_share: float
    speedup_over_dense: float
    macs_ratio: float
    dense_peak_mib: float | None
    static_peak_mib: float | None
    dynamic_peak_mib: float | None
    reservoir_mib: float
    overhead: dict[str, float]
    samples_ms: dict[str, list[float]]
    environment: dict


def bench_training(
    config: TrainConfig,
    *,
    steps: int = 40,
    swap_share: float = 0.05,
    memory: bool = True,
    report: Callable[[str], None] = lambda _: None,
) -> TrainingBench:
    """Time `steps` steps of each policy. Raises DynpruneError for settings that cannot be trained."""
    if steps < config.hold:
        raise DynpruneError(
            f"--steps got {steps}. Expected at least --hold, {config.hold}, so that a swap is among them."
        )
    report("reading data")
    data = load_data(config.source)
    config = config.resolved(len(data.train))
    with threads(config.threads):
        return compare(config, data, steps, swap_share, memory, report)


def compare(
    config: TrainConfig, data: Data, steps: int, swap_share: float, memory: bool, report: Callable[[str], None]
) -> TrainingBench:
    sessions: dict[str, Session] = {}
    narrow = None  # found once: all but the dense network have the same widths
    for name, policy in POLICIES.items():
        sessions[name] = prepare_session(config, data, policy, None if policy == "dense" else narrow)
        narrow = narrow if policy == "dense" else sessions[name].fit
    data = sessions["dynamic"].data  # in as many colours as the network takes
    if config.compile:
        for session in sessions.values():
            session.compile(report)
    force_swaps(sessions["swapping"], swap_share)
    batches = endless(data, config)
    report(f"the dynamic session's first {FIRST_STEP} steps")
    for batch in islice(batches, FIRST_STEP):
        sessions["dynamic"].train_step(*batch)
    samples: dict[str, list[float]] = {name: [] for name in sessions}
    swap_steps = []
    waited = 0.0
    for i in range(WARM_UP + steps):
        report(f"step {i + 1} of {WARM_UP + steps}, each policy in turn")
        started = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - started
        if i >= WARM_UP and sessions["dynamic"].explorer.changes_at(sessions["dynamic"].step + 1):
            swap_steps.append(i - WARM_UP)
        for name, session in sessions.items():
            elapsed = step_ms(session, *batch)
            if i >= WARM_UP:
                samples[name].append(elapsed)
    hold = sessions["dynamic"].explorer.hold
    medians = {name: median(kept) for name, kept in samples.items()}
    dynamic_ms = per_step_of_a_round(samples["dynamic"], swap_steps, hold)
    overhead = {**breakdown(sessions["dynamic"], batches, hold), "data_ms": 1000 * waited / (WARM_UP + steps)}
    macs = sessions["static"].macs / sessions["static"].graph.macs({})
    reservoir_mib = sessions["dynamic"].reservoir.store_bytes / 2**20
    bfloat16, threads = sessions["dynamic"].bfloat16, torch.get_num_threads()
    del sessions, session
    peaks = {name: peak_mib(config, name, report) if memory else None for name in ("dense", "static", "dynamic")}
    return TrainingBench(
        config.model,
        config.batch_size,
        "x".join(map(str, data.size[1:])),
        " ".join(config.budget),
        "bfloat16" if bfloat16 else "float32",
        hold,
        medians["dense"],
        medians["static"],
        dynamic_ms,
        medians["swapping"],
        dynamic_ms / medians["static"],
        medians["swapping"] / medians["static"],
        swap_share,
        medians["dense"] / dynamic_ms,
        macs,
        peaks["dense"],
        peaks["static"],
        peaks["dynamic"],
        reservoir_mib,
        overhead,
        samples,
        {**environment(), "threads": threads},
    )


def prepare_session(config: TrainConfig, data: Data, policy: str, fit: Fit | None = None) -> Session:
    """A session at the beginning of a long run; dynamic ones explore throughout what is timed."""
    settings = dataclasses.replace(
        config, policy=policy, explore=0.5, grow=0.0, epochs=max(1, 4000 // data.steps_per_epoch(config.batch_size))
    )
    session = Session(settings, data, fit=fit)
    rehearse_step(session)
    session.model.train()
    return session


def force_swaps(session: Session, share: float) -> None:
    """Exchange this share of the executed arms of every group at every step, for others by chance."""
    rng = np.random.default_rng(0)
    owed = dict.fromkeys(session.widths, 0.0)  # small groups exchange an arm every few steps

    def select(step: int) -> dict[str, np.ndarray]:
        selection = {}
        for name, slots in session.reservoir.slots.items():
            others = np.setdiff1d(np.arange(session.graph.groups[name].arms), slots)
            owed[name] += share * len(slots)
            count = min(int(owed[name]), len(others))
            owed[name] -= count
            kept = rng.permutation(slots)[count:]
            selection[name] = np.sort(np.concatenate([kept, rng.permutation(others)[:count]]))
        return selection

    vars(session.explorer).update(select=select, hold=1)


def endless(data: Data, config: TrainConfig):
    epochs = cycle(range(1000))
    while True:
        yield from data.train_batches(config.batch_size, config.seed, next(epochs))


def step_ms(session: Session, images: torch.Tensor, labels: torch.Tensor) -> float:
    """One training step, waited for."""
    started = time.perf_counter()
    session.train_step(images, labels)
    wait_for(session.device)
    return 1000 * (time.perf_counter() - started)


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def per_step_of_a_round(samples: list[float], swap_steps: list[int], hold: int) -> float:
    """Median of the steps with a swap and of those without, weighted as in a round."""
    swaps = [samples[i] for i in swap_steps] or samples
    plain = [value for i, value in enumerate(samples) if i not in swap_steps] or samples
    return (median(swaps) + (hold - 1) * median(plain)) / hold


def breakdown(session: Session, batches, hold: int) -> dict[str, float]:
    """Milliseconds per step of selecting, swapping and rewards, over one more round; each is waited for here."""
    spent = {"select_ms": 0.0, "swap_ms": 0.0, "reward_ms": 0.0}

    def timed(key: str, function: Callable) -> Callable:
        def wrapper(*args):
            wait_for(session.device)
            started = time.perf_counter()
            result = function(*args)
            wait_for(session.device)
            spent[key] += 1000 * (time.perf_counter() - started)
            return result

        return wrapper

    for part, name in ((session.explorer, "select"), (session.reservoir, "swap"), (session.explorer, "reward")):
        setattr(part, name, timed(f"{name}_ms", getattr(part, name)))
    for batch in islice(batches, hold):
        session.train_step(*batch)
    return {key: value / hold for key, value in spent.items()}


# -- memory ------------------------------------------------------------------------------------------------------------


def peak_mib(config: TrainConfig, name: str, report: Callable[[str], None]) -> float | None:
    """Peak memory of training steps in a fresh process, above that process with only the data loaded."""
    report(f"peak memory of {name}, in a process of its own")
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=memory_probe, args=(dataclasses.asdict(config), name, theirs))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError as error:
        raise DynpruneError(
            f"The process that measures the memory of {name} died. Try a smaller --batch-size than {config.batch_size}."
        ) from error
    finally:
        process.join()


def memory_probe(settings: dict, name: str, result) -> None:
    """Child process: train a few steps of the policy and send the peak. The static network gives up its reservoir."""
    config = TrainConfig(**settings)
    data = load_data(config.source)
    batches = endless(data, config)
    batch = next(batches)
    idle = status_mib("VmRSS")
    session = prepare_session(config, data, POLICIES[name])
    session.explorer.hold = 2  # so that a swap is among the steps
    if name != "dynamic":
        del session.reservoir.full
        session.reservoir.spans, session.reservoir.buffers = {}, {}
    if session.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(session.device)
    else:
        reset_peak()
    for _ in range(MEMORY_STEPS):
        session.train_step(*batch)
    wait_for(session.device)
    if session.device.type == "cuda":
        result.send(torch.cuda.max_memory_allocated(session.device) / 2**20)
    else:
        peak = status_mib("VmHWM")
        result.send(None if peak is None or idle is None else peak - idle)


def status_mib(key: str) -> float | None:
    """An entry of the process's own status, in MiB; None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key + ":"))
    except (OSError, StopIteration):
        return None


def reset_peak() -> None:
    """Forget the peak of building the model (Linux); elsewhere it counts."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        pass
