"""What would a user do instead? Several ways to a network within the budget, trained on the same data, side by side.

Takes the training settings, the policies and the number of seeds; trains every pair in a run directory of its own,
skips what is finished and goes on with what was stopped. Returns every run's accuracy, size and cost, and what they say
about ours.

    cucb         dynamic channel execution: the bandit chooses the channels
    cucb-paper   the same as published, with a new selection at every step
    random       the same schedule, channels chosen by chance
    static       a thin network of the widths that --allocation gives: from scratch or, where --weights gives a trained
                 network, its largest channels
    static-ours  a thin network of the widths that cucb ended with, from scratch
    dense        the whole network
    dense+prune  the whole network for half of the training cost, cut to the budget by Torch-Pruning, trained on for the
                 rest; where --weights gives a trained network, cut at once. dense+prune:importance=hessian has
                 another of its importances: magnitude, taylor, hessian, isomorphic

A policy with other settings is a rival too: `cucb:explore=0.03:hold=40` is cucb with these two changed. That is how a
setting's worth is shown. Where --weights gives a trained network, --epochs 0 shows what each makes of it untrained.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dynprune import zoo
from dynprune.budgets.fit import Fit
from dynprune.budgets.limits import parse_limit
from dynprune.data.loading import Data, load_data
from dynprune.data.scores import evaluate, fitting
from dynprune.deploy.rivals import IMPORTANCES, prune, torch_pruning
from dynprune.errors import DynpruneError, Stopped
from dynprune.files.disk import write_text
from dynprune.machine import environment
from dynprune.runs.config import TrainConfig
from dynprune.runs.directory import Run
from dynprune.structure.channels import ChannelGraph
from dynprune.structure.tracing import first_line, trace
from dynprune.training.checkpoint import fill_full, fit_in
from dynprune.training.rehearsal import rehearse_step
from dynprune.training.scout import scouted
from dynprune.training.session import PASSES, Session
from dynprune.training.train import Progress, train
from dynprune.training.within import fit_into
from dynprune.zoo.weights import load_trained

POLICIES = ("cucb", "cucb-paper", "random", "static", "static-ours", "dense", "dense+prune")
# what rivals share
COMMON = (
    "model",
    "weights",
    "data",
    "data_root",
    "image_size",
    "val_fraction",
    "policy",
    "budget",
    "paper",
    "epochs",
    "batch_size",
    "seed",
)


COMPARISON = "comparison.json"


@dataclass(frozen=True)
class ComparedRun:
    """accuracy: on the test images, of the last step's model. train_macs: of all steps, forward and backward.
    train_seconds: with what came before the first step, such as calibration and repair."""

    policy: str
    seed: int
    accuracy: float
    macs: int
    params: int
    train_macs: int
    train_seconds: float
    epochs: int


@dataclass(frozen=True)
class PolicySummary:
    """spread: standard deviation over the seeds, None with one seed. lead: how far ours (the first policy) is ahead of
    it, in accuracy."""

    policy: str
    seeds: int
    accuracy: float
    spread: float | None
    macs: int
    params: int
    train_macs: float
    train_seconds: float
    lead: float


@dataclass(frozen=True)
class Comparison:
    model: str
    data: str
    budget: str
    equal: str
    test_data: str
    runs: list[ComparedRun]
    policies: list[PolicySummary]
    verdict: str
    plot: str
    environment: dict


def compare(
    config: TrainConfig,
    policies: list[str],
    seeds: int,
    out: Path,
    *,
    equal: str = "images",
    untrained: bool = False,
    report: Callable[[Progress], None] = lambda _: None,
    say: Callable[[str], None] = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
) -> Comparison:
    """Train every policy with every seed in OUT/POLICY-SEED. Raises DynpruneError for a comparison that makes no sense,
    before any training, and Stopped where it is asked to stop; the same call goes on then.

    equal: "images", every policy sees as many images, or "cost", every policy multiplies as often as the first does.
    Where the settings give a time, every policy has that, and chooses what fits into it.
    untrained: compare what each makes of a trained network before any training.
    """
    check(config, policies, seeds, equal, out, untrained)
    found = []
    if any(policy.startswith("dense+prune") for policy in policies):
        torch_pruning()
    for seed in range(config.seed, config.seed + seeds):
        own = dataclasses.replace(config, seed=seed)
        data = load_data(own.source)  # split by the seed, as each run's own settings say
        own = own if own.time else own.resolved(len(data.train))
        data = fitting(zoo.build(own.model, len(data.classes), size=data.size), data)
        reference: ComparedRun | None = None
        for policy in policies:
            length = config.epochs if equal == "images" or reference is None else reference
            try:
                one = Trial(own, policy, out, data, report, stop, untrained).run(length)
            except Stopped as stopped:  # it names train --resume, which knows neither the rivals nor what was cut
                raise Stopped(
                    f"Stopped while {policy}, seed {own.seed}, was trained. Everything so far is kept in {out}: "
                    "give the same command again to go on there."
                ) from stopped
            reference = reference or one
            found.append(one)
            say(
                f"{policy}, seed {one.seed}: {100 * one.accuracy:.2f} % with {one.macs / 1e6:.1f} M MACs, "
                f"{one.params / 1e6:.2f} M parameters, {one.train_seconds:.0f} s, {one.epochs} epochs"
            )
    summaries = summarise(found, policies)
    plot = draw(found, out / "comparison.png")
    result = Comparison(
        config.model,
        data.name,
        " ".join(config.budget),
        "seconds" if config.time else equal,
        data.reports,
        found,
        summaries,
        verdict(summaries),
        plot,
        environment(),
    )
    write_text(out / COMPARISON, json.dumps(dataclasses.asdict(result), indent=2))
    return result


def read_comparison(folder: Path) -> Comparison | None:
    """What `compare` left in a folder; None where it left nothing. Raises DynpruneError for a damaged file."""
    path = folder / COMPARISON
    if not path.is_file():
        return None
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        runs = [ComparedRun(**own) for own in known.pop("runs")]
        policies = [PolicySummary(**own) for own in known.pop("policies")]
        return Comparison(**known, runs=runs, policies=policies)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DynpruneError(
            f"{path} is damaged ({type(error).__name__}: {first_line(error)[:100]}). Run dynprune compare again with "
            f"--out {folder}; what is finished there is not repeated."
        ) from error


def check(config: TrainConfig, policies: list[str], seeds: int, equal: str, out: Path, untrained: bool) -> None:
    if untrained and not config.weights:
        raise DynpruneError("--epochs 0 compares what is made of a trained network. Pass its --weights, or train.")
    if untrained and (equal == "cost" or "static-ours" in (policy.split(":")[0] for policy in policies)):
        raise DynpruneError("--epochs 0 trains nothing. Leave out --equal cost and static-ours.")
    for policy in policies:
        if policy.partition(":")[0] not in POLICIES:
            raise DynpruneError(
                f'--policies got "{policy}". Choose from: {", ".join(POLICIES)}, each with changed '
                f"settings if need be, such as cucb:explore=0.03."
            )
        variant(config, policy)
    if len(set(policies)) < 2 or len(set(policies)) < len(policies):
        raise DynpruneError(
            f"--policies got {','.join(policies)}. Expected at least two, each once, separated by commas."
        )
    names = [policy.split(":")[0] for policy in policies]
    if "static-ours" in names and "cucb" not in policies[: names.index("static-ours")]:
        raise DynpruneError("--policies static-ours takes the widths that cucb ended with. Put cucb before it.")
    if seeds < 1:
        raise DynpruneError(f"--seeds got {seeds}. Expected at least 1.")
    if equal not in ("images", "cost"):
        raise DynpruneError(f'--equal got "{equal}". Expected images or cost.')
    if any(policy.startswith("dense+prune") for policy in policies) and any(
        parse_limit(text).quantity != "macs" for text in config.budget
    ):
        raise DynpruneError(
            "--policies dense+prune cuts to a budget of MACs alone. Leave it out, or give one budget in MACs."
        )
    if config.time and (equal == "cost" or "dense+prune" in (name.partition(":")[0] for name in policies)):
        raise DynpruneError("--time gives every policy as many seconds. Leave out --equal cost and dense+prune.")
    if out.exists() and not out.is_dir():
        raise DynpruneError(f"--out got {out}, which is a file. Expected a folder for the runs.")


def variant(config: TrainConfig, policy: str) -> TrainConfig:
    """The settings that a policy such as cucb:explore=0.03:hold=40 trains with."""
    name, *changes = policy.split(":")
    fields = {
        field.name: kind
        for field in dataclasses.fields(TrainConfig)
        if field.name not in COMMON and (kind := type(getattr(TrainConfig, field.name))) in (int, float, str)
    }
    changed: dict[str, Any] = {}
    for change in changes if name != "dense+prune" else without_importance(policy):
        key, _, value = change.partition("=")
        key = key.replace("-", "_")
        try:
            changed[key] = fields[key](value)
        except (KeyError, ValueError) as error:
            raise DynpruneError(
                f'--policies got "{change}" in "{policy}". Expected NAME=VALUE with one of: {", ".join(fields)}.'
            ) from error
    own = {"cucb-paper": "cucb", "static-ours": "static", "dense+prune": "dense"}.get(name, name)
    allocation = "balanced" if own != "cucb" and config.allocation == "learned" else config.allocation
    if allocation == "auto":  # a search takes seconds, and finds other widths each time: not what is compared here
        allocation = "uniform"
    # a thin network from scratch is an ordinary one
    grow = config.grow if own in ("cucb", "random") and name != "cucb-paper" else 0.0
    return dataclasses.replace(
        config, **{"policy": own, "paper": name == "cucb-paper", "allocation": allocation, "grow": grow, **changed}
    ).validate()


def importance_of(policy: str) -> str:
    """Of Torch-Pruning's importances, the one that a policy such as dense+prune:importance=hessian names."""
    given = [change.partition("=")[2] for change in policy.split(":")[1:] if change.startswith("importance=")]
    found = given[-1] if given else IMPORTANCES[0]
    if found not in IMPORTANCES:
        raise DynpruneError(f'--policies got "{policy}". Its importance is one of: {", ".join(IMPORTANCES)}.')
    return found


def without_importance(policy: str) -> list[str]:
    importance_of(policy)
    return [change for change in policy.split(":")[1:] if not change.startswith("importance=")]


class Trial:
    """One policy with one seed."""

    def __init__(
        self,
        config: TrainConfig,
        policy: str,
        out: Path,
        data: Data,
        report: Callable[[Progress], None],
        stop: Callable[[], bool],
        untrained: bool = False,
    ):
        self.untrained = untrained
        self.config, self.policy, self.out, self.data, self.report, self.stop = config, policy, out, data, report, stop
        self.path = out / f"{policy.replace(':', ',')}-{config.seed}"

    def run(self, length: int | ComparedRun) -> ComparedRun:
        """Train for so many epochs, or as long as costs what another run cost."""
        settings = variant(self.config, self.policy)
        if self.policy.startswith("dense+prune"):
            return self.prune_and_train_on(settings, length)
        fit = (
            fit_in(Run(self.out / f"cucb-{self.config.seed}").read_checkpoint()[1], "fit")
            if self.policy.startswith("static-ours")
            else None
        )
        if isinstance(length, ComparedRun):
            session = Session(dataclasses.replace(settings, epochs=1), self.data, fit=fit)
            before = session.scout_macs
            length = affordable(length.train_macs - before, session.train_macs - before)
        return self.finish(self.path, dataclasses.replace(settings, epochs=length), fit=fit)

    def per_epoch(self, macs: int) -> int:
        return PASSES * macs * self.data.steps_per_epoch(self.config.batch_size) * self.config.batch_size

    def finish(
        self,
        path: Path,
        settings: TrainConfig,
        *,
        fit: Fit | None = None,
        full: nn.Module | None = None,
        teacher: nn.Module | None = None,
        before: float = 0.0,
    ) -> ComparedRun:
        """Train in `path`, go on there, or read what is finished. teacher: of a network that another tool cut; before:
        the seconds that it took."""
        run = Run(path)
        known = run.config_file.is_file() and without_machine(run.config) == without_machine(settings)
        if not known and run.config_file.is_file():
            raise DynpruneError(f"{path} was trained with other settings. Choose another --out, or remove it.")
        record = "untrained" if self.untrained else "train"
        recorded = run.results.get(record, {}) if known else {}
        if not {"accuracy", "macs", "train_macs", "seconds", "params"} <= recorded.keys():
            resume, began = known and run.has_checkpoint, time.perf_counter()
            settings = run.config if resume else settings
            if resume and fit is None and settings.scouts:
                fit = fit_in(run.read_checkpoint()[1], "first_fit")
            session = Session(settings, self.data, fit=fit, full=full, teacher=teacher, repaired=not resume)
            if settings.scouts and fit is None and not resume:
                session = Session(settings, self.data, fit=scouted(session, stop=self.stop))
            if settings.time and not resume:
                rehearse_step(session)
                fit_into(session, settings, began)
            before += time.perf_counter() - began
            run = run if known else Run.create(path, settings, overwrite=False)
            if settings.time and not resume:
                run.write_config(session.config)  # with what was chosen
            if self.untrained:
                accuracy = evaluate(session.model, self.data, self.data.test, session.device)
                recorded = {"accuracy": accuracy, "macs": session.macs, "train_macs": 0, "seconds": before}
            else:
                result = train(settings, run, session=session, resume=resume, report=self.report, stop=self.stop)
                recorded = dataclasses.asdict(result)
                recorded["seconds"] += before
            recorded["params"] = session.graph.params(session.widths)
            run.record(record, recorded)
        return ComparedRun(
            self.policy,
            settings.seed,
            recorded["accuracy"],
            recorded["macs"],
            recorded["params"],
            recorded["train_macs"],
            recorded["seconds"],
            0 if self.untrained else run.config.epochs if settings.time else settings.epochs,
        )

    def prune_and_train_on(self, settings: TrainConfig, length: int | ComparedRun) -> ComparedRun:
        """Half of the epochs (or of the cost) dense, then cut, then the rest at the settings' schedule from half of its
        learning rate; a tenth was two points worse (`tests/measure/ablations.md`). Where --weights gives a trained
        network, it is cut at once and trained on like its rivals."""
        graph = trace(zoo.build(settings.model, len(self.data.classes), size=self.data.size), self.data.example)
        if settings.weights:
            small, seconds = self.pruned(self.given_model(), settings, graph)
            if isinstance(length, ComparedRun):
                length = affordable(length.train_macs, self.per_epoch(trace(small, self.data.example).macs({})))
            teacher = self.given_model().eval() if settings.distill else None  # as its rivals have it
            settings = dataclasses.replace(settings, epochs=length)
            return self.finish(self.path, settings, full=small, teacher=teacher, before=seconds)
        dense_epoch = self.per_epoch(graph.macs({}))
        before = max(1, length // 2) if isinstance(length, int) else affordable(length.train_macs / 2, dense_epoch)
        first = self.finish(self.path / "dense", dataclasses.replace(settings, epochs=before))
        small, seconds = self.pruned(self.dense_model(), settings, graph)
        macs = trace(small, self.data.example).macs({})
        after = (
            max(1, length - before)
            if isinstance(length, int)
            else affordable(length.train_macs - first.train_macs, self.per_epoch(macs))
        )
        second = self.finish(
            self.path / "pruned",
            dataclasses.replace(settings, epochs=after, lr=settings.lr / 2),
            full=small,
            before=seconds,
        )
        return dataclasses.replace(
            second,
            train_macs=first.train_macs + second.train_macs,
            train_seconds=first.train_seconds + second.train_seconds,
            epochs=before + after,
        )

    def pruned(self, model: nn.Module, settings: TrainConfig, graph: ChannelGraph) -> tuple[nn.Module, float]:
        """What Torch-Pruning makes of it within the budget, and the seconds that took."""
        began, macs = time.perf_counter(), parse_limit(settings.budget[0]).value(graph.macs({}))
        small = prune(model, self.data, macs, importance_of(self.policy), settings.seed)
        return small, time.perf_counter() - began

    def given_model(self) -> nn.Module:
        model = zoo.build(self.config.model, len(self.data.classes), self.config.seed, size=self.data.size)
        load_trained(model, self.config.model, self.config.weights, len(self.data.classes), self.data.size)
        return model

    def dense_model(self) -> nn.Module:
        model = zoo.build(self.config.model, len(self.data.classes), self.config.seed, size=self.data.size)
        fill_full(model, *Run(self.path / "dense").read_checkpoint())
        return model


def without_machine(config: TrainConfig) -> TrainConfig:
    """The settings that change what is learned: how often the state is saved and who decodes the photos does not."""
    config = config.anchored()
    same: dict[str, Any] = {"checkpoint_every": TrainConfig.checkpoint_every, "workers": TrainConfig.workers}
    if config.time:  # what was chosen for it
        same |= {name: getattr(TrainConfig, name) for name in ("epochs", "batch_size", "lr", "grow")}
    return dataclasses.replace(config, **same)


def affordable(train_macs: float, per_epoch: int) -> int:
    """Whole epochs that cost closest to this, at least one."""
    return max(1, round(train_macs / per_epoch))


def summarise(runs: list[ComparedRun], policies: list[str]) -> list[PolicySummary]:
    """Means per policy; a policy is compared with the first one seed by seed."""
    by_policy = {policy: [run for run in runs if run.policy == policy] for policy in policies}
    ours = statistics.mean(run.accuracy for run in by_policy[policies[0]])
    lines = []
    for policy, own in by_policy.items():
        accuracies = [run.accuracy for run in own]
        lines.append(
            PolicySummary(
                policy,
                len(own),
                statistics.mean(accuracies),
                statistics.stdev(accuracies) if len(own) > 1 else None,
                round(statistics.mean(run.macs for run in own)),
                round(statistics.mean(run.params for run in own)),
                statistics.mean(run.train_macs for run in own),
                statistics.mean(run.train_seconds for run in own),
                ours - statistics.mean(accuracies),
            )
        )
    return lines


def verdict(summaries: list[PolicySummary]) -> str:
    """One line per rival: ahead or behind by more than the spread of both, or no difference that these seeds show."""
    ours, lines = summaries[0], []
    for other in summaries[1:]:
        if ours.spread is None or other.spread is None:
            lines.append(
                f"{ours.policy} {100 * other.lead:+.2f} points against {other.policy} (one seed: no spread, "
                f"so nothing is shown)"
            )
            continue
        spread = (ours.spread**2 + other.spread**2) ** 0.5
        words = "above" if other.lead > spread else "below" if other.lead < -spread else "not different from"
        lines.append(
            f"{ours.policy} is {words} {other.policy}: {100 * other.lead:+.2f} points, spread "
            f"{100 * spread:.2f}, {ours.seeds} seeds"
        )
    return "\n".join(lines)


def draw(runs: list[ComparedRun], path: Path) -> str:
    """Accuracy over seconds, over training cost and over MACs, as a PNG."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(13, 4), layout="constrained")
    labels = {
        "train_seconds": "seconds of training, and before it",
        "train_macs": "multiplications in training",
        "macs": "multiplications per image",
    }
    if not any(run.train_macs for run in runs):
        del labels["train_macs"]
    for axes, (field, label) in zip(figure.subplots(1, len(labels)), labels.items()):
        for policy in dict.fromkeys(run.policy for run in runs):
            own = [run for run in runs if run.policy == policy]
            axes.scatter(
                [getattr(run, field) for run in own], [100 * run.accuracy for run in own], label=policy, alpha=0.7
            )
        axes.set(xlabel=label, ylabel="test accuracy, %", xscale="log")
        axes.grid(alpha=0.3)
        axes.legend()
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise DynpruneError(f"Cannot write {path} ({error.strerror}).") from error
    return str(path)
