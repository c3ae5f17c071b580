"""A checkpoint into a network: whose tensors are they, and under which names?

Takes a module and a file; fills the module's tensors. Training scripts put the weights under "model", "state_dict",
"ema" and many other keys, and before every name what they were wrapped in ("module.", "_orig_mod.", "model."). A prefix
is removed only where what is left are the network's own names, so a network whose own names begin that way loads too.
Every tensor must fit by name and shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dynprune import zoo
from dynprune.errors import DynpruneError
from dynprune.zoo.checkpoints import Contents, Described, Foreign, read_contents, state_dicts
from dynprune.zoo.pretrained import fetch, is_name

# DataParallel, torch.compile, FSDP, Fabric
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_forward_module"}
# in the name of a part that holds averaged weights: what is meant to be used
AVERAGED = ("ema", "averaged", "swa", "shadow")


@dataclass(frozen=True)
class Candidate:
    """A mapping from names to tensors in a file. place: the keys that lead there, "" for the whole file. read: one of
    its tensors."""

    place: str
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]


@dataclass(frozen=True)
class Fit:
    """How a candidate's names become the network's own. names: own name to the candidate's."""

    candidate: Candidate
    names: dict[str, str]
    missing: list[str]
    unknown: list[str]
    other_shape: list[str]  # with both shapes, in words

    @property
    def whole(self) -> bool:
        return not (self.missing or self.unknown or self.other_shape)


@dataclass(frozen=True)
class Loaded:
    """What came of a checkpoint. place: where in the file the weights lay, "" for the file as a whole. anew: layers
    that make the scores and begin anew, since the weights are of `classes` classes."""

    place: str
    anew: tuple[str, ...] = ()
    classes: int = 0

    @property
    def words(self) -> str:
        """What a user should know of it, "" if nothing."""
        if not self.anew:
            return f"weights: {self.place}" if self.place else ""
        return f"weights are of {self.classes} classes: {', '.join(self.anew)} begin{'s' * (len(self.anew) == 1)} anew"


def load_trained(model: nn.Module, name: str, weights: str, classes: int, size: Sequence[int] | None = None) -> Loaded:
    """Fill `model` with weights that are named or lie in a file, also those of another number of classes.

    name: of the network, as `zoo.build` takes it; classes: how many `model` has. size: of an input. Layers that make
    the scores keep their initial weights if the weights are of another number of classes: those whose shapes differ
    between `model` and the network of that number. Any other misfit raises DynpruneError, as in `load_weights`.
    """
    if is_name(weights):
        state = fetch(name, weights).state_dict()
        candidates = [Candidate("", {key: tuple(value.shape) for key, value in state.items()}, state.__getitem__)]
    else:
        candidates = read_candidates(Path(weights))
    if whole := whole_fits(model, candidates):
        return Loaded(fill_from_fit(model, best_of(whole), weights).candidate.place)
    for count in class_counts(model, candidates, classes):
        try:
            other = zoo.build(name, count, size=size)
        except DynpruneError:
            continue
        if whole := whole_fits(other, candidates):
            fit = fill_from_fit(other, best_of(whole), weights)
            return Loaded(fit.candidate.place, copy_all_but_scores(other, model), count)
    raise misfit(model, candidates, weights)


def load_weights(model: nn.Module, path: Path) -> str:
    """Fill `model` from a checkpoint file. Returns where in the file the weights lay, "" for the file as a whole.

    Of several that fit, averaged weights come first. Raises DynpruneError for files that hold no weights of this
    network, naming what is missing, left over or of another shape, and for tensors that are not finite.
    """
    candidates = read_candidates(path)
    whole = whole_fits(model, candidates)
    if not whole:
        raise misfit(model, candidates, str(path))
    return fill_from_fit(model, best_of(whole), str(path)).candidate.place


def whole_fits(model: nn.Module, candidates: Iterable[Candidate]) -> list[Fit]:
    return [fit for candidate in candidates for fit in fits_of(model, candidate) if fit.whole]


def best_of(whole: Iterable[Fit]) -> Fit:
    """Averaged weights before others, then what lies least deep."""
    return min(
        whole,
        key=lambda fit: (
            not is_averaged(fit.candidate.place),
            fit.candidate.place.count("."),
            len(fit.candidate.place),
        ),
    )


def misfit(model: nn.Module, candidates: Iterable[Candidate], weights: str) -> DynpruneError:
    fits = [fit for candidate in candidates for fit in fits_of(model, candidate)]
    return DynpruneError(
        f"{weights} does not fit the model. {problems_of(min(fits, key=distance))} Check that "
        f"--model and the number of classes are those it was trained with."
    )


def fill_from_fit(model: nn.Module, fit: Fit, weights: str) -> Fit:
    """Read every tensor into the model."""
    state = {}
    for name, theirs in fit.names.items():
        try:
            value = fit.candidate.read(theirs)
        except Exception as error:
            raise DynpruneError(f"{weights} is damaged: {theirs} cannot be read ({clean(error)}).") from error
        if (value.is_floating_point() or value.is_complex()) and not bool(torch.isfinite(value).all()):
            raise DynpruneError(
                f"{weights} holds numbers that are not finite (nan or infinite) in {theirs}. The "
                f"training that wrote it had failed; take an earlier checkpoint."
            )
        state[name] = value
    model.load_state_dict(state, strict=False)
    return fit


def class_counts(model: nn.Module, candidates: Iterable[Candidate], classes: int) -> list[int]:
    """Numbers of classes that the weights may be of: first dimensions of tensors that fit by name and not by shape."""
    own = {name: tuple(value.shape) for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    found: dict[int, None] = {}
    for candidate in candidates:
        for fit in fits_of(model, candidate):
            if fit.missing or fit.unknown:
                continue
            for name, theirs in fit.names.items():
                shape = candidate.shapes[theirs]
                if shape != own[name] and shape and shape[1:] == own[name][1:] and shape[0] != classes:
                    found[shape[0]] = None
    return list(found)


@torch.no_grad()
def copy_all_but_scores(other: nn.Module, model: nn.Module) -> tuple[str, ...]:
    """Give `model` every tensor of `other` that has its shape; returns the layers of the rest."""
    theirs = other.state_dict()
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    same = {name: theirs[name] for name, value in state.items() if value.shape == theirs[name].shape}
    model.load_state_dict(same, strict=False)
    return tuple(dict.fromkeys(name.rpartition(".")[0] or name for name in state if name not in same))


def is_averaged(place: str) -> bool:
    return any(word in place.lower() for word in AVERAGED)


def reader(contents: Contents, tensors: Mapping[str, Described]) -> Callable[[str], Tensor]:
    return lambda name: contents.tensor(tensors[name])


def read_candidates(path: Path) -> list[Candidate]:
    """Every mapping from names to tensors in a file. Raises DynpruneError where there is none."""
    if not path.is_file():
        raise DynpruneError(f"No weights file {path}. Expected a safetensors file or a saved state dict.")
    try:
        if is_safetensors(path):
            from safetensors import safe_open

            file = safe_open(path, "pt")
            return [
                Candidate("", {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}, file.get_tensor)
            ]
        contents = read_contents(path)
        found = [
            Candidate(place, {name: item.size for name, item in tensors.items()}, reader(contents, tensors))
            for place, tensors in state_dicts(contents)
        ]
    except PermissionError as error:
        raise DynpruneError(f"{path} cannot be read: permission denied.") from error
    except Exception as error:  # a damaged pickle can raise anything
        raise DynpruneError(
            f"{path} is not a readable checkpoint ({type(error).__name__}: {clean(error)}). "
            "Expected safetensors, or a state dict saved with torch.save(model.state_dict(), ...)."
        ) from error
    if not found:
        what = (
            f"a whole object ({contents.tree.name})"
            if isinstance(contents.tree, Foreign)
            else f"{type(contents.tree).__name__} without tensors"
        )
        raise DynpruneError(
            f"{path} holds {what}, not a state dict. Expected a mapping from names to tensors: "
            f"torch.save(model.state_dict(), ...)."
        )
    return found


def is_safetensors(path: Path) -> bool:
    """Whether a file is one of safetensors, whatever its name: the length of a header, and the header's first brace."""
    if path.suffix == ".safetensors":
        return True
    with path.open("rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= path.stat().st_size


def fits_of(model: nn.Module, candidate: Candidate) -> list[Fit]:
    """The candidate under every prefix, removed or added, with which at least one name fits; without any, as it is."""
    own = model.state_dict(keep_vars=True)
    shapes = {name: tuple(value.shape) for name, value in own.items() if isinstance(value, Tensor)}
    same: dict[int, list[str]] = {}
    for name, value in own.items():
        same.setdefault(id(value), []).append(name)
    result = []
    for unwrap in (False, True):
        names = {without_wrappers(name) if unwrap else name: name for name in candidate.shapes}
        for removed, added in prefixes(shapes, names):
            ours = {added + name[len(removed) :]: theirs for name, theirs in names.items() if name.startswith(removed)}
            result.append(judge(candidate, shapes, same.values(), ours, inside=bool(removed)))
    return result


def prefixes(own: Iterable[str], theirs: Mapping[str, str]) -> list[tuple[str, str]]:
    """Pairs (removed from their names, put before them) with which names may fit. Only few of the own names need to be
    looked at."""
    own = list(own)
    found = {("", "")}
    for name in {min(own, key=len, default=""), max(own, key=len, default=""), *own[:1], *own[-1:]}:
        for other in theirs:
            if other.endswith("." + name):
                found.add((other[: -len(name)], ""))
            elif name.endswith("." + other):
                found.add(("", name[: -len(other)]))
    return sorted(found, key=lambda pair: (len(pair[0]) + len(pair[1]), pair))


def without_wrappers(name: str) -> str:
    """A name without the parts that wrappers put in, wherever they stand."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def judge(
    candidate: Candidate,
    shapes: Mapping[str, tuple[int, ...]],
    same: Iterable[list[str]],
    ours: Mapping[str, str],
    *,
    inside: bool,
) -> Fit:
    """same: the own names of each tensor, any of which will do. inside: names outside a removed prefix are none of this
    network's business."""
    missing = [
        names[0]
        for names in same
        if not any(name in ours for name in names) and not names[0].endswith(("num_batches_tracked", "_extra_state"))
    ]
    used = set(ours.values())
    unknown = [theirs for name, theirs in ours.items() if name not in shapes]
    if not inside:
        unknown += [name for name in candidate.shapes if name not in used]
    other = [
        f"{name} is {list(candidate.shapes[ours[name]])}, the model has {list(shapes[name])}"
        for name in shapes
        if name in ours and candidate.shapes[ours[name]] != shapes[name]
    ]
    return Fit(candidate, {name: theirs for name, theirs in ours.items() if name in shapes}, missing, unknown, other)


def distance(fit: Fit) -> int:
    """How far from fitting, with what matters least last."""
    return 2 * len(fit.missing) + len(fit.unknown) + len(fit.other_shape) - (len(fit.names) > 0)


def problems_of(fit: Fit) -> str:
    parts = [
        f"{title} {len(found)}: {', '.join(found[:3])}{', ...' if len(found) > 3 else ''}"
        for title, found in (("missing", fit.missing), ("unknown", fit.unknown), ("of another shape", fit.other_shape))
        if found
    ]
    return f"Tensors {'; '.join(parts)}." + (
        f' (Looked at under "{fit.candidate.place}".)' if fit.candidate.place else ""
    )


def clean(error: BaseException) -> str:
    """An exception in one line of printable characters."""
    line = next((line for line in str(error).splitlines() if line.strip()), "no message")
    return "".join(char for char in line if char.isprintable())[:200]
