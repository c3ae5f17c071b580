"""Charts of a survey, each an SVG that takes the page's colours, with a sentence that says what it shows.

matplotlib draws; words stay text, so that they can be read aloud, searched and copied.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from dynprune.deploy.compare import ComparedRun
from dynprune.pages.survey import Answers, GatedImages, LayerCost, Picks, Survey
from dynprune.units import digits

INK, FAINT = "#010203", "#040506"  # replaced by the page's own colours of text and of lines
KEY = "@@"
BLUE, ORANGE, GREEN, GREY = "#3d85c6", "#d9742b", "#3f9d5f", "#8c97a3"  # legible on light and on dark
COLOURS = (BLUE, ORANGE, GREEN, "#a9629b", "#b59a2b", "#5a9ea6")
HEAT = LinearSegmentedColormap.from_list("heat", [(0.24, 0.52, 0.78, 0.0), (0.24, 0.52, 0.78, 1.0)])
MOST_BARS = 16
WIDTH, HEIGHT = 4.8, 2.9  # inches: at 72 points to the inch legible on a phone


@dataclass(frozen=True)
class Chart:
    """svg: an element for a page. alt: what it shows, in words."""

    title: str
    svg: str
    alt: str


def drawn(title: str, alt: str, draw: Callable[[Any], None], height: float = HEIGHT) -> Chart:
    """One chart of one pair of axes."""
    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": title,
        "font.size": 10,
        "font.family": "sans-serif",
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": FAINT,
        "xtick.color": INK,
        "ytick.color": INK,
        "grid.color": FAINT,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure.add_subplot())
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return Chart(title, in_page(out.getvalue()), alt)


def above(axes: Any) -> None:
    """The legend on a line of its own, where it covers nothing."""
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=4, borderaxespad=0.2, columnspacing=1.2, handlelength=1.4
    )


def in_page(svg: str) -> str:
    """An SVG file as an element: as wide as its place, in the page's colours. KEY stands before its
    names, for what tells it from the others of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg[^>]*?) (?:height|width)="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) (?:height|width)="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid=")', rf"\1{KEY}", svg)
    svg = re.sub(r'(xlink:href="#|href="#|url\(#)', rf"\1{KEY}", svg)
    svg = svg.replace(INK, "currentColor").replace(FAINT, "var(--line)")
    return svg.replace("<svg", '<svg aria-hidden="true" focusable="false"', 1)


def training(survey: Survey) -> list[Chart]:
    """Accuracy and loss over epochs, of training (augmented images) and validation."""
    charts = []
    epochs = [int(line.get("epoch", number + 1)) for number, line in enumerate(survey.metrics)]
    for title, own, held, scale, unit in (
        ("Accuracy", "accuracy", "val_accuracy", 100, "%"),
        ("Loss", "loss", "val_loss", 1, "nats"),
    ):
        lines = [
            (name, [scale * line[key] if isinstance(line.get(key), int | float) else np.nan for line in survey.metrics])
            for name, key in (("training", own), ("validation", held))
        ]
        lines = [(name, values) for name, values in lines if not np.isnan(values).all()]
        if not epochs or not lines:
            continue

        def draw(axes: Any, lines: Any = lines, unit: str = unit) -> None:
            for (name, values), colour in zip(lines, (ORANGE, BLUE)):
                axes.plot(epochs, values, color=colour, label=name, marker="o" if len(epochs) < 20 else "", ms=3.5)
            axes.set_xlabel("epoch")
            axes.set_ylabel(unit)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(axis="y", linewidth=0.6)
            above(axes)

        ends = "; ".join(f"{name} from {values[0]:.2f} to {values[-1]:.2f} {unit}" for name, values in lines)
        charts.append(drawn(title, f"{title} over {len(epochs)} epochs: {ends}.", draw))
    return charts


def widths(survey: Survey) -> Chart:
    """Channels of every group, full-width beside compact."""
    groups = survey.widths
    numbers = np.arange(len(groups))
    named = len(groups) <= MOST_BARS

    def draw(axes: Any) -> None:
        axes.bar(numbers, [full for _, full, _ in groups], color=GREY, alpha=0.45, width=0.85, label="dense")
        axes.bar(numbers, [own for _, _, own in groups], color=BLUE, width=0.85, label="compact")
        axes.set_ylabel("channels")
        if named:
            axes.set_xticks(numbers, [group[0] for group in groups], rotation=60, ha="right", fontsize=9)
        else:
            axes.set_xlabel(f"groups of channels, in the network's order (1 to {len(groups)})")
        above(axes)

    full, own = sum(group[1] for group in groups), sum(group[2] for group in groups)
    least = min(groups, key=lambda group: group[2] / group[1])
    return drawn(
        "Widths",
        f"{own:,} of {full:,} channels stay. The narrowest for its width is {least[0]}: {least[2]} of {least[1]}.",
        draw,
        HEIGHT + 0.6 * named,
    )


def picks(found: Picks) -> Chart:
    """Which channels were picked, round by round; at the bottom the share of all steps in which each ran."""
    edges = np.cumsum([arms for _, arms in found.groups])[:-1]
    shown = np.vstack([found.chosen, np.repeat(found.executed[None], max(1, len(found.chosen) // 8), 0)])

    def draw(axes: Any) -> None:
        axes.imshow(shown, aspect="auto", cmap=HEAT, vmin=0, vmax=1, interpolation="nearest")
        for edge in edges if len(edges) < 40 else ():
            axes.axvline(edge - 0.5, color=FAINT, linewidth=0.6)
        axes.axhline(len(found.chosen) - 0.5, color=ORANGE, linewidth=1)
        axes.set_xlabel("channels, layer by layer")
        axes.set_ylabel("selection (below the line: share of all steps)")
        ticks = np.unique(np.linspace(0, len(found.steps) - 1, min(6, len(found.steps))).astype(int))
        axes.set_yticks(ticks, [f"step {found.steps[tick]}" for tick in ticks])

    never = int((found.executed == 0).sum())
    settled = int((found.chosen[-1] == found.chosen[max(0, len(found.chosen) - 2)]).mean() * 100)
    return drawn(
        "How often each channel was picked",
        f"{len(found.steps)} selections from step {found.steps[0]} to {found.steps[-1]}. {never:,} of "
        f"{len(found.executed):,} channels never ran; the last selection agrees with the one before in {settled} % of "
        "the channels.",
        draw,
        HEIGHT + 0.6,
    )


def costs(layers: Sequence[LayerCost], what: str) -> Chart | None:
    """Where "macs", "params" or "ms" went, layer by layer: the most expensive ones, and the rest together."""
    unit, scale, title = {
        "macs": ("million multiply-accumulates", 1e-6, "MACs by layer"),
        "params": ("thousand parameters", 1e-3, "Parameters by layer"),
        "ms": ("ms at batch 1, one thread", 1.0, "Milliseconds by layer"),
    }[what]
    values = [(layer.name, getattr(layer, f"dense_{what}"), getattr(layer, what)) for layer in layers]
    known = [(name, scale * dense, scale * own) for name, dense, own in values if dense is not None and own is not None]
    if not known or not sum(dense for _, dense, _ in known):
        return None
    first = sorted(known, key=lambda entry: -entry[1])[: MOST_BARS - 1]
    rest = [entry for entry in known if entry not in first]
    rows = [entry for entry in known if entry in first]
    if rest:
        rows.append((f"{len(rest)} others", sum(entry[1] for entry in rest), sum(entry[2] for entry in rest)))

    def draw(axes: Any) -> None:
        at = np.arange(len(rows))
        axes.barh(at, [dense for _, dense, _ in rows], color=GREY, alpha=0.45, height=0.8, label="dense")
        axes.barh(at, [own for _, _, own in rows], color=BLUE, height=0.45, label="compact")
        axes.set_yticks(at, [name for name, _, _ in rows], fontsize=9)
        axes.invert_yaxis()
        axes.set_xlabel(unit)
        above(axes)

    dense, own = sum(entry[1] for entry in known), sum(entry[2] for entry in known)
    most = max(known, key=lambda entry: entry[2])
    return drawn(
        title,
        f"In all {digits(own)} of {digits(dense)} {unit}. Most of what is left is in {most[0]}: {digits(most[2])}.",
        draw,
        1.2 + 0.22 * len(rows),
    )


def latency(survey: Survey) -> Chart | None:
    """How long single runs took at the first batch size: the share that was at least so quick."""
    rows = survey.bench.get("rows")
    if not isinstance(rows, list) or not rows or "dense" not in rows[0]:
        return None
    row = rows[0]
    sides = [
        (name, np.sort(row[key]["samples_ms"]))
        for name, key in (
            ("dense", "dense"),
            ("dense int8", "dense_int8"),
            ("compact", "compact"),
            ("compact int8", "compact_int8"),
        )
        if row.get(key)
    ]

    def draw(axes: Any) -> None:
        for (name, samples), colour in zip(sides, (GREY, ORANGE, BLUE, GREEN)):
            axes.step(samples, 100 * np.arange(1, len(samples) + 1) / len(samples), color=colour, label=name)
        axes.set_xscale("log")
        axes.set_xlabel(f"ms at batch {row['batch']}")
        axes.set_ylabel("% of the runs")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:g}"[0] in "25" else "")
        axes.grid(linewidth=0.6)
        above(axes)

    said = "; ".join(
        f"{name} {np.median(samples):.3g} ms (95 % within {np.percentile(samples, 95):.3g})" for name, samples in sides
    )
    return drawn("Latency", f"Medians of {len(sides[0][1])} runs each, taken in turn: {said}.", draw)


def confusion(found: Answers) -> Chart:
    """Which classes were taken for which."""
    counts, few = found.confusion, len(found.classes) <= 12
    shares = counts / np.maximum(1, counts.sum(1, keepdims=True))

    def draw(axes: Any) -> None:
        axes.imshow(shares, cmap=HEAT, vmin=0, vmax=1, interpolation="nearest")
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        if len(found.classes) <= 25:
            ticks, size = np.arange(len(found.classes)), 9 if few else 6
            axes.set_xticks(ticks, found.classes, rotation=60, ha="right", fontsize=size)
            axes.set_yticks(ticks, found.classes, fontsize=size)
        for (true, said), count in np.ndenumerate(counts) if few else ():
            if count:
                axes.text(said, true, str(count), ha="center", va="center", fontsize=7)

    wrong = counts - np.diag(np.diag(counts))
    true, said = np.unravel_index(wrong.argmax(), wrong.shape)
    worst = (
        f" Most often {found.classes[true]} is taken for {found.classes[said]}: {wrong.max()} times."
        if wrong.any()
        else ""
    )
    return drawn(
        "Confusion", f"{int(np.trace(counts)):,} of {int(counts.sum()):,} images are right.{worst}", draw, HEIGHT + 1.2
    )


def by_class(found: Answers) -> Chart:
    """Accuracy of every class, worst first; of many classes the worst."""
    accuracy = found.by_class
    order = [int(at) for at in np.argsort(np.nan_to_num(accuracy, nan=2.0)) if not np.isnan(accuracy[at])]
    shown = order[:25]

    def draw(axes: Any) -> None:
        at = np.arange(len(shown))
        axes.barh(at, 100 * accuracy[shown], color=BLUE, height=0.7)
        axes.set_yticks(at, [found.classes[own] for own in shown], fontsize=9)
        axes.invert_yaxis()
        axes.set_xlim(0, 100)
        axes.set_xlabel("% right" + (f", the worst 25 of {len(order)} classes" if len(order) > 25 else ""))
        axes.grid(axis="x", linewidth=0.6)

    worst, best = order[0], order[-1]
    return drawn(
        "Accuracy by class",
        f"From {100 * accuracy[worst]:.1f} % ({found.classes[worst]}) to {100 * accuracy[best]:.1f} % "
        f"({found.classes[best]}).",
        draw,
        1.0 + 0.2 * len(shown),
    )


def image_costs(found: GatedImages) -> Chart:
    """How many images cost how much, those that were taken for another class apart."""
    shares, right = 100 * found.shares, found.right

    def draw(axes: Any) -> None:
        edges = np.linspace(shares.min(), max(shares.max(), shares.min() + 0.1), 31)
        parts = [shares[right], shares[~right]]
        axes.hist(parts, edges, stacked=True, color=[BLUE, ORANGE], label=["right", "wrong"])
        axes.set_xlabel("% of the ungated network's MACs")
        axes.set_ylabel("test images")
        above(axes)

    means = [f"{100 * found.shares[own].mean():.1f} %" if own.any() else "none" for own in (right, ~right)]
    return drawn(
        "Cost of each image",
        f"From {shares.min():.1f} to {shares.max():.1f} % of the ungated network, in the mean {shares.mean():.1f} %: "
        f"of images that are right {means[0]}, of others {means[1]}.",
        draw,
    )


def class_costs(by_class: Mapping[str, float]) -> Chart:
    """Mean cost of the images of every class, the most costly first; of many classes these. by_class: shares of the
    ungated network's."""
    order = sorted(by_class.items(), key=lambda item: -item[1])
    shown = order[:25]

    def draw(axes: Any) -> None:
        at = np.arange(len(shown))
        axes.barh(at, [100 * share for _, share in shown], color=BLUE, height=0.7)
        axes.set_yticks(at, [name for name, _ in shown], fontsize=9)
        axes.invert_yaxis()
        axes.set_xlabel("% of the MACs" + (f", the most costly 25 of {len(order)} classes" if len(order) > 25 else ""))
        axes.grid(axis="x", linewidth=0.6)

    (most, much), (least, little) = order[0], order[-1]
    return drawn(
        "Cost by class",
        f"From {100 * much:.1f} % ({most}) to {100 * little:.1f} % ({least}) in the mean.",
        draw,
        1.0 + 0.2 * len(shown),
    )


def gate_layers(lines: Sequence[Mapping[str, Any]]) -> Chart:
    """What the gates of each layer open, and how much that tells. lines: as result.json holds them, in order."""
    at = np.arange(len(lines))
    shares, own_bits, of_class = (
        [float(line[key]) for line in lines] for key in ("open_share", "entropy_bits", "information_bits")
    )

    def draw(axes: Any) -> None:
        axes.bar(at, shares, color=GREY, width=0.8, label="open share")
        axes.plot(at, own_bits, "o-", color=BLUE, ms=3, label="bits per gate")
        axes.plot(at, of_class, "o-", color=ORANGE, ms=3, label="of them on the class")
        axes.set_ylim(0, 1)
        axes.set_xlabel("gated layers, from the input on")
        above(axes)

    counts = np.array([line["units"] for line in lines])
    mean = [float(counts @ own / counts.sum()) for own in (own_bits, of_class)]
    return drawn(
        "What gates decide, layer by layer",
        f"A gate carries {mean[0]:.2f} bits in the mean (1 if it is open for half of the images, 0 if it never "
        f"changes), {mean[1]:.3f} of them on the class.",
        draw,
    )


def trade_off(points: Sequence[tuple[str, float, float]], unit: str) -> Chart:
    """Accuracy of several networks over what they cost. points: name, cost, accuracy."""

    def draw(axes: Any) -> None:
        for number, (name, cost, accuracy) in enumerate(points):
            axes.scatter([cost], [100 * accuracy], color=COLOURS[number % len(COLOURS)], s=28, zorder=3)
            axes.annotate(name, (cost, 100 * accuracy), xytext=(4, 4), textcoords="offset points", fontsize=9)
        axes.set_xlabel(unit)
        axes.set_ylabel("test accuracy, %")
        axes.margins(0.15)
        axes.grid(linewidth=0.6)

    said = "; ".join(f"{name}: {100 * accuracy:.2f} % at {digits(cost)}" for name, cost, accuracy in points)
    return drawn(f"Accuracy over {unit}", f"{said} {unit}.", draw)


COSTS = {"train_seconds": (1, "seconds of training"), "train_macs": (1e12, "trillion training MACs"),
         "params": (1e6, "million parameters")}  # fmt: skip


LEGEND = 45  # letters that fit beside each other above a chart


def policies(runs: Sequence[ComparedRun], cost: str) -> Chart | None:
    """Accuracy of every run of a comparison over what it cost, one colour for each policy; None where all cost the
    same. cost: a key of COSTS."""
    scale, unit = COSTS[cost]
    columns = max(1, min(3, LEGEND // (max(len(run.policy) for run in runs) + 4)))
    found: dict[str, list[tuple[float, float]]] = {}
    for run in runs:
        found.setdefault(run.policy, []).append((getattr(run, cost) / scale, 100 * run.accuracy))
    costs = [x for points in found.values() for x, _ in points]
    if max(costs) - min(costs) <= 0.01 * max(costs):
        return None

    def draw(axes: Any) -> None:
        for number, (policy, points) in enumerate(found.items()):
            mark = "osD^v"[number // len(COLOURS) % 5]
            axes.scatter(*zip(*points), color=COLOURS[number % len(COLOURS)], marker=mark, s=28, zorder=3, label=policy)
        axes.set_xlabel(unit)
        axes.set_ylabel("test accuracy, %")
        axes.margins(0.1)
        axes.grid(linewidth=0.6)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2, columnspacing=1.2,
                    handletextpad=0.1)  # fmt: skip

    said = "; ".join(
        f"{policy}: {np.mean([y for _, y in points]):.2f} % at {digits(float(np.mean([x for x, _ in points])))}"
        for policy, points in found.items()
    )
    lines = -(-len(found) // columns)
    return drawn(f"Accuracy over {unit}", f"Means by policy: {said} {unit}.", draw, HEIGHT + 0.2 * (lines - 1))
