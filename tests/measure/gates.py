r"""Gates beside each other: targets, ways to learn, and no gates at all, on the same network and steps.

    python -m tests.measure.gates --out DIR --targets 0.25,0.33,0.5,0.66 --estimators gumbel,reinforce,random -- \
        RUN --epochs 2
    python -m tests.measure.gates table --out DIR

What follows `--` is given to every `dynprune gate`: a finished run whose network gets the gates, or `--model` and
`--data`, and a schedule. Every target is trained with the first estimator, the target 0.33 with all of them, and once
with every gate open. A run in DIR that is finished is not repeated, one that was stopped goes on. The table says for
each what it reached on the test images, how much its gates depend on the image, and what is left when they are frozen;
`dense` is the network before `compact`, so that its column is what both methods save together.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from dynprune.runs.directory import Run

COMPARED = 0.33  # the target at which estimators are compared


def jobs(targets: list[float], estimators: list[str]) -> list[tuple[str, float]]:
    """Estimator and target of every run, the ungated one first, then the estimators, then the curve."""
    at_one = [(name, COMPARED) for name in estimators]
    return [("ungated", 1.0), *at_one, *((estimators[0], target) for target in targets if target != COMPARED)]


def train(out: Path, estimator: str, target: float, options: list[str]) -> None:
    path = out / f"{estimator}-{target:g}"
    if recorded(path, "gate"):
        return
    if (path / "checkpoint.safetensors").is_file():
        command = ["gate", "--resume", "--out", str(path)]
    else:
        chosen = [] if estimator == "ungated" else ["--estimator", estimator]
        command = ["gate", *options, "--target", str(target), *chosen, "--out", str(path), "--overwrite"]
    print(path.name, file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "dynprune", *command], check=True, stdout=subprocess.DEVNULL)


def recorded(path: Path, step: str) -> dict:
    """What a run's command has recorded; nothing if it has not finished."""
    return Run(path).results.get(step, {})


def line(path: Path) -> str:
    """One row of the table."""
    result = recorded(path, "gate")
    stats, before = result["stats"], dense_macs(result)
    layers = stats["layers"]
    information = sum(layer["information_bits"] * layer["units"] for layer in layers) / sum(
        layer["units"] for layer in layers
    )
    entropy = sum(layer["entropy_bits"] * layer["units"] for layer in layers) / sum(layer["units"] for layer in layers)
    estimator = path.name.rpartition("-")[0]
    seen = (
        "- | - | - | -"
        if estimator == "ungated"
        else (
            f"{100 * stats['varying_share']:.0f} % | {entropy:.2f} | "
            f"{information:.3f} | {100 * stats['frozen_accuracy']:.2f} "
            f"% at {100 * stats['frozen_share']:.1f} %"
        )
    )
    return (
        f"| {estimator} | {result['target']:g} | {100 * stats['share']:.1f} % | "
        f"{100 * result['macs'] / before:.1f} % | {100 * result['accuracy']:.2f} % | {seen} |"
    )


def dense_macs(result: dict) -> int:
    """Of the network before anything was removed from it."""
    compacted = recorded(Path(result["base"]), "compact") if Path(result["base"]).is_dir() else {}
    return compacted.get("dense_macs", result["dense_macs"])


def table(out: Path) -> str:
    found = sorted(
        (path for path in out.iterdir() if recorded(path, "gate")),
        key=lambda path: (path.name.partition("-")[0], recorded(path, "gate")["target"]),
    )
    return "\n".join(
        [
            "| gates | target | mean cost of the ungated | of the dense | accuracy | gates that vary | bits "
            "per gate | of them on the class | frozen |",
            "|---|---|---|---|---|---|---|---|---|",
            *map(line, found),
        ]
    )


def main() -> None:
    own, options = sys.argv[1:], []
    if "--" in own:
        own, options = own[: own.index("--")], own[own.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", default="train", choices=["train", "table"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--targets", default="0.25,0.33,0.5,0.66")
    parser.add_argument("--estimators", default="gumbel,reinforce,random")
    chosen = parser.parse_args(own)
    if chosen.task == "train":
        for estimator, target in jobs(
            [float(text) for text in chosen.targets.split(",")], chosen.estimators.split(",")
        ):
            train(chosen.out, estimator, target, options)
    print(table(chosen.out))


if __name__ == "__main__":
    main()
