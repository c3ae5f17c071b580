"""From a name to a network: the zoo, `torchvision:NAME`, `timm:NAME`, or the user's own `package.module:factory`.

Takes the name and the number of classes, returns a freshly initialised module. `load_weights` fills it from a checkpoint.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from dynprune.errors import DynpruneError
from dynprune.zoo import cifar

ZOO: dict[str, Callable[[int], nn.Module]] = {
    name: getattr(cifar, name) for name in ("vgg16", "vgg19", "resnet20", "resnet56", "resnet164", "densenet40")}
FORMS = f"{', '.join(ZOO)}, torchvision:NAME, timm:NAME, package.module:factory"


def build(name: str, classes: int, seed: int | None = None) -> nn.Module:
    """A new network for `classes` classes. With a seed, its initial weights are reproducible; the global generator is
    left as it was either way."""
    factory = find_factory(name)
    with torch.random.fork_rng():
        if seed is not None:
            torch.manual_seed(seed)
        model = factory(classes)
    if not isinstance(model, nn.Module):
        raise DynpruneError(f'"{name}" returned {type(model).__name__}. Expected a torch.nn.Module.')
    return model


def find_factory(name: str) -> Callable[[int], nn.Module]:
    if name in ZOO:
        return ZOO[name]
    source, colon, rest = name.partition(":")
    if not colon:
        close = difflib.get_close_matches(name, ZOO, 1)
        raise DynpruneError(f'No model "{name}". ' + (f"Did you mean {close[0]}? " if close else "") + f"Choose one of: {FORMS}.")
    if source == "torchvision":
        return torchvision_factory(rest)
    if source == "timm":
        return timm_factory(rest)
    return user_factory(source, rest)


def torchvision_factory(name: str) -> Callable[[int], nn.Module]:
    import torchvision

    known = [model for model in torchvision.models.list_models() if not model.startswith("quantized_")]
    if name not in known:
        close = ", ".join(difflib.get_close_matches(name, known, 3)) or ", ".join(known[:8]) + ", ..."
        raise DynpruneError(f'torchvision has no model "{name}". Close to it: {close}.')
    extra: dict[str, object] = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    if name in torchvision.models.list_models(module=torchvision.models.segmentation) + torchvision.models.list_models(module=torchvision.models.detection):
        extra["weights_backbone"] = None
    return lambda classes: torchvision.models.get_model(name, weights=None, num_classes=classes, **extra)


def timm_factory(name: str) -> Callable[[int], nn.Module]:
    try:
        import timm
    except ImportError as error:
        raise DynpruneError(f'timm is not installed, so "timm:{name}" cannot be built. Install it: pip install "dynprune[timm]".') from error
    if not timm.is_model(name):
        close = ", ".join(difflib.get_close_matches(name, timm.list_models(), 3)) or "see timm.list_models()"
        raise DynpruneError(f'timm has no model "{name}". Close to it: {close}.')
    return lambda classes: timm.create_model(name, pretrained=False, num_classes=classes)


def user_factory(module_name: str, factory_name: str) -> Callable[[int], nn.Module]:
    """Import the user's factory, also from the working directory. It is called with num_classes if it takes that."""
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except (ImportError, TypeError, ValueError) as error:
        raise DynpruneError(f'Cannot import "{module_name}" ({error}). Expected one of: {FORMS}.') from error
    factory = getattr(module, factory_name, None)
    if not callable(factory):
        raise DynpruneError(f'"{module_name}" has no callable "{factory_name}". Expected a function that returns a torch.nn.Module.')
    takes = inspect.signature(factory).parameters
    accepts = "num_classes" in takes or any(p.kind is p.VAR_KEYWORD for p in takes.values())
    return (lambda classes: factory(num_classes=classes)) if accepts else (lambda classes: factory())


def refuse_packed(path: Path) -> None:
    """torch.save writes a zip archive without compression; anything else could unpack to far more than its size, or be plain pickle."""
    if not zipfile.is_zipfile(path):
        raise ValueError("not the zip archive that torch.save writes since version 1.6")
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise ValueError("a compressed archive, which torch.save does not write")


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint file, without unpickling code: safetensors, or torch.load with weights_only."""
    if not path.is_file():
        raise DynpruneError(f"No weights file {path}. Expected a safetensors file or a saved state dict.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        refuse_packed(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise DynpruneError(f"{path} is not a readable checkpoint ({type(error).__name__}: {str(error).partition(chr(10))[0]}). "
                            "Expected safetensors, or a state dict saved with torch.save(model.state_dict(), ...).") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()):
        raise DynpruneError(f"{path} holds {type(state).__name__}, not a state dict. Expected a mapping from names to tensors.")
    return {name.removeprefix("module."): value for name, value in state.items()}


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill `model` from a checkpoint; every tensor must fit by name and shape."""
    state, own = read_state_dict(path), model.state_dict()
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    unknown = [name for name in state if name not in own]
    shapes = [f"{name} is {list(state[name].shape)}, the model has {list(own[name].shape)}"
              for name in own if name in state and state[name].shape != own[name].shape]
    problems = [f"{title} {len(found)}: {', '.join(found[:3])}{', ...' if len(found) > 3 else ''}"
                for title, found in (("missing", missing), ("unknown", unknown), ("of another shape", shapes)) if found]
    if problems:
        raise DynpruneError(f"{path} does not fit the model. Tensors {'; '.join(problems)}. "
                            "Check that --model and the number of classes are those it was trained with.")
    model.load_state_dict(state, strict=False)
