"""Training steps as torch computes them and as dynprune does, in turn: `python -m tests.measure.quick_steps [options]`.

Medians of a forward pass, a backward pass and an optimizer step in bfloat16, and their ratio. What differs: wide
convolutions as products, on processors with AMX (`dynprune.execution.convolutions`), and BatchNorms of few channels
(`dynprune.execution.normalisation`).

    --models vgg16,torchvision:resnet18   --size 32   --batch-size 128   --steps 10   --threads 0 (all)
    --budget 1 (share of the multiply-accumulates, at uniform widths)
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn

from dynprune import zoo
from dynprune.budgets.allocation import allocate, constraints_for
from dynprune.budgets.limits import Budget
from dynprune.structure.surgery import slim
from dynprune.structure.tracing import trace
from dynprune.training.recipe import quick_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="vgg16,torchvision:resnet18,resnet20,torchvision:mobilenet_v2")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--budget", type=float, default=1.0)
    given = parser.parse_args()
    torch.set_num_threads(given.threads or torch.get_num_threads())
    print(f"{torch.get_num_threads()} threads, {given.size} px, batches of {given.batch_size}, budget {given.budget:g}")
    print("| network | torch, ms | quick, ms | ratio |\n|---|---|---|---|")
    for name in given.models.split(","):
        usual, quick = step_ms(name, given)
        print(f"| {name} | {usual:.1f} | {quick:.1f} | {usual / quick:.2f} |", flush=True)


def network(name: str, given: argparse.Namespace) -> nn.Module:
    size = (3, given.size, given.size)
    model = zoo.build(name, 10, size=size)
    if given.budget < 1:
        graph = trace(model, torch.zeros(1, *size))
        widths = allocate(graph, [f"macs={given.budget}"], allowed=constraints_for(graph, Budget((f"{given.budget}",))))
        model = slim(model, graph.kept({group: range(width) for group, width in widths.items()}))
    return model.to(memory_format=torch.channels_last).train()


def step_ms(name: str, given: argparse.Namespace) -> tuple[float, float]:
    """Medians as torch computes it, and as dynprune does."""
    model, cpu = network(name, given), torch.device("cpu")
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9, nesterov=True, fused=True)
    images = torch.randn(given.batch_size, 3, given.size, given.size).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (given.batch_size,))

    def step(quick: bool) -> float:
        began = time.perf_counter()
        with quick_step(model, cpu, True) if quick else torch.autocast("cpu", torch.bfloat16):
            scores = model(images)
        optimizer.zero_grad()
        F.cross_entropy(scores.float(), labels).backward()
        optimizer.step()
        return 1000 * (time.perf_counter() - began)

    timed = [(step(False), step(True)) for _ in range(given.steps + 1)][1:]
    return statistics.median(usual for usual, _ in timed), statistics.median(own for _, own in timed)


if __name__ == "__main__":
    main()
