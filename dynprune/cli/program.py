"""The commands together. torch is imported inside them, so that `--help` is quick."""

from __future__ import annotations

from typing import Annotated

import typer

from dynprune.cli.common import with_common
from dynprune.cli.deploy import bench, compact, export, predict, report
from dynprune.cli.look import guide, inspect, plan
from dynprune.cli.options import with_settings
from dynprune.cli.process import run_app
from dynprune.cli.train import compare, gate, run, train
from dynprune.runs.config import CompactConfig, GateConfig
from dynprune.version import __version__

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def version(shown: bool) -> None:
    if shown:
        print(f"dynprune {__version__}")
        raise typer.Exit


@app.callback()
def dynprune(
    _version: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Compact CNNs by dynamic channel execution.

    In each training step a bandit picks a salient subset of every layer's channels and only those run, so training is
    cheaper and what comes out is already small. `dynprune run` does everything in one go; or step by step:

    **train** the channels that matter · **compact** them into a file · **export** it to ONNX · **bench** it against the
    dense network

    **gate** then lets each image decide which of the remaining channels to compute.
    """


for command in (
    train,
    with_settings(compact, CompactConfig),
    export,
    bench,
    predict,
    report,
    with_settings(gate, GateConfig, without=("base",)),
    run,
    compare,
    inspect,
    plan,
    guide,
):
    app.command()(with_common(command))


def main() -> None:
    """Run a command. Exit codes: 0, 1 for errors, 2 for options that make no sense, 130 after Ctrl-C, 143 after
    SIGTERM."""
    run_app(app)
