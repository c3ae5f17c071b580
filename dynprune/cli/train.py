"""Commands that train: train, gate, run, compare."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from dynprune.cli.options import (
    Batch,
    BenchThreads,
    BnImages,
    FinetuneEpochs,
    FinetuneLr,
    Fold,
    Json,
    MinRate,
    Opset,
    Out,
    Overwrite,
    Resume,
    Trust,
    not_of_file,
    parse_batches,
    with_settings,
)
from dynprune.cli.process import BEGAN, finish, listening, refuse_missed, stoppable
from dynprune.errors import DynpruneError
from dynprune.runs.config import CompactConfig, GateConfig, Task, TrainConfig


def settings_of(given: dict) -> TrainConfig:
    """The settings of a run, checked. Of --epochs and --time one rules: of two that are typed none."""
    typed = not_of_file(given)
    if "epochs" in typed and typed.get("time"):
        raise DynpruneError("--time and --epochs both say how long to train. Pass one of the two.")
    if "epochs" in typed and given.get("time"):
        given["time"] = ""
    return TrainConfig(**given).validate()


@with_settings
def train(
    given: dict,
    out: Out = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    trust: Trust = False,
    override: Annotated[
        bool, typer.Option("--override", help="With --resume: go on with the settings given here where they differ.")
    ] = False,
    json_output: Json = False,
) -> None:
    """Train with dynamic channel execution and leave a run directory.

    Example: `dynprune train --data photos/ --model torchvision:resnet18 --budget 0.25 --epochs 30`
    """
    if override and not resume:
        raise DynpruneError(
            "--override changes the settings of a run that is resumed. Pass --resume with it, or --overwrite to begin "
            "anew."
        )
    config = settings_of(given)
    from dynprune.commands import train as verb
    from dynprune.display.tables import train_table

    with stoppable() as listener:
        if resume:
            result = verb.resume(
                out or verb.run_name(config, config.policy),
                given,
                override=override,
                model=given.get("model", ""),
                trust=trust,
                listener=listener,
            )
        else:
            result = verb.train(config, out, overwrite=overwrite, began=BEGAN, listener=listener)
    if result is None:  # one of several processes, and not the first
        raise typer.Exit
    finish(
        json_output, dataclasses.asdict(result), lambda: [train_table(result), f"next: dynprune compact {result.run}"]
    )


def gate(
    given: dict,
    base: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[RUN]...",
            help="Finished and compacted run whose network gets the gates; its data settings are taken over. Without "
            "it, a new network of --model. With --form cascade: runs or ONNX files, the smallest first; without any, "
            "compact networks are made of a trained one, --model with --weights.",
        ),
    ] = None,
    form: Annotated[
        str,
        typer.Option(
            "--form",
            help="What decides: gates (predictors inside the network, which are trained), cascade (a compact network "
            "for every image, a larger one where it is unsure), or nested (the compact one lies inside of the larger "
            "one, which goes on from it; of a trained network).",
        ),
    ] = "gates",
    max_drop: Annotated[
        float | None,
        typer.Option(
            "--max-drop",
            help="With --form cascade or nested, in place of --target: the cheapest that loses at most so many points "
            "of validation accuracy beside the last network. [default: 0]",
            show_default=False,
        ),
    ] = None,
    min_accuracy: Annotated[
        float | None,
        typer.Option(
            "--min-accuracy",
            help="With --form cascade or nested, in place of --target: the cheapest with so many percent of the "
            "validation images right.",
            show_default=False,
        ),
    ] = None,
    cost: Annotated[
        str,
        typer.Option(
            "--cost",
            help="With --form cascade or nested: what --target and cheapest count: macs, or latency, milliseconds in "
            "onnxruntime at batch 1 on --threads, measured first. Small networks are seldom as quick as their macs "
            "say.",
        ),
    ] = "macs",
    shares: Annotated[
        str,
        typer.Option(
            "--shares",
            help="With --form cascade or nested and --weights: shares of the multiply-accumulates for which compact "
            "networks are made, such as 0.2,0.4; which of them are used is chosen on validation images. [default: "
            "around --target]",
            show_default=False,
        ),
    ] = "",
    search_time: Annotated[
        str,
        typer.Option(
            "--search-time",
            help="With --form cascade or nested and --weights: how long each network's widths are searched for.",
        ),
    ] = "30s",
    tune: Annotated[
        str,
        typer.Option(
            "--tune",
            help="With --form cascade or nested and --weights: how long each network learns from the untouched one.",
        ),
    ] = "1m",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Run directory to write. [default: runs/MODEL-DATA-gate, -cascade or -nested]",
            show_default=False,
        ),
    ] = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    trust: Trust = False,
    json_output: Json = False,
) -> None:
    """Let each image decide how much of a network, or which of several, to compute, at a mean cost.

    Gates are trained with the network; then `dynprune export RUN --onnx` and `dynprune bench RUN`. With `--target 1`
    nothing is closed: what to compare with. `--form cascade` trains no gates and writes one ONNX file, of networks that
    are given or that it makes compact itself; so does `--form nested`, where the small network is a part of the large.

    Examples: `dynprune gate runs/mine --target 0.33 --epochs 10`,
    `dynprune gate --form cascade runs/quarter runs/dense --target 0.4`,
    `dynprune gate --form cascade -m resnet20 -w resnet20.pt -d photos/ --target 0.33`
    """
    bases = base or []
    made = Made(shares, search_time, tune)
    if form in ("cascade", "nested"):
        return cascade(
            given, bases, made, max_drop, min_accuracy, cost, out, overwrite, resume, json_output, form == "nested"
        )
    if form != "gates":
        raise DynpruneError(f'--form got "{form}". Expected gates, cascade or nested.')
    if max_drop is not None or min_accuracy is not None or cost != "macs":
        raise DynpruneError("--max-drop, --min-accuracy and --cost are of --form cascade. Gates have --target.")
    if made != Made():
        raise DynpruneError("--shares, --search-time and --tune are of --form cascade. Gates have --epochs.")
    if len(bases) > 1:
        raise DynpruneError(f"gate got {len(bases)} runs. Expected one whose network gets gates, or --form cascade.")
    if not (resume or bases):
        GateConfig(**given).validate()
    from dynprune.commands import gate as verb
    from dynprune.display.tables import gate_tables

    if resume and (out is None or bases):
        raise DynpruneError("--resume goes on with the run in --out, with its settings. Pass --out, and no other run.")
    with stoppable() as listener:
        if resume and out is not None:
            result = verb.resume(out, given, model=given.get("model", ""), trust=trust, listener=listener)
        else:
            config = verb.based_on(bases[0], given, trust=trust) if bases else GateConfig(**given)
            result = verb.gate(config, out, overwrite=overwrite, listener=listener)
    finish(
        json_output,
        dataclasses.asdict(result),
        lambda: [
            *gate_tables(result),
            *([result.verdict] if result.verdict else []),
            f"next: dynprune export {result.run} --onnx",
        ],
    )


@dataclasses.dataclass(frozen=True)
class Made:
    """Which networks a cascade makes of a trained one, as it was typed."""

    shares: str = ""
    search_time: str = "30s"
    tune: str = "1m"


# settings of gates that a cascade has too: which images, and threads; and what a network that is made needs
OF_A_CASCADE = ("data", "data_root", "val_fraction", "workers", "seed", "target", "threads")
OF_TRAINED = tuple(field.name for field in dataclasses.fields(Task))


def cascade(
    given: dict,
    networks: list[Path],
    made: Made,
    max_drop: float | None,
    min_accuracy: float | None,
    cost: str,
    out: Path | None,
    overwrite: bool,
    resume: bool,
    json_output: bool,
    nested: bool,
) -> None:
    """`gate --form cascade`, of networks that are given, or of a trained one; `--form nested`, of a trained one."""
    making = not networks and "weights" in given
    if nested and not making:
        raise DynpruneError(
            "--form nested makes its networks of a trained one: pass --model, --weights and --data, and no runs."
        )
    known = {"target", *(OF_TRAINED if making else OF_A_CASCADE)}
    foreign = sorted(set(not_of_file(given)) - known) + ["resume"] * (resume and not making)
    if foreign:
        raise DynpruneError(
            f"--{foreign[0].replace('_', '-')} is for gates that are trained, and a cascade has none: leave it out."
            if making or foreign[0] not in OF_TRAINED
            else f"--{foreign[0].replace('_', '-')} is for a cascade that makes its networks of one trained network, "
            "with --weights and no runs. Leave it out, or the runs."
        )
    if not making and made != Made():
        raise DynpruneError(
            "--shares, --search-time and --tune make networks of a trained one: pass --model, --weights and --data, "
            "and no runs."
        )
    settings = {name: value for name, value in given.items() if name in known - {"target"}}
    what: list = [CompactConfig(**settings, search_time=made.search_time, tune=made.tune)] if making else networks
    data = "" if making or "data" not in given else GateConfig(**settings).validate().source
    from dynprune.commands import cascade as verb
    from dynprune.display.tables import cascade_tables

    with listening() as listener:
        result = verb.cascade(
            *what,
            out=out,
            target=given.get("target"),
            max_drop=max_drop,
            min_accuracy=min_accuracy,
            cost=cost,
            shares=numbers_in(made.shares),
            threads=given.get("threads", 1),
            data=data,
            nested=nested,
            overwrite=overwrite,
            resume=resume,
            listener=listener,
        )
    finish(
        json_output,
        dataclasses.asdict(result),
        lambda: [*cascade_tables(result), result.verdict, f"report: {result.page}"],
    )


def numbers_in(text: str) -> list[float]:
    """ "0.2,0.4" to numbers; nothing to none."""
    try:
        return [float(part) for part in text.split(",")] if text else []
    except ValueError:
        raise DynpruneError(f'--shares got "{text}". Expected numbers separated by commas, such as 0.2,0.4.') from None


@with_settings
def run(
    given: dict,
    out: Out = None,
    overwrite: Overwrite = False,
    min_rate: MinRate = 0.0,
    bn_images: BnImages = 0,
    finetune_epochs: FinetuneEpochs = 0,
    finetune_lr: FinetuneLr = 0.01,
    opset: Opset = None,
    fold_normalization: Fold = False,
    batch: Batch = "1,8,32",
    bench_threads: BenchThreads = 1,
    json_output: Json = False,
) -> None:
    """Train, compact, export and bench in one go, with the same options. Without any: the embedded digits.

    Example: `dynprune run --data photos/ --model resnet56 --budget 0.25`
    """
    batches = parse_batches(batch)  # refuse before the long work
    config = settings_of(given)
    from dynprune.commands import bench as bench_verb
    from dynprune.commands import compact as compact_verb
    from dynprune.commands import export as export_verb
    from dynprune.commands import report as report_verb
    from dynprune.commands import train as train_verb
    from dynprune.deploy.bench import BenchResult
    from dynprune.deploy.compact import check_options
    from dynprune.deploy.export import ExportResult
    from dynprune.display import tables

    check_options(min_rate, bn_images, finetune_epochs, finetune_lr)
    with stoppable() as listener:
        trained = train_verb.train(config, out, overwrite=overwrite, opset=opset, began=BEGAN, listener=listener)
    if trained is None:
        raise typer.Exit
    with listening() as listener:
        compacted = compact_verb.compact(
            trained.run,
            min_rate=min_rate,
            bn_images=bn_images,
            finetune_epochs=finetune_epochs,
            finetune_lr=finetune_lr,
            listener=listener,
        )
        exported = export_verb.export(
            trained.run, opset=opset, fold_normalization=fold_normalization, listener=listener
        )
        measured = bench_verb.bench(trained.run, batches=batches, threads=bench_threads, listener=listener)
        written = report_verb.report(trained.run, listener=listener)
    assert isinstance(exported, ExportResult) and isinstance(measured, BenchResult)  # those of a run without gates
    results = {
        "train": dataclasses.asdict(trained),
        "compact": dataclasses.asdict(compacted),
        "export": dataclasses.asdict(exported),
        "bench": measured.without_samples(),
        "report": dataclasses.asdict(written),
    }
    finish(
        json_output,
        results,
        lambda: [
            tables.train_table(trained),
            tables.compact_table(compacted),
            *tables.export_tables(exported),
            tables.bench_table(measured),
            measured.verdict,
            f"report: {written.page}",
        ],
    )
    refuse_missed(measured)


@with_settings
def compare(
    given: dict,
    policies: Annotated[
        str,
        typer.Option(
            "--policies",
            help="Ways to train, separated by commas, yours first: cucb, cucb-paper, random, static, static-ours, "
            "dense, dense+prune. With settings of its own: cucb:explore=0.03, or dense+prune:importance=hessian "
            "(magnitude, taylor, hessian, isomorphic).",
        ),
    ] = "cucb,random,static",
    seeds: Annotated[
        int,
        typer.Option(
            "--seeds", help="Runs of each, with seeds from --seed on. One seed shows nothing; three begin to."
        ),
    ] = 3,
    equal: Annotated[
        str,
        typer.Option(
            "--equal", help="What all have in equal amount: images (training images seen) or cost (multiplications)."
        ),
    ] = "images",
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", help="Folder for the runs and the comparison; what is finished there is not repeated."
        ),
    ] = Path("runs/comparison"),
    json_output: Json = False,
) -> None:
    """Train what you would do instead, side by side: random channels, thin networks from scratch, dense, dense and
    pruned.

    Stopped comparisons go on where they were. With `--weights` and `--epochs 0`, what each makes of the trained network
    before any training. Example:
    `dynprune compare --data photos/ --model resnet56 --budget 0.25 --policies cucb,random,static --seeds 3`
    """
    if "policy" in given or "paper" in given:
        raise DynpruneError("compare takes --policies, several of them, in place of --policy.")
    untrained = given.get("epochs") == 0
    config = TrainConfig(**given | ({"epochs": 1} if untrained else {})).validate()
    from dynprune.commands import compare as verb
    from dynprune.display.tables import comparison_table

    with stoppable() as listener:
        result = verb.compare(
            config,
            [name.strip() for name in policies.split(",")],
            seeds,
            out,
            equal=equal,
            untrained=untrained,
            listener=listener,
        )
    finish(json_output, dataclasses.asdict(result), lambda: [comparison_table(result), result.verdict])
