"""Trained weights by name: those that torchvision and timm publish, with the images they were trained on.

Takes a model's name and what the user calls its weights: `pretrained`, a member of torchvision's enum such as
`IMAGENET1K_V2`, or a tag of timm's such as `a1_in1k`. Returns the network as its library fills it, and how images were
resized and normalised for it. The library fetches the file once and keeps it; without a connection one line says which
file belongs where.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from dynprune.errors import DynpruneError
from dynprune.zoo import parse_name

DEFAULT = "pretrained"
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")


@dataclass(frozen=True)
class Preprocessing:
    """How images were made for a network: resized by `interpolation` until `margin` times height and width fit in, the
    middle of `size` (height, width) cut out, pixels in 0..1 normalised by mean and std per channel."""

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    margin: float


def is_name(weights: str) -> bool:
    """Whether weights are meant by name. A file of that name comes first."""
    return (
        bool(weights)
        and not Path(weights).exists()
        and not any(mark in weights for mark in "/\\")
        and (weights == DEFAULT or Path(weights).suffix[1:] not in ("pt", "pth", "bin", "safetensors", "ckpt", "tar"))
    )


def preprocessing_of(model: str, weights: str) -> Preprocessing:
    """How images were made for weights that are named. Nothing is fetched for it."""
    source, name = library_of(model, weights)
    if source == "torchvision":
        entry = torchvision_entry(name, weights)
        shown = entry.transforms()
        crop, resize = shown.crop_size[0], shown.resize_size[0]
        mean, std = (tuple(shown.mean), tuple(shown.std))
        if name in ("googlenet", "inception_v3"):  # unless built bare, they turn ImageNet's normalisation into this
            mean = std = (0.5, 0.5, 0.5)
        return Preprocessing((crop, crop), mean, std, shown.interpolation.value, resize / crop)
    config = timm_config(timm_tag(name, weights))
    return Preprocessing(
        tuple(config.input_size[1:]), tuple(config.mean), tuple(config.std), config.interpolation, 1 / config.crop_pct
    )


def fetch(model: str, weights: str) -> nn.Module:
    """The network of this name as its library fills it, for the classes it was trained on. Raises DynpruneError where
    there are no such weights, and where they cannot be fetched."""
    source, name = library_of(model, weights)
    options = parse_name(model)[1]
    with torch.device("cpu"):
        if source == "torchvision":
            import torchvision

            entry = torchvision_entry(name, weights)
            try:
                return torchvision.models.get_model(name, weights=entry, progress=sys.stderr.isatty(), **options)
            except OSError as error:
                place = Path(torch.hub.get_dir()) / "checkpoints" / entry.url.rpartition("/")[2]
                raise unreachable(weights, entry.url, f"at {place}", error) from error
        import timm

        tag = timm_tag(name, weights)
        hub = logging.getLogger("huggingface_hub")
        before = hub.level
        hub.setLevel(logging.ERROR)  # it tells of every attempt
        try:
            return timm.create_model(tag, True, **cast(dict[str, Any], options))
        except Exception as error:  # of whichever library it fetches with
            file = f"model.safetensors of {timm_config(tag).hf_hub_id}"
            raise unreachable(weights, file, "anywhere, and pass it as --weights FILE", error) from error
        finally:
            hub.setLevel(before)


def unreachable(weights: str, url: str, place: str, error: Exception) -> DynpruneError:
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return DynpruneError(f'--weights "{weights}" cannot be fetched ({reason[:120].rstrip(".")}). Put {url} {place}.')


def library_of(model: str, weights: str) -> tuple[str, str]:
    """Library and name of a network that may have published weights."""
    source, colon, name = parse_name(model)[0].partition(":")
    if source not in ("torchvision", "timm") or not colon:
        raise DynpruneError(
            f'No weights file {weights}. "{model}" has no published weights either; those of torchvision: and timm: '
            "have. Expected a safetensors file or a saved state dict."
        )
    return source, name


def torchvision_entry(name: str, weights: str):
    """The member of torchvision's enum."""
    import torchvision

    try:
        members = torchvision.models.get_model_weights(name)
    except ValueError as error:
        raise DynpruneError(f'torchvision has no weights for "{name}". Pass a file as --weights.') from error
    known = [member.name for member in members]
    if weights == DEFAULT and known:
        return members.DEFAULT
    if weights not in known:
        raise DynpruneError(
            f"No weights file {weights}, and torchvision has no weights of that name for {name}. It has "
            f"{', '.join([DEFAULT, *known])}."
        )
    return members[weights]


def timm_tag(name: str, weights: str) -> str:
    """timm's name of a network with its weights, such as resnet18.a1_in1k."""
    try:
        import timm
    except ImportError as error:
        raise DynpruneError(
            f'timm is not installed, so weights of "timm:{name}" cannot be found. '
            'Install it: pip install "dynprune[timm]".'
        ) from error
    base = name.partition(".")[0]
    known = timm.list_pretrained(f"{base}.*") or timm.list_pretrained(base)
    if weights == DEFAULT and known:
        return name if "." in name else f"{base}.{timm_config(base).tag}"
    if f"{base}.{weights}" not in known:
        tags = [entry.partition(".")[2] for entry in known]
        raise DynpruneError(
            f"No weights file {weights}, and timm has no weights of that tag for {base}. It has "
            f"{', '.join([DEFAULT, *tags[:12]]) if tags else 'none'}{', ...' if len(tags) > 12 else ''}."
        )
    return f"{base}.{weights}"


def timm_config(tag: str) -> Any:
    """What timm knows of a network's weights."""
    import timm

    config = timm.get_pretrained_cfg(tag)
    if config is None:
        raise DynpruneError(f'timm has no weights for "{tag}". Pass a file as --weights.')
    return config
