"""The command line: options to configuration, configuration to calls, results to a report.

Options of `train` and `run` are made from the fields of TrainConfig, so each setting is described once. torch is imported
inside the commands, so that `--help` is quick. Results go to stdout (one JSON object with `--json`), progress to stderr;
a DynpruneError is one line on stderr and exit status 1.
"""

from __future__ import annotations

import dataclasses
import inspect as python_inspect
import json
import os
import re
import signal
import sys
import typing
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn, Optional

import typer

from dynprune.errors import DynpruneError, DynpruneWarning, Stopped
from dynprune.runs.config import ENOUGH, GateConfig, Recipe, TrainConfig
from dynprune.version import __version__

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown",
                  context_settings={"help_option_names": ["-h", "--help"]})

RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory that `dynprune train` wrote.")]
AnyRunPath = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory that `dynprune train` or `dynprune gate` wrote.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing run directory.")]
Out = Annotated[Optional[Path], typer.Option("--out", help="Run directory to write. [default: runs/MODEL-DATA-POLICY]", show_default=False)]
Trust = Annotated[bool, typer.Option("--trust", help="Let the run name your own code as its model (package.module:factory).")]
DataNow = Annotated[str, typer.Option("--data", help="Where the run's data lie now, if they were moved.", show_default=False)]
Named = Annotated[str, typer.Option("--model", help="Name that model code yourself, instead of --trust.", show_default=False)]
MinRate = Annotated[float, typer.Option("--min-rate", help="Drop channels that ran in less than this share of the steps.")]
BnImages = Annotated[int, typer.Option("--bn-images", help="Re-estimate BatchNorm statistics on so many training images; 0 keeps them.")]
FinetuneEpochs = Annotated[int, typer.Option("--finetune-epochs", help="Train the compact network on for so many epochs.")]
FinetuneLr = Annotated[float, typer.Option("--finetune-lr", help="Learning rate at the start of fine-tuning.")]
Opset = Annotated[Optional[int], typer.Option("--opset", help="ONNX opset; what was written is reported. [default: the exporter's]", show_default=False)]
Fold = Annotated[bool, typer.Option("--fold-normalization", help="Put input normalisation into the graph: it then takes RGB pixels in 0..1.")]
Batch = Annotated[str, typer.Option("--batch", help="Batch sizes, separated by commas; the first gives the verdict.")]
BenchThreads = Annotated[int, typer.Option("--bench-threads", help="onnxruntime threads; 0 leaves its choice.")]

PANELS = {"model": "Model and data", "epochs": "Training recipe", "precision": "Machine", "policy": "Method", "reservoir": "Machine", "target": "Method"}


def with_settings(command: Callable, kind: type[Recipe] = TrainConfig, without: tuple[str, ...] = ()) -> Callable:
    """Give a command an option per field of `kind`; it receives the ones that were given as the dict `given`."""
    fields = [field for field in dataclasses.fields(kind) if field.name not in without]
    hints = typing.get_type_hints(command, include_extras=True)
    own = [p.replace(annotation=hints[p.name], kind=p.KEYWORD_ONLY) for p in python_inspect.signature(command).parameters.values() if p.name != "given"]
    options, panel = [], ""
    for field in fields:
        panel = PANELS.get(field.name, panel)
        several, auto = isinstance(field.default, tuple), field.metadata["auto"]
        shown = "auto" if auto is not None and field.default == auto else (" ".join(field.default) if several else str(field.default)) or False
        option = typer.Option("--" + field.name.replace("_", "-"), help=field.metadata["help"], show_default=shown, rich_help_panel=panel)
        options.append(python_inspect.Parameter(field.name, python_inspect.Parameter.KEYWORD_ONLY, default=None,
                                         annotation=Annotated[Optional[list[str] if several else str if auto is not None else type(field.default)], option]))

    def wrapper(**values: object) -> None:
        given = {field.name: number_or_auto(field, values.pop(field.name)) for field in fields}
        command(given={name: tuple(value) if isinstance(value, list) else value for name, value in given.items() if value not in (None, [])}, **values)

    wrapper.__signature__ = python_inspect.Signature([*options, *own])  # type: ignore[attr-defined]
    wrapper.__doc__, wrapper.__name__ = command.__doc__, command.__name__
    return wrapper


def number_or_auto(field: dataclasses.Field, value: object) -> object:
    """The number that "auto" stands for, or the one that was given, where a setting has both."""
    auto = field.metadata["auto"]
    if auto is None or value is None or value == "auto":
        return auto if value == "auto" and auto is not None else value
    try:
        number = type(auto)(value)  # type: ignore[call-arg]
    except ValueError:
        number = auto
    if number == auto:
        raise DynpruneError(f"--{field.name.replace('_', '-')} got {value}. Expected {field.metadata['expected']}.")
    return number


def version(shown: bool) -> None:
    if shown:
        print(f"dynprune {__version__}")
        raise typer.Exit


@app.callback()
def dynprune(_version: Annotated[bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version.")] = False) -> None:
    """Compact CNNs by dynamic channel execution.

    In each training step a bandit picks a salient subset of every layer's channels and only those run, so training is cheaper and
    what comes out is already small. `dynprune run` does everything in one go; or step by step:

    **train** the channels that matter · **compact** them into a file · **export** it to ONNX · **bench** it against the dense network

    **gate** then lets each image decide which of the remaining channels to compute.
    """


@app.command()
@with_settings
def train(given: dict, out: Out = None, overwrite: Overwrite = False,
          resume: Annotated[bool, typer.Option("--resume", help="Go on with the stopped run in --out, with its settings.")] = False,
          trust: Trust = False,
          override: Annotated[bool, typer.Option("--override", help="With --resume: go on with the settings given here where they differ.")] = False,
          json_output: Json = False) -> None:
    """Train with dynamic channel execution and leave a run directory.

    Example: `dynprune train --data photos/ --model torchvision:resnet18 --budget 0.25 --epochs 30`
    """
    from dynprune.report import tables as report

    if override and not resume:
        raise DynpruneError("--override changes the settings of a run that is resumed. Pass --resume with it, or --overwrite to begin anew.")
    result = do_train(given, out, overwrite, resume, override, trust)
    finish(json_output, dataclasses.asdict(result), lambda: [report.train_table(result), f"next: dynprune compact {result.run}"])


@app.command()
def compact(run: RunPath, min_rate: MinRate = 0.0, bn_images: BnImages = 0, finetune_epochs: FinetuneEpochs = 0, finetune_lr: FinetuneLr = 0.01,
            data: DataNow = "", model: Named = "", trust: Trust = False, json_output: Json = False) -> None:
    """Remove the channels that were not chosen, prove that nothing else changed, and write one safetensors file.

    Load it in Python with `dynprune.load("RUN/compact.safetensors")`.
    """
    from dynprune.report import tables as report

    opened(run, model, trust)
    result = do_compact(run, min_rate, bn_images, finetune_epochs, finetune_lr, data)
    finish(json_output, dataclasses.asdict(result), lambda: [report.compact_table(result), f"next: dynprune export {run} --onnx"])


@app.command()
def export(run: AnyRunPath, onnx: Annotated[bool, typer.Option("--onnx", help="Write ONNX.")] = False,
           out: Annotated[Optional[Path], typer.Option("--out", help="File to write. [default: RUN/compact.onnx]", show_default=False)] = None,
           opset: Opset = None, fold_normalization: Fold = False, data: DataNow = "", model: Named = "", trust: Trust = False, json_output: Json = False) -> None:
    """Write the compact model as one ONNX file with a dynamic batch, and prove that onnxruntime computes the same as torch.

    A run of `dynprune gate` gives a graph for one image at a time, in which closed gates mean less work; the form of each layer is measured.
    """
    if not onnx:
        raise DynpruneError("No format given. Pass --onnx: it is the one there is.")
    from dynprune.report import tables as report
    from dynprune.runs.directory import GateRun

    found = opened(run, model, trust)
    if isinstance(found, GateRun):
        gated = do_export_gated(found, out, opset, fold_normalization, data)
        finish(json_output, dataclasses.asdict(gated), lambda: [report.gated_export_table(gated), f"next: dynprune bench {run}"])
        return
    result = do_export(run, out, opset, fold_normalization, data)
    finish(json_output, dataclasses.asdict(result), lambda: [report.export_table(result), f"next: dynprune bench {run}"])


@app.command()
@with_settings
def bench(given: dict,
          targets: Annotated[Optional[list[Path]], typer.Argument(metavar="[RUN | A.onnx B.onnx]", help="A run directory, or two ONNX files to compare.")] = None,
          against: Annotated[Optional[Path], typer.Option("--against", help="Run of a trained dense network to compare with.", show_default=False)] = None,
          batch: Batch = "1,8,32", bench_threads: BenchThreads = 1,
          training: Annotated[bool, typer.Option("--training", help="Time training steps instead: dense, static and dynamic, side by side, with the training "
                                                                    "settings below. Answers what a run would save before it starts.")] = False,
          steps: Annotated[int, typer.Option("--steps", help="Steps of each kind that --training times.")] = 40,
          swap_share: Annotated[float, typer.Option("--swap-share", help="Share of the arms that --training also swaps at every step, as a stress.")] = 0.05,
          memory: Annotated[bool, typer.Option("--memory/--no-memory", help="Let --training measure peak memory too, each in its own process.")] = True,
          trust: Trust = False, json_output: Json = False) -> None:
    """Measure the compact model against its dense twin in onnxruntime: interleaved, raw samples kept, one verdict.

    A run of `dynprune gate` is measured over real images, against the network without gates and a static one of the same mean cost.

    Examples: `dynprune bench runs/mine`, `dynprune bench a.onnx b.onnx`, `dynprune bench --training --model resnet56 --budget 0.25`
    """
    from dynprune.report import tables as report

    if training:
        measured = do_bench_training(given, targets, steps, swap_share, memory)
        finish(json_output, dataclasses.asdict(measured), lambda: [report.training_table(measured)])
        return
    model, data = given.pop("model", ""), given.pop("data", "")
    if given:
        raise DynpruneError(f"--{next(iter(given)).replace('_', '-')} belongs to bench --training. A run is measured with the settings it was trained with.")
    for path in [*(targets or []), *([against] if against else [])]:
        if path.is_dir():
            opened(path, model, trust)
    if len(targets or []) == 1 and against is None and (gated := gate_run(targets[0])):
        measured = do_bench_gated(gated, batch, bench_threads, data)
        finish(json_output, measured.without_samples(), lambda: [*report.gated_bench_tables(measured), measured.verdict])
        if not measured.met:
            raise told(f"target {measured.target} missed: an image costs {measured.stats.share:.4f} of the ungated network. Train the gates with a smaller --target.")
        return
    result = do_bench(targets or [], against, batch, bench_threads, data)
    finish(json_output, result.without_samples(), lambda: [report.bench_table(result), result.verdict])
    refuse_missed(result)


def gate(given: dict,
         base: Annotated[Optional[Path], typer.Argument(metavar="[RUN]", help="Finished and compacted run whose network gets the gates; its data settings are taken over. "
                                                                             "Without it, a new network of --model.")] = None,
         out: Annotated[Optional[Path], typer.Option("--out", help="Run directory to write. [default: runs/MODEL-DATA-gate]", show_default=False)] = None,
         overwrite: Overwrite = False,
         resume: Annotated[bool, typer.Option("--resume", help="Go on with the stopped run in --out, with its settings.")] = False,
         trust: Trust = False, json_output: Json = False) -> None:
    """Put gates into a network that decide per image which channels to compute, and train both to a mean cost.

    Then `dynprune export RUN --onnx` and `dynprune bench RUN`. With `--target 1` nothing is closed: what to compare with.

    Example: `dynprune gate runs/mine --target 0.33 --epochs 10`
    """
    from dynprune.report import tables as report

    result = do_gate(given, base, out, overwrite, resume, trust)
    finish(json_output, dataclasses.asdict(result), lambda: [*report.gate_tables(result), f"next: dynprune export {result.run} --onnx"])


app.command()(with_settings(gate, GateConfig, without=("base",)))


@app.command()
@with_settings
def run(given: dict, out: Out = None, overwrite: Overwrite = False, min_rate: MinRate = 0.0, bn_images: BnImages = 0,
        finetune_epochs: FinetuneEpochs = 0, finetune_lr: FinetuneLr = 0.01, opset: Opset = None, fold_normalization: Fold = False,
        batch: Batch = "1,8,32", bench_threads: BenchThreads = 1, json_output: Json = False) -> None:
    """Train, compact, export and bench in one go, with the same options. Without any: the embedded digits.

    Example: `dynprune run --data photos/ --model resnet56 --budget 0.25`
    """
    from dynprune.report import tables as report

    parse_batches(batch)  # refuse before the long work
    from dynprune.deploy.compact import check_options
    check_options(min_rate, bn_images, finetune_epochs, finetune_lr)
    trained = do_train(given, out, overwrite, False, opset=opset)
    path = Path(trained.run)
    compacted = do_compact(path, min_rate, bn_images, finetune_epochs, finetune_lr)
    exported = do_export(path, None, opset, fold_normalization)
    measured = do_bench([path], None, batch, bench_threads)
    results = {"train": dataclasses.asdict(trained), "compact": dataclasses.asdict(compacted), "export": dataclasses.asdict(exported),
               "bench": measured.without_samples()}
    finish(json_output, results, lambda: [report.train_table(trained), report.compact_table(compacted), report.export_table(exported),
                                          report.bench_table(measured), measured.verdict])
    refuse_missed(measured)


@app.command()
@with_settings
def compare(given: dict,
            policies: Annotated[str, typer.Option("--policies", help="Ways to train, separated by commas, yours first: cucb, cucb-paper, random, static, "
                                                                     "static-ours, dense, dense+prune. With settings of its own: cucb:explore=0.03.")] = "cucb,random,static",
            seeds: Annotated[int, typer.Option("--seeds", help="Runs of each, with seeds from --seed on. One seed shows nothing; three begin to.")] = 3,
            equal: Annotated[str, typer.Option("--equal", help="What all have in equal amount: images (training images seen) or cost (multiplications).")] = "images",
            out: Annotated[Path, typer.Option("--out", help="Folder for the runs and the comparison; what is finished there is not repeated.")] = Path("runs/comparison"),
            json_output: Json = False) -> None:
    """Train what you would do instead, side by side: random channels, thin networks from scratch, dense, dense and pruned.

    Stopped comparisons go on where they were. Example:
    `dynprune compare --data photos/ --model resnet56 --budget 0.25 --policies cucb,random,static --seeds 3`
    """
    from dynprune.report import tables as report

    if "policy" in given or "paper" in given:
        raise DynpruneError("compare takes --policies, several of them, in place of --policy.")
    config = TrainConfig(**given).validate()
    from dynprune.deploy.compare import compare as run_comparison

    display = report.Display()
    with display.live(), stop_requested() as stop:
        result = run_comparison(config, [name.strip() for name in policies.split(",")], seeds, out, equal=equal, report=display.step, say=display.say, stop=stop)
    finish(json_output, dataclasses.asdict(result), lambda: [report.comparison_table(result), result.verdict])


@app.command()
def inspect(model: Annotated[str, typer.Option("--model", help="Network, named as for `train`.")] = "vgg16",
            input_shape: Annotated[str, typer.Option("--input", help="Input of one example, such as 3x224x224. [default: what the source is used to]",
                                                     show_default=False)] = "",
            classes: Annotated[int, typer.Option("--classes", help="Number of classes; 0 takes 1000 for torchvision and timm (segmentation 21, detection 91), else 10.")] = 0,
            check: Annotated[bool, typer.Option("--check", help="Remove random channels and prove that the compact copy computes the same.")] = False,
            fraction: Annotated[float, typer.Option("--fraction", help="Share of each group's channels that --check removes.")] = 0.5,
            seed: Annotated[int, typer.Option("--seed", help="Which channels --check removes.")] = 0,
            json_output: Json = False) -> None:
    """Show which channels of a network can be removed, which cannot and why; with --check, prove it.

    Example: `dynprune inspect --model torchvision:shufflenet_v2_x1_0 --check`
    """
    from dynprune.report import tables as report
    from dynprune.structure.inspect import inspect as look

    result = look(model, shape=input_shape, classes=classes, check=check, fraction=fraction, seed=seed)
    finish(json_output, dataclasses.asdict(result), lambda: report.inspect_tables(result))
    if result.check is not None and not result.check.ok:
        raise typer.Exit(1)


@app.command()
def plan(model: Annotated[str, typer.Option("--model", help="Network, named as for `train`.")] = "vgg16",
         budget: Annotated[list[str], typer.Option("--budget", help="As for `train`; several hold at once.")] = ["0.25"],  # noqa: B006 (Typer reads it)
         allocation: Annotated[str, typer.Option("--allocation", help="uniform or balanced; with --from, learned.")] = "uniform",
         learned_by: Annotated[Optional[Path], typer.Option("--from", help="Use what the bandit of this run learned.", metavar="RUN")] = None,
         latency: Annotated[bool, typer.Option(help="Predict milliseconds in onnxruntime; layers are timed once and kept.")] = True,
         align: Annotated[str, typer.Option("--align", help="Widths are multiples of this; auto: 16 (8 without AVX-512), or 8 or 4 where a layer is narrow.")] = "auto",
         min_width: Annotated[int, typer.Option("--min-width", help="No layer gets narrower than this.")] = 1,
         max_width_share: Annotated[float, typer.Option("--max-width-share", help="No layer keeps more than this share of its channels.")] = 1.0,
         keep: Annotated[Optional[list[str]], typer.Option("--keep", help="Layers that are never narrowed, by name or pattern.")] = None,
         input_shape: Annotated[str, typer.Option("--input", help="Input of one example, such as 3x224x224.")] = "",
         classes: Annotated[int, typer.Option("--classes", help="Number of classes; 0 takes 1000 for torchvision and timm (segmentation 21, detection 91), else 10.")] = 0,
         json_output: Json = False) -> None:
    """Show, before any training, which widths a budget gives and what they cost.

    Example: `dynprune plan --model torchvision:resnet18 --budget macs=0.25 --budget params=0.11 --allocation balanced`
    """
    config = TrainConfig(model=model, budget=tuple(budget), allocation="learned" if learned_by else allocation, align=align, min_width=min_width,
                         max_width_share=max_width_share, keep=tuple(keep or ())).validate()
    if config.allocation == "learned" and learned_by is None:
        raise DynpruneError("--allocation learned needs --from RUN, a run of --policy cucb to learn from. Before any training, choose uniform or balanced.")
    from dynprune.report import tables as report
    from dynprune.training.plan import plan as make_plan
    from dynprune.runs.directory import Run

    display = report.Display()
    with display.live():
        result = make_plan(config, shape=input_shape, classes=classes, latency=latency, learned_by=Run.open(learned_by) if learned_by else None,
                           report=display.work)
    finish(json_output, dataclasses.asdict(result), lambda: [report.plan_table(result)])
    if not result.satisfiable:
        raise told(result.problem)


# -- what the commands share ------------------------------------------------------------------------------------------


def opened(path: Path, model: str, trust: bool):
    """The run in `path`, of train or gate, if its model is none of the user's own code, or code that was named or trusted."""
    from dynprune.runs.directory import open_any

    run = open_any(path)
    run.refuse_code(model, trust)
    return run


def gate_run(path: Path):
    """The run of gates in `path`, or None."""
    from dynprune.runs.directory import GateRun

    return GateRun.open(path) if GateRun(path).config_file.is_file() else None


def told(message: str) -> DynpruneError:
    """An error about a result that was printed already."""
    error = DynpruneError(message)
    error.told = True
    return error


def moved(config: Recipe, data: str):
    """The run's images, read from where they lie now; None where the run's own settings say it."""
    from dynprune.data.loading import load_data

    return load_data(dataclasses.replace(config, data=data).source) if data else None


def run_name(config: Recipe, method: str) -> Path:
    """Where a run goes that is given no place: runs/MODEL-DATA-METHOD."""
    return Path("runs") / "-".join(re.sub(r"[:/?&=,()\s]+", "-", part) for part in (config.model, Path(config.data).name, method))


def do_train(given: dict, out: Path | None, overwrite: bool, resume: bool, override: bool = False, trust: bool = False, opset: int | None = None):
    config = TrainConfig(**given).validate()
    from dynprune.training import distributed
    from dynprune.report.tables import Display
    from dynprune.runs.directory import Run
    from dynprune.data.loading import load_data
    from dynprune.training.rehearsal import rehearse
    from dynprune.training.session import Session, fit_in
    from dynprune.training.train import train as run_training

    path = out or run_name(config, config.policy)
    found = Run.open(path) if resume else None
    if found:
        found.refuse_code(given.get("model", ""), trust)
    if resume:
        config = resumed(found.config, given, path, override)
    ranks = distributed.join(os.environ, config.device)
    display = Display.silent() if not ranks.first else Display()
    if not resume and ranks.first:
        Run.refuse_existing(path, overwrite)
    try:
        with display.live(), stop_requested() as stop:
            display.note(f"reading {config.data}")
            data = load_data(config.source)
            if resume and not found.has_checkpoint:
                display.say(f"{path} was stopped before its first checkpoint: it begins anew")
            again = resume and found.has_checkpoint
            fit = fit_in(found.read_checkpoint(lambda _: None)[1], "first_fit") if again else None
            session = Session(config, data, fit=fit, report=display.work, ranks=ranks)
            config = session.config
            for remark in data.remarks:
                display.say(remark)
            if not again:
                rehearse(session, opset=opset, note=display.note, say=display.say)
            run = found or (Run.create(path, session.config, overwrite) if ranks.first else Run(path))
            if resume and given and ranks.first:
                run.write_config(config)
            display.say(f"{config.model} on {config.data}: {len(data.train)} images to train, validation is {data.chooses}, test is {data.reports}"
                        + (f"; {ranks.count} processes" if ranks.several else ""))
            display.say(f"{session.steps} steps of {config.batch_size} images, learning rate {config.lr:g}"
                        + (f"; weights: {session.weights_from} of {config.weights}" if session.weights_from else ""))
            if session.steps < ENOUGH // 2 and not resume:
                display.say(f"warning: {session.steps} steps are few to learn from. Expect little, or choose more --epochs" + (" or a smaller --batch-size." if "batch_size" in given else "."))
            result = run_training(config, run, resume=again, override=override, report=display.step, note=display.say if resume else display.note, stop=stop,
                                  session=session)
    finally:
        distributed.leave()
    if not ranks.first:
        raise typer.Exit
    return result


PLACES = ("data", "data_root", "workers", "threads")  # where the data lie and the machine that reads them may change
WIDTHS = ("budget", "allocation", "min_width", "max_width_share", "keep", "align")  # settings that decide the widths


def resumed(config: Recipe, given: dict, path: Path, override: bool) -> Recipe:
    """The run's own settings; options given beside --resume must agree with them, or are taken with --override."""
    differing = [f"--{name.replace('_', '-')} {value} (the run has {getattr(config, name)})" for name, value in given.items()
                 if value != getattr(config, name) and name not in ("checkpoint_every", *PLACES)]
    if differing and not override:
        raise DynpruneError(f"--resume goes on with the settings that {path} was started with, which differ: {', '.join(differing)}. Drop those options, or pass "
                            "--override to go on with them.")
    fixed = [name for name in ("model", "image_size", "policy", "seed", "optimizer", *WIDTHS) if name in given and given[name] != getattr(config, name)]
    if fixed:
        raise DynpruneError(f"--override cannot change --{fixed[0].replace('_', '-')}: the checkpoint in {path} would not fit. Start a new run with another --out.")
    return dataclasses.replace(config, **given).validate()


def do_compact(run: Path, min_rate: float, bn_images: int, finetune_epochs: int, finetune_lr: float, data: str = ""):
    from dynprune.deploy.compact import compact as make_compact
    from dynprune.report.tables import Display
    from dynprune.runs.directory import Run

    display = Display()
    with display.live():
        display.note("compacting and proving")
        found = Run.open(run)
        return make_compact(found, min_rate=min_rate, bn_images=bn_images, finetune_epochs=finetune_epochs, finetune_lr=finetune_lr, data=moved(found.config, data),
                            report=display.step, work=display.work)


INHERITED = ("data", "data_root", "image_size", "val_fraction", "augment", "workers", "batch_size", "label_smoothing", "threads", "seed")  # from the run that is gated
GENTLE_LR = 0.05  # for a network that is trained already


def do_gate(given: dict, base: Path | None, out: Path | None, overwrite: bool, resume: bool, trust: bool):
    from dynprune.data.loading import load_data
    from dynprune.gates.training import GateSession, gate as run_gate
    from dynprune.gates.rehearsal import rehearse_gates
    from dynprune.report.tables import Display
    from dynprune.runs.directory import GateRun, Run

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise DynpruneError("gate works in one process. Start it without torchrun.")
    if resume:
        if out is None or base is not None:
            raise DynpruneError("--resume goes on with the run in --out, with its settings. Pass --out, and no other run.")
        run = GateRun.open(out)
        run.refuse_code(given.get("model", ""), trust)
        config = resumed(run.config, given, out, False)
    else:
        if base is not None:
            source = Run.open(base)
            source.refuse_code(given.get("model", ""), trust)
            known = source.config
            if given.get("model", known.model) != known.model:
                raise DynpruneError(f'--model got "{given["model"]}", but {base} is of "{known.model}". Leave one of the two out.')
            if "weights" in given:
                raise DynpruneError(f"--weights got {given['weights']}, but the weights are those of {base}. Leave one of the two out.")
            given = {"lr": GENTLE_LR, **{name: getattr(known, name) for name in INHERITED}, **given, "model": known.model, "base": str(base)}
        config = GateConfig(**given).validate()
        path = out or run_name(config, "gate")
        Run.refuse_existing(path, overwrite)
    display = Display()
    with display.live(), stop_requested() as stop:
        display.note(f"reading {config.data}")
        session = GateSession(config, load_data(config.source))
        config = session.config
        if not (resume and run.has_checkpoint):
            rehearse_gates(session, note=display.note, say=display.say)
        run = run if resume else GateRun.create(path, config, overwrite)
        display.say(f"{config.base or config.model} on {config.data}: {len(session.model.gates)} gated groups with {sum(len(gate.sizes) for gate in session.model.gates)} gates; "
                    f"validation is {session.data.chooses}, test is {session.data.reports}")
        if resume and not run.has_checkpoint:
            display.say(f"{run.path} was stopped before its first checkpoint: it begins anew")
        return run_gate(config, run, resume=resume and run.has_checkpoint, report=display.step, note=display.say if resume else display.note, stop=stop, session=session)


def do_export_gated(run, out: Path | None, opset: int | None, fold_normalization: bool, data: str = ""):
    from dynprune.gates.export import export_gated
    from dynprune.report.tables import Display

    display = Display()
    with display.live():
        return export_gated(run, out=out, opset=opset, fold_normalization=fold_normalization, data=moved(run.config, data), report=display.work)


def do_bench_gated(run, batch: str, threads: int, data: str = ""):
    from dynprune.gates.bench import bench_gated
    from dynprune.report.tables import Display

    if batch not in ("1", "1,8,32"):
        raise DynpruneError(f"--batch got {batch}. A gated network takes one image at a time: leave --batch out.")
    display = Display()
    with display.live():
        return bench_gated(run, threads=threads, data=moved(run.config, data), report=display.note, work=display.work)


def do_export(run: Path, out: Path | None, opset: int | None, fold_normalization: bool, data: str = ""):
    from dynprune.deploy.export import export as make_onnx
    from dynprune.report.tables import Display
    from dynprune.runs.directory import Run

    display = Display()
    with display.live():
        display.note("exporting to ONNX and comparing with torch")
        found = Run.open(run)
        return make_onnx(found, out=out, opset=opset, fold_normalization=fold_normalization, data=moved(found.config, data))


def do_bench(targets: list[Path], against: Path | None, batch: str, threads: int, data: str = ""):
    from dynprune.deploy import bench as benchmark
    from dynprune.report.tables import Display
    from dynprune.runs.directory import Run

    batches = parse_batches(batch)
    display = Display()
    with display.live():
        if len(targets) == 2:
            return benchmark.bench_files(*targets, batches=batches, threads=threads, report=display.note)
        if len(targets) != 1 or targets[0].suffix == ".onnx":
            raise DynpruneError(f"bench got {len(targets)} file(s). Expected one run directory, or two ONNX files.")
        found = Run.open(targets[0])
        return benchmark.bench_run(found, batches=batches, threads=threads, against=Run.open(against) if against else None, data=moved(found.config, data),
                                   report=display.note)


def refuse_missed(result) -> None:
    """A budget that is missed is an error, after everything was shown."""
    from dynprune.budgets.fit import first_missed

    if missed := first_missed(result.budgets):
        raise told(f"budget {missed['budget']} missed: measured {missed['actual']:.4g}, allowed {missed['limit']:.4g}. On a quiet machine measure again; "
                            "if it stays so, train with a smaller budget.")


def do_bench_training(given: dict, targets: list[Path] | None, steps: int, swap_share: float, memory: bool):
    if targets:
        raise DynpruneError(f"bench --training got {targets[0]}. It takes no run: name the network with --model.")
    if not 0 <= swap_share <= 1:
        raise DynpruneError(f"--swap-share got {swap_share}. Expected a share in [0, 1].")
    config = TrainConfig(**given).validate()
    from dynprune.training.bench_training import bench_training
    from dynprune.report.tables import Display

    display = Display()
    with display.live():
        return bench_training(config, steps=steps, swap_share=swap_share, memory=memory, report=display.live_note)


def parse_batches(text: str) -> list[int]:
    try:
        batches = [int(part) for part in text.split(",")]
    except ValueError:
        batches = []
    if not batches or min(batches) < 1:
        raise DynpruneError(f'--batch got "{text}". Expected numbers of images separated by commas, such as 1,8,32.')
    return batches


@contextmanager
def stop_requested() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM ask the training loop to stop after its step; a second one stops at once."""
    asked: list[int] = []
    own = os.getpid()

    def ask(number: int, frame: object) -> None:
        if os.getpid() != own or asked:  # processes that decode photos inherit this
            interrupt(number, frame)
        asked.append(number)
        print("stopping after this step and saving; once more to stop at once", file=sys.stderr)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    except Stopped as error:
        error.exit_code = 128 + asked[0] if asked else error.exit_code
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def finish(json_output: bool, result: dict, tables: Callable[[], list]) -> None:
    from dynprune.report import tables as report

    if json_output:
        print(json.dumps(result))
    else:
        report.show(*tables())


class Interrupted(BaseException):
    """A signal asked the program to end at once. No `except Exception` stops it; every `finally` runs."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


def interrupt(number: int, _frame: object) -> None:
    raise Interrupted(number)


def show_warning(message: Warning | str, category: type[Warning], *place: object) -> None:
    """Our own warnings as one line; others as Python shows them."""
    if issubclass(category, DynpruneWarning):
        print(f"warning: {message}", file=sys.stderr)
    else:
        sys.stderr.write(warnings.formatwarning(message, category, *place[:2]))  # type: ignore[arg-type]


def fail(message: str, code: int, told: bool = False) -> NoReturn:
    """One line on stderr and, with --json, an object on stdout, unless a result stands there already."""
    if message:
        print(f"error: {message}", file=sys.stderr)
    if "--json" in sys.argv and not told:
        print(json.dumps({"error": message, "exit_code": code}))
    sys.exit(code)


def main() -> None:
    """Run a command. Exit codes: 0, 1 for errors, 2 for options that make no sense, 130 after Ctrl-C, 143 after SIGTERM."""
    for stream in (sys.stdout, sys.stderr):  # a terminal may not know a sign, and names of files need not be UTF-8
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    warnings.showwarning = show_warning
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except DynpruneError as error:
        fail(str(error), error.exit_code, error.told)
    except PermissionError as error:
        fail(f"Permission denied: {error.filename}. Make it readable (and a run directory writable), or choose another place.", 1)
    except Interrupted as error:
        fail(f"interrupted by {error}", error.exit_code)
    except typer.Abort:
        fail("interrupted", 128 + signal.SIGINT)
    except Exception as error:
        if not hasattr(error, "format_message"):  # Typer's own: options that make no sense
            raise
        if "--json" in sys.argv:
            fail(error.format_message(), 2)
        error.show()
        sys.exit(2)
