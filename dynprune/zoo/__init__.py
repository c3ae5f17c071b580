"""From a name to a network: the zoo, `torchvision:NAME`, `timm:NAME`, `transformers:NAME`, or the user's own
`package.module:factory`.

Takes the name and the number of classes, returns a freshly initialised module. Arguments may follow the name:
`timm:resnet18?in_chans=1`. `weights.py` fills it from a checkpoint.

Others use `build` and `runs_code`, `load_trained` (`weights.py`).
"""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from dynprune.errors import DynpruneError
from dynprune.state.copies import same_randomness
from dynprune.state.tensors import in_precision, refuse_strange
from dynprune.zoo import cifar

ZOO: dict[str, Callable[[int], nn.Module]] = {
    name: getattr(cifar, name) for name in ("vgg16", "vgg19", "resnet20", "resnet56", "resnet164", "densenet40")
}
FORMS = f"{', '.join(ZOO)}, torchvision:NAME, timm:NAME, transformers:NAME, package.module:factory"
# what factories call the number of classes
COUNTS_CLASSES = ("num_classes", "n_classes", "nclasses", "num_labels", "classes")
# arguments of libraries that read files or the network
FETCHING = ("pretrained", "checkpoint", "weights", "cache", "url", "file", "trust_remote")

# besides folders called site-packages
INSTALLED = {Path(sysconfig.get_path("stdlib")), Path(torch.__file__).parents[1]}

Factory = Callable[[int], object]


def build(name: str, classes: int, seed: int | None = None, *, size: Sequence[int] | None = None) -> nn.Module:
    """A new network for `classes` classes, in float32. With a seed, its initial weights are reproducible; the global
    generators are left as they were either way. size: channels, height and width of an input, by which lazy layers find
    their own sizes, and for which transformers of torchvision and timm with a fixed number of patches are built.

    Raises DynpruneError for names that lead to no network, and where building it fails.
    """
    base, options = parse_name(name)
    with torch.device("cpu"):  # what modules make as they are imported outlives this call, and so a caller's device
        factory = find_factory(base, options, size)
    with same_randomness(seed):
        try:
            model = factory(classes)
        except DynpruneError:
            raise
        except Exception as error:
            if torch.get_default_device().type == "meta":  # the caller tries whether it can be built there
                raise RuntimeError(f"not on the meta device: {first_line(error)}") from error
            raise failed(name, error) from error
        if not isinstance(model, nn.Module):
            raise DynpruneError(f'"{name}" returned {type(model).__name__}. Expected a torch.nn.Module.')
        materialise(model, name, size)
    refuse_strange(model, name)
    return in_precision(model, torch.float32)


def materialise(model: nn.Module, name: str, size: Sequence[int] | None) -> None:
    """Let lazy layers find their sizes, in one forward pass."""
    if not any(nn.parameter.is_lazy(value) for value in [*model.parameters(), *model.buffers()]):
        return
    if size is None:
        raise DynpruneError(f'"{name}" has lazy layers, whose sizes depend on the input, which is not known here.')
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, *size))
    except Exception as error:
        raise DynpruneError(
            f'"{name}" has lazy layers and fails on an input of {"x".join(map(str, size))} '
            f"({type(error).__name__}: {first_line(error)})."
        ) from error
    model.train()


def failed(name: str, error: BaseException) -> DynpruneError:
    """What a factory's exception means, in one line that names the place in the user's code."""
    ours = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(ours)]
    where = f" in {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    hint = ""
    if isinstance(error, TypeError) and "argument" in str(error):
        hint = f' Arguments can follow the name: "{name}{"&" if "?" in name else "?"}depth=18".'
    return DynpruneError(f'"{name}" cannot be built: {type(error).__name__}{where}: {first_line(error)}.{hint}')


def first_line(error: BaseException) -> str:
    line = next((line for line in str(error).splitlines() if line.strip()), "no message")
    return "".join(char for char in line if char.isprintable())[:300].rstrip(".")


def runs_code(model: str) -> bool:
    """Whether a model's name is that of a function of the user's own, which would be imported."""
    return ":" in model and not model.startswith(("torchvision:", "timm:", "transformers:"))


def parse_name(name: str) -> tuple[str, dict[str, object]]:
    """ "timm:resnet18?in_chans=1&drop_rate=0.1" to the name and its arguments: numbers, True, False, None, tuples, or
    text."""
    base, mark, text = name.partition("?")
    options: dict[str, object] = {}
    for part in text.split("&") if mark else ():
        key, equals, value = part.partition("=")
        if not equals or not key.isidentifier():
            raise DynpruneError(f'--model got "{name}". Expected arguments such as {base}?width=64&depth=18.')
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key] = value
    return base, options


def find_factory(name: str, options: dict[str, object] | None = None, size: Sequence[int] | None = None) -> Factory:
    """What builds the network of this name, given the number of classes. size: see `build`."""
    options = options or {}
    if name in ZOO:
        if options:
            raise DynpruneError(f'"{name}" takes no arguments. Got {", ".join(options)}.')
        return ZOO[name]
    source, colon, rest = name.partition(":")
    if not colon:
        raise DynpruneError(f'No model "{name}". {suggestion(name)}Choose one of: {FORMS}.')
    if source in ("torchvision", "timm", "transformers"):
        fetching = [key for key in options if any(word in key.lower() for word in FETCHING)]
        if fetching:
            raise DynpruneError(
                f'"{name}" got {fetching[0]}, which would read files or the network. Start from '
                f"trained weights with --weights FILE."
            )
        if source == "transformers":
            return transformers_factory(rest, options)
        return (torchvision_factory if source == "torchvision" else timm_factory)(rest, options, size)
    return user_factory(source, rest, options)


@contextmanager
def imported_anew(name: str) -> Iterator[None]:
    """Inside, modules of the user's own that `name` leads to are imported again, as another process would; afterwards
    the first ones are back. Random numbers that a module drew at its top then differ. Installed packages stay as they
    are."""
    main = sys.modules.get(name.partition(":")[0])
    home = source_folder(main)
    own = {
        key: module
        for key, module in sys.modules.items()
        if home is not None and source_folder(module) == home and key != "__main__"
    }
    try:
        for key in own:
            del sys.modules[key]
        yield
    finally:
        for key in [
            key for key, module in sys.modules.items() if own and source_folder(module) == home and key != "__main__"
        ]:
            del sys.modules[key]
        sys.modules.update(own)


def source_folder(module: ModuleType | None) -> Path | None:
    """The folder from which a module of the user's own is imported, that of its outermost package; None for installed
    ones and ours."""
    file = getattr(module, "__file__", None) or next(
        (f"{folder}/__init__.py" for folder in getattr(module, "__path__", ())), ""
    )
    top, *inner = module.__name__.split(".") if module else ("",)
    above = list(Path(file).parents)[len(inner) + (Path(file).name == "__init__.py") :]
    if (
        top == "dynprune"
        or not file.endswith(".py")
        or not above
        or above[0] in INSTALLED
        or above[0].name in ("site-packages", "dist-packages")
    ):
        return None
    return above[0]


def suggestion(name: str) -> str:
    """Where a network of this name, or one like it, is to be had."""
    import torchvision

    sources = {"torchvision:": torchvision.models.list_models()}
    if "timm" in sys.modules or importlib.util.find_spec("timm"):
        import timm

        sources["timm:"] = timm.list_models()
    for prefix, names in {"": list(ZOO), **sources}.items():
        if name in names:
            return f"Did you mean {prefix}{name}? "
    close = difflib.get_close_matches(name, [*ZOO, *sources["torchvision:"]], 1)
    return f"Did you mean {close[0] if close[0] in ZOO else 'torchvision:' + close[0]}? " if close else ""


def torchvision_factory(name: str, options: dict[str, object], size: Sequence[int] | None) -> Factory:
    import torchvision

    known = [model for model in torchvision.models.list_models() if not model.startswith("quantized_")]
    if name not in known:
        close = ", ".join(difflib.get_close_matches(name, known, 3)) or ", ".join(known[:8]) + ", ..."
        raise DynpruneError(f'torchvision has no model "{name}". Close to it: {close}.')
    extra: dict[str, object] = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    if name in torchvision.models.list_models(module=torchvision.models.segmentation) + torchvision.models.list_models(
        module=torchvision.models.detection
    ):
        extra["weights_backbone"] = None
    if name.startswith("vit_") and size and size[1] == size[2]:
        extra["image_size"] = size[1]
    return lambda classes: torchvision.models.get_model(
        name, weights=None, **{"num_classes": classes, **extra, **options}
    )


def timm_factory(name: str, options: dict[str, Any], size: Sequence[int] | None) -> Factory:
    try:
        import timm
    except ImportError as error:
        raise DynpruneError(
            f'timm is not installed, so "timm:{name}" cannot be built. Install it: pip install "dynprune[timm]".'
        ) from error
    if not timm.is_model(name):
        close = ", ".join(difflib.get_close_matches(name, timm.list_models(), 3)) or "see timm.list_models()"
        raise DynpruneError(f'timm has no model "{name}". Close to it: {close}.')
    usual, sized = timm.get_pretrained_cfg(name), {}
    chosen = any("img_size" in option for option in options)  # img_size=96, or dynamic_img_size=True
    fixed = usual if usual and usual.fixed_input_size and not chosen else None
    if size and fixed and tuple(size[1:]) != tuple(fixed.input_size[1:]):
        sized["img_size"] = tuple(size[1:])

    def built(classes: int) -> nn.Module:
        def create(**more: object) -> nn.Module:
            return timm.create_model(name, pretrained=False, **{"num_classes": classes, **more, **options})

        try:
            return create(**sized)
        except TypeError:  # a few have no argument for it
            return create()

    return built


def transformers_factory(name: str, options: dict[str, object]) -> Factory:
    """An image classifier of transformers: of a kind such as "convnextv2" with the default configuration, or of a
    folder with a config.json."""
    try:
        from transformers import AutoConfig, AutoModelForImageClassification
    except ImportError as error:
        raise DynpruneError(
            f'transformers is not installed, so "transformers:{name}" cannot be built. Install it: '
            f"pip install transformers."
        ) from error
    if Path(name).is_dir():
        return lambda classes: AutoModelForImageClassification.from_config(
            AutoConfig.from_pretrained(name, local_files_only=True, num_labels=classes, **options)
        )
    known = sorted(config.model_type for config in AutoModelForImageClassification._model_mapping)
    if name not in known:
        close = ", ".join(difflib.get_close_matches(name, known, 3)) or ", ".join(known[:8]) + ", ..."
        raise DynpruneError(
            f'transformers has no image classifier "{name}". Close to it: {close}. A folder with a '
            f"config.json will do too."
        )
    return lambda classes: AutoModelForImageClassification.from_config(
        AutoConfig.for_model(name, num_labels=classes, **options)
    )


def user_factory(module_name: str, path: str, options: dict[str, object]) -> Factory:
    """Import the user's factory, also from the working directory: a function, a class, or one inside a class,
    "Class.method". It is called with the number of classes if it takes that."""
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except SyntaxError as error:
        raise DynpruneError(
            f'Cannot import "{module_name}": {error.msg} in {error.filename}:{error.lineno}.'
        ) from error
    except ModuleNotFoundError as error:
        raise DynpruneError(f'Cannot import "{module_name}" ({error}). Expected one of: {FORMS}.') from error
    except Exception as error:
        raise failed(f"{module_name}:{path}", error) from error
    factory: object = module
    for part in path.split("."):
        factory = getattr(factory, part, None)
    if not callable(factory):
        raise DynpruneError(
            f'"{module_name}" has no callable "{path}". Expected a function or a class that gives a torch.nn.Module.'
        )
    try:
        takes: Mapping[str, inspect.Parameter] = inspect.signature(factory).parameters
    except ValueError:  # some that are written in C tell nothing
        takes = {}
    counts = next(
        (key for key in COUNTS_CLASSES if key in takes),
        "num_classes" if any(p.kind is p.VAR_KEYWORD for p in takes.values()) else None,
    )
    return lambda classes: factory(**({counts: classes} if counts else {}) | options)
