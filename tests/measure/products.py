"""Training steps with and without convolutions as products, in turn: `python -m tests.measure.products [options]`.

Medians of a forward pass, a backward pass and an optimizer step of the full-width network in bfloat16, and their ratio.
Needs a processor with AMX, as `dynprune.execution.convolutions` does.

    --models vgg16,torchvision:resnet18   --size 32   --batch-size 128   --steps 10   --threads 0 (all)
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

from dynprune import zoo
from dynprune.execution.convolutions import small_maps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="vgg16,torchvision:resnet18,resnet20,torchvision:mobilenet_v2")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(given.threads or torch.get_num_threads())
    print(f"{torch.get_num_threads()} threads, {given.size} px, batches of {given.batch_size}")
    print("| network | as always, ms | products, ms | ratio |\n|---|---|---|---|")
    for name in given.models.split(","):
        usual, products = step_ms(name, given)
        print(f"| {name} | {usual:.0f} | {products:.0f} | {usual / products:.2f} |", flush=True)


def step_ms(name: str, given: argparse.Namespace) -> tuple[float, float]:
    """Medians without and with products."""
    size = (3, given.size, given.size)
    model = zoo.build(name, 10, size=size).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9, nesterov=True, fused=True)
    images = torch.randn(given.batch_size, *size).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (given.batch_size,))

    def step(products: bool) -> float:
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16), small_maps(model, products):
            scores = model(images)
        optimizer.zero_grad()
        F.cross_entropy(scores.float(), labels).backward()
        optimizer.step()
        return 1000 * (time.perf_counter() - began)

    timed = [(step(False), step(True)) for _ in range(given.steps + 1)][1:]
    return statistics.median(usual for usual, _ in timed), statistics.median(own for _, own in timed)


if __name__ == "__main__":
    main()
