"""A cascade as one HTML file: what it reaches beside static networks, what it costs, and which images go on.

Takes the result, what was seen on the way, and the data; computes nothing but ratios.
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from dynprune.cascades.build import CascadeResult, Sights
from dynprune.data.loading import Data, image_name
from dynprune.pages.charts import BLUE, GREEN, ORANGE, Chart, drawn
from dynprune.pages.page import embedded, folded, grid, heading, table, write_html
from dynprune.pages.survey import picture
from dynprune.units import digits, million, percent

SHOWN = 12  # images of each kind
MOST_CLASSES = 25


def write_cascade_page(path: Path, result: CascadeResult, sights: Sights, data: Data) -> None:
    """Write the page. Raises DynpruneError where the file cannot be written."""
    last = result.rows[-2].name
    rows: list[tuple[str, ...]] = [
        ("network", "MACs", "share", "test accuracy", "validation", "has the last word on", "mean ms", "p95 ms")
    ]
    for row in result.rows:
        ms = [digits(value) for value in (row.mean_ms, row.p95_ms)]
        rows.append(
            (
                row.name,
                million(row.macs),
                f"{row.macs / result.rows[-2].macs:.3f}",
                percent(row.accuracy),
                percent(row.val_accuracy),
                "left out" if row.name in result.left_out else percent(row.images_share),
                *ms,
            )
        )
    measured = (
        f"Chosen on validation images ({result.val_data}), reported on test images ({result.test_data}). Milliseconds: "
        f"single test images, every network in turn, {result.environment['threads'] or 'default'} thread(s), "
        f"{result.environment['processor']}, onnxruntime {result.environment['onnxruntime']}."
    )
    thresholds = [
        (f"{name} is trusted", f"where its best class leads by {threshold:.4f} of probability or more")
        for name, threshold in zip(result.chain, result.thresholds)
    ]
    parts = [
        f'<p class="verdict">{escape(result.verdict)}.</p>',
        heading("In short"),
        table(rows, head=True),
        table(thresholds),
        f'<p class="soft">{escape(measured)}</p>',
        heading("Charts"),
        grid([trade_off(result, sights), by_class(result)]),
        heading("Images that go on first"),
        *pictures(sights, data, unsure=True),
        heading("Images that stop first"),
        *pictures(sights, data, unsure=False),
        heading("Every class"),
        folded(
            "Share of each class that goes on",
            table([("class", "goes on"), *((name, percent(share)) for name, share in ranked(result))], head=True),
        ),
    ]
    write_html(path, f"{' then '.join(result.chain)}: a cascade beside {last} alone", parts)


def ranked(result: CascadeResult) -> list[tuple[str, float]]:
    return sorted(result.goes_on.items(), key=lambda item: -item[1])


def trade_off(result: CascadeResult, sights: Sights) -> Chart:
    """Test accuracy over mean cost: cascades of these networks as a line, the networks alone as another."""
    unit, per, field = ("M", 1e6, "macs") if result.cost == "macs" else ("ms", 1.0, "mean_ms")
    label = "million MACs of an image, in the mean" if unit == "M" else "ms of an image, in the mean"
    dots = sorted((getattr(row, field) / per, 100 * row.accuracy, row.name) for row in result.rows[:-1])
    costs, accuracies, names = zip(*dots)
    own = getattr(result.rows[-1], field) / per, 100 * result.rows[-1].accuracy
    curve = sorted((plan.cost / per, 100 * plan.accuracy) for plan in sights.curve if len(plan.chain) > 1)

    def draw(axes: Any) -> None:
        axes.plot(costs, accuracies, "o-", color=ORANGE, ms=4)
        axes.plot(*zip(*curve), "-", color=BLUE)
        axes.scatter(own[:1], own[1:], color=GREEN, s=36, zorder=3)
        for cost, accuracy, name in dots:
            axes.annotate(name, (cost, accuracy), xytext=(4, -11), textcoords="offset points")
        axes.annotate("this one", own, xytext=(-8, 7), textcoords="offset points")
        axes.set_xlabel(label)
        axes.set_ylabel("test accuracy, %")
        axes.margins(0.12)
        axes.grid(linewidth=0.6)

    alone = "; ".join(f"{name} {accuracy:.2f} % at {cost:.2f} {unit}" for cost, accuracy, name in dots)
    return drawn(
        "Accuracy over mean cost",
        f"Line: cascades of these networks, their thresholds chosen on validation images. Dots: the networks alone "
        f"({alone}). This one: {own[1]:.2f} % at {own[0]:.2f} {unit}.",
        draw,
    )


def by_class(result: CascadeResult) -> Chart:
    """Which classes go on most often."""
    found = ranked(result)
    shown = found[:MOST_CLASSES]

    def draw(axes: Any) -> None:
        at = np.arange(len(shown))
        axes.barh(at, [100 * share for _, share in shown], color=BLUE, height=0.7)
        axes.set_yticks(at, [name for name, _ in shown], fontsize=9)
        axes.invert_yaxis()
        axes.set_xlabel(
            "% of the test images that go on" + (f", {len(shown)} of {len(found)} classes" * (found != shown))
        )
        axes.grid(axis="x", linewidth=0.6)

    (most, much), (least, little) = found[0], found[-1]
    return drawn(
        "Who goes on, by class",
        f"Of {most} {100 * much:.0f} % of the images go on to a larger network, of {least} {100 * little:.0f} %.",
        draw,
        1.0 + 0.2 * len(shown),
    )


def pictures(sights: Sights, data: Data, *, unsure: bool) -> list[str]:
    """The test images that the first network is least, or most, sure of."""
    first, last = sights.chain[0], sights.chain[-1]
    order = np.argsort(sights.test.margin[first], kind="stable")
    chosen = order[:SHOWN] if unsure else order[::-1][:SHOWN]
    figures = []
    for place in map(int, chosen):
        label, said, later = (
            data.classes[own]
            for own in (sights.test.labels[place], sights.test.said[first, place], sights.test.said[last, place])
        )
        words = f"{label}: the first says {said}" + (f", the last {later}" if unsure else "")
        figures.append(embedded(picture(data, data.test, place), image_name(data.test, place), words))
    kind = "closest to a tie" if unsure else "surest"
    return [
        f'<p class="soft">The test images of which the first network is {kind}.</p>',
        f'<div class="worst">{"".join(figures)}</div>',
    ]
