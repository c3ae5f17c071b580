"""A report as one HTML file that needs nothing else: no script, no font, no picture from elsewhere.

Takes surveys of one run or several; writes what they tell, and computes nothing but ratios.
"""

from __future__ import annotations

import base64
import io
import itertools
import re
import shlex
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from dynprune.deploy.compare import Comparison
from dynprune.files.disk import write_text
from dynprune.pages import charts
from dynprune.pages.charts import Chart
from dynprune.pages.survey import GatedImage, GatedImages, Survey, WorstImage
from dynprune.units import digits
from dynprune.version import __version__

STYLE = """
:root { color-scheme: light dark; --paper: #fbfbf9; --card: #ffffff; --ink: #1c2126; --soft: #5c6670; --line: #d5d9dd;
  --mark: #2465a4; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171a; --card: #1c2024; --ink: #e6e9ec; --soft: #a0a9b2;
  --line: #3a4249; --mark: #7db5ea; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1360px; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; border-bottom: 1px solid var(--line); }
p { margin: .4rem 0; max-width: 75ch; } .soft { color: var(--soft); font-size: .9rem; }
.verdict { font-size: 1.15rem; border-left: 4px solid var(--mark); padding: .3rem .8rem; max-width: 75ch; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); gap: 1rem; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .7rem; }
figure h3 { font-size: 1rem; margin: 0 0 .3rem; } figure svg { display: block; width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: .85rem; margin-top: .3rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
@media (max-width: 600px) { .wide th[scope=row] { min-width: 7rem; overflow-wrap: anywhere; } }
th { font-weight: 600; } td.number, th.number { text-align: right; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .6rem; overflow-x: auto;
  font-size: .85rem; } summary { cursor: pointer; margin: .4rem 0; }
.worst { display: flex; flex-wrap: wrap; gap: .8rem; } .worst figure { width: 136px; font-size: .85rem; }
.worst img { width: 100%; image-rendering: auto; display: block; border-radius: 3px; }
svg text { font-family: system-ui, sans-serif !important; }
"""


def write_page(path: Path, surveys: Sequence[Survey], compared: Sequence[Comparison] = ()) -> None:
    """Write the report of these runs, below the comparisons that they belong to. Raises DynpruneError where the file
    cannot be written."""
    alone = len(surveys) == 1 and not compared
    title = (
        f"{surveys[0].model} on {Path(surveys[0].data).name}"
        if alone
        else "; ".join(f"{own.model} on {Path(own.data).name}, budget {own.budget}" for own in compared)
        or f"{len(surveys)} runs: {', '.join(survey.path.name for survey in surveys)}"
    )
    parts = [part for survey in surveys for part in of_run(survey, alone=alone)]
    if len(surveys) > 1:
        parts = [*side_by_side(surveys), *parts]
    write_html(path, title, [*(part for own in compared for part in of_comparison(own)), *parts])


def of_comparison(comparison: Comparison) -> list[str]:
    """Policies beside each other: what each reaches, and what it costs to get there."""
    lines: list[tuple[str, ...]] = [
        ("policy", "test accuracy", "spread", "seeds", "MACs", "parameters", "training MACs", "training seconds")
    ]
    lines += [
        (
            own.policy,
            f"{100 * own.accuracy:.2f} %",
            "-" if own.spread is None else f"{100 * own.spread:.2f}",
            str(own.seeds),
            f"{own.macs / 1e6:,.2f} M",
            f"{digits(own.params / 1e6)} M",
            f"{digits(own.train_macs / 1e12)} T",
            f"{own.train_seconds:,.0f}",
        )
        for own in comparison.policies
    ]
    equal = {"images": "images", "cost": "multiplications"}.get(comparison.equal, comparison.equal)
    said = "".join(f'<p class="verdict">{escape(line)}</p>' for line in comparison.verdict.splitlines())
    note = (
        f'<p class="soft">Every policy was given equal {equal}. Means over seeds, with their standard deviation, on '
        f"{escape(comparison.test_data)}, which chose nothing.</p>"
    )
    drawn = [charts.policies(comparison.runs, of) for of in ("train_seconds", "train_macs", "params")]
    return [heading("Policies"), said, table(lines, True), note, grid([chart for chart in drawn if chart])]


def write_html(path: Path, title: str, parts: Iterable[str]) -> None:
    """A page of these parts. Raises DynpruneError where the file cannot be written."""
    write_text(
        path,
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{escape(title)}</h1>\n"
        + apart("\n".join(parts))
        + f'\n<p class="soft">Written by dynprune {__version__}.</p>\n</main>\n</body>\n</html>\n',
    )


def of_run(survey: Survey, alone: bool) -> list[str]:
    level = "" if alone else f"<h1>{escape(survey.path.name)}</h1>"
    parts = [level, verdict(survey), heading("In short"), table(summary(survey))]
    if rows := gated_times(survey):
        parts += [heading("Time in onnxruntime"), table(rows, head=True), *how_gated_were_timed(survey)]
    if rows := times(survey):
        parts += [heading("Time in onnxruntime"), table(rows, head=True), *how_measured(survey)]
    drawn = [*charts.training(survey)]
    if survey.widths:
        drawn.append(charts.widths(survey))
    drawn += [chart for what in ("macs", "params", "ms") if (chart := charts.costs(survey.layers, what))]
    drawn += [chart for chart in (charts.latency(survey),) if chart]
    if survey.picks:
        drawn.append(charts.picks(survey.picks))
    if survey.answers:
        drawn += [charts.confusion(survey.answers), charts.by_class(survey.answers)]
    if survey.gated:
        drawn += gate_charts(survey)
    parts += [heading("Charts"), grid(drawn)] if drawn else []
    if survey.gated:
        parts += [*easy_and_hard(survey.gated), heading("Every gated layer"), folded("Numbers", gate_table(survey))]
    if survey.answers:
        parts += [heading("Images that were taken for another class"), *worst_images(survey)]
    if survey.widths:
        parts += [heading("Every layer"), folded("Widths and costs as numbers", layer_table(survey))]
    parts += [
        heading("To repeat it"),
        f"<pre>{escape(commands(survey))}</pre>",
        folded("All settings", f"<pre>{escape(survey.settings)}</pre>"),
        folded("Versions and machine", table([(key, str(value)) for key, value in survey.environment.items()])),
    ]
    return parts


def heading(text: str) -> str:
    return f"<h2>{escape(text)}</h2>"


def verdict(survey: Survey) -> str:
    """The first sentence: what it came to."""
    said = []
    if survey.accuracy is not None:
        said.append(f"{100 * survey.accuracy:.2f} % right on the test images")
    for told in (survey.results.get("gate", {}), survey.bench):
        if isinstance(line := told.get("verdict"), str) and line:
            said.append(line)
    if not said:
        said.append("Not compacted and not benchmarked yet: only training is told here")
    return f'<p class="verdict">{escape("; ".join(said))}.</p>'


def summary(survey: Survey) -> list[tuple[str, ...]]:
    """What a reader asks first, with what each number was taken on."""
    rows: list[tuple[str, ...]] = [("network", survey.model), ("data", survey.data)]
    train, compact = survey.results.get("train", {}), survey.results.get("compact", {})
    for name, result in (("after training", train), ("compact", compact)):
        if isinstance(result.get("accuracy"), int | float) and "gate" not in survey.results:
            rows.append((f"test accuracy, {name}", f"{100 * result['accuracy']:.2f} % ({result.get('test_data', '')})"))
    if isinstance(compact.get("accuracy_before"), int | float):
        rows.append(("test accuracy, untouched network", f"{100 * compact['accuracy_before']:.2f} %"))
    for name, key, unit, scale in (("MACs", "macs", "M", 1e6), ("parameters", "params", "M", 1e6)):
        if compact.get(f"dense_{key}") and compact.get(key):
            dense, own = compact[f"dense_{key}"], compact[key]
            rows.append((name, f"{own / scale:,.2f} {unit} of {dense / scale:,.2f} {unit}, {dense / own:.2f}x fewer"))
    if gates := survey.results.get("gate", {}):
        rows += gate_rows(gates)
    for line in survey.bench.get("budgets") or compact.get("budgets") or []:
        met = "met" if line["met"] else "MISSED"
        rows.append((f"budget {line['budget']}", f"{digits(line['actual'])} of {digits(line['limit'])}, {met}"))
    if isinstance(train.get("seconds"), int | float):
        rows.append(("training", f"{train['seconds']:,.0f} s for {train.get('steps')} steps"))
    for made in survey.results.get("export", {}).get("variants") or []:
        rows.append((made["kind"], f"{100 * made['accuracy']:.2f} % on test images, {made['verdict']}"))
    return rows


def times(survey: Survey) -> list[tuple[str, ...]]:
    """Milliseconds of every file at every batch size."""
    rows = survey.bench.get("rows")
    if not isinstance(rows, list) or not rows or "dense" not in rows[0]:
        return []
    sides = [key for key in ("dense", "dense_int8", "compact", "compact_int8") if rows[0].get(key)]
    lines = [("batch", *(f"{side.replace('_', ' ')}, ms (p95)" for side in sides), "compact is faster by")]
    for row in rows:
        cells = [f"{row[side]['p50_ms']:.3g} ({row[side]['p95_ms']:.3g})" for side in sides]
        both = f", in int8 {row['speedup_int8_p50']:.2f}x" if row.get("speedup_int8_p50") else ""
        lines.append((str(row["batch"]), *cells, f"{row['speedup_p50']:.2f}x{both}"))
    return lines


def gate_rows(gates: dict) -> list[tuple[str, ...]]:
    """What gates reached, as the command says it."""
    stats = gates.get("stats")
    if not isinstance(stats, dict):
        return []
    shares = stats.get("percentiles", {})
    rows: list[tuple[str, ...]] = [
        (
            "gates",
            f"{gates['units']:,}, {gates['estimator']}; {100 * stats['varying_share']:.0f} % vary with the image",
        ),
        ("test accuracy, gated", f"{100 * gates['accuracy']:.2f} % ({gates['test_data']})"),
        (
            "mean cost of an image",
            f"{gates['macs'] / 1e6:,.2f} M of {gates['dense_macs'] / 1e6:,.2f} M MACs, {100 * stats['share']:.2f} % "
            f"(target {100 * gates['target']:.2f} %, {'met' if gates['met'] else 'MISSED'})",
        ),
        ("cost, 5th to 95th percentile", f"{100 * shares['5']:.2f} to {100 * shares['95']:.2f} %"),
        (
            "accuracy with frozen gates",
            f"{100 * stats['frozen_accuracy']:.2f} % at {100 * stats['frozen_share']:.2f} % of the MACs",
        ),
    ]
    if isinstance(gates.get("static_accuracy"), float) and gates.get("static_macs"):
        share = 100 * gates["static_macs"] / gates["dense_macs"]
        rows.append(
            ("a static network of this cost", f"{100 * gates['static_accuracy']:.2f} % at {share:.2f} % of the MACs")
        )
    return rows


def gated_times(survey: Survey) -> list[tuple[str, ...]]:
    """Milliseconds of single images, of every network that `bench` timed beside the gated one."""
    rows = survey.bench.get("rows")
    if not isinstance(rows, list) or not rows or "network" not in rows[0]:
        return []
    lines: list[tuple[str, ...]] = [("network", "MACs in the mean", "mean ms", "p50", "p95")]
    for row in rows:
        ms = [f"{row[key]:.3g}" for key in ("mean_ms", "p50_ms", "p95_ms")]
        lines.append((row["network"], f"{row['macs'] / 1e6:,.2f} M", *ms))
    return lines


def how_gated_were_timed(survey: Survey) -> list[str]:
    where = survey.bench.get("environment", {})
    return [
        f'<p class="soft">{survey.bench.get("images")} single test images, every network in turn, '
        f"{survey.bench.get('threads') or 'default'} thread(s); {escape(str(where.get('processor', '')))}, onnxruntime "
        f"{escape(str(where.get('onnxruntime', '')))}.</p>"
    ]


def gate_charts(survey: Survey) -> list[Chart]:
    assert survey.gated is not None
    stats = survey.results.get("gate", {}).get("stats") or {}
    found = [charts.image_costs(survey.gated)]
    if stats.get("by_class"):
        found.append(charts.class_costs(stats["by_class"]))
    if stats.get("layers"):
        found.append(charts.gate_layers(stats["layers"]))
    return found


def easy_and_hard(found: GatedImages) -> list[str]:
    """The test images that cost least, and those that cost most."""
    looked = "all" if len(found.shares) == found.total else f"{len(found.shares):,} of {found.total:,}"

    def shown(own: GatedImage) -> str:
        words = own.label if own.said == own.label else f"{own.label}, taken for {own.said}"
        return embedded(own.pixels, own.name, f"{words}: {100 * own.share:.1f} % of the MACs")

    return [
        heading("Easy images"),
        f'<p class="soft">Of {looked} test images, those for which the gates open least.</p>',
        f'<div class="worst">{"".join(map(shown, found.easiest))}</div>',
        heading("Hard images"),
        '<p class="soft">Those for which they open most.</p>',
        f'<div class="worst">{"".join(map(shown, found.hardest))}</div>',
    ]


def gate_table(survey: Survey) -> str:
    lines: list[tuple[str, ...]] = [("layer", "gates", "open", "vary with the image", "bits per gate", "on the class")]
    for line in (survey.results.get("gate", {}).get("stats") or {}).get("layers", []):
        shares = [f"{100 * line[key]:.1f} %" for key in ("open_share", "varying_share")]
        bits = [f"{line[key]:.3f}" for key in ("entropy_bits", "information_bits")]
        lines.append((line["group"], str(line["units"]), *shares, *bits))
    return table(lines, True)


def how_measured(survey: Survey) -> list[str]:
    bench = survey.bench
    where, runs = bench.get("environment", {}), [len(row["dense"]["samples_ms"]) for row in bench["rows"]]
    return [
        f'<p class="soft">Medians of {", ".join(map(str, runs))} runs of each file, taken in turn in one process, '
        f"{bench.get('threads') or 'default'} thread(s); {escape(str(where.get('processor', '')))}, onnxruntime "
        f"{escape(str(where.get('onnxruntime', '')))}. The dense file has random weights unless a trained dense "
        "run was compared: it is as fast.</p>"
    ]


def table(rows: Iterable[tuple[str, ...]], head: bool = False) -> str:
    """Rows of cells; with `head` the first row names the columns, else the first cell names the row."""
    lines = []
    for number, row in enumerate(rows):
        kind = "th" if head and number == 0 else "td"
        first = f'<th scope="{"col" if kind == "th" else "row"}">{escape(row[0])}</th>'
        scope = ' scope="col"' if kind == "th" else ""
        lines.append(f"<tr>{first}{''.join(f'<{kind}{scope}>{escape(cell)}</{kind}>' for cell in row[1:])}</tr>")
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def folded(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def grid(drawn: Iterable[Chart]) -> str:
    return f'<div class="grid">{"".join(map(figure, drawn))}</div>'


def apart(text: str) -> str:
    """Give the names inside every chart of a page a number of their own."""
    numbers = itertools.count(1)
    return re.sub(r"<svg.*?</svg>", lambda found: found[0].replace(charts.KEY, f"c{next(numbers)}-"), text, flags=re.S)


def figure(chart: Chart) -> str:
    """A chart with its words: read aloud in place of the picture, and shown below it."""
    return (
        f'<figure role="group" aria-label="{escape(chart.title)}"><h3>{escape(chart.title)}</h3>{chart.svg}'
        f"<figcaption>{escape(chart.alt)}</figcaption></figure>"
    )


def worst_images(survey: Survey) -> list[str]:
    found = survey.answers
    assert found is not None
    if not found.worst:
        return ["<p>None.</p>"]
    looked = "all" if found.images == found.total else f"{found.images:,} of {found.total:,}"
    said = (
        f'<p class="soft">By {escape(found.by)}, of {looked} test images ({escape(found.test_data)}), those whose own '
        "class seemed least probable.</p>"
    )
    return [said, f'<div class="worst">{"".join(map(worst_image, found.worst))}</div>']


def worst_image(own: WorstImage) -> str:
    sure = f"{100 * own.probability:.0f} %; own class {100 * own.own_probability:.1f} %"
    return embedded(own.pixels, own.name, f"{own.label}, taken for {own.said} ({sure})")


def embedded(pixels: Tensor, name: str, words: str) -> str:
    """An image inside the page, with words below. pixels: uint8, (3, height, width)."""
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())).save(out, "PNG")
    data = base64.b64encode(out.getvalue()).decode()
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{escape(name)}"><figcaption>{escape(words)}<br>'
        f"{escape(Path(name).name)}</figcaption></figure>"
    )


def layer_table(survey: Survey) -> str:
    """The numbers behind the charts."""
    of_widths = table(
        [("group", "dense", "compact"), *((n, str(full), str(own)) for n, full, own in survey.widths)], True
    )
    lines: list[tuple[str, ...]] = [
        ("layer", "MACs dense", "compact", "parameters dense", "compact", "ms dense", "compact")
    ]
    for layer in survey.layers:
        ms = ["-" if value is None else f"{value:.4f}" for value in (layer.dense_ms, layer.ms)]
        counts = [f"{value:,}" for value in (layer.dense_macs, layer.macs, layer.dense_params, layer.params)]
        lines.append((layer.name, *counts, *ms))
    if survey.between_ms:
        lines.append(("between layers", "", "", "", "", *(f"{value:.4f}" for value in survey.between_ms)))
    return of_widths + table(lines, True)


def commands(survey: Survey) -> str:
    """What a reader types to get the same."""
    again = shlex.quote(f"{survey.path.name}-again")
    file = "config.toml" if survey.command == "train" else f"{survey.command}.toml"
    first = f"dynprune {survey.command} --config {shlex.quote(str(survey.path / file))} --out {again}"
    rest = [f"dynprune compact {again}"] if survey.command == "train" else []
    export = survey.results.get("export", {})
    options = "".join(f" --{made['kind']}" for made in export.get("variants") or [])
    options += " --fold-normalization" if export.get("fold_normalization") else ""
    if export:
        rest.append(f"dynprune export {again} --onnx{options}")
    if survey.bench:
        rest.append(f"dynprune bench {again}")
    return "\n".join([first, *rest])


def side_by_side(surveys: Sequence[Survey]) -> list[str]:
    """Several runs in one table and as points of a trade-off."""
    lines: list[tuple[str, ...]] = [
        ("run", "network", "test accuracy", "MACs", "parameters", "ms, batch 1", "speed-up")
    ]
    by_macs, by_ms = [], []
    for survey in surveys:
        compact, bench = survey.results.get("compact", {}), survey.bench
        trained = survey.results.get("train") or survey.results.get("untrained") or {}
        macs, params = (compact.get(key) or trained.get(key) for key in ("macs", "params"))
        ms = bench.get("compact_p50_ms")
        lines.append(
            (
                survey.path.name,
                survey.model,
                "-" if survey.accuracy is None else f"{100 * survey.accuracy:.2f} %",
                f"{macs / 1e6:,.2f} M" if macs else "-",
                f"{params / 1e6:,.2f} M" if params else "-",
                f"{ms:.3g}" if ms else "-",
                f"{bench['speedup_p50']:.2f}x" if bench.get("speedup_p50") else "-",
            )
        )
        if survey.accuracy is not None and macs:
            by_macs.append((survey.path.name, macs / 1e6, survey.accuracy))
        if survey.accuracy is not None and ms:
            by_ms.append((survey.path.name, float(ms), survey.accuracy))
    drawn = [
        charts.trade_off(points, unit)
        for points, unit in ((by_macs, "million MACs"), (by_ms, "ms at batch 1"))
        if len(points) > 1
    ]
    note = (
        '<p class="soft">Milliseconds of different runs were taken at different times; dynprune bench compares two '
        "files in turn.</p>"
    )
    return [heading("Side by side"), table(lines, True), note, grid(drawn)]
