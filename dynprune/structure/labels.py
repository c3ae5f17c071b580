"""Labels: integers that say, element by element of a tensor, which arm the element belongs to.

A *label tensor* has the shape of the value that it describes. Label 0 is pinned: it can never be removed. Labels that
must live and die together are tied; an arm is what ties connect.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

PINNED = 0


class Labels:
    """All labels that were given out, 1 to `next - 1`, and their ties: int64 of shape (2, pairs) each."""

    def __init__(self) -> None:
        self.next = 1
        self.ties: list[Tensor] = []

    def fresh(self, count: int) -> Tensor:
        start, self.next = self.next, self.next + count
        return torch.arange(start, self.next)

    def all(self) -> Tensor:
        """Every label but PINNED."""
        return torch.arange(1, self.next)

    def among(self, labels: Tensor) -> Tensor:
        """The labels that occur, each once, in order, without PINNED. As marks in a list of all labels: unique would
        sort every element."""
        there = torch.zeros(self.next, dtype=torch.bool)
        there[distinct(labels).reshape(-1)] = True
        there[PINNED] = False
        return there.nonzero()[:, 0]

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Labels at the same place in `a` and `b` (broadcast against each other) live and die together."""
        a, b = torch.broadcast_tensors(a, b)
        once = tuple(slice(0, 1) if one == other == 0 else slice(None) for one, other in zip(a.stride(), b.stride()))
        a, b = a[once].reshape(-1), b[once].reshape(-1)
        differ = a != b
        if bool(differ.any()):  # as one number per pair, since unique over columns takes fifty times as long
            pairs = torch.unique(a[differ] * self.next + b[differ])
            self.ties.append(torch.stack([pairs // self.next, pairs % self.next]))

    def tie_along(self, labels: Tensor, dim: int) -> Tensor:
        """Tie all entries along `dim`; returns the first entry, with `dim` kept at size 1."""
        first = labels.narrow(dim, 0, 1)
        if varies(labels, dim):
            self.tie(labels, first.expand_as(labels))
        return first

    def components(self) -> np.ndarray:
        """Number of the connected component of every label, int32 of shape (labels,)."""
        ties = torch.cat(self.ties, dim=1).numpy() if self.ties else np.zeros((2, 0), dtype=np.int64)
        graph = coo_matrix((np.ones(ties.shape[1], dtype=bool), (ties[0], ties[1])), shape=(self.next, self.next))
        return connected_components(graph, directed=False)[1]


def distinct(labels: Tensor) -> Tensor:
    """The labels without the repeats that broadcasting makes: every stride-0 dimension cut to its first entry."""
    return labels[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in labels.stride())]


def varies(labels: Tensor, dim: int) -> bool:
    """True when the labels are not the same all along `dim`."""
    if labels.size(dim) < 2 or labels.stride(dim) == 0:
        return False
    small = distinct(labels)
    return bool((small != small.narrow(dim, 0, 1)).any())


def labels_along(labels: Tensor, dim: int) -> Tensor | None:
    """The labels along `dim` when they do not depend on any other dimension, else None. Shape (size of dim,)."""
    dim = dim % labels.ndim
    if any(varies(labels, d) for d in range(labels.ndim) if d != dim):
        return None
    return labels.movedim(dim, 0).reshape(labels.size(dim), -1)[:, 0]


def pinned_like(value: Tensor) -> Tensor:
    """Labels of a value none of whose elements can be removed."""
    return torch.zeros((), dtype=torch.int64).expand(value.shape)


def tensors_in(tree: object) -> Iterator[Tensor]:
    """What may carry labels: every tensor in nested lists, tuples, dicts and plain objects such as model outputs."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from tensors_in(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from tensors_in(value)
    elif hasattr(tree, "__dict__") and not isinstance(tree, (nn.Module, type)) and not callable(tree):
        yield from tensors_in(vars(tree))
    elif hasattr(tree, "__dataclass_fields__"):
        yield from tensors_in([getattr(tree, name) for name in tree.__dataclass_fields__])
