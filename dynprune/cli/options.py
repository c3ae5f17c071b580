"""Options that commands share, each defined once; those of settings are made from the settings' fields."""

from __future__ import annotations

import copy
import dataclasses
import inspect as python_inspect
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from dynprune.errors import DynpruneError
from dynprune.runs.config import Recipe, Task, TrainConfig

RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory that `dynprune train` wrote.")]
AnyRunPath = Annotated[
    Path, typer.Argument(metavar="RUN", help="Run directory that `dynprune train` or `dynprune gate` wrote.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing run directory.")]
Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="Run directory to write. [default: runs/MODEL-DATA-POLICY]", show_default=False),
]
Trust = Annotated[
    bool, typer.Option("--trust", help="Let the run name your own code as its model (package.module:factory).")
]
DataNow = Annotated[
    str, typer.Option("--data", help="Where the run's data lie now, if they were moved.", show_default=False)
]
Named = Annotated[
    str, typer.Option("--model", help="Name that model code yourself, instead of --trust.", show_default=False)
]
MinRate = Annotated[
    float, typer.Option("--min-rate", help="Drop channels that ran in less than this share of the steps.")
]
BnImages = Annotated[
    int, typer.Option("--bn-images", help="Re-estimate BatchNorm statistics on so many training images; 0 keeps them.")
]
FinetuneEpochs = Annotated[
    int, typer.Option("--finetune-epochs", help="Train the compact network on for so many epochs.")
]
FinetuneLr = Annotated[float, typer.Option("--finetune-lr", help="Learning rate at the start of fine-tuning.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the stopped run in --out, with its settings.")]
Network = Annotated[str, typer.Option("--model", "-m", help="Network, named as for `train`.")]
Input = Annotated[
    str,
    typer.Option(
        "--input",
        help="Input of one example, such as 3x224x224. [default: what the source is used to]",
        show_default=False,
    ),
]
Classes = Annotated[
    int,
    typer.Option(
        "--classes",
        help="Number of classes; 0 takes 1000 for torchvision and timm (segmentation 21, detection 91), else 10.",
    ),
]
Opset = Annotated[
    int | None,
    typer.Option(
        "--opset", help="ONNX opset; what was written is reported. [default: the exporter's]", show_default=False
    ),
]
Fold = Annotated[
    bool,
    typer.Option(
        "--fold-normalization", help="Put input normalisation into the graph: it then takes RGB pixels in 0..1."
    ),
]
FoldResize = Annotated[
    bool,
    typer.Option(
        "--fold-resize",
        help="Write RUN/compact.photos.onnx too, with resizing and normalisation inside: it takes photos of any size.",
    ),
]
Int8 = Annotated[bool, typer.Option("--int8", help="Write RUN/compact.int8.onnx too: weights and activations in int8.")]
Fp16 = Annotated[
    bool, typer.Option("--fp16", help="Write RUN/compact.fp16.onnx too: half the size, for GPUs; float32 in and out.")
]
Calibration = Annotated[
    int | None,
    typer.Option(
        "--calibration", help="Training images that give --int8 its ranges. [default: 500]", show_default=False
    ),
]
MaxDrop = Annotated[
    float | None,
    typer.Option(
        "--max-drop",
        help="Points of validation accuracy that --int8 may lose; beyond, the most sensitive layers stay in float32. "
        "[default: 1]",
        show_default=False,
    ),
]
Batch = Annotated[str, typer.Option("--batch", help="Batch sizes, separated by commas; the first gives the verdict.")]
BenchThreads = Annotated[int, typer.Option("--bench-threads", help="onnxruntime threads; 0 leaves its choice.")]

MACHINE = {"precision", "device", "threads", "seed", "checkpoint_every", "no_onnx", "reservoir", "compile"}


# what everyone needs, before the rest; --out with them
FIRST = {"data": "-d", "model": "-m", "weights": "-w", "budget": "-b", "epochs": "-e", "time": "-t"}


FROM_FILE: set[str] = set()  # options of this command that --config gave, and not the command line


def not_of_file(given: dict) -> dict:
    """Settings that were given on the command line: a file may hold those of other commands."""
    return {name: value for name, value in given.items() if name not in FROM_FILE}


def with_settings(command: Callable, kind: type[Task] = TrainConfig, without: tuple[str, ...] = ()) -> Callable:
    """Give a command an option per field of `kind`; it receives the ones that were given as the dict `given`."""
    fields = [field for field in dataclasses.fields(kind) if field.name not in without]
    hints = typing.get_type_hints(command, include_extras=True)
    own = [
        parameter.replace(
            annotation=in_panel(hints[parameter.name])
            if parameter.name not in ("out", "json_output")
            else hints[parameter.name],
            kind=parameter.KEYWORD_ONLY,
        )
        for parameter in python_inspect.signature(command).parameters.values()
        if parameter.name != "given"
    ]
    options = {field.name: setting_option(field, panel_of(field.name)) for field in fields}
    options = {name: options[name] for name in [*(name for name in FIRST if name in options), *options]}

    def wrapper(**values: object) -> None:
        given = {field.name: number_or_auto(field, values.pop(field.name)) for field in fields}
        command(
            given={
                name: tuple(value) if isinstance(value, list) else value
                for name, value in given.items()
                if value not in (None, [])
            },
            **values,
        )

    wrapper.__signature__ = python_inspect.Signature([*options.values(), *own])  # type: ignore[attr-defined]  # which inspect reads
    wrapper.__doc__, wrapper.__name__ = command.__doc__, command.__name__
    return wrapper


def setting_option(field: dataclasses.Field, panel: str | None) -> python_inspect.Parameter:
    """The option of a setting: its meaning, with the default as one would write it."""
    auto = field.metadata["auto"]
    default = (
        "auto"
        if auto is not None and field.default == auto
        else " ".join(field.default)
        if isinstance(field.default, tuple)
        else str(field.default)
    )
    text = field.metadata["help"] + (
        f" [default: {default}]" if default and not isinstance(field.default, bool) else ""
    )
    names = ["--" + field.name.replace("_", "-"), *([FIRST[field.name]] if field.name in FIRST else [])]
    option = typer.Option(*names, help=text, show_default=False, rich_help_panel=panel)
    value = list[str] if isinstance(field.default, tuple) else str if auto is not None else type(field.default)
    return python_inspect.Parameter(
        field.name, python_inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[value | None, option]
    )


def panel_of(name: str) -> str | None:
    """Under which heading a setting stands in --help; none for what everyone needs."""
    if name in FIRST:
        return None
    if name in MACHINE:
        return "Machine"
    if name in {field.name for field in dataclasses.fields(Task)}:
        return "Model and data"
    return "Training recipe" if name in {field.name for field in dataclasses.fields(Recipe)} else "Method"


def meaning(name: str) -> str:
    """What a setting of `train` means, for an option of a command that takes it without the others."""
    return TrainConfig.__dataclass_fields__[name].metadata["help"]


def in_panel(annotation: object) -> object:
    """An option of the command's own, shown below those that everyone needs."""
    kind, info = typing.get_args(annotation)[:2]
    if not isinstance(info, typer.models.OptionInfo):
        return annotation
    info = copy.copy(info)
    info.rich_help_panel = "This command"
    return Annotated[kind, info]


def number_or_auto(field: dataclasses.Field, value: object) -> object:
    """The number that "auto" stands for, or the one that was given, where a setting has both."""
    auto = field.metadata["auto"]
    if auto is None or value is None or value == "auto":
        return auto if value == "auto" and auto is not None else value
    try:
        number = type(auto)(value)
    except ValueError:
        number = auto
    if number == auto:
        raise DynpruneError(f"--{field.name.replace('_', '-')} got {value}. Expected {field.metadata['expected']}.")
    return number


def parse_batches(text: str) -> list[int]:
    """ "1,8,32" to numbers."""
    try:
        batches = [int(part) for part in text.split(",")]
    except ValueError:
        batches = []
    if not batches or min(batches) < 1:
        raise DynpruneError(f'--batch got "{text}". Expected numbers of images separated by commas, such as 1,8,32.')
    return batches
