"""`dynprune.save`: a network of your own as a file that `dynprune.load` opens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from dynprune.errors import DynpruneError
from dynprune.files import artifact
from dynprune.files.modules import save_module
from dynprune.structure.channels import ChannelGraph, Selection


def save(
    model: nn.Module,
    path: str | Path,
    graph: ChannelGraph | None = None,
    selection: Selection | None = None,
    *,
    classes: Sequence[str] | int | None = None,
    size: Sequence[int] | None = None,
    template: Selection | None = None,
    name: str = "",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> None:
    """Write a network, usually a compact one, as one safetensors file.

    With a model and a path alone, for any task: `load(path, full)` puts it back into the full-width network, or into
    one of the same widths.

    With graph and selection, classes and size, a compact file of an image classifier, as the commands write it: model
    is then the compact copy, `slim(full, graph.kept(selection, template))`; template as it was given there. classes:
    their names, or how many. size: channels, height and width of an image. name: of the full-width network as `train`
    takes it, by which `load(path)` builds it; without one, `load(path, full)` wants the full-width network. mean, std:
    of the images' channels.

    Raises DynpruneError where the model is not of this selection, where only a part of these facts is given, and where
    the file cannot be written.

    >>> dynprune.save(small, "small.safetensors")
    >>> dynprune.save(small, "small.safetensors", graph, selection, classes=10, size=(3, 224, 224))
    """
    if isinstance(model, str | Path) and isinstance(path, nn.Module):  # the order of version 0
        model, path = path, model
    if not isinstance(model, nn.Module):
        raise DynpruneError(f"save got a {type(model).__name__}. Expected a module and a path: save(model, path).")
    if graph is None and selection is None and classes is None and size is None:
        save_module(Path(path), model)
        return
    if graph is None or selection is None or classes is None or size is None:
        raise DynpruneError(
            "save got some of graph, selection, classes and size. Expected all of them, for a compact file of a "
            "classifier, or none."
        )
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
