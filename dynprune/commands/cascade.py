"""`dynprune gate --form cascade`: a compact network for every image, a larger one where it is unsure."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from dynprune.cascades.build import CascadeResult, make
from dynprune.cascades.networks import Network, check_alike, open_network
from dynprune.data.loading import Data, Source, load_data
from dynprune.errors import DynpruneError
from dynprune.files.disk import write_text
from dynprune.listener import SILENT, Listener
from dynprune.pages.cascade import write_cascade_page

PAGE = "report.html"


def cascade(
    *networks: str | Path,
    out: str | Path | None = None,
    target: float | None = None,
    max_drop: float | None = None,
    min_accuracy: float | None = None,
    threads: int = 1,
    data: str | Data | Source = "",
    overwrite: bool = False,
    listener: Listener = SILENT,
) -> CascadeResult:
    """Join two or three networks for the same classes, the smallest first, into one ONNX file: each image goes on to
    the next where the two best classes are closer than a threshold, chosen on validation images.

    networks: compact or dense runs, or ONNX files that `export` wrote. out: the folder to write, with cascade.onnx,
    cascade.csv, cascade.json and report.html. One of target (mean multiply-accumulates of an image, over those of the
    last network), max_drop (points of validation accuracy below the last network) and min_accuracy (percent of the
    validation images); as accurate as the last network if none is given. With three networks, two are taken where the
    third is of no use. threads: of onnxruntime, for the times. data: where the runs' data lie now, or the data
    themselves; files without a run need them.

    Raises DynpruneError, before anything is written, for networks of other classes or inputs, and where one of them
    alone does as well.

    >>> dynprune.cascade("runs/quarter", "runs/dense", target=0.4).verdict
    """
    if threads < 0:
        raise DynpruneError(f"--threads got {threads}. Expected a number of onnxruntime threads, 0 for its choice.")
    found = [open_network(network) for network in networks]
    check_alike(found)
    folder = Path(out) if out else Path("runs") / f"{found[0].name}-{found[-1].name}-cascade"
    refuse_folder(folder, overwrite)
    try:
        images = images_for(found, data, listener)
        result, sights = make(
            found,
            images,
            folder,
            target=target,
            max_drop=max_drop,
            min_accuracy=min_accuracy,
            threads=threads,
            report=listener.work,
        )
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()  # nothing was written
    result = dataclasses.replace(result, page=str(folder / PAGE))
    write_cascade_page(folder / PAGE, result, sights, images)
    write_text(folder / "cascade.json", json.dumps(dataclasses.asdict(result), indent=2))
    return result


def refuse_folder(folder: Path, overwrite: bool) -> None:
    """Raises DynpruneError for a folder that is in use, or cannot be made."""
    if folder.is_dir() and any(folder.iterdir()):
        ours = (folder / "cascade.json").is_file()
        if not (ours and overwrite):
            raise DynpruneError(
                f"{folder} exists. "
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
