"""From a trained network to a compact file, without a run: calibrate, find widths, cut, repair, tune, prove, write.

Takes the settings, builds the network with its weights, and hands modules and tensors to the room `repair`. Validation
images choose (they measure distances from the untouched network, without their labels), training images calibrate and
tune, test images are only reported.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dynprune import zoo
from dynprune.budgets.fit import Fit, Fitter, budgets_met, first_missed
from dynprune.budgets.limits import Budget, parse_limit
from dynprune.data.loading import Data, load_data, some
from dynprune.data.scores import evaluate, fitting, logits
from dynprune.deploy.compact import TOLERANCE, largest_difference
from dynprune.deploy.export import check_classes
from dynprune.errors import DynpruneError
from dynprune.files import artifact
from dynprune.files.disk import kind_of
from dynprune.listener import SILENT, Listener
from dynprune.repair.distill import Lesson, Memory, of_labels, tune
from dynprune.repair.images import enough, sample_images
from dynprune.repair.nested import Nested
from dynprune.repair.shares import Share
from dynprune.repair.trained import FEWEST, Compaction
from dynprune.repair.widths import Found
from dynprune.runs.config import CompactConfig, seconds_in
from dynprune.runs.directory import CompactRun
from dynprune.state.copies import copied
from dynprune.state.tensors import named_tensors, paths_of
from dynprune.structure.channels import ChannelGraph
from dynprune.structure.record import AxisKey
from dynprune.structure.surgery import composed, slim
from dynprune.structure.tracing import exact_part, masked
from dynprune.training.begin import searched
from dynprune.training.distributed import ALONE, Ranks, learning_together, meet
from dynprune.training.recipe import choose_device, use_bfloat16
from dynprune.training.session import trace_images
from dynprune.training.train import threads
from dynprune.zoo.weights import load_trained

CHECKED = 2000  # images with which it is seen whether the untouched network knows its classes at all


@dataclass(frozen=True)
class TrainedResult:
    """Accuracies on the test images: of the untouched network, of the compact one after repair, and as written.
    distance: of the compact network from the untouched one on validation images before tuning, in nats;
    distance_at_start: of the widths that the search began with. seconds: by phase. left: layers that were not refitted,
    and why. curve: seconds and least distance after every pull of the search."""

    run: str
    path: str
    macs: int
    params: int
    size_bytes: int
    dense_macs: int
    dense_params: int
    dense_size_bytes: int
    budgets: list[dict]
    accuracy_before: float
    accuracy_repaired: float
    accuracy: float
    test_data: str
    distance_at_start: float
    distance: float
    pulls: int
    curve: list[tuple[float, float]]
    tune_steps: int
    max_rel_diff: float
    mixed_groups: list[str]
    left: dict[str, str]
    seconds: dict[str, float]
    widths: dict[str, int]


class Timer:
    """Seconds by phase, told as they begin."""

    def __init__(self, listener: Listener):
        self.listener, self.phase, self.began = listener, "", 0.0
        self.seconds: dict[str, float] = {}

    def __call__(self, phase: str, words: str) -> None:
        self.end()
        self.phase, self.began = phase, time.perf_counter()
        self.listener.note(words)

    def end(self) -> dict[str, float]:
        if self.phase:
            self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + time.perf_counter() - self.began
        self.phase = ""
        return self.seconds


@dataclass
class Bench:
    """A trained network, calibrated once, ready to be cut at any budget. before: its accuracy on the test images, nan
    in processes that do not test."""

    config: CompactConfig
    data: Data
    full: nn.Module
    device: torch.device
    graph: ChannelGraph
    cut_before: Mapping[AxisKey, np.ndarray]
    fitter: Fitter
    fit: Fit
    compaction: Compaction
    before: float
    ranks: Ranks = ALONE


def prepare(config: CompactConfig, timer: Timer, listener: Listener, ranks: Ranks = ALONE) -> Bench:
    """Read, check and calibrate. Raises DynpruneError for weights, data and budgets that make no sense before anything
    is computed."""
    timer("load", "loading images and weights")
    data = load_data(config.source)
    full, data, cut_before = trained_network(config, data)
    refuse_few(data, config)
    device = choose_device(config.device, ranks.local)
    graph = trace_images(full, data.example)
    fitter = Fitter(full, graph, data.example, config.allowed, listener.work)
    fit = fitter.fit()
    full = full.to(device).eval()
    before = check_knows_classes(full, data, device, listener) if ranks.first else math.nan
    count = config.images or enough(graph.macs({}))
    timer("calibrate", f"calibrating on {min(count, len(data.train) // 2)} training images")
    images = sample_images(full, data, count, config.seed, device, Share(ranks.rank, ranks.count))
    half = use_bfloat16(config.precision, device)
    compaction = Compaction(full, graph, images, choice=config.arms, seed=config.seed, bfloat16=half)
    return Bench(config, data, full, device, graph, cut_before, fitter, fit, compaction, before, ranks)


def compact_trained(
    config: CompactConfig, run_path: Path, *, overwrite: bool = False, listener: Listener = SILENT, ranks: Ranks = ALONE
) -> TrainedResult | None:
    """Write a run directory with compact.safetensors. Of several processes each calls this; the first one alone proves,
    tests and writes, the others get None."""
    refuse_shared(config.allowed, ranks, config.max_drop)
    if ranks.first:
        CompactRun.refuse_existing(run_path, overwrite)
    timer = Timer(listener)
    with threads(config.threads), torch.random.fork_rng():
        torch.manual_seed(config.seed)
        bench = prepare(config, timer, listener, ranks)
        if config.max_drop:
            bench = within_drop(bench, timer, listener)
        return cut_and_write(bench, run_path, timer, overwrite=overwrite, listener=listener)


def cut_and_write(
    bench: Bench, run_path: Path, timer: Timer, *, overwrite: bool, listener: Listener
) -> TrainedResult | None:
    """Find widths for the bench's budget, cut, repair, tune, prove and write; see `compact_trained`."""
    config, ranks = bench.config, bench.ranks
    found = find_widths(bench, seconds_in(config.search_time), timer, listener)
    timer("repair", "cutting and repairing")
    difference, unproven = prove_cut(bench, found.widths) if ranks.first else (0.0, [])
    narrow = made(bench, found.widths)
    distance = bench.compaction.distance(narrow)
    repaired = evaluate(narrow, bench.data, bench.data.test, bench.device) if ranks.first else math.nan
    before = copied(narrow) if ranks.first and seconds_in(config.tune) else None
    steps = tuned(bench, narrow, timer, listener)
    farther = bench.compaction.distance(narrow) if steps else distance
    if not ranks.first:
        meet(ranks)
        return None
    if before is not None:
        narrow, steps = better_of(bench, (before, distance), (narrow, farther), steps, listener)
    timer("write", "writing, and proving that what was written is what was made")
    told = dict(
        accuracy_before=bench.before,
        accuracy_repaired=repaired,
        distance=distance,
        tune_steps=steps,
        max_rel_diff=difference,
        mixed_groups=unproven,
    )
    written = write(CompactRun.create(run_path, config, overwrite), bench, narrow.cpu(), found, told, timer)
    meet(ranks)
    return written


def refuse_shared(budget: Budget, ranks: Ranks, max_drop: float = 0.0) -> None:
    """What several processes cannot decide together: each would measure other times, or other answers."""
    in_ms = any(parse_limit(text).quantity == "latency" for text in budget.limits)
    if ranks.several and (max_drop or in_ms):
        raise DynpruneError(
            "Several processes share a --budget in macs or params. Start compact without torchrun for --max-drop and "
            "for milliseconds."
        )


def made(bench: Bench, widths: dict[str, int]) -> nn.Module:
    """The network of these widths, repaired unless that is switched off."""
    return bench.compaction.cut(widths) if bench.config.no_repair else bench.compaction.repaired(widths)


def tuned(bench: Bench, narrow: nn.Module, timer: Timer, listener: Listener) -> int:
    """Let the narrow network learn from the untouched one for as long as the settings say. Returns the steps. Two
    networks of which one lies in the other learn in the same steps."""
    config, seconds = bench.config, seconds_in(bench.config.tune)
    if not seconds:
        return 0
    timer("tune", f"tuning for {config.tune}")
    both = isinstance(narrow, Nested)  # and each is to say what the untouched network says

    def run(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
        said = logits(model(batch[0]))
        return torch.cat([said, said]) if both and model is not narrow else said

    def of_batch(output: object, batch: Sequence[Tensor]) -> Tensor | None:
        return of_labels(logits(output), torch.cat([batch[1], batch[1]]) if both else batch[1])

    once = bench.data.augment == "none" and not both
    with learning_together(narrow, bench.ranks) as equal_gradients:
        return tune(
            narrow,
            Lesson(bench.full, run, own=of_batch, memory=Memory(len(bench.data.train)) if once else None),
            endless(bench.data, config, bench.device, bench.ranks),
            seconds,
            lr=config.tune_lr,
            bfloat16=use_bfloat16(config.precision, bench.device),
            report=lambda now, loss, step: listener.detail(f"tuning: {now:.0f} of {seconds:.0f} s, loss {loss:.3f}"),
            clock=bench.compaction.images.share.clock(bench.device),
            average=equal_gradients,
            settle=narrow.settle if isinstance(narrow, Nested) else lambda: None,
        )


JUDGED = 2000  # validation images that say whether tuning has helped
DOUBT = 2.0  # standard errors of a difference beyond which it is not chance


def better_of(
    bench: Bench, repaired: tuple[nn.Module, float], tuned: tuple[nn.Module, float], steps: int, listener: Listener
) -> tuple[nn.Module, int]:
    """The tuned network with its steps, or the one before, with none, where validation images say that too few steps
    have done harm. repaired, tuned: the two, each with its distance from the untouched network.

    Accuracy decides where it moves by more than chance would move it; else which of the two says more nearly what the
    untouched network says: that tells apart what accuracy does not.
    """
    (before, far), (after, farther) = repaired, tuned
    data = dataclasses.replace(bench.data, val=some(bench.data.val, JUDGED))
    was, now = (right_answers(model, data, bench.device).float() for model in (before, after))
    gained = now - was
    gain, chance = float(gained.mean()), DOUBT * float(gained.std(correction=0)) / math.sqrt(len(gained))
    if gain > chance or gain >= -chance and farther <= far:
        return after, steps
    listener.say(
        f"{steps} steps of tuning left {100 * float(now.mean()):.2f} % right on {len(now)} validation images, where "
        f"{100 * float(was.mean()):.2f} % were before, at a distance of {farther:.3f} from the untouched network, "
        f"where it was {far:.3f} before: the network stays as it was repaired. Give --tune more time, or 0."
    )
    return before, 0


# -- a bound on what is lost, in place of a budget ---------------------------------------------------------------------

DROP_STEPS = 6  # networks that are tried at most; as a rule three are enough
AIMED, NEAR_ENOUGH = 0.9, 0.8  # share of the drop that is aimed at, and from which on nothing smaller is looked for
STEEPER = 1.5  # a network loses much as this power of the logarithm of its budget: measured on four, 0.9 to 2.4
CLOSEST = 1.05  # ratio of two budgets between which nothing is looked for
FEW_FIRST = 1000  # images after which a drop that is far too large is told


def within_drop(bench: Bench, timer: Timer, listener: Listener) -> Bench:
    """The bench with the smallest budget in multiply-accumulates whose repaired network, before any tuning, loses at
    most --max-drop points on the validation images.

    What is lost is counted with one standard error of the difference, since other images will differ. The next budget
    is where a curve between what the nearest two lost says.
    """
    bound = bench.config.max_drop / 100
    timer("max-drop", f"looking for the smallest network that loses at most {bench.config.max_drop:g} points")
    right = right_answers(bench.full, bench.data, bench.device)
    cost, allowed = bench.fitter.cost, bench.fitter.allowed
    smallest = cost.cost("macs", allowed.smallest) / cost.dense("macs")
    low, high, best = (smallest, math.nan), (1.0, 0.0), None
    for _ in range(DROP_STEPS):
        share = between(low, high, AIMED * bound)
        trial = with_budget(bench, share, best)
        found = find_widths(trial, seconds_in(bench.config.search_time) / DROP_STEPS, None, listener)
        lost, error = lost_by(made(trial, found.widths), right, trial, bound)
        listener.detail(f"{share:.3f} of the MACs loses {100 * lost:.2f} points on validation images")
        drop = lost + error
        if drop <= bound:
            best, high = dataclasses.replace(trial, fit=Fit(found.widths)), (share, drop)
        else:
            low = share, drop
        if NEAR_ENOUGH * bound <= drop <= bound or high[0] < CLOSEST * low[0]:
            break
    if best is None:
        raise DynpruneError(
            f"--max-drop {bench.config.max_drop:g} is not met at {low[0]:.3f} of the MACs, the most that was tried, "
            "before tuning. Allow a larger drop, or give a --budget and some time to --tune."
        )
    return best


def between(low: tuple[float, float], high: tuple[float, float], aimed: float) -> float:
    """The share to try next, between two shares and what each loses (nan: not known)."""
    if math.isnan(low[1]):
        return max(math.sqrt(low[0] * high[0]), high[0] / 2)
    least, most, wanted = (max(0.0, lost) ** (1 / STEEPER) for lost in (high[1], low[1], aimed))
    place = min(0.85, max(0.15, (wanted - least) / max(most - least, 1e-9)))
    return high[0] * (low[0] / high[0]) ** place


def with_budget(bench: Bench, share: float, wider: Bench | None = None) -> Bench:
    """The same network and calibration at another share of the multiply-accumulates. wider: a bench of good widths at a
    larger share; where the same widths in proportion are nearer than those of the allocation, they are the start."""
    config = dataclasses.replace(bench.config, budget=(f"macs={share:.4f}",))
    fitter = Fitter(bench.full, bench.graph, bench.data.example, config.allowed)
    fit = fitter.fit()
    if wider and config.search != "none":
        bound, macs = parse_limit(config.budget[0]).value(fitter.cost.dense("macs")), bench.graph.macs
        own = fitter.narrower(wider.fit.widths, bound / macs(wider.fit.widths))
        if macs(own) <= bound and min((fit.widths, own), key=bench.compaction.pull) is own:
            fit = Fit(own)
    return dataclasses.replace(bench, config=config, fitter=fitter, fit=fit)


def lost_by(model: nn.Module, right: Tensor, bench: Bench, bound: float) -> tuple[float, float]:
    """Share of the validation images that a network gets wrong and the untouched one right, less those that it alone
    gets right, and the standard error of that. Of fewer images where they leave no doubt that it is above `bound`."""
    lost, mean, error = torch.zeros(0), 0.0, 0.0
    for own in right_by_batch(model, bench.data, bench.device):
        lost = torch.cat([lost, right[len(lost) : len(lost) + len(own)].float() - own.float()])
        mean, error = float(lost.mean()), float(lost.std()) / math.sqrt(len(lost))
        if len(lost) >= FEW_FIRST and mean - DOUBT * error > bound:
            break
    return mean, error


def right_answers(model: nn.Module, data: Data, device: torch.device) -> Tensor:
    """For every validation image, whether its class is predicted right."""
    return torch.cat(list(right_by_batch(model, data, device)))


def right_by_batch(model: nn.Module, data: Data, device: torch.device) -> Iterator[Tensor]:
    for images, labels in data.eval_batches(data.val):
        with torch.no_grad():
            scores = logits(model(images.to(device, memory_format=torch.channels_last)))
        yield scores.argmax(1).cpu() == labels


# -- the steps ---------------------------------------------------------------------------------------------------------


def trained_network(config: CompactConfig, data: Data) -> tuple[nn.Module, Data, Mapping[AxisKey, np.ndarray]]:
    """The network with its weights, the data as it takes them, and what was cut from it before: a compact file can be
    compacted again."""
    if not config.weights:
        raise DynpruneError(
            "compact without a run needs a trained network. Pass its --weights (a checkpoint file, or a name such as "
            "pretrained), or a run directory of dynprune train."
        )
    full = zoo.build(config.model, len(data.classes), config.seed, size=data.size)
    cut_before: Mapping[AxisKey, np.ndarray] = {}
    if kind_of(Path(config.weights)) == "compact":
        full, facts = artifact.load_with_facts(Path(config.weights), full)
        if facts.model not in ("", config.model):
            raise DynpruneError(f'{config.weights} is of "{facts.model}". Pass --model {facts.model}.')
        check_classes(Path(config.weights), facts, data.classes)
        data = dataclasses.replace(data, mean=tuple(facts.mean), std=tuple(facts.std))
        return full, fitting(full, data), artifact.kept_of(facts)
    data = fitting(full, data)
    loaded = load_trained(full, config.model, config.weights, len(data.classes), data.size)
    if loaded.anew:
        raise DynpruneError(
            f"--weights {config.weights} {loaded.words.removeprefix('weights ')}, and {config.data} has "
            f"{len(data.classes)}, so there is nothing to keep yet. Train it first: dynprune train "
            f"--model {config.model} --weights {config.weights} --data {config.data}"
        )
    return full, data, cut_before


def refuse_few(data: Data, config: CompactConfig) -> None:
    if len(data.train) < FEWEST:
        raise DynpruneError(
            f"{config.data} has {len(data.train)} training images. Expected at least {FEWEST} to calibrate with; a few "
            "hundred are better."
        )


def check_knows_classes(full: nn.Module, data: Data, device: torch.device, listener: Listener) -> float:
    """The untouched network's test accuracy. Warns where it does no better than chance on some validation images."""
    seen = evaluate(full, data, some(data.val, CHECKED), device)
    chance = 1 / len(data.classes)
    if seen < chance + 2 * math.sqrt(chance * (1 - chance) / min(CHECKED, len(data.val))):
        listener.say(
            f"warning: the untouched network is right for {100 * seen:.1f} % of the validation images, which is "
            "chance. Are these its classes, in their order, and its normalisation and image size?"
        )
    return evaluate(full, data, data.test, device)


def find_widths(bench: Bench, seconds: float, timer: Timer | None, listener: Listener) -> Found:
    """The widths of the allocation, or better ones that were searched for."""
    compaction, config = bench.compaction, bench.config
    start = compaction.pull(bench.fit.widths)
    if config.search == "none" or not compaction.graph.groups:
        return Found(bench.fit.widths, start, [(0.0, start)])
    if timer:
        timer("search", f"searching widths for {config.search_time}")
    return searched(
        compaction,
        bench.fitter,
        bench.fit,
        config.allowed,
        seconds,
        policy=config.search,
        report=lambda now, best, pulls: listener.detail(
            f"widths: {now:.0f} of {seconds:.0f} s, {pulls} tried, distance {start:.3f} to {best:.3f}"
        ),
    )[1]


def prove_cut(bench: Bench, widths: dict[str, int]) -> tuple[float, list[str]]:
    """Largest difference between the cut network and the untouched one in which the removed arms are hidden, before
    repair; and the groups of which that cannot be said."""
    graph, selection = bench.graph, bench.compaction.selection(widths)
    proven = exact_part(graph, selection)
    own = copied(bench.full).cpu()
    difference = largest_difference(masked(own, graph, proven), slim(own, graph.kept(proven)), bench.data)
    if not difference < TOLERANCE:
        raise DynpruneError(
            f"The cut network differs from the untouched one with hidden channels by {difference:.1e} of the largest "
            f"output, more than {TOLERANCE:g}. Nothing was written. Please report the model's name."
        )
    return difference, sorted(set(selection) - set(proven))


def endless(
    data: Data, config: CompactConfig, device: torch.device, ranks: Ranks = ALONE
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Augmented training batches, epoch after epoch, with the rows of their images among the training images; of
    several processes, each one's part."""
    batch, epoch = min(128, max(8, len(data.train) // 8)), 0
    batch = max(2, batch // ranks.count) * ranks.count
    while True:
        rows = data.order(batch, config.seed, epoch).view(-1, batch)[:, ranks.part(batch)]
        batches = data.train_batches(batch, config.seed, epoch, part=ranks.part(batch))
        for own, (images, labels) in zip(rows, batches, strict=True):
            yield images.to(device, memory_format=torch.channels_last), labels.to(device), own
        epoch += 1


def write(run: CompactRun, bench: Bench, narrow: nn.Module, found: Found, told: dict, timer: Timer) -> TrainedResult:
    """Save the file, read it back as a stranger would, and measure that. narrow: on the CPU."""
    config, data, graph, full = bench.config, bench.data, bench.graph, bench.full.cpu()
    latency = bench.fitter.time(found.widths, narrow) if bench.fitter.in_ms else None
    met = budgets_met(graph, config.budget, found.widths, latency)
    if missed := first_missed(met):
        raise DynpruneError(
            f"The compact network costs {missed['actual']:.4g}, above the budget {missed['budget']} "
            f"({missed['limit']:.4g}). Nothing was written. If that is a time, try again when the machine is quiet, or "
            "with a smaller budget."
        )
    accuracy = evaluate(narrow, data, data.test)
    kept = composed(bench.cut_before, graph.kept(bench.compaction.selection(found.widths)))
    facts = artifact.Facts(
        asdict(config),
        data.classes,
        list(data.size),
        list(data.mean),
        list(data.std),
        artifact.kept_as_json(kept),
        found.widths,
        graph.macs(found.widths),
        graph.params(found.widths),
        graph.macs({}),
        graph.params({}),
        accuracy,
        resize=asdict(data.preprocess.resize),
        white=data.depth.white,
    )
    artifact.save(run.compact_file, narrow, facts, within=paths_of(full))
    loaded = artifact.load(run.compact_file, zoo.build(config.model, len(data.classes), size=data.size))
    if not largest_difference(narrow, loaded, data) < TOLERANCE:
        run.compact_file.unlink()
        raise DynpruneError(
            "The compact file, read back, gives other outputs than the network that was saved. It was not kept. Please "
            "report the model's name."
        )
    result = TrainedResult(
        run=str(run.path),
        path=str(run.compact_file),
        macs=facts.macs,
        params=sum(p.numel() for p in loaded.parameters()),
        size_bytes=run.compact_file.stat().st_size,
        dense_macs=facts.dense_macs,
        dense_params=sum(p.numel() for p in full.parameters()),
        dense_size_bytes=sum(t.numel() * t.element_size() for t in named_tensors(full).values()),
        budgets=met,
        accuracy=accuracy,
        test_data=data.reports,
        distance_at_start=found.curve[0][1],
        pulls=len(found.curve) - 1,
        curve=found.curve,
        left=bench.compaction.targets.left | bench.compaction.calibration.left,
        seconds=timer.end(),
        widths=found.widths,
        **told,
    )
    run.record("compact", asdict(result))
    return result
