"""Budgets held, over many networks, one JSON line each: `python -m tests.measure.budgets count|latency|align [--out
FILE]`.

Not a test of its own: it takes a quarter of an hour. *count*: compact networks counted by PyTorch's FlopCounterMode and
by their own parameters, at budgets of 0.5, 0.25 and 0.1. *latency*: budgets of 0.5 and 0.25 of the dense network's
time, found and then measured anew. *align*: widths that are multiples of what onnxruntime's layout wants against any
widths, at equal MACs, timed in turn.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from dynprune.budgets.fit import Fitter
from dynprune.budgets.latency import Stopwatch, interleaved
from dynprune.errors import DynpruneError
from dynprune.runs.config import TrainConfig
from dynprune.structure.inspect import build_for_inspection, default_classes
from dynprune.structure.surgery import slim
from dynprune.structure.tracing import trace

ZOO = ["vgg16", "vgg19", "resnet20", "resnet56", "resnet164", "densenet40"]
TORCHVISION = [
    f"torchvision:{name}"
    for name in """
    alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 mnasnet1_0
    mobilenet_v2 mobilenet_v3_large regnet_x_800mf regnet_y_400mf resnet18 resnet50 resnext50_32x4d
    shufflenet_v2_x1_0 squeezenet1_1 vgg11_bn wide_resnet50_2 resnet34
    """.split()
]
TIMED = [
    ("vgg16", ""),
    ("resnet20", ""),
    ("torchvision:resnet18", "3x224x224"),
    ("torchvision:mobilenet_v2", "3x224x224"),
    ("torchvision:efficientnet_b0", "3x224x224"),
]


def build(name: str, shape: str = "") -> tuple:
    model, size = build_for_inspection(name, default_classes(name), shape)
    x = torch.randn(1, *size, generator=torch.Generator().manual_seed(0))
    return model.eval(), x, trace(model, x)


def count(name: str) -> list[dict]:
    model, x, graph = build(name)
    dense, lines = counted(model, x), []
    for budget in (0.5, 0.25, 0.1):
        for quantity, place in (("macs", 0), ("params", 1)):
            for align in ("1", "auto"):
                line = {"model": name, "budget": f"{quantity}={budget}", "align": align}
                try:
                    widths = (
                        Fitter(
                            model,
                            graph,
                            x,
                            TrainConfig(model=name, budget=(line["budget"],), align=align).validate().allowed,
                        )
                        .fit()
                        .widths
                    )
                    small = slim(model, graph.kept({group: np.arange(width) for group, width in widths.items()}))
                    line["used"] = counted(small, x)[place] / (budget * dense[place])
                except DynpruneError as error:
                    line["refused"] = str(error)
                lines.append(line)
    return lines


def counted(model: torch.nn.Module, x: torch.Tensor) -> tuple[int, int]:
    """MACs by PyTorch's own counter, and parameters."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops() // 2, sum(p.numel() for p in model.parameters())


def latency(name: str, shape: str) -> list[dict]:
    model, x, graph = build(name, shape)
    lines = []
    for budget in (0.5, 0.25):
        line = {"model": name, "budget": f"latency={budget}"}
        fitter = Fitter(model, graph, x, TrainConfig(model=name, budget=(line["budget"],)).validate().allowed)
        try:
            found = fitter.fit()
            again = fitter.time(found.widths)
            line |= {
                "dense_ms": again.dense_ms,
                "planned_ms": found.latency.measured_ms,
                "measured_ms": again.measured_ms,
                "used": again.measured_ms / (budget * again.dense_ms),
                "candidates": found.candidates,
                "macs_share": graph.macs(found.widths) / graph.macs({}),
            }
        except DynpruneError as error:
            line["refused"] = str(error)
        lines.append(line)
    return lines


def align(name: str, shape: str) -> list[dict]:
    model, x, graph = build(name, shape)
    watch, lines = Stopwatch(model, graph, (x,)), []
    for budget in (0.5, 0.25):
        aligned = (
            Fitter(model, graph, x, TrainConfig(model=name, budget=(str(budget),)).validate().allowed).fit().widths
        )
        same = graph.macs(aligned) / graph.macs({})
        free = (
            Fitter(model, graph, x, TrainConfig(model=name, budget=(f"macs={same}",), align="1").validate().allowed)
            .fit()
            .widths
        )
        sessions = [watch.open(watch.candidate(widths)) for widths in (aligned, free)]
        timed = interleaved(
            [(s, {s.get_inputs()[0].name: x.numpy()}) for s in (watch.dense, *sessions)], 4.0, (20, 500)
        )
        dense, one, other = (float(np.median(kept)) for kept in timed)
        lines.append(
            {
                "model": name,
                "budget": budget,
                "macs": [graph.macs(aligned), graph.macs(free)],
                "dense_ms": dense,
                "aligned_ms": one,
                "unaligned_ms": other,
                "unaligned_over_aligned": other / one,
                "aligned_over_dense": one / dense,
            }
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("count", "latency", "align"))
    parser.add_argument("--out")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    out = open(options.out, "w") if options.out else sys.stdout
    jobs = (
        [(count, (name,)) for name in ZOO + TORCHVISION]
        if options.what == "count"
        else [({"latency": latency, "align": align}[options.what], pair) for pair in TIMED]
    )
    for measure, arguments in jobs:
        for line in measure(*arguments):
            print(json.dumps(line), file=out, flush=True)


if __name__ == "__main__":
    main()
