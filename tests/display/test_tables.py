"""Every table as it looks in a terminal of 80 columns, against a stored file.

After a wanted change: `python -m tests.display.test_tables`, and read the difference.
"""

import io
from pathlib import Path

import pytest
from rich.console import Console

from dynprune.deploy.bench import BenchResult, BenchRow, Latency
from dynprune.deploy.compact import CompactResult
from dynprune.deploy.compare import Comparison, PolicySummary
from dynprune.deploy.export import ExportResult
from dynprune.deploy.several import Curve, CurvePoint
from dynprune.deploy.trained import TrainedResult
from dynprune.display import tables
from dynprune.gates.bench import GatedBenchResult, GatedRow
from dynprune.gates.export import GatedExportResult
from dynprune.gates.stats import GateLine, GateStats
from dynprune.gates.training import GateResult
from dynprune.structure.channels import PinnedLayer
from dynprune.structure.inspect import Check, GroupLine, Inspection
from dynprune.training.bench_training import TrainingBench
from dynprune.training.plan import Plan
from dynprune.training.train import TrainResult
from dynprune.units import digits

STORED = Path(__file__).parent / "tables.txt"
TEST = "test split, a fifth of all digits"
LONG = "features.denseblock3.denselayer12.conv1"  # of densenet121: longer than half a line
RUN = "runs/torchvision-densenet121-photographs-of-birds-cucb"
MACHINE = {"processor": "Some Processor", "gpu": None, "threads": 1, "onnxruntime": "1.32.0", "torch": "2.14.1"}
MACS = {"budget": "macs=0.25", "actual": 708_429_184, "limit": 708_540_416.0, "met": True}
LATENCY = {"budget": "latency=0.5", "actual": 0.2641, "limit": 0.2872, "predicted": 0.2634, "met": False}
STATS = GateStats(
    accuracy=0.7522,
    share=0.487,
    percentiles={"5": 0.3959, "25": 0.4539, "50": 0.5119, "75": 0.5119, "95": 0.5119},
    by_class={"Acanthis flammea": 0.4556, "8": 0.47},
    right_share=0.4932,
    wrong_share=None,
    easiest=[("photos/val/Acanthis flammea/IMG_20240518_171530_HDR_edited.jpg", 0.2799, "Acanthis flammea")],
    hardest=[("image 214", 1.0, "3")],
    varying_share=0.5833,
    frozen_accuracy=0.5167,
    frozen_share=0.5119,
    layers=[GateLine(LONG, 2, 0.8972, 1.0, 0.478, 0.212)],
)


def train():
    return tables.train_table(
        TrainResult(
            run=RUN,
            policy="cucb",
            accuracy=1.0,
            val_accuracy=0.9861,
            test_data=TEST,
            val_data="10 % of the training images",
            seconds=3671.0,
            images_per_second=1556.4,
            steps=12_220,
            macs=708_429_184,
            train_macs=0,
            dense_macs=2_834_161_664,
            macs_executed_share=0.24996,
            data_wait_share=0.0073,
            precision="bfloat16",
            compiled=None,
            processes=1,
            gradient_bytes=0,
            dense_gradient_bytes=0,
        )
    )


def compact():
    return tables.compact_table(
        CompactResult(
            path=f"{RUN}/compact.safetensors",
            macs=708_429_184,
            params=2_010_000,
            size_bytes=8_212_480,
            dense_macs=2_834_161_664,
            dense_params=7_978_856,
            dense_size_bytes=32_254_976,
            budgets=[MACS, LATENCY],
            budget_met=False,
            accuracy=0.7522,
            accuracy_executed=0.7522,
            test_data=TEST,
            max_rel_diff=4.2e-16,
            mixed_groups=[],
            arms_dropped_by_rate=0,
            widths={},
        )
    )


def trained():
    return tables.trained_table(
        TrainedResult(
            run=RUN,
            path=f"{RUN}/compact.safetensors",
            macs=708_429_184,
            params=2_010_000,
            size_bytes=8_212_480,
            dense_macs=2_834_161_664,
            dense_params=7_978_856,
            dense_size_bytes=32_254_976,
            budgets=[MACS, LATENCY],
            accuracy_before=0.7522,
            accuracy_repaired=0.7101,
            accuracy=0.7444,
            test_data=TEST,
            distance_at_start=0.234,
            distance=0.123,
            pulls=57,
            curve=[(1.0, 0.234), (60.0, 0.123)],
            tune_steps=1_220,
            max_rel_diff=4.2e-16,
            mixed_groups=[],
            left={LONG: "its inputs are few"},
            seconds={"calibrate": 5.2, "search": 60.0, "repair": 31.4, "tune": 180.3},
            widths={},
        )
    )


def curve():
    point = CurvePoint(0.5, 1_417_080_832, 4_010_000, 0.7612, 0.7588, 123.4, 1_456.7, 0.1234)
    small = CurvePoint(0.25, 708_429_184, 2_010_000, 0.5, 0.4922, 61.2, 1_456.7, 0.9)
    return tables.curve_table(Curve([point, small], 2_834_161_664, 7_978_856, 1.0, 0.79, TEST, f"{RUN}/curve.png"))


def export():
    return tables.export_table(ExportResult(f"{RUN}/compact.onnx", 20, 8_212_480, 2.4e-6, 1e-7, 1.0, 144, False))


def bench():
    def side(p50: float, p95: float) -> Latency:
        return Latency(p50_ms=p50, p95_ms=p95, images_per_second=1e3 / p50, samples_ms=[p50] * 75)

    rows = [
        BenchRow(batch, side(p50, 1.1 * p50), side(p50 / 2, 0.6 * p50), 2.0)
        for batch, p50 in ((1, 0.5512), (32, 999.4), (256, 12_345.0))
    ]
    return tables.bench_table(
        BenchResult(
            dense_path="",
            compact_path="",
            threads=1,
            rows=rows,
            speedup_p50=2.0,
            dense_p50_ms=0.5512,
            compact_p50_ms=0.2756,
            dense_bytes=32_254_976,
            compact_bytes=8_212_480,
            dense_macs=2_834_161_664,
            compact_macs=708_429_184,
            dense_params=7_978_856,
            compact_params=2_010_000,
            accuracy_onnx=0.7522,
            dense_accuracy_onnx=None,
            test_data=TEST,
            verdict="",
            budgets=[MACS, LATENCY],
            environment=MACHINE,
        )
    )


def bench_training():
    return tables.training_table(
        TrainingBench(
            model="torchvision:resnet18",
            batch_size=128,
            image_size="96x64",
            budget="0.25",
            precision="bfloat16",
            hold=20,
            dense_ms=1289.8,
            static_ms=773.9,
            dynamic_ms=773.8,
            swapping_ms=779.9,
            dynamic_over_static=1.0,
            swapping_over_static=1.03,
            swap_share=0.05,
            speedup_over_dense=1.67,
            macs_ratio=0.2491,
            dense_peak_mib=2376.0,
            static_peak_mib=1280.0,
            dynamic_peak_mib=None,
            reservoir_mib=43.0,
            overhead={"select_ms": 0.03, "swap_ms": 0.21, "reward_ms": 0.53, "data_ms": 3.47},
            samples_ms={"dense": [1.0] * 20},
            environment=MACHINE,
        )
    )


def compare():
    lines = [
        PolicySummary("cucb:explore=0.1:hold=40", 3, 0.7959, 0.0025, 78_200_000, 3_500_000, 42.1e12, 3671.0, 0.0),
        PolicySummary("dense+prune", 3, 0.7049, 0.011, 2_834_161_664, 14_720_000, 5.26e15, 71.0, 0.09),
    ]
    plot = "runs/comparison/comparison.png"
    return tables.comparison_table(Comparison("vgg16", "cifar10", "0.25", "cost", TEST, [], lines, "", plot, MACHINE))


def gate():
    return tables.gate_tables(
        GateResult(
            run="",
            base="",
            estimator="gumbel",
            target=0.5,
            met=True,
            accuracy=0.4722,
            val_accuracy=0.5,
            test_data=TEST,
            macs=345_000_000,
            dense_macs=708_429_184,
            gate_macs=500_000,
            path=f"{RUN}/gated.safetensors",
            file_max_diff=0.0,
            units=1_012,
            closed_for_good=22,
            stats=STATS,
            steps=162,
            seconds=8.0,
        )
    )


def gated_export():
    return tables.gated_export_table(
        GatedExportResult(
            path=f"{RUN}/gated.onnx",
            opset=20,
            size_bytes=8_212_480,
            max_abs_diff=1.7e-6,
            max_rel_diff=1e-7,
            top1_agreement=1.0,
            gates_agree=0.9922,
            images=128,
            fold_normalization=False,
            units=1_012,
            closed_for_good=22,
            most_share=0.9181,
            forms={"pair": 18, "blocks": 4, "full": 2},
            layers={},
        )
    )


def gated_bench():
    rows = [
        GatedRow(name, macs, ms, 1.1 * ms, ms, 0.298 / ms, [])
        for name, macs, ms in (
            ("ungated", 2_834_161_664, 0.298),
            ("gated", 708_429_184, 0.246),
            ("static, same mean cost", 708_429_184, 0.233),
        )
    ]
    return tables.gated_bench_tables(
        GatedBenchResult(
            run="",
            target=0.5,
            met=True,
            threads=0,
            images=200,
            rows=rows,
            torch_rows=rows[:2],
            speedup_p50=1.21,
            speedup_over_static=0.95,
            accuracy=0.4722,
            accuracy_onnx=0.47,
            forms={},
            slow_ms=0.293,
            quick_ms=0.221,
            stats=STATS,
            test_data=TEST,
            verdict="",
            environment=MACHINE,
        )
    )


def plan():
    return tables.plan_table(
        Plan(
            model="torchvision:densenet121",
            input="3x224x224",
            satisfiable=True,
            problem="",
            widths={"features.conv0": 32, LONG: 64},
            full_widths={"features.conv0": 64, LONG: 128},
            macs=708_429_184,
            params=2_010_000,
            dense_macs=2_834_161_664,
            dense_params=7_978_856,
            smallest_macs=102_700_000,
            smallest_params=310_000,
            latency_ms=0.2641,
            dense_latency_ms=1_234.5,
            smallest_latency_ms=None,
            budgets=[MACS, LATENCY],
        )
    )


def inspect():
    layers = [LONG, LONG.replace("conv1", "norm2"), LONG.replace("conv1", "conv2"), "classifier"]
    return tables.inspect_tables(
        Inspection(
            model="torchvision:densenet121",
            input="3x224x224",
            groups=2,
            arms=192,
            macs=2_834_161_664,
            params=7_978_856,
            prunable_params_share=0.9908,
            pinned=[PinnedLayer("output", "classifier", 1000)],
            lines=[
                GroupLine("conv1", 64, ["conv1", "bn1", "conv2"], 0.3898, 0.0716, ()),
                GroupLine(LONG, 128, layers, 0.1156, 0.2711, ("group_norm",)),
            ],
            check=Check(True, 1.7e-7, 0.66, 0.2524, 0.09, 0.5, 0, [LONG], ""),
        )
    )


TABLES = (
    inspect,
    plan,
    train,
    compact,
    trained,
    curve,
    export,
    bench,
    bench_training,
    compare,
    gate,
    gated_export,
    gated_bench,
)


def rendered(width: int) -> dict[str, str]:
    """Every table by its name, as text."""
    found = {}
    for make in TABLES:
        made, out = make(), io.StringIO()
        console = Console(file=out, width=width)
        for item in made if isinstance(made, list) else [made]:
            console.print(item, highlight=False)
        found[make.__name__] = "".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines())
    return found


def as_file() -> str:
    return "\n".join(f"{name}\n\n{text}" for name, text in rendered(80).items())


def test_tables_are_as_stored():
    assert as_file() == STORED.read_text(encoding="utf-8")


@pytest.mark.parametrize("width", [80, 160])
def test_nothing_is_cut(width):
    """A name that is cut cannot be typed, and a number that is cut is another one."""
    for name, text in rendered(width).items():
        assert "…" not in text and max(map(len, text.splitlines())) <= width, name


def test_one_seed_has_no_spread():
    line = PolicySummary("static", 1, 0.7049, None, 1, 1, 1.0, 1.0, 0.0)
    table = tables.comparison_table(
        Comparison("vgg16", "digits", "0.25", "images", TEST, [], [line], "", None, MACHINE)
    )
    assert list(table.columns[1].cells) == ["70.49 %"]


def test_layers_beside_a_groups_first_have_short_names():
    assert tables.beside("layer1.0.conv1", "layer1.0.bn1") == ".bn1"
    assert tables.beside("layer1.0.conv1", "layer1.1.conv1") == "layer1.1.conv1"
    assert tables.beside("stage2.1.branch2.0", "stage2.1.branch2.3") == ".branch2.3"
    assert [tables.beside("conv1.0", name) for name in ("conv1.0", "conv1.1", "fc")] == ["conv1.0", "conv1.1", "fc"]


def test_times_have_three_digits_and_no_exponent():
    assert [digits(ms) for ms in (0.5512, 28.14, 999.4, 999.6, 12_345.0)] == ["0.551", "28.1", "999", "1,000", "12,345"]


if __name__ == "__main__":
    STORED.write_text(as_file(), encoding="utf-8")
