"""`dynprune gate --form cascade`: a compact network for every image, a larger one where it is unsure. With `--form
nested` the compact one lies inside of the larger one, which goes on from it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from dynprune.cascades.build import CascadeResult, make
from dynprune.cascades.choice import Asked
from dynprune.cascades.networks import MOST, Network, check_alike, nested_in, open_network
from dynprune.commands.train import run_name
from dynprune.data.loading import Data, Source, load_data
from dynprune.deploy.several import compact_several
from dynprune.errors import DynpruneError
from dynprune.files.disk import write_text
from dynprune.listener import SILENT, Listener
from dynprune.pages.cascade import write_cascade_page
from dynprune.runs.config import CompactConfig

PAGE, NETWORKS = "report.html", "networks"
PARTS = (0.45, 0.75, 1.0, 1.5, 2.0)  # of the target: budgets of the compact networks
PARTS_NESTED = (0.45, 0.65, 1.0)  # where the first two lie in a wide network each, and the last is to compare with
SHARES = (0.15, 0.25, 0.4, 0.6)  # without a target


def cascade(
    *networks: str | Path | CompactConfig,
    out: str | Path | None = None,
    target: float | None = None,
    max_drop: float | None = None,
    min_accuracy: float | None = None,
    cost: str = "macs",
    shares: Sequence[float] = (),
    threads: int = 1,
    data: str | Data | Source = "",
    nested: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    listener: Listener = SILENT,
) -> CascadeResult:
    """Join two or three networks for the same classes, the smallest first, into one ONNX file: each image goes on to
    the next where the two best classes are closer than a threshold, chosen on validation images.

    networks: compact or dense runs, or ONNX files that `export` wrote, up to eight to choose from; or one
    `CompactConfig` with a trained network, which is compacted to several budgets first. out: the folder to write, with
    cascade.onnx, cascade.csv, cascade.json and report.html, and the networks where they were made here. One of target
    (mean cost of an image, over that of the last network), max_drop (points of validation accuracy below the last
    network) and min_accuracy (percent of the validation images); as accurate as the last network if none is given.
    cost: "macs", multiply-accumulates, or "latency", milliseconds in onnxruntime at batch 1, which are measured first.
    shares: of the multiply-accumulates, for which compact networks are made; without them some around the target.
    nested: for each of them that is below the target, a network of all channels is made too in which it lies, and which
    computes, where the compact one is unsure, only what that has not; one of these pairs is used. resume: those of them
    that are in `out` already stay. threads: of onnxruntime, for the times. data: where the runs' data lie now, or the
    data themselves; files without a run need them.

    Raises DynpruneError, before anything is written, for networks of other classes or inputs, and where one of them
    alone does as well; networks that were made here stay then.

    >>> dynprune.cascade("runs/quarter", "runs/dense", target=0.4).verdict
    >>> dynprune.cascade(dynprune.CompactConfig("resnet20", "resnet20.pt", "photos/", tune="1m"), target=0.4).rows
    """
    if threads < 0:
        raise DynpruneError(f"--threads got {threads}. Expected a number of onnxruntime threads, 0 for its choice.")
    asked = Asked(target, max_drop, min_accuracy, cost).validate()
    first, *others = networks or ("",)
    if not isinstance(first, CompactConfig):
        if shares or resume or nested:
            raise DynpruneError(
                "--shares, --resume and nested networks are for a trained network that is compacted here. Leave them "
                "out."
            )
        return of_networks([str(network) for network in networks], out, asked, threads, data, overwrite, listener)
    if others or data:
        raise DynpruneError(
            "A cascade of a trained network got other networks or data too. Expected its settings alone."
        )
    return of_trained(first, out, asked, shares, threads, nested, overwrite, resume, listener)


def of_networks(
    networks: Sequence[str],
    out: str | Path | None,
    asked: Asked,
    threads: int,
    data: str | Data | Source,
    overwrite: bool,
    listener: Listener,
) -> CascadeResult:
    found = [open_network(network) for network in networks]
    check_alike(found, {outer for _, outer in nested_in(found)})
    folder = Path(out) if out else Path("runs") / f"{found[0].name}-{found[-1].name}-cascade"
    refuse_folder(folder, overwrite)
    try:
        return written(found, images_for(found, data, listener), folder, asked, threads, listener)
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()  # nothing was written


def of_trained(
    config: CompactConfig,
    out: str | Path | None,
    asked: Asked,
    shares: Sequence[float],
    threads: int,
    nested: bool,
    overwrite: bool,
    resume: bool,
    listener: Listener,
) -> CascadeResult:
    config = config.validate()
    shares = check_shares(shares or shares_for(asked.target, nested), asked.target)
    inside = [share for share in shares if asked.target is None or share < asked.target] if nested else []
    if len(shares) + len(inside) >= MOST:
        raise DynpruneError(
            f"--shares got {len(shares)}, of which {len(inside)} lie in a wide network each, so there would be "
            f"{len(shares) + len(inside)} networks beside the untouched one. Expected {MOST - 1} at most."
        )
    folder = Path(out) if out else run_name(config, "nested" if nested else "cascade")
    refuse_folder(folder, overwrite or resume)
    kept = folder / NETWORKS
    try:
        several = compact_several(config, shares, kept, inside=inside, resume=resume, listener=listener)
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()  # nothing was written
    found = [open_network(run) for run in several.runs]
    try:
        return written(found, several.data, folder, asked, threads, listener, nested)
    except DynpruneError as error:
        given = " ".join(str(run) for run in several.runs)
        raise DynpruneError(f"{error} The networks stay: dynprune gate --form cascade {given}") from error


def written(
    networks: Sequence[Network],
    data: Data,
    folder: Path,
    asked: Asked,
    threads: int,
    listener: Listener,
    nested: bool = False,
) -> CascadeResult:
    """The cascade of these networks with its files."""
    result, sights = make(networks, data, folder, asked, threads=threads, nested=nested, report=listener.work)
    result = dataclasses.replace(result, page=str(folder / PAGE))
    write_cascade_page(folder / PAGE, result, sights, data)
    write_text(folder / "cascade.json", json.dumps(dataclasses.asdict(result), indent=2))
    return result


def shares_for(target: float | None, nested: bool = False) -> tuple[float, ...]:
    """Budgets of the compact networks that a cascade chooses from."""
    if not target:
        return SHARES[:3] if nested else SHARES  # there are twice as many networks then
    return tuple(round(target * part, 3) for part in (PARTS_NESTED if nested else PARTS) if target * part < 1)


def check_shares(shares: Sequence[float], target: float | None) -> list[float]:
    """In order. Raises DynpruneError for shares that no cascade can be made of."""
    found = sorted(set(shares))
    if not 1 <= len(found) < MOST or not all(0 < share < 1 for share in found):
        raise DynpruneError(
            f"--shares got {', '.join(f'{share:g}' for share in shares)}. Expected one to {MOST - 1} shares of the "
            "multiply-accumulates between 0 and 1, such as 0.2,0.4."
        )
    if target is not None and found[0] >= target:
        raise DynpruneError(
            f"--shares begins at {found[0]:g} and --target is {target:g}, but every image passes the smallest network. "
            "Give a smaller first share."
        )
    return found


def refuse_folder(folder: Path, overwrite: bool) -> None:
    """Raises DynpruneError for a folder that is in use, or cannot be made."""
    if folder.is_dir() and (inside := {entry.name for entry in folder.iterdir()}):
        ours = "cascade.json" in inside or inside == {NETWORKS}  # of a run that was stopped
        if not (ours and overwrite):
            raise DynpruneError(
                f"{folder} exists. "
                + ("--resume goes on with its networks. " if ours and NETWORKS in inside else "")
                + ("Pass --overwrite to replace it, or " if ours else "It is not a cascade's: pass ")
                + "--out for another place."
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DynpruneError(f"Cannot create {folder} ({error.strerror}). Choose another --out.") from error


def images_for(networks: Sequence[Network], data: str | Data | Source, listener: Listener) -> Data:
    """The images, as the networks take them."""
    how = networks[0].preprocess
    run = next((network.run for network in networks if network.run), None)
    if isinstance(data, Data):
        found = data
    elif run is not None:
        moved = data if isinstance(data, str) else data.name
        listener.note(f"reading {moved or run.config.data}")
        found = run.images(moved)
    else:
        if isinstance(data, str):
            if not data:
                raise DynpruneError(
                    "ONNX files do not say which images to choose thresholds on. Pass --data, or runs in place of "
                    "files."
                )
            data = Source(data)
        listener.note(f"reading {data.name}")
        found = load_data(data.like(how))
    found = found.with_channels(how.size[0])
    if found.size != how.size:
        raise DynpruneError(
            f"{networks[0].path} takes images of {'x'.join(map(str, how.size))}; the data are "
            f"{'x'.join(map(str, found.size))}. Use the data it was trained on."
        )
    return dataclasses.replace(found, mean=how.mean, std=how.std)
