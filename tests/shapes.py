"""Circles, squares and triangles on noise, drawn: pictures with masks and boxes, for other tasks than classes."""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = ("circle", "square", "triangle")


def draw(
    count: int, seed: int, size: int = 64, most: int = 3, channels: int = 3
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Pictures (count, channels, size, size) of 1 to `most` shapes; masks (count, size, size), 0 where there is none,
    else 1 + kind; per picture boxes (shapes, 4) as x, y, x, y in pixels, and kinds (shapes,). Later shapes hide
    earlier ones; what is hidden by more than half is not in the boxes."""
    rng = torch.Generator().manual_seed(seed)

    def between(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=rng) * (high - low) + low

    rows, columns = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    pictures = between(0, 0.5, count, channels, 1, 1) + 0.15 * torch.randn(count, channels, size, size, generator=rng)
    masks = torch.zeros(count, size, size, dtype=torch.int64)
    all_boxes, all_kinds = [], []
    for picture, mask in zip(pictures, masks):
        owner = torch.full((size, size), -1)
        number = int(torch.randint(1, most + 1, (1,), generator=rng))
        kinds = torch.randint(3, (number,), generator=rng)
        areas = []
        for place, kind in enumerate(kinds.tolist()):
            radius = float(between(size / 12, size / 5, 1))
            y, x = between(radius, size - radius, 2).tolist()
            down, right = rows - y, columns - x
            inside = (
                down**2 + right**2 < radius**2,
                torch.maximum(down.abs(), right.abs()) < 0.85 * radius,
                (down < 0.8 * radius) & (down > 2 * right.abs() - radius),
            )[kind]
            owner[inside], areas = place, [*areas, int(inside.sum())]
            colour = between(0.2, 1.0, channels, 1)
            picture[:, inside] = colour + 0.1 * torch.randn(channels, areas[-1], generator=rng)
            mask[inside] = 1 + kind
        boxes, seen = [], []
        for place, kind in enumerate(kinds.tolist()):
            ys, xs = torch.nonzero(owner == place, as_tuple=True)
            if len(ys) > areas[place] / 2:
                boxes.append([int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1])
                seen.append(kind)
        all_boxes.append(torch.tensor(boxes, dtype=torch.float32).view(-1, 4))
        all_kinds.append(torch.tensor(seen, dtype=torch.int64))
    return pictures, masks, all_boxes, all_kinds


def mean_iou(said: Tensor, masks: Tensor, classes: int = 4) -> float:
    """Intersection over union of (pictures, size, size) of classes, mean over the classes."""
    both = torch.bincount((masks * classes + said).flatten(), minlength=classes**2).view(classes, classes).double()
    return float((both.diagonal() / (both.sum(0) + both.sum(1) - both.diagonal())).mean())


def average_precision(found: list[dict[str, Tensor]], boxes: list[Tensor], kinds: list[Tensor]) -> float:
    """Area under precision over recall at an overlap of one half, mean over the kinds: AP50 as PASCAL VOC counts it
    since 2010. found: per picture boxes, scores and labels, 1 + kind as torchvision's detectors count."""
    from torchvision.ops import box_iou

    values = []
    for kind in range(len(KINDS)):
        hits: list[tuple[float, bool]] = []
        wanted = sum(int((own == kind).sum()) for own in kinds)
        for own, there, what in zip(found, boxes, kinds):
            mine = own["labels"] == 1 + kind
            truth, order = there[what == kind], own["scores"][mine].argsort(descending=True)
            overlap = box_iou(own["boxes"][mine][order], truth)
            free = torch.ones(len(truth), dtype=torch.bool)
            for row, score in zip(overlap, own["scores"][mine][order].tolist()):
                best = int((row * free).argmax()) if len(truth) else -1
                hit = best >= 0 and bool(free[best]) and float(row[best]) >= 0.5
                if hit:
                    free[best] = False
                hits.append((score, hit))
        hits.sort(key=lambda pair: -pair[0])
        right = torch.tensor([hit for _, hit in hits], dtype=torch.float64).cumsum(0)
        precision, recall = right / torch.arange(1, len(hits) + 1), right / max(1, wanted)
        precision = precision.flip(0).cummax(0).values.flip(0)
        values.append(float((precision * recall.diff(prepend=torch.zeros(1, dtype=torch.float64))).sum()))
    return sum(values) / len(values)
