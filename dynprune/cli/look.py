"""Commands that look at a network and train nothing: inspect, plan, guide."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from dynprune.budgets.limits import Budget
from dynprune.cli.options import Classes, Input, Json, Network, meaning
from dynprune.cli.process import finish, listening, told
from dynprune.runs.config import TrainConfig

Budgets = Annotated[list[str], typer.Option("--budget", "-b", help="As for `train`; several hold at once.")]


def inspect(
    model: Network = TrainConfig.model,
    input_shape: Input = "",
    classes: Classes = 0,
    check: Annotated[
        bool, typer.Option("--check", help="Remove random channels and prove that the compact copy computes the same.")
    ] = False,
    fraction: Annotated[
        float, typer.Option("--fraction", help="Share of each group's channels that --check removes.")
    ] = 0.5,
    seed: Annotated[int, typer.Option("--seed", help="Which channels --check removes.")] = 0,
    json_output: Json = False,
) -> None:
    """Show which channels of a network can be removed, which cannot and why; with --check, prove it.

    Example: `dynprune inspect --model torchvision:shufflenet_v2_x1_0 --check`
    """
    from dynprune.commands.inspect import inspect as verb
    from dynprune.display.tables import inspect_tables

    result = verb(model, shape=input_shape, classes=classes, check=check, fraction=fraction, seed=seed)
    finish(json_output, dataclasses.asdict(result), lambda: inspect_tables(result))
    if result.check is not None and not result.check.ok:
        raise typer.Exit(1)


def plan(
    model: Network = TrainConfig.model,
    budget: Budgets = ["0.25"],  # noqa: B006 (Typer reads it)
    allocation: Annotated[
        str, typer.Option("--allocation", help="uniform or balanced; with --from, learned.")
    ] = "uniform",
    learned_by: Annotated[
        Path | None, typer.Option("--from", help="Use what the bandit of this run learned.", metavar="RUN")
    ] = None,
    latency: Annotated[
        bool, typer.Option(help="Predict milliseconds in onnxruntime; layers are timed once and kept.")
    ] = True,
    align: Annotated[str, typer.Option("--align", help=meaning("align"))] = TrainConfig.align,
    min_width: Annotated[int, typer.Option("--min-width", help=meaning("min_width"))] = TrainConfig.min_width,
    max_width_share: Annotated[
        float, typer.Option("--max-width-share", help=meaning("max_width_share"))
    ] = TrainConfig.max_width_share,
    keep: Annotated[list[str] | None, typer.Option("--keep", help=meaning("keep"))] = None,
    int8: Annotated[bool, typer.Option("--int8", help=meaning("int8"))] = False,
    input_shape: Input = "",
    classes: Classes = 0,
    json_output: Json = False,
) -> None:
    """Show, before any training, which widths a budget gives and what they cost.

    Example: `dynprune plan --model torchvision:resnet18 --budget macs=0.25 --budget params=0.11 --allocation balanced`
    """
    allowed = Budget(tuple(budget), allocation, align, min_width, max_width_share, tuple(keep or ()), int8)
    from dynprune.commands import plan as verb
    from dynprune.display.tables import plan_table

    with listening() as listener:
        result = verb.plan(
            model,
            allowed,
            shape=input_shape,
            classes=classes,
            latency=latency,
            learned_by=learned_by,
            listener=listener,
        )
    finish(json_output, dataclasses.asdict(result), lambda: [plan_table(result)])
    if not result.satisfiable:
        raise told(result.problem)


def guide(
    topic: Annotated[
        str | None,
        typer.Argument(metavar="[TOPIC]", help="Page to show; without one, the list of pages.", show_default=False),
    ] = None,
) -> None:
    """Show a page of the guide in the terminal.

    Example: `dynprune guide budgets`
    """
    from rich.console import Console
    from rich.markdown import Markdown

    from dynprune.guide import TOPICS, page

    text = (
        page(topic)
        if topic
        else "# Guide\n\n`dynprune guide TOPIC` shows a page.\n\n"
        + "\n".join(f"- **{name}**: {words}" for name, words in TOPICS.items())
    )
    Console().print(Markdown(text))
