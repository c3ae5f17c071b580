"""What gates do: how much they save, on which images, and whether they depend on the image at all.

Takes a gated network and labelled images; returns shares of cost per image and class, the information between gates and
classes, and the accuracy when every gate is frozen to what it does most.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dynprune.data.loading import Data, Images
from dynprune.data.scores import logits
from dynprune.gates.gating import Choices, Choose, GatedNetwork, fixed

NEVER, ALWAYS = 0.01, 0.99  # a unit that opens for fewer or more of the images than this does not vary
EXAMPLES = 5


@dataclass(frozen=True)
class GateLine:
    """One gated group. open_share: mean over images and arms. varying_share: of its units. entropy_bits: mean of its
    units; information_bits: between a unit and the class, mean of its units."""

    group: str
    units: int
    open_share: float
    varying_share: float
    entropy_bits: float
    information_bits: float


@dataclass(frozen=True)
class GateStats:
    """share: mean cost of an image over the ungated network's, gates included; percentiles: of that share (5, 25, 50,
    75, 95). frozen_accuracy: with each gate fixed to what it does most, for at least the same cost (frozen_share).
    easiest, hardest: (image, share, class) that cost least and most. right_share, wrong_share: mean cost of the images
    that are classified right and wrong."""

    accuracy: float
    share: float
    percentiles: dict[str, float]
    by_class: dict[str, float]
    right_share: float | None
    wrong_share: float | None
    easiest: list[tuple[str, float, str]]
    hardest: list[tuple[str, float, str]]
    varying_share: float
    frozen_accuracy: float
    frozen_share: float
    layers: list[GateLine]


@dataclass
class Observed:
    """Of every image: the class that was said, its label, its cost share, and per gate what was open, (images,
    units)."""

    said: Tensor
    labels: Tensor
    shares: Tensor
    opened: list[Tensor]

    @property
    def right(self) -> Tensor:
        return self.said == self.labels


@torch.no_grad()
def observe(model: GatedNetwork, data: Data, images: Images, choose: Choose | None = None) -> Observed:
    """Run all images, in batches and in the model's own precision, on the device of the model."""
    device = next(model.parameters()).device
    said, labels, shares, opened = [], [], [], []
    model.eval()
    for batch, truth in data.eval_batches(images):
        output, choices = model.run(batch.to(device, memory_format=torch.channels_last), choose or model.threshold)
        said.append(logits(output).argmax(1).cpu())
        labels.append(truth)
        shares.append(model.executed_share(choices))
        opened.append([value.cpu() for value in choices.open])
    return Observed(torch.cat(said), torch.cat(labels), torch.cat(shares), [torch.cat(gate) for gate in zip(*opened)])


def gate_stats(
    model: GatedNetwork, data: Data, images: Images, report: Callable[[str], None] = lambda _: None
) -> GateStats:
    """Everything about the gates on these images."""
    report("running the test images through the gates")
    seen = observe(model, data, images)
    classes = len(data.classes)
    lines = []
    for gate, opened in zip(model.gates, seen.opened):
        rates = opened.mean(0)
        lines.append(
            GateLine(
                gate.group,
                len(gate.sizes),
                float(opened.mean(0) @ torch.tensor(gate.sizes, dtype=opened.dtype)) / sum(gate.sizes),
                float(((rates > NEVER) & (rates < ALWAYS)).float().mean()),
                float(bits(rates).mean()),
                float(information(opened, seen.labels, classes).mean()),
            )
        )
    report("running them with frozen gates")
    pattern = frozen_pattern(model, seen)
    frozen = observe(model, data, images, pattern)
    order = torch.argsort(seen.shares)
    units = sum(line.units for line in lines)

    def example(i: int) -> tuple[str, float, str]:
        return name_of(images, i), float(seen.shares[i]), data.classes[int(seen.labels[i])]

    def mean_share(where: Tensor) -> float | None:
        return float(seen.shares[where].mean()) if where.any() else None

    return GateStats(
        float(seen.right.double().mean()),
        float(seen.shares.mean()),
        {str(p): float(torch.quantile(seen.shares, p / 100)) for p in (5, 25, 50, 75, 95)},
        {
            name: share
            for number, name in enumerate(data.classes)
            if (share := mean_share(seen.labels == number)) is not None
        },
        mean_share(seen.right),
        mean_share(~seen.right),
        [example(int(i)) for i in order[:EXAMPLES]],
        [example(int(i)) for i in order.flip(0)[:EXAMPLES]],
        sum(line.varying_share * line.units for line in lines) / units,
        float(frozen.right.double().mean()),
        float(frozen.shares.mean()),
        lines,
    )


def name_of(images: Images, i: int) -> str:
    paths = getattr(images, "paths", None)
    return paths[i] if paths else f"image {i}"


def bits(rates: Tensor) -> Tensor:
    """Entropy of Bernoulli variables with these rates, in bits."""
    rates = rates.double().clamp(1e-12, 1 - 1e-12)
    return -(rates * rates.log2() + (1 - rates) * (1 - rates).log2())


def information(opened: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Mutual information between each unit and the class, in bits, (units,). opened: (images, units) of 0 and 1;
    labels: (images,)."""
    left = torch.zeros(opened.shape[1], dtype=torch.float64)
    for number in range(classes):
        own = opened[labels == number]
        if len(own):
            left += len(own) / len(opened) * bits(own.mean(0))
    return bits(opened.mean(0)) - left


def frozen_pattern(model: GatedNetwork, seen: Observed) -> Choose:
    """Gates that do not look: units open in the order of how often they were, until the cost is at least the mean that
    was paid."""
    rates = torch.cat([opened.mean(0) for opened in seen.opened])
    order = torch.argsort(rates, descending=True, stable=True)
    sizes = [len(gate.sizes) for gate in model.gates]

    def pattern(count: int) -> list[Tensor]:
        flat = torch.zeros(len(rates))
        flat[order[:count]] = 1
        return [part[None] for part in flat.split(sizes)]

    def cost(count: int) -> float:
        units = [
            torch.where(part.any() | torch.tensor(not gate.cuts), part, torch.eye(1, part.shape[1]))
            for gate, part in zip(model.gates, pattern(count))
        ]
        return float(model.executed_share(Choices(model.gates, units, units)))

    low, high, wanted = 0, len(rates), float(seen.shares.mean())
    while low < high:  # cost grows with the count
        middle = (low + high) // 2
        low, high = (low, middle) if cost(middle) >= wanted else (middle + 1, high)
    return fixed({gate.group: part for gate, part in zip(model.gates, pattern(low))})
