"""Every classification network of torchvision through choice and repair, on random data: `python -m
tests.measure.coverage_repair [--every N] [--only NAME,NAME] [--images 32]`.

Each in its own process: seconds for calibration and order of arms, seconds for one cut and repair at half of the
multiply-accumulates, peak memory, how far the scores are from the untouched network's as cut and as repaired (on the
images that repair saw: random data has nothing to generalise to), and the layers that are left. Prints Markdown rows;
exits with 1 if any failed.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time

import torch
import torchvision

from dynprune import zoo
from dynprune.budgets.allocation import allocate
from dynprune.data.scores import logits
from dynprune.repair.trained import Compaction, Images
from dynprune.structure.tracing import lively, trace

LARGER = {"inception_v3": 299}
SECONDS = 1800


def names() -> list[str]:
    known = torchvision.models.list_models(module=torchvision.models)
    return [name for name in known if not name.startswith("quantized_")]


def one(name: str, count: int) -> str:
    torch.manual_seed(0)
    side = LARGER.get(name, 224)
    network = zoo.build(f"torchvision:{name}", 1000, 0)
    images = torch.randn(count, 3, side, side)
    with torch.no_grad():
        model = lively(network, (images[:2],))[0].eval()
    graph = trace(model, images[:1])
    began = time.perf_counter()
    compaction = Compaction(
        model, graph, Images([(part,) for part in images.split(8)], (images,), (images,), (images,))
    )
    calibrated, began = time.perf_counter() - began, time.perf_counter()
    widths = allocate(graph, ["0.5"])
    repaired = compaction.repaired(widths)
    seconds = time.perf_counter() - began

    @torch.no_grad()
    def gap(network: torch.nn.Module) -> float:
        said = compaction.said[0]
        return float((logits(network(images)) - said).square().mean() / said.var())

    left = compaction.targets.left | compaction.calibration.left
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    params = sum(p.numel() for p in model.parameters()) / 1e6
    return (
        f"| {name} | {params:.1f} M | {calibrated:.1f} | {seconds:.1f} | {memory:.1f} | "
        f"{gap(compaction.cut(widths)):.3g} | {gap(repaired):.3g} | {len(left)} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--only", default="")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(one(given.child, given.images), flush=True)
        return
    print("| network | parameters | calibration, s | repair, s | memory, GiB | as cut | repaired | layers left |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    failed = []
    for name in given.only.split(",") if given.only else names()[:: given.every]:
        command = [
            sys.executable,
            "-m",
            "tests.measure.coverage_repair",
            "--child",
            name,
            "--images",
            str(given.images),
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
            line = (
                done.stdout.strip().splitlines()[-1]
                if done.returncode == 0
                else (done.stderr.strip() or f"ended with {done.returncode}").splitlines()[-1]
            )
        except subprocess.TimeoutExpired:
            done, line = None, f"more than {SECONDS} s"
        if done is None or done.returncode:
            failed.append(name)
            line = f"| {name} | failed: {line[:150]} |"
        print(line, flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
