"""`dynprune.save`: a compact network of your own as a file that `dynprune.load` opens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from dynprune.errors import DynpruneError
from dynprune.files import artifact
from dynprune.structure.channels import ChannelGraph, Selection


def save(
    path: str | Path,
    model: nn.Module,
    graph: ChannelGraph,
    selection: Selection,
    *,
    classes: Sequence[str] | int,
    size: Sequence[int],
    template: Selection | None = None,
    name: str = "",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> None:
    """Write a compact network as one safetensors file.

    model: the compact copy, `slim(full, graph.kept(selection, template))`; template as it was given there. classes:
    their names, or how many. size: channels, height and width of an image. name: of the full-width network as `train`
    takes it, by which `load(path)` builds it; without one, `load(path, full)` wants the full-width network. mean, std:
    of the images' channels.

    Raises DynpruneError where the model is not of this selection, and where the file cannot be written.

    >>> dynprune.save("small.safetensors", small, graph, selection, classes=10, size=(3, 224, 224))
    """
    kept, widths = graph.kept(selection, template), {arms: len(own) for arms, own in selection.items()}
    for (tensor, dim), positions in kept.items():
        if dim >= 0 and (found := artifact.tensor_shape(model, tensor)) is not None and found[dim] != len(positions):
            raise DynpruneError(
                f"{tensor} has {found[dim]} channels along dimension {dim}, the selection "
                f"{len(positions)}. Expected the compact copy of this selection."
            )
    labels = [str(number) for number in range(classes)] if isinstance(classes, int) else list(classes)
    facts = artifact.Facts(
        {"model": name},
        labels,
        list(size),
        list(mean or [0.0] * size[0]),
        list(std or [1.0] * size[0]),
        artifact.kept_as_json(kept),
        widths,
        graph.macs(widths),
        graph.params(widths),
        graph.macs({}),
        graph.params({}),
        0.0,
    )
    artifact.save(Path(path), model, facts)
