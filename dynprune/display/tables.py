"""How results look: tables on stdout.

Takes the result dataclasses of the other modules and a rich Console; computes nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from dynprune.units import digits, duration, mebibytes, million, percent

if TYPE_CHECKING:  # these import torch
    from dynprune.cascades.build import CascadeResult
    from dynprune.deploy.bench import BenchResult, Latency
    from dynprune.deploy.compact import CompactResult
    from dynprune.deploy.compare import Comparison
    from dynprune.deploy.export import ExportResult
    from dynprune.deploy.predict import Prediction
    from dynprune.deploy.quantize import Variant
    from dynprune.deploy.several import Curve
    from dynprune.deploy.trained import TrainedResult
    from dynprune.gates.bench import GatedBenchResult
    from dynprune.gates.export import GatedExportResult
    from dynprune.gates.stats import GateStats
    from dynprune.gates.training import GateResult
    from dynprune.structure.inspect import Inspection
    from dynprune.training.bench_training import TrainingBench
    from dynprune.training.plan import Plan
    from dynprune.training.train import TrainResult


def titled(title: str, *columns: str) -> Table:
    """An empty table. Where the terminal is narrow, words go to the next line, and so do long names, whole: rich would
    cut those, and a name that is cut cannot be typed (`--keep`, a path)."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def pairs(title: str, rows: list[tuple[str, str]]) -> Table:
    table = titled(title, "", "")
    table.show_header = False
    for name, value in rows:
        table.add_row(name, value)
    return table


def train_table(result: TrainResult) -> Table:
    return pairs(
        "train",
        [
            ("policy", result.policy),
            ("test accuracy", f"{percent(result.accuracy)} ({result.test_data})"),
            ("validation accuracy", f"{percent(result.val_accuracy)} ({result.val_data})"),
            *([("weights", f"of epoch {result.kept_epoch}, the best on validation")] if result.kept_epoch else []),
            (
                "MACs executed per image",
                f"{million(result.macs)} of {million(result.dense_macs)} ({percent(result.macs_executed_share)})",
            ),
            (
                "time",
                f"{duration(result.seconds)} for {result.steps} steps, {result.images_per_second:,.0f} images/s, "
                f"{result.precision}",
            ),
            ("waiting for data", percent(result.data_wait_share)),
            ("run", result.run),
        ],
    )


def sizes_table(before: str, result: CompactResult | TrainedResult) -> Table:
    """What a compact network saves; the column `before` is of the network that it was."""
    table = titled("compact", "", before, "compact", "ratio")
    table.add_row("MACs", million(result.dense_macs), million(result.macs), f"{result.dense_macs / result.macs:.2f}x")
    table.add_row(
        "parameters",
        million(result.dense_params),
        million(result.params),
        f"{result.dense_params / result.params:.2f}x",
    )
    table.add_row(
        "size",
        mebibytes(result.dense_size_bytes),
        mebibytes(result.size_bytes),
        f"{result.dense_size_bytes / result.size_bytes:.2f}x",
    )
    table.add_section()
    return table


def compact_table(result: CompactResult) -> Table:
    table = sizes_table("dense", result)
    table.add_row("test accuracy", "", percent(result.accuracy), f"executed: {percent(result.accuracy_executed)}")
    table.add_row("proof", "", f"{result.max_rel_diff:.1e}", "largest difference")
    for line in result.budgets:
        table.add_row("budget", line["budget"], used(line), "met" if line["met"] else "MISSED")
    table.caption = (
        f"tested on {result.test_data}; proof: compact against what training executed; written to {result.path}"
    )
    table.caption_justify = "left"
    return table


def trained_table(result: TrainedResult) -> Table:
    table = sizes_table("untouched", result)
    change = f"{100 * (result.accuracy - result.accuracy_before):+.2f} points"
    table.add_row("test accuracy", percent(result.accuracy_before), percent(result.accuracy), change)
    if result.tune_steps:
        table.add_row("before tuning", "", percent(result.accuracy_repaired), f"{result.tune_steps} steps of tuning")
    table.add_row("distance", "0", f"{result.distance:.3f}", "nats, before tuning")
    if result.pulls:
        fell = f"distance {result.distance_at_start:.3f} to {result.curve[-1][1]:.3f}"
        table.add_row("widths", "", f"{result.pulls} tried", fell)
    if result.left:
        table.add_row("not refitted", "", f"{len(result.left)} layers", next(iter(result.left)))
    table.add_row("proof", "", f"{result.max_rel_diff:.1e}", "of the cut, before repair")
    table.add_row("seconds", "", f"{sum(result.seconds.values()):.0f}", spent(result.seconds))
    for line in result.budgets:
        table.add_row("budget", line["budget"], used(line), "met" if line["met"] else "MISSED")
    table.caption, table.caption_justify = f"tested on {result.test_data}; written to {result.path}", "left"
    return table


def curve_table(result: Curve) -> Table:
    table = titled("curve, before any tuning", "MACs", "parameters", "validation", "test", "lost", "ms", "dense, ms")
    before = percent(result.val_accuracy_before), percent(result.accuracy_before)
    table.add_row(f"{million(result.macs)} (1.000)", million(result.params), *before, "", "", "")
    for point in result.points:
        table.add_row(
            f"{million(point.macs)} ({point.macs / result.macs:.3f})",
            million(point.params),
            percent(point.val_accuracy),
            percent(point.accuracy),
            f"{100 * (result.accuracy_before - point.accuracy):.2f}",
            digits(point.ms),
            digits(point.dense_ms),
        )
    table.caption, table.caption_justify = f"tested on {result.test_data}; plot: {result.plot}", "left"
    return table


def spent(seconds: dict[str, float]) -> str:
    """The phases that took longest, with their seconds."""
    longest = sorted(seconds.items(), key=lambda item: -item[1])[:3]
    return ", ".join(f"{phase} {value:.0f}" for phase, value in longest)


def export_tables(result: ExportResult) -> list[Table]:
    return [export_table(result), *([variants_table(result.variants)] if result.variants else [])]


def variants_table(variants: Sequence[Variant]) -> Table:
    """Precisions beside float32: accuracy, time, bytes."""
    table = titled("precision", "", "test accuracy", "validation", "same class", "ms, batch 1", "size")
    first = variants[0]
    table.add_row(
        "float32",
        percent(first.float32_accuracy),
        percent(first.float32_val_accuracy),
        "",
        digits(first.float32_ms),
        mebibytes(first.float32_size_bytes),
    )
    for own in variants:
        table.add_row(
            own.kind,
            percent(own.accuracy),
            percent(own.val_accuracy),
            percent(own.agreement),
            f"{digits(own.ms)} (float32 in turn: {digits(own.float32_ms)})",
            mebibytes(own.size_bytes),
        )
    lines = [own.verdict for own in variants]
    for own in variants:
        if own.float32_layers:
            named = ", ".join(own.float32_layers[:3]) + (", ..." if len(own.float32_layers) > 3 else "")
            lines.append(f"{len(own.float32_layers)} of {own.layers} layers stay in float32: {named}")
        lines.append(f"written to {own.path}")
    table.caption, table.caption_justify = "; ".join(lines), "left"
    return table


def export_table(result: ExportResult) -> Table:
    return pairs(
        "export",
        [
            ("file", result.path),
            ("size", f"{mebibytes(result.size_bytes)}, opset {result.opset}"),
            ("parity with torch", f"largest difference {result.max_abs_diff:.1e}"),
            ("same class", f"{percent(result.top1_agreement)} of {result.images} images"),
            *(
                (
                    "takes photos",
                    f"{own.path}: same class of {percent(own.top1_agreement)}, {percent(own.off_share)} of the pixels "
                    "off by more than 2 of 255",
                )
                for own in result.photos
            ),
        ],
    )


def predictions_table(found: Sequence[Prediction]) -> Table:
    count = max((len(own.classes) for own in found), default=1)
    table = titled("predict", "image", *(["class"] if count == 1 else [str(rank) for rank in range(1, count + 1)]))
    for own in found:
        table.add_row(own.path, *(f"{name}  {percent(chance)}" for name, chance in own.classes))
    return table


def bench_table(result: BenchResult) -> Table:
    title = f"bench: onnxruntime, {result.threads or 'default'} thread(s)"
    if result.int8:
        table = titled(
            f"{title}, ms p50 / p95", "batch", "dense", "dense int8", "compact", "compact int8", "compact", "both"
        )
        for row in result.rows:
            sides = (row.dense, row.dense_int8, row.compact, row.compact_int8)
            cells = [timed(own)[0] for own in sides if own is not None]
            table.add_row(str(row.batch), *cells, f"{row.speedup_p50:.2f}x", f"{row.speedup_int8_p50:.2f}x")
    else:
        table = titled(
            title,
            "batch",
            "dense, ms\np50 / p95",
            "\nimages/s",
            "compact, ms\np50 / p95",
            "\nimages/s",
            "speed-up\np50",
        )
        for row in result.rows:
            table.add_row(str(row.batch), *timed(row.dense), *timed(row.compact), f"{row.speedup_p50:.2f}x")
    facts = [
        f"runs {', '.join(str(len(row.dense.samples_ms)) for row in result.rows)}",
        f"MACs {million(result.dense_macs)} to {million(result.compact_macs)}",
        f"parameters {million(result.dense_params)} to {million(result.compact_params)}",
        f"files {mebibytes(result.dense_bytes)} to {mebibytes(result.compact_bytes)}",
    ]
    if result.int8:
        sizes = [mebibytes(int(str(result.int8[key]))) for key in ("dense_bytes", "compact_bytes")]
        facts[-1] += f", int8 {' to '.join(sizes)}"
    if result.accuracy_onnx is not None:
        dense_said = f", dense {percent(result.dense_accuracy_onnx)}" if result.dense_accuracy_onnx is not None else ""
        facts.append(f"accuracy {percent(result.accuracy_onnx)} on {result.test_data}{dense_said}")
    if result.int8:
        accuracy, before = (result.int8[key] for key in ("accuracy", "dense_accuracy"))
        facts.append(
            f"int8 {percent(float(str(accuracy)))}"
            + ("" if before is None else f", dense {percent(float(str(before)))}")
        )
    facts += [f"budget {line['budget']}: {used(line)}, {'met' if line['met'] else 'MISSED'}" for line in result.budgets]
    environment = result.environment
    facts.append(f"{environment['processor']}, onnxruntime {environment['onnxruntime']}")
    table.caption, table.caption_justify = "; ".join(facts), "left"
    return table


def timed(own: Latency) -> tuple[str, str]:
    """Milliseconds and images per second."""
    return f"{digits(own.p50_ms)} / {digits(own.p95_ms)}", digits(own.images_per_second)


def training_table(result: TrainingBench) -> Table:
    table = titled(
        f"training {result.model}, batch {result.batch_size}, {result.image_size}, budget {result.budget}, "
        f"{result.precision}",
        "",
        "ms per step",
        "against static",
        "peak memory",
    )

    def peak(mib: float | None) -> str:
        return "-" if mib is None else f"{mib:,.0f} MiB"

    table.add_row(
        "dense", f"{result.dense_ms:.1f}", f"{result.dense_ms / result.static_ms:.2f}x", peak(result.dense_peak_mib)
    )
    table.add_row("static, same widths", f"{result.static_ms:.1f}", "1.00x", peak(result.static_peak_mib))
    table.add_row(
        "dynamic, exploring",
        f"{result.dynamic_ms:.1f}",
        f"{result.dynamic_over_static:.2f}x",
        peak(result.dynamic_peak_mib),
    )
    table.add_row(
        f"dynamic, {100 * result.swap_share:g} % swapped every step",
        f"{result.swapping_ms:.1f}",
        f"{result.swapping_over_static:.2f}x",
        "",
    )
    costs = ", ".join(f"{name.removesuffix('_ms')} {value:.2f}" for name, value in result.overhead.items())
    environment = result.environment
    table.caption = (
        f"{result.speedup_over_dense:.2f}x the dense speed at {percent(result.macs_ratio)} of the MACs; "
        f"reservoir {result.reservoir_mib:,.1f} MiB; ms per step: {costs}; medians of "
        f"{len(result.samples_ms['dense'])} interleaved steps; "
        f"{environment['gpu'] or environment['processor']}, {environment['threads']} thread(s), torch "
        f"{environment['torch']}"
    )
    table.caption_justify = "left"
    return table


def comparison_table(result: Comparison) -> Table:
    table = titled(
        f"{result.model} on {result.data}, budget {result.budget}, equal {result.equal}",
        "\npolicy",
        "\ntest accuracy",
        "\nMACs",
        "\nparameters",
        "training\nMACs",
        "\ntime",
    )
    for line in result.policies:
        table.add_row(
            line.policy.replace(":", "\n:"),  # its settings below it, as they are typed
            f"{100 * line.accuracy:.2f}{'' if line.spread is None else f' ± {100 * line.spread:.2f}'} %",
            million(line.macs),
            million(line.params),
            f"{digits(line.train_macs / 1e12)} T",
            duration(line.train_seconds),
        )
    table.caption, table.caption_justify = (
        f"means over {result.policies[0].seeds} seed(s), tested on {result.test_data}" + f"; {result.plot}",
        "left",
    )
    return table


def used(line: dict) -> str:
    """A budget's line: what is used of what is allowed."""
    if line["budget"].startswith("latency"):
        return f"{digits(line['actual'])} of {digits(line['limit'])} ms (predicted {digits(line['predicted'])})"
    return f"{line['actual']:,} of {line['limit']:,.0f}"


def gate_tables(result: GateResult) -> list:
    """What gates reached, and each gated group."""
    stats = result.stats
    facts = pairs(
        "gate",
        [
            ("estimator", result.estimator),
            ("test accuracy", f"{percent(result.accuracy)} ({result.test_data})"),
            (
                "mean cost of an image",
                f"{million(result.macs)} of {million(result.dense_macs)} MACs "
                f"({percent(stats.share)}; target {percent(result.target)}, "
                f"{'met' if result.met else 'MISSED'}; gates {million(result.gate_macs)})",
            ),
            (
                "cost, 5th to 95th percentile",
                f"{percent(stats.percentiles['5'])} to {percent(stats.percentiles['95'])}",
            ),
            ("gates that vary with the image", percent(stats.varying_share)),
            (
                "gates closed for good",
                f"{result.closed_for_good:,} of {result.units:,}, which hardly any training image "
                f"opened: export cuts what they close",
            ),
            (
                "accuracy with frozen gates",
                f"{percent(stats.frozen_accuracy)} at {percent(stats.frozen_share)} of the MACs",
            ),
            ("time", f"{duration(result.seconds)} for {result.steps} steps"),
            ("file", result.path),
        ],
    )
    table = titled("gates", "group", "gates", "open", "vary", "entropy", "information\non the class")
    for line in stats.layers:
        table.add_row(
            line.group,
            str(line.units),
            percent(line.open_share),
            percent(line.varying_share),
            f"{line.entropy_bits:.3f} bit",
            f"{line.information_bits:.3f} bit",
        )
    return [facts, table]


def cascade_tables(result: CascadeResult) -> list[Table]:
    """Each network, the cascade, and which classes go on."""
    table = titled("cascade", "", "MACs in\nthe mean", "test\naccuracy", "last word on\nimages", "mean ms", "p95 ms")
    for row in result.rows:
        table.add_row(
            row.name,
            million(row.macs),
            percent(row.accuracy),
            "left out" if row.name in result.left_out else percent(row.images_share),
            *(digits(value) for value in (row.mean_ms, row.p95_ms)),
        )
    ranked = sorted(result.goes_on.items(), key=lambda item: -item[1])
    some = ranked if len(ranked) <= 4 else [*ranked[:2], *ranked[-2:]]
    below = ", ".join(f"{own:.3f}" for own in result.thresholds)
    table.caption = (
        f"images go on where the lead of the best class is below {below}; "
        f"by class: {', '.join(f'{name} {100 * share:.0f} %' for name, share in some)}; on validation images "
        f"{percent(result.val_accuracy)} at {result.val_share:.3f}; written to {result.path}"
    )
    table.caption_justify = "left"
    return [table]


def gated_export_table(result: GatedExportResult) -> Table:
    return pairs(
        "export",
        [
            ("file", result.path),
            ("size", f"{mebibytes(result.size_bytes)}, opset {result.opset}, one image at a time"),
            (
                "cut",
                f"{result.closed_for_good:,} of {result.units:,} gates, which hardly any image opens; what is left "
                f"costs {percent(result.most_share)} of the MACs at most",
            ),
            (
                "forms of gated layers",
                ", ".join(f"{count} {form}" for form, count in sorted(result.forms.items()))
                + " (the quickest of each was measured)",
            ),
            ("parity with torch", f"largest difference {result.max_abs_diff:.1e}, with the same gates"),
            ("same class", f"{percent(result.top1_agreement)} of {result.images} images"),
            ("gates", f"opened alike on {percent(result.gates_agree)} of the images"),
        ],
    )


def gated_bench_tables(result: GatedBenchResult) -> list:
    table = titled(
        f"bench: {result.images} real images one by one, {result.threads or 'default'} thread(s)",
        "",
        "MACs",
        "p50",
        "p95",
        "mean",
        "speed-up",
    )
    for kind, rows in (("onnxruntime", result.rows), ("torch", result.torch_rows)):
        for row in rows:
            table.add_row(
                f"{kind}, {row.network}",
                million(row.macs),
                f"{digits(row.p50_ms)} ms",
                f"{digits(row.p95_ms)} ms",
                f"{digits(row.mean_ms)} ms",
                f"{row.speedup_p50:.2f}x",
            )
        table.add_section()
    environment = result.environment
    table.caption = (
        f"gated images from {digits(result.quick_ms)} ms (cheapest tenth) to {digits(result.slow_ms)} ms "
        f"(dearest tenth); accuracy {percent(result.accuracy)} on {result.test_data}, "
        f"{percent(result.accuracy_onnx)} of the timed images in onnxruntime; "
        f"{environment['processor']}, onnxruntime {environment['onnxruntime']}"
    )
    table.caption_justify = "left"
    return [table, cost_table(result.stats)]


def cost_table(stats: GateStats) -> Table:
    """Who pays what."""
    table = titled("cost of an image over the ungated network", "images", "mean cost")
    table.add_row(
        "all",
        f"{percent(stats.share)} ({', '.join(f'{p}th {percent(value)}' for p, value in stats.percentiles.items())})",
    )
    table.add_row("classified right / wrong", f"{percent(stats.right_share)} / {percent(stats.wrong_share)}")
    for name, share in sorted(stats.by_class.items(), key=lambda entry: entry[1]):
        table.add_row(name, percent(share))
    table.add_section()
    for title, examples in (("cheapest", stats.easiest), ("dearest", stats.hardest)):
        for image, share, label in examples:
            table.add_row(f"{title}: {image} ({label})", percent(share))
    return table


def plan_table(result: Plan) -> Table:
    table = titled(f"plan for {result.model} at {result.input}", "", "smallest", "chosen", "full")
    table.add_row("MACs", million(result.smallest_macs), million(result.macs), million(result.dense_macs))
    table.add_row("parameters", million(result.smallest_params), million(result.params), million(result.dense_params))
    if result.dense_latency_ms is not None:
        table.add_row(
            "onnxruntime, batch 1",
            *(
                ("-" if ms is None else f"{digits(ms)} ms")
                for ms in (result.smallest_latency_ms, result.latency_ms, result.dense_latency_ms)
            ),
        )
    for line in result.budgets:
        table.add_row(f"budget {line['budget']}", "", used(line), "met" if line["met"] else "MISSED")
    table.add_section()
    for name, full in result.full_widths.items():
        table.add_row(name, "", str(result.widths[name]) if result.widths else "-", str(full))
    return table


def beside(first: str, layer: str) -> str:
    """A layer's name, short (".conv2", ".branch.3") where it lies in the module that also holds `first`, or the
    numbered layers of which `first` is one."""
    *path, last = first.split(".")
    while path and last.isdecimal():
        last = path.pop()
    module = "".join(f"{name}." for name in path)
    return f".{layer.removeprefix(module)}" if module and layer.startswith(module) else layer


def inspect_tables(result: Inspection) -> list:
    """Groups, pins and the outcome of the check."""
    table = titled(
        f"{result.model} at {result.input}: {result.groups} groups, {result.arms} arms",
        "group",
        "arms",
        "layers",
        "MACs",
        "parameters",
        "removal",
    )
    for line in result.lines:
        names = [beside(line.name, layer) for layer in line.layers[:3]]
        layers = ", ".join(names) + (f" and {len(line.layers) - 3} more" if len(line.layers) > 3 else "")
        table.add_row(
            line.name,
            str(line.arms),
            layers,
            percent(line.macs_share),
            percent(line.params_share),
            ", ".join(line.mixed_by) or "exact",
        )
    table.caption, table.caption_justify = (
        (
            f"{million(result.macs)} MACs, {million(result.params)} parameters; "
            f"{percent(result.prunable_params_share)} of the parameters lie in an arm "
            f"that can be removed. An arm's share counts all layers that it touches. "
            f"Names that begin with a dot lie beside the group's own."
        ),
        "left",
    )
    pins = titled("cannot be removed", "pinned by", "in layer", "channels")
    for pin in result.pinned:
        pins.add_row(pin.op, pin.layer, str(pin.channels))
    items: list = [table, pins]
    if result.check is not None:
        check = result.check
        verdict = (
            "exact" if check.ok else f"not shown: {check.not_shown}" if check.not_shown else f"FAILED {check.failure}"
        )
        items.append(
            f"check: {verdict}; largest difference {check.max_rel_diff:.1e} of the largest output with "
            f"{percent(check.fraction)} of the arms removed (their removal changes {check.effect:.1e} of "
            f"it), {percent(check.params_kept_share)} of the parameters kept, traced in "
            f"{check.trace_seconds:.2f} s"
        )
        if check.mixed:
            items.append(
                f"{len(check.mixed)} groups are mixed by a norm: a copy without their channels was run, but "
                f"cannot equal the masked original"
            )
    return items


def show(*items: object) -> None:
    """Print results on stdout; piped output is as wide as a table needs."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    for item in items:
        console.print(item, highlight=False)
