"""Other tasks than classes, on drawn shapes: `python -m tests.measure.tasks segmentation|detection [--seeds 3]
[--first 0] [--steps N] [--side N]`.

For every seed: the dense network; at each budget the thin one and dynamic execution from scratch with as many steps,
and the trained dense network compacted, untuned and tuned by its own loss for some seconds. Prints Markdown rows as
they come: IoU (mean over classes) or AP50, on pictures that nothing was trained on, and at the end how long a step of
dynamic execution takes over one of the thin network, both in turn.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import ssdlite320_mobilenet_v3_large

import dynprune
from tests.shapes import average_precision, draw, mean_iou

TESTED, BATCHES, BATCH = 300, 150, 16


def block(before: int, after: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in ((before, after), (after, after)):
        layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Three levels of 16, 32 and 64 channels (Ronneberger, Fischer & Brox, 2015, in small)."""

    def __init__(self, width: int = 16):
        super().__init__()
        w = width
        self.first, self.down, self.deep = block(3, w), block(w, 2 * w), block(2 * w, 4 * w)
        self.up, self.join = nn.ConvTranspose2d(4 * w, 2 * w, 2, 2), block(4 * w, 2 * w)
        self.up_again, self.join_again = nn.ConvTranspose2d(2 * w, w, 2, 2), block(2 * w, w)
        self.last = nn.Conv2d(w, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.first(x)
        two = self.down(F.max_pool2d(one, 2))
        y = self.join(torch.cat([self.up(self.deep(F.max_pool2d(two, 2))), two], 1))
        return self.last(self.join_again(torch.cat([self.up_again(y), one], 1)))


class Segmentation:
    rate, name = 3e-3, "IoU"

    def __init__(self, side: int):
        self.side, self.example = side, torch.zeros(1, 3, side, side)
        self.test = draw(TESTED, 10**6, side)[:2]

    def network(self) -> nn.Module:
        return UNet()

    def batch(self, seed: int) -> tuple:
        return draw(BATCH, seed, self.side)[:2]

    def loss(self, model: nn.Module, batch: tuple) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    @torch.no_grad()
    def score(self, model: nn.Module) -> float:
        said = torch.cat([model(part).argmax(1) for part in self.test[0].split(50)])
        return 100 * mean_iou(said, self.test[1])


class Detection:
    rate, name = 2e-3, "AP50"

    def __init__(self, side: int):
        self.side, self.example = side, ([torch.zeros(3, side, side)],)
        self.test = draw(TESTED, 10**6, side)

    def network(self) -> nn.Module:
        model = ssdlite320_mobilenet_v3_large(
            weights=None, weights_backbone=None, num_classes=4, detections_per_img=20, score_thresh=0.02
        )
        model.transform.fixed_size = (self.side, self.side)
        return model

    def batch(self, seed: int) -> tuple:
        pictures, _, boxes, kinds = draw(BATCH, seed, self.side)
        return list(pictures), [{"boxes": own, "labels": 1 + kind} for own, kind in zip(boxes, kinds)]

    def loss(self, model: nn.Module, batch: tuple) -> Tensor:
        return torch.stack(list(model(*batch).values())).sum()

    @torch.no_grad()
    def score(self, model: nn.Module) -> float:
        found = [own for part in self.test[0].split(50) for own in model(list(part))]
        return 100 * average_precision(found, *self.test[2:])


def trained(task, budget: str | None, policy: str, steps: int, seed: int) -> tuple[nn.Module, float]:
    """A network trained from scratch, and its share of the multiply-accumulates."""
    torch.manual_seed(seed)
    execution = dynprune.DynamicExecution(
        task.network(),
        task.example,
        budget or "macs=1.0",
        steps=steps,
        policy=policy,
        seed=seed,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, task.rate),
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(execution.optimizer, task.rate, total_steps=steps)
    execution.model.train()
    for step in range(steps):
        task.loss(execution.model, task.batch(seed * 10**5 + step % BATCHES)).backward()
        execution.step()
        schedule.step()
    return execution.finish(), execution.macs / execution.graph.macs({})


def compacted(
    task, dense: nn.Module, batches: list, budget: str, seed: int, search: float, tune: float
) -> tuple[nn.Module, float]:
    found = dynprune.compact(dense, task.example, batches, budget, loss=task.loss, search=search, tune=tune, seed=seed)
    return found.model, found.macs / found.graph.macs({})


def step_times(task, budget: str, rounds: int = 12) -> float:
    """A step of dynamic execution, while it explores, over one of the thin network: median of pairs, in turn."""
    torch.manual_seed(0)
    pair = [
        dynprune.DynamicExecution(
            task.network(),
            task.example,
            budget,
            steps=10**6,
            policy=policy,
            optimizer=lambda parameters: torch.optim.AdamW(parameters, 1e-3),
        )
        for policy in ("cucb", "static")
    ]
    batch, ratios = task.batch(0), []

    def seconds(execution) -> float:
        execution.model.train()
        began = time.perf_counter()
        for _ in range(5):
            task.loss(execution.model, batch).backward()
            execution.step()
        return time.perf_counter() - began

    for number in range(rounds):
        first, second = (seconds(execution) for execution in (pair if number % 2 == 0 else pair[::-1]))
        ratios.append(first / second if number % 2 == 0 else second / first)
    return statistics.median(ratios[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["segmentation", "detection"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--budgets", default="0.5,0.25")
    parser.add_argument("--search", type=float, default=20.0)
    parser.add_argument("--tune", type=float, default=30.0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    task = {"segmentation": Segmentation, "detection": Detection}[given.task](given.side)
    print(f"| seed | how | MACs | {task.name}, % | seconds |\n|---|---|---|---|---|", flush=True)

    def row(seed: int, how: str, make: Callable[[], tuple[nn.Module, float]]) -> nn.Module:
        began = time.perf_counter()
        network, share = make()
        seconds = time.perf_counter() - began
        print(f"| {seed} | {how} | {share:.3f} | {task.score(network):.2f} | {seconds:.0f} |", flush=True)
        return network

    for seed in range(given.first, given.first + given.seeds):
        dense = row(seed, "dense", partial(trained, task, None, "dense", given.steps, seed))
        batches = [task.batch(seed * 10**5 + number) for number in range(BATCHES)]
        for budget in (f"macs={text}" for text in given.budgets.split(",")):
            for how, policy in (("thin", "static"), ("dynamic execution", "cucb")):
                row(seed, how, partial(trained, task, budget, policy, given.steps, seed))
            for how, tune in (("compacted", 0.0), (f"compacted, {given.tune:g} s tuned", given.tune)):
                row(seed, how, partial(compacted, task, dense, batches, budget, seed, given.search, tune))
    for budget in (f"macs={text}" for text in given.budgets.split(",")):
        print(f"{budget}: a step of dynamic execution takes {step_times(task, budget):.3f} of a thin one's", flush=True)


if __name__ == "__main__":
    main()
