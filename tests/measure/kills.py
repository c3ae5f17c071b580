"""Kill training at random moments with SIGKILL, resume, compare: `python -m tests.measure.kills [--runs 20] [--seed
0]`.

Every run is killed once or twice, at a moment drawn uniformly over the time an uninterrupted run takes; a checkpoint is
written after every step, so many of them hit a checkpoint being written. What is left at the end must equal an
uninterrupted run's: every tensor of the checkpoint (weights, statistics, momentum, bandits, selections) bit for bit,
selections.json, and the metrics but for their times.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
OPTIONS = [
    "--model",
    "tests.models:tiny",
    "--image-size",
    "8",
    "--batch-size",
    "64",
    "--epochs",
    "8",
    "--explore",
    "0.5",
    "--checkpoint-every",
    "1",
    "--no-onnx",
]
TIMES = {"seconds", "images_per_second", "data_wait_share"}


def start(path: Path, *extra: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "dynprune", "train", *OPTIONS, *extra, "--out", str(path)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    errors = process.communicate(timeout=300)[1]
    assert process.returncode == 0, errors
    return errors


def outcome(path: Path) -> tuple[dict[str, torch.Tensor], dict, list[dict]]:
    metrics = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    # not a view of a file that may change
    tensors = {name: value.clone() for name, value in load_file(path / "checkpoint.safetensors").items()}
    return (
        tensors,
        json.loads((path / "selections.json").read_text()),
        [{key: value for key, value in line.items() if key not in TIMES} for line in metrics],
    )


def same(one: tuple, other: tuple) -> bool:
    return (
        one[0].keys() == other[0].keys()
        and all(torch.equal(one[0][name], other[0][name]) for name in one[0])
        and one[1:] == other[1:]
    )


def killed_run(path: Path, rng: random.Random, seconds: tuple[float, float]) -> list[str]:
    """Train with kills; returns what was found after each, for the record."""
    found, process = [], start(path)
    for _ in range(rng.choice((1, 2))):
        time.sleep(rng.uniform(*seconds))
        process.kill()
        process.wait()
        process.stderr.close()
        if not (path / "config.toml").is_file():
            found.append("nothing yet")
            shutil.rmtree(path, ignore_errors=True)
            process = start(path)
            continue
        left = {file.name for file in path.iterdir()}
        found.append(
            "half a checkpoint"
            if any("fresh" in name or "partial" in name for name in left)
            else "a checkpoint"
            if "checkpoint.safetensors" in left
            else "only the checkpoint before"
            if "checkpoint.previous.safetensors" in left
            else "no checkpoint"
        )
        process = start(path, "--resume", "--trust")
    finish(process)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    rng, equal = random.Random(options.seed), 0
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        started = time.monotonic()
        finish(start(whole))
        took, expected = time.monotonic() - started, outcome(whole)
        for number in range(options.runs):
            path = Path(folder) / f"run{number}"
            found = killed_run(path, rng, (0.3 * took, took))
            good = same(outcome(path), expected)
            equal += good
            print(
                f"run {number + 1}: after the kills there was {', then '.join(found)}: "
                f"{'identical' if good else 'DIFFERENT'}",
                flush=True,
            )
            shutil.rmtree(path)
    print(f"{equal} of {options.runs} identical to the uninterrupted run")
    return 0 if equal == options.runs else 1


if __name__ == "__main__":
    sys.exit(main())
