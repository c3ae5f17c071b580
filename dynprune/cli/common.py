"""Options that every command has: settings from a file, and how much is said meanwhile."""

from __future__ import annotations

import dataclasses
import inspect as python_inspect
import tomllib
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from dynprune.cli import options, process
from dynprune.errors import DynpruneError
from dynprune.runs.config import CompactConfig, GateConfig, TrainConfig, anchored

IN_FILE = "DEFAULT_MAP"  # what the command line's library calls a value that stood in a file
FIELDS = {field.name: field for kind in (GateConfig, CompactConfig, TrainConfig) for field in dataclasses.fields(kind)}


def read_settings(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8", errors="surrogateescape"))
    except OSError as error:
        raise DynpruneError(f"--config {path} cannot be read ({error.strerror}). Expected a TOML file.") from error
    except (ValueError, RecursionError) as error:
        raise DynpruneError(
            f"--config {path} is not TOML ({str(error)[:150]}). Expected lines such as: epochs = 30"
        ) from error


def options_of(command: Any) -> dict[str, Any]:
    """A command's options by the names that a settings file may give them: those of its flags."""
    found: dict[str, Any] = {}
    for option in command.params:
        if option.param_type_name == "option":
            names = [name.lstrip("-").replace("-", "_") for name in option.opts if name.startswith("--")]
            found |= {name: option for name in [*names, option.name]}
    for name in ("config", "help", "version"):
        found.pop(name, None)
    return found


def for_command(settings: Mapping[str, Any], name: str, commands: Mapping[str, Any]) -> dict[str, Any]:
    """What a settings file says to one command: the entries at its top and those of the table named after the command.
    Entries that only other commands know are left to them."""
    plain = {key: value for key, value in settings.items() if not isinstance(value, dict)}
    for key, value in settings.items():
        if isinstance(value, dict) and key not in commands:
            raise DynpruneError(f"--config has a table [{key}]. Expected the name of a command: {', '.join(commands)}.")
    own = settings.get(name, {})
    known = {key for other in commands.values() for key in options_of(other)} | FIELDS.keys()
    for key in plain:
        if key.replace("-", "_") not in known:
            raise DynpruneError(
                f'--config has an unknown setting "{key}". See dynprune {name} --help for those it has.'
            )
    mine = options_of(commands[name])
    for key in own:
        if key.replace("-", "_") not in mine:
            raise DynpruneError(f'--config has an unknown setting "{key}" in [{name}]. See dynprune {name} --help.')
    return {key.replace("-", "_"): value for key, value in {**plain, **own}.items() if key.replace("-", "_") in mine}


def as_default(name: str, value: Any, option: Any, folder: Path) -> Any:
    """An entry as the command line would give it. folder: from which paths in the file count."""
    field = FIELDS.get(name)
    if field is not None and field.metadata["auto"] is not None and value == field.metadata["auto"]:
        return "auto"
    flag = bool(getattr(option, "is_flag", False))
    several = bool(getattr(option, "multiple", False))
    wrong = isinstance(value, bool) is not flag or isinstance(value, list) and not several
    if wrong or not isinstance(value, str | int | float | bool | list):
        expected = "true or false" if flag else "a list" if several else "one value"
        raise DynpruneError(f"--config: {name} is {value!r}. Expected {expected}.")
    if several:
        return [str(entry) for entry in (value if isinstance(value, list) else [value])]
    return anchored(name, value, folder)


def use_settings(context: typer.Context, path: Path | None) -> Path | None:
    """Take a file's settings as the command's defaults."""
    if path is None or context.resilient_parsing:
        return path
    parent = context.parent
    assert parent is not None and context.info_name is not None
    commands = parent.command.commands  # type: ignore[attr-defined]  # of a group of commands
    own = options_of(context.command)
    found = for_command(read_settings(path), context.info_name, commands)
    context.default_map = {
        own[name].name: as_default(name, value, own[name], path.absolute().parent) for name, value in found.items()
    }
    return path


def quiet(_context: typer.Context, asked: bool) -> bool:
    if asked:
        process.VOICE = "quiet"
    return asked


def verbose(_context: typer.Context, asked: bool) -> bool:
    if asked:
        if process.VOICE == "quiet":
            raise DynpruneError("--quiet and --verbose exclude each other. Choose one.")
        process.VOICE = "verbose"
    return asked


Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="Settings from a TOML file, such as a run's config.toml; options given here come first. A table named "
        "after a command, such as [bench], is for that one alone. Paths count from the file's folder.",
        callback=use_settings,
        is_eager=True,
        show_default=False,
    ),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress; results, warnings and errors only.", callback=quiet)
]
Verbose = Annotated[
    bool,
    typer.Option("--verbose", help="Every phase as a line with the time; where an error came from.", callback=verbose),
]


def with_common(command: Callable) -> Callable:
    """Give a command --config, --quiet and --verbose."""
    hints = typing.get_type_hints(command, include_extras=True) if hasattr(command, "__annotations__") else {}
    signature = python_inspect.signature(command)
    own = [
        parameter.replace(
            annotation=hints.get(parameter.name, parameter.annotation), kind=python_inspect.Parameter.KEYWORD_ONLY
        )
        for parameter in signature.parameters.values()
    ]
    more = [
        python_inspect.Parameter(name, python_inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, default, kind in (("config", None, Config), ("quiet", False, Quiet), ("verbose", False, Verbose))
    ]

    def wrapper(context: typer.Context, **values: object) -> None:
        for option in more:
            values.pop(option.name)
        sources = {name: context.get_parameter_source(name) for name in context.default_map or {}}
        options.FROM_FILE = {name for name, source in sources.items() if source is not None and source.name == IN_FILE}
        command(**values)

    context = python_inspect.Parameter("context", python_inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    wrapper.__signature__ = python_inspect.Signature([context, *own, *more])  # type: ignore[attr-defined]  # which Typer reads
    wrapper.__doc__, wrapper.__name__ = command.__doc__, command.__name__
    return wrapper
