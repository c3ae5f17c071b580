"""Throughput of several processes against one, one thread each, in turn: `python -m tests.measure.scaling [--processes
2] [--model vgg16] [--rounds 3]`.

The batch is the same, so with two processes each computes half of it. Images per second of every epoch but the first of
each run; medians, and the efficiency: how much of the added processes' worth is left after what they tell each other.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def speeds(count: int, options: list[str], folder: Path) -> list[float]:
    start = [sys.executable, "-m"] + (
        ["torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "-m"] if count > 1 else []
    )
    subprocess.run(
        [
            *start,
            "dynprune",
            "train",
            *options,
            "--threads",
            "1",
            "--checkpoint-every",
            "never",
            "--overwrite",
            "--out",
            str(folder / f"run{count}"),
        ],
        cwd=ROOT,
        check=True,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    lines = [json.loads(line) for line in (folder / f"run{count}" / "metrics.jsonl").read_text().splitlines()]
    return [line["images_per_second"] for line in lines[1:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--model", default="vgg16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4)
    chosen = parser.parse_args()
    options = ["--model", chosen.model, "--epochs", str(chosen.epochs)]
    measured: dict[int, list[float]] = {1: [], chosen.processes: []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(chosen.rounds):
            for count, kept in measured.items():
                kept += speeds(count, options, Path(folder))
    one, several = (statistics.median(kept) for kept in measured.values())
    print(
        json.dumps(
            {
                "model": chosen.model,
                "images_per_second": {str(count): statistics.median(kept) for count, kept in measured.items()},
                "lowest_and_highest": {str(count): [min(kept), max(kept)] for count, kept in measured.items()},
                "speedup": several / one,
                "efficiency": several / one / chosen.processes,
            }
        )
    )


if __name__ == "__main__":
    main()
