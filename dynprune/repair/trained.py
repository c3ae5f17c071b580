"""The whole way: a trained network and some images in, a compact network out.

    moments of every layer ─▶ order of arms ─▶ widths by a bandit ─▶ cut ─▶ repair ─▶ tuning for some seconds

Each step is a file of this room. Takes modules and tensors; knows no settings and no files.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from dynprune.budgets.allocation import CostModel, constraints_for
from dynprune.budgets.limits import Budget, Limit, parse_limit
from dynprune.data.scores import logits
from dynprune.errors import DynpruneError
from dynprune.repair.calibration import calibrate
from dynprune.repair.choice import orders
from dynprune.repair.distill import RATE, Lesson, learning, of_labels, tune
from dynprune.repair.examples import Reader, count_of, endless, joined, moved, part_of
from dynprune.repair.refit import ROUNDS, Targets, repair, targets_of
from dynprune.repair.says import SCORES, Said, Says, are_scores, distance_between, what_says
from dynprune.repair.scores import refit_scores, scores_layer
from dynprune.repair.shares import WHOLE, Share
from dynprune.repair.widths import Found, Moves, search
from dynprune.state.copies import copied
from dynprune.structure import calling
from dynprune.structure.channels import ChannelGraph, Selection
from dynprune.structure.labels import tensors_in
from dynprune.structure.record import AxisKey
from dynprune.structure.surgery import slim
from dynprune.structure.tracing import first_line

FEWEST = 32  # images without which nothing can be calibrated
PULL_SCALE = 0.25  # of the places that a repair within the search looks at
PULL_ROUNDS = 2  # of the regression behind a rectifier, there
COARSE = 0.01  # a distance that bfloat16 tells well enough: it was never more than 0.0005 off
ACTIVATIONS = 2**31  # bytes that the examples of one call may take where its activations are largest
RATE_OF_VALUES = 0.003  # peak learning rate where only outputs that are no class scores are learned from
LOSS_WEIGHT = 0.5  # of what the untouched network says, beside a loss of the user's own


@dataclass
class Images:
    """Examples, as arguments of calls, that no other shares. moments: calls for calibration. repair: for the final
    repair; pull: the part of them that the search uses. judge: by which distances are measured. listed: see
    `Reader.listed`. share: which part of all examples these are."""

    moments: list[tuple]
    repair: tuple
    pull: tuple
    judge: tuple
    listed: bool = False
    share: Share = WHOLE

    @property
    def few(self) -> tuple:
        return part_of(self.judge, 0, 2, self.listed)


class Compaction:
    """One trained network, calibrated once, to be cut at any widths."""

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        images: Images,
        *,
        says: Says = SCORES,
        choice: str = "repairable",
        seed: int = 0,
        bfloat16: bool = False,
    ):
        """model: in eval mode; it stays as it is. says: what of its answers matters. bfloat16: whether the search
        measures class scores in it."""
        self.model, self.graph, self.images, self.says, self.seed = model, graph, images, says, seed
        self.bfloat16 = self.coarse = bfloat16 and says.scores
        self.pulled: dict[tuple[tuple[str, int], ...], float] = {}
        share, few = images.share, images.few
        self.calibration = calibrate(model, images.moments, says, few=few, listed=images.listed, seed=seed, share=share)
        self.orders = orders(model, graph, self.calibration, choice, seed)
        self.calibration.moments.clear()  # the largest thing there is, and of no more use
        self.targets = targets_of(model, images.repair, few=few, seed=seed, share=share, thorough=True)
        self.quick = targets_of(model, images.pull, few=few, seed=seed, scale=PULL_SCALE, share=share)
        self.head = scores_layer(model, few) if says.scores else None
        self.said = self.what(model, images.judge)
        if self.head:
            repair = images.repair
            self.fitted = [*images.moments, *(part_of(repair, at, at + 128) for at in range(0, count_of(repair), 128))]
            self.taught = torch.cat([self.what(model, part)[0] for part in self.fitted])

    @torch.no_grad()
    def what(self, model: nn.Module, inputs: tuple) -> Said:
        said, _ = self.says.of(model, lambda model: calling.call(model, inputs))
        return [value.float() for value in said]

    def selection(self, widths: dict[str, int]) -> Selection:
        return {name: self.orders[name].kept(width) for name, width in widths.items()}

    def cut(self, widths: dict[str, int]) -> nn.Module:
        """A copy with these widths, as cut."""
        return slim(self.model, self.graph.kept(self.selection(widths))).eval()

    def repaired(self, widths: dict[str, int], targets: Targets | None = None, rounds: int = ROUNDS) -> nn.Module:
        """A copy with these widths, refitted; with `targets` in a hurry, as the search does."""
        narrow = self.cut(widths)
        kept = self.graph.kept(self.selection(widths))
        if targets:
            repair(narrow, kept, targets, rounds=rounds)
        else:
            self.repair(narrow, kept)
        return narrow

    def repair(self, narrow: nn.Module, kept: Mapping[AxisKey, np.ndarray]) -> None:
        """Refit a network that holds the `kept` positions, which is in eval mode, in place."""
        repair(narrow, kept, self.targets)
        if self.head:
            refit_scores(narrow, self.head, self.fitted, self.taught, self.images.share)

    def distance(self, narrow: nn.Module) -> float:
        """How far what a network says is from what the untouched one says."""
        said = self.what(narrow, self.images.judge)
        return distance_between(said, self.said, self.images.share, scores=self.says.scores)

    def pull(self, widths: dict[str, int]) -> float:
        """The distance of a copy with these widths, repaired in a hurry; measured once."""
        key = tuple(sorted(widths.items()))
        if key not in self.pulled:
            self.pulled[key] = self.distance_in_a_hurry(widths)
        return self.pulled[key]

    def distance_in_a_hurry(self, widths: dict[str, int]) -> float:
        """Measuring it would be half of a pull."""
        narrow = self.repaired(widths, self.quick, rounds=PULL_ROUNDS)
        if self.coarse:
            with torch.autocast(self.said[0].device.type, torch.bfloat16):
                far = self.distance(narrow)
            if far >= COARSE:
                return far
            self.coarse = False  # or all that follows, which is near too, would be measured twice
        return self.distance(narrow)

    def worth(self, cost: CostModel, bounds: list[tuple[Limit, float]], widths: dict[str, int]) -> np.ndarray:
        """The logarithm of what one more arm of each group is expected to be worth for what it costs, (groups,)."""
        own = np.array([widths[name] for name in cost.names], dtype=np.int64)
        price = sum(cost.slopes(limit.quantity, own) / bound for limit, bound in bounds)
        loss = [
            self.orders[name].losses[max(0, len(self.orders[name].losses) - widths[name] - 1)] for name in cost.names
        ]
        worth = np.log(np.maximum(loss, 1e-30)) - np.log(np.maximum(price, 1e-30))
        return worth - worth.mean()

    def find_widths(
        self,
        start: dict[str, int],
        budget: Budget,
        seconds: float,
        *,
        cost: CostModel | None = None,
        policy: str = "bandit",
        report: Callable[[float, float, int], None] = lambda *_: None,
    ) -> Found:
        """Better widths than `start` within the budget; see `widths.search`."""
        self.coarse = self.bfloat16
        cost = cost or CostModel(self.graph)
        bounds = [(limit, limit.value(cost.dense(limit.quantity))) for limit in map(parse_limit, budget.limits)]
        in_ms = any(limit.quantity == "latency" for limit, _ in bounds)  # which says itself what a width costs
        fine = budget if in_ms or budget.align != "auto" else replace(budget, align="fine")
        moves = Moves(cost, bounds, constraints_for(self.graph, fine))
        worth = self.worth(cost, bounds, start)
        return search(
            start,
            moves,
            self.pull,
            seconds=seconds,
            policy=policy,
            worth=worth,
            seed=self.seed,
            report=report,
            clock=self.images.share.clock(self.said[0].device),
        )


@dataclass
class Compacted:
    """A compact network made from a trained one. model: in eval mode. selection: the arms that it kept; with `graph`
    what `dynprune.save` takes. distance: from the untouched network after repair and before tuning, on images that
    nothing was fitted to; distance_at_start: of the widths that the search began with. left: layers that were not
    refitted, and why. seconds: by phase."""

    model: nn.Module
    graph: ChannelGraph
    selection: Selection
    widths: dict[str, int]
    macs: int
    params: int
    distance: float
    distance_at_start: float
    pulls: int
    tune_steps: int
    left: dict[str, str]
    seconds: dict[str, float]


def compact_module(
    model: nn.Module,
    graph: ChannelGraph,
    reader: Reader,
    batches: Iterable,
    budget: Budget,
    start: dict[str, int],
    cost: CostModel,
    *,
    accepts: Callable[[dict[str, int]], bool],
    loss: Callable[[nn.Module, Any], Tensor] | None,
    images: int,
    search_seconds: float,
    policy: str,
    choice: str,
    tune_seconds: float,
    tune_lr: float | None,
    bfloat16: Callable[[bool], bool],
    seed: int,
    report: Callable[[str], None],
    share: Share = WHOLE,
    together: Callable[[nn.Module], AbstractContextManager[Callable[[], object]]] = lambda _: nullcontext(lambda: None),
) -> Compacted:
    """The whole way for a module and batches of the user's own; see `dynprune.compact`.

    start: widths within the budget. accepts: whether other widths really are, once they are measured. bfloat16: whether
    to tune in it, where class scores are all that matters and where not. share: of several processes, each with batches
    of its own. together: around tuning in them; gives what makes their gradients equal.
    """
    seconds: dict[str, float] = {}
    refuse_not_finite(model)
    model = copied(model).eval().to(memory_format=torch.channels_last)  # rows of positions are what is read
    device = next(model.parameters()).device
    began = time.perf_counter()
    report("collecting examples")
    taken = collect(model, reader, batches, -(-4 * images // share.count), device)
    taken.count = share.least(taken.count, device)
    if share.count * taken.count < FEWEST or taken.count < 4:
        among = f" to the process that had fewest of {share.count}" if share.count > 1 else ""
        raise DynpruneError(
            f"data gave {taken.count} images{among}. Expected at least {FEWEST}; a few hundred are better."
        )
    refuse_loss(loss, model, taken)
    report(f"calibrating on {share.count * taken.count} examples")
    sample = replace(taken.shared_out(), share=share)
    few = sample.few
    says = SCORES if taken.labels is not None else what_says(model, graph, lambda own: calling.call(own, few))
    half = bfloat16(says.scores)
    compaction = Compaction(model, graph, sample, says=says, choice=choice, seed=seed, bfloat16=half)
    refuse_labels(taken.labels, compaction.said[0])
    seconds["calibrate"], began = time.perf_counter() - began, time.perf_counter()
    at_start = compaction.pull(start)
    found = Found(start, at_start, [(0.0, at_start)])
    if policy != "none" and search_seconds and graph.groups:
        report(f"searching widths for {search_seconds:g} s")
        found = compaction.find_widths(start, budget, search_seconds, cost=cost, policy=policy)
        if not accepts(found.widths):
            found = Found(start, at_start, found.curve)
    seconds["search"], began = time.perf_counter() - began, time.perf_counter()
    report("cutting and repairing")
    narrow = compaction.repaired(found.widths)
    distance, steps = compaction.distance(narrow), 0
    seconds["repair"], began = time.perf_counter() - began, time.perf_counter()
    if tune_seconds:
        report(f"tuning for {tune_seconds:g} s")
        again = endless(batches, device, lambda: taken.batches)
        lesson = lesson_of(model, graph, reader, says, loss, taken)
        with trainable(narrow), together(narrow) as average:
            most = RATE if says.scores or loss else RATE_OF_VALUES
            half = bfloat16(says.scores and loss is None)
            clock = share.clock(device)
            steps = tune(
                narrow, lesson, again, tune_seconds, lr=tune_lr, most=most, bfloat16=half, clock=clock, average=average
            )
    seconds["tune"] = time.perf_counter() - began
    return Compacted(
        narrow.to(memory_format=torch.contiguous_format),
        graph,
        compaction.selection(found.widths),
        found.widths,
        graph.macs(found.widths),
        graph.params(found.widths),
        distance,
        at_start,
        len(found.curve) - 1,
        steps,
        compaction.targets.left | compaction.calibration.left,
        seconds,
    )


def lesson_of(
    model: nn.Module,
    graph: ChannelGraph,
    reader: Reader,
    says: Says,
    loss: Callable[[nn.Module, Any], Tensor] | None,
    taken: Taken,
) -> Lesson:
    """What tuning teaches: the user's loss, or the labels, beside what the untouched network says."""
    if loss is None:

        def run(own: nn.Module, batch: Any) -> object:
            return calling.call(own, reader(batch))

        if not says.scores:
            return Lesson(model, run, says, whole=False)
        return Lesson(model, run, says, lambda output, batch: of_labels(logits(output), reader.labels(batch)))
    teacher, batch = learning(model), taken.batches[0]
    says = what_says(teacher, graph, lambda own: loss(own, batch), scores=says.scores)
    return Lesson(teacher, loss, says, lambda output, _batch: cast(Tensor, output), LOSS_WEIGHT, scaled=True)


@contextmanager
def trainable(model: nn.Module) -> Iterator[None]:
    """Inside, a network in which nothing is to be trained, as one that was loaded to be used, is trained as a whole."""
    parameters = [value for value in model.parameters() if value.is_floating_point()]
    stiff = not any(value.requires_grad for value in parameters)
    for value in parameters if stiff else ():
        value.requires_grad_(True)
    try:
        yield
    finally:
        for value in parameters if stiff else ():
            value.requires_grad_(False)
            value.grad = None


def refuse_not_finite(model: nn.Module) -> None:
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.is_floating_point() and not value.isfinite().all():
            raise DynpruneError(f"{name} holds numbers that are not finite. Expected trained weights.")


def refuse_labels(labels: Tensor | None, said: Tensor) -> None:
    """Labels that are no classes of the network's."""
    if labels is not None and are_scores(said) and len(labels) and not 0 <= int(labels.max()) < said.shape[1]:
        raise DynpruneError(
            f"data gave the label {int(labels.max())}, and the network has {said.shape[1]} classes. Expected labels "
            f"from 0 to {said.shape[1] - 1}, or images alone."
        )


def refuse_loss(loss: Callable[[nn.Module, Any], Tensor] | None, model: nn.Module, taken: Taken) -> None:
    """A loss that cannot be trained on: it is called once, on a copy."""
    if loss is None:
        return
    trial = learning(copied(model))
    with trainable(trial):
        try:
            value = loss(trial, taken.batches[0])
        except Exception as error:
            raise DynpruneError(
                f"loss(model, batch) failed on the first batch ({type(error).__name__}: {first_line(error)[:200]}). "
                "Expected a function of the model, which is in train mode, and a batch as data gives it."
            ) from error
    if not isinstance(value, Tensor) or value.numel() != 1:
        came = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise DynpruneError(
            f"loss(model, batch) gave {came}. Expected one number, as a tensor that is a mean over examples."
        )
    if not value.requires_grad:
        raise DynpruneError("loss(model, batch) has no gradient. Expected one computed by the model that it is given.")
    if not math.isfinite(float(value.detach())):
        raise DynpruneError(
            f"loss(model, batch) is {float(value.detach())} on the first batch of data. Expected a number."
        )


@dataclass
class Taken:
    """Examples from the user's batches. most: that one call may hold. batches: as they came, so many as were needed;
    only the first where they can be had again. labels: of classes, where there are any."""

    inputs: tuple
    count: int
    listed: bool
    most: int
    batches: list
    labels: Tensor | None

    def shared_out(self) -> Images:
        """A quarter for calibration, a quarter to judge by, the rest for repair."""
        quarter = min(self.count // 4, self.most)
        rest = min(self.count - 2 * quarter, self.most)
        calls = max(16, min(128, self.most))

        def part(start: int, stop: int) -> tuple:
            return part_of(self.inputs, start, stop, self.listed)

        moments = [part(at, min(quarter, at + calls)) for at in range(0, quarter, calls)]
        pull = max(16, min(256, rest // 2))
        return Images(
            moments,
            part(quarter, quarter + rest),
            part(quarter, quarter + pull),
            part(quarter + rest, 2 * quarter + rest),
            self.listed,
        )


def collect(model: nn.Module, reader: Reader, batches: Iterable, wanted: int, device: torch.device) -> Taken:
    """The first examples, as one call's inputs; fewer where their activations would take more than a bound.

    model: in eval mode, on the device.
    """
    one = part_of(moved(reader.example, device), 0, 1, reader.listed(reader.example))
    most = max(16, int(ACTIVATIONS // activation_bytes(model, one)))
    wanted = min(wanted, 4 * most)
    parts: list[tuple] = []
    kept: list = []
    labels: list[Tensor] = []
    count, listed, once = 0, False, isinstance(batches, Iterator)
    for batch in batches:
        inputs = moved(reader(batch), device)
        listed = reader.listed(inputs)
        parts.append(inputs)
        if once or not kept:
            kept.append(moved(batch, device))
        own = reader.labels(batch)
        labels += [] if own is None else [own]
        count += count_of(inputs, listed)
        if count >= wanted:
            break
    if not parts:
        return Taken((), 0, False, most, [], None)
    count = min(count, wanted)
    whole = part_of(joined(parts, listed), 0, count, listed)
    return Taken(whole, count, listed, most, kept, torch.cat(labels) if labels else None)


@torch.no_grad()
def activation_bytes(model: nn.Module, example: tuple) -> int:
    """Bytes of one image's four largest activations: about what is there at once. example: arguments of a call with
    one."""
    sizes: list[int] = []

    def note(_module: nn.Module, _inputs: tuple, output: object) -> None:
        sizes.append(sum(value.numel() * value.element_size() for value in tensors_in(output)))

    hooks = [module.register_forward_hook(note) for module in model.modules() if not list(module.children())]
    try:
        calling.call(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    return max(1, sum(sorted(sizes)[-4:]))
