"""Commands that take a run: compact, export, predict, bench."""

from __future__ import annotations

import dataclasses
import sys
from csv import writer
from pathlib import Path
from typing import Annotated

import typer

from dynprune.cli.options import (
    AnyRunPath,
    Batch,
    BenchThreads,
    BnImages,
    Calibration,
    DataNow,
    FinetuneEpochs,
    FinetuneLr,
    Fold,
    FoldResize,
    Fp16,
    Int8,
    Json,
    MaxDrop,
    MinRate,
    Named,
    Opset,
    Overwrite,
    Trust,
    not_of_file,
    parse_batches,
    with_settings,
)
from dynprune.cli.process import finish, listening, refuse_missed, told
from dynprune.errors import DynpruneError
from dynprune.runs.config import CompactConfig, TrainConfig


def opened(path: Path, model: str, trust: bool):
    """The run in `path`, of train or gate, if its model is none of the user's own code, or code that was named or
    trusted."""
    from dynprune.runs.directory import open_any

    run = open_any(path)
    run.refuse_code(model, trust)
    return run


def compact(
    given: dict,
    run: Annotated[
        Path | None,
        typer.Argument(metavar="[RUN]", help="Run directory that `dynprune train` wrote. Without it: --weights."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Run directory to write. [default: runs/MODEL-DATA-compact]", show_default=False
        ),
    ] = None,
    overwrite: Overwrite = False,
    curve: Annotated[
        str,
        typer.Option(
            "--curve",
            help="Show accuracy, size and time at these shares of the MACs, such as 0.75,0.5,0.25; write no network.",
        ),
    ] = "",
    min_rate: MinRate = 0.0,
    bn_images: BnImages = 0,
    finetune_epochs: FinetuneEpochs = 0,
    finetune_lr: FinetuneLr = 0.01,
    trust: Trust = False,
    json_output: Json = False,
) -> None:
    """Make a network compact: a run of `dynprune train`, or any trained network.

    With RUN, remove the channels that were not chosen, prove that nothing else changed, and write one safetensors file.

    Without, give --model, its --weights and your --data: channels that the rest can make up for go, a bandit tries
    widths on frozen weights, every layer is refitted, and the result learns for some seconds from the network that you
    gave. No training run, about a minute.

    Examples: `dynprune compact runs/mine`, `dynprune compact --model resnet20 --weights resnet20.pt --data photos/
    --budget 0.5`

    Load it in Python with `dynprune.load("RUN/compact.safetensors")`.
    """
    from dynprune.commands import compact as verb
    from dynprune.display.tables import compact_table, trained_table

    if run is None:
        of_run = dict(min_rate=min_rate, bn_images=bn_images, finetune_epochs=finetune_epochs)
        if wrong := next((name for name, value in of_run.items() if value), None):
            raise DynpruneError(f"--{wrong.replace('_', '-')} belongs to compact RUN. Drop it, or name a run.")
        if "budget" in given and given.get("max_drop"):
            raise DynpruneError("--max-drop stands in place of --budget. Choose one of the two.")
        config = CompactConfig(**given).validate()
        if curve:
            show_curve(config, curve, out, json_output)
            return
        with listening() as listener:
            trained = verb.compact(config, out=out, overwrite=overwrite, listener=listener)
        if trained is None:  # torchrun's first process tells
            return
        finish(
            json_output,
            dataclasses.asdict(trained),
            lambda: [trained_table(trained), f"next: dynprune export {trained.run} --onnx"],
        )
        return
    given = not_of_file(given)
    model, data = given.pop("model", ""), given.pop("data", "")
    if given or out or overwrite or curve:
        wrong = next(iter(given), "out" if out else "overwrite" if overwrite else "curve")
        raise DynpruneError(
            f"--{wrong.replace('_', '-')} belongs to compact without a run. {run} is compacted with the settings it "
            "was trained with."
        )
    opened(run, model, trust)
    with listening() as listener:
        result = verb.compact(
            run,
            min_rate=min_rate,
            bn_images=bn_images,
            finetune_epochs=finetune_epochs,
            finetune_lr=finetune_lr,
            data=data,
            listener=listener,
        )
    finish(
        json_output, dataclasses.asdict(result), lambda: [compact_table(result), f"next: dynprune export {run} --onnx"]
    )


def show_curve(config: CompactConfig, shares: str, out: Path | None, json_output: bool) -> None:
    """compact --curve."""
    from dynprune.commands import compact as verb
    from dynprune.display.tables import curve_table

    try:
        wanted = [float(share) for share in shares.split(",")]
    except ValueError:
        wanted = []
    with listening() as listener:
        result = verb.curve(config, wanted, out, listener=listener)
    finish(json_output, dataclasses.asdict(result), lambda: [curve_table(result)])


def export(
    run: AnyRunPath,
    onnx: Annotated[bool, typer.Option("--onnx", help="Write ONNX.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File to write. [default: RUN/compact.onnx]", show_default=False)
    ] = None,
    opset: Opset = None,
    fold_normalization: Fold = False,
    fold_resize: FoldResize = False,
    int8: Int8 = False,
    fp16: Fp16 = False,
    calibration: Calibration = None,
    max_drop: MaxDrop = None,
    data: DataNow = "",
    model: Named = "",
    trust: Trust = False,
    json_output: Json = False,
) -> None:
    """Write the compact model as one ONNX file with a dynamic batch, and prove that onnxruntime computes the same as
    torch.

    With --int8 (and --fp16) write it in these precisions too, and show accuracy, time and size beside float32. Layers
    for which int8 costs too much accuracy stay in float32, and are named.

    Examples: `dynprune export runs/mine --onnx`, `dynprune export runs/mine --onnx --int8 --max-drop 0.5`

    A run of `dynprune gate` gives a graph for one image at a time, in which closed gates mean less work; the form of
    each layer is measured.
    """
    if not onnx:
        raise DynpruneError("No format given. Pass --onnx: it is the one there is.")
    from dynprune.commands import export as verb
    from dynprune.deploy.export import ExportResult
    from dynprune.display.tables import export_tables, gated_export_table

    limits: dict = {"calibration": calibration, "max_drop": max_drop}
    limits = {name: value for name, value in limits.items() if value is not None}
    if limits and not int8:
        raise DynpruneError(f"--{next(iter(limits)).replace('_', '-')} belongs to --int8. Pass that too, or drop it.")
    opened(run, model, trust)
    with listening() as listener:
        result = verb.export(
            run,
            out=out,
            opset=opset,
            fold_normalization=fold_normalization,
            fold_resize=fold_resize,
            int8=int8,
            fp16=fp16,
            **limits,
            data=data,
            listener=listener,
        )
    finish(
        json_output,
        dataclasses.asdict(result),
        lambda: [
            *(export_tables(result) if isinstance(result, ExportResult) else [gated_export_table(result)]),
            f"next: dynprune bench {run}",
        ],
    )


def predict(
    target: Annotated[
        Path, typer.Argument(metavar="FILE|RUN", help="ONNX file that export wrote, compact file, or run directory.")
    ],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGES...", help="Image files, and folders of them.")],
    top: Annotated[int, typer.Option("--top", "-k", help="How many classes to name for each image.")] = 3,
    csv: Annotated[
        bool, typer.Option("--csv", help="Print lines of path, rank, class and probability, and nothing else there.")
    ] = False,
    bench_threads: BenchThreads = 0,
    trust: Trust = False,
    json_output: Json = False,
) -> None:
    """Name the most probable classes of images.

    How images become inputs, and what the classes are called, is read from the file alone. Example: dynprune predict
    runs/mine/compact.onnx photos/new --csv
    """
    from dynprune.commands.predict import predict as verb
    from dynprune.display.tables import predictions_table

    if csv and json_output:
        raise DynpruneError("--csv and --json exclude each other. Choose one.")
    if target.is_dir():
        opened(target, "", trust)
    with listening() as listener:
        found = verb(target, images, top=top, threads=bench_threads, trust=trust, listener=listener)
    if csv:
        lines = writer(sys.stdout, lineterminator="\n")
        lines.writerow(["path", "rank", "class", "probability"])
        for own in found:
            lines.writerows([own.path, rank, name, f"{p:.6f}"] for rank, (name, p) in enumerate(own.classes, 1))
        return
    rows = [
        {"path": own.path, "classes": [{"class": name, "probability": p} for name, p in own.classes]} for own in found
    ]
    finish(json_output, {"images": rows}, lambda: [predictions_table(found)])


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Run directories, side by side if several, or a comparison's folder."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="HTML file to write. [default: RUN/report.html; of several report.html]",
            show_default=False,
        ),
    ] = None,
    data: DataNow = "",
    model: Named = "",
    trust: Trust = False,
    json_output: Json = False,
) -> None:
    """Write a page about a run: one HTML file with everything in it, to be opened anywhere or sent by mail.

    Verdict, accuracy and loss over epochs, widths, what was picked, where operations and milliseconds went, confusion,
    worst images, settings and the commands to repeat it; and MODEL_CARD.md, as model hubs read it. Example: dynprune
    report runs/mine
    """
    from dynprune.commands.report import report as verb
    from dynprune.commands.report import runs_in

    for run in (own for folder in runs for own in runs_in(folder)):
        run.refuse_code(model, trust)
    with listening() as listener:
        result = verb(*runs, out=out, data=data, listener=listener)
    card = [f"card: {result.card}"] if result.card else []
    finish(json_output, dataclasses.asdict(result), lambda: [f"page: {result.page}", *card])


@with_settings
def bench(
    given: dict,
    targets: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[RUN | A.onnx B.onnx]", help="A run directory, or two ONNX files to compare."),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option("--against", help="Run of a trained dense network to compare with.", show_default=False),
    ] = None,
    batch: Batch = "1,8,32",
    bench_threads: BenchThreads = 1,
    training: Annotated[
        bool,
        typer.Option(
            "--training",
            help="Time training steps instead: dense, static and dynamic, side by side, with the training settings "
            "below. Answers what a run would save before it starts.",
        ),
    ] = False,
    steps: Annotated[int, typer.Option("--steps", help="Steps of each kind that --training times.")] = 40,
    swap_share: Annotated[
        float,
        typer.Option("--swap-share", help="Share of the arms that --training also swaps at every step, as a stress."),
    ] = 0.05,
    memory: Annotated[
        bool,
        typer.Option("--memory/--no-memory", help="Let --training measure peak memory too, each in its own process."),
    ] = True,
    trust: Trust = False,
    json_output: Json = False,
) -> None:
    """Measure the compact model against its dense twin in onnxruntime: interleaved, raw samples kept, one verdict.

    A run of `dynprune gate` is measured over real images, against the network without gates and a static one of the
    same mean cost.

    Examples: `dynprune bench runs/mine`, `dynprune bench a.onnx b.onnx`, `dynprune bench --training --model resnet56
    --budget 0.25`
    """
    if training:
        bench_training(given, targets, steps, swap_share, memory, json_output)
        return
    given = not_of_file(given)
    model, data = given.pop("model", ""), given.pop("data", "")
    if given:
        raise DynpruneError(
            f"--{next(iter(given)).replace('_', '-')} belongs to bench --training. A run is measured "
            f"with the settings it was trained with."
        )
    for path in [*(targets or []), *([against] if against else [])]:
        if path.is_dir():
            opened(path, model, trust)
    batches = parse_batches(batch)
    from dynprune.commands import bench as verb
    from dynprune.deploy.bench import BenchResult
    from dynprune.display import tables

    with listening() as listener:
        result = verb.bench(
            *(targets or []), against=against, batches=batches, threads=bench_threads, data=data, listener=listener
        )
    if isinstance(result, BenchResult):
        finish(json_output, result.without_samples(), lambda: [tables.bench_table(result), result.verdict])
        refuse_missed(result)
        return
    finish(json_output, result.without_samples(), lambda: [*tables.gated_bench_tables(result), result.verdict])
    if not result.met:
        raise told(
            f"target {result.target} missed: an image costs {result.stats.share:.4f} of the ungated network. "
            f"Train the gates with a smaller --target."
        )


def bench_training(
    given: dict, targets: list[Path] | None, steps: int, swap_share: float, memory: bool, json_output: bool
) -> None:
    """bench --training."""
    if targets:
        raise DynpruneError(f"bench --training got {targets[0]}. It takes no run: name the network with --model.")
    if not 0 <= swap_share <= 1:
        raise DynpruneError(f"--swap-share got {swap_share}. Expected a share in [0, 1].")
    config = TrainConfig(**given).validate()
    from dynprune.display.tables import training_table
    from dynprune.training.bench_training import bench_training as measure

    with listening() as listener:
        result = measure(config, steps=steps, swap_share=swap_share, memory=memory, report=listener.detail)
    finish(json_output, dataclasses.asdict(result), lambda: [training_table(result)])
