"""`dynprune compact`: from a trained run to a compact file."""

from __future__ import annotations

from pathlib import Path

from dynprune.data.loading import Data
from dynprune.deploy.compact import CompactResult
from dynprune.deploy.compact import compact as make_compact
from dynprune.listener import SILENT, Listener
from dynprune.runs.directory import Run


def compact(
    run: str | Path,
    *,
    min_rate: float = 0.0,
    bn_images: int = 0,
    finetune_epochs: int = 0,
    finetune_lr: float = 0.01,
    data: str | Data = "",
    listener: Listener = SILENT,
) -> CompactResult:
    """Remove the channels that were not chosen, prove that nothing else changed, and write RUN/compact.safetensors.

    min_rate: drop channels that ran in less than this share of the steps. bn_images: re-estimate BatchNorm statistics
    on so many training images. finetune_epochs: train the compact network on. data: where the run's data lie now, or
    the data themselves.

    Raises DynpruneError, and writes nothing, when the proof or a budget fails.

    >>> dynprune.compact("runs/mine").macs
    """
    listener.note("compacting and proving")
    found = Run.open(Path(run))
    return make_compact(
        found,
        min_rate=min_rate,
        bn_images=bn_images,
        finetune_epochs=finetune_epochs,
        finetune_lr=finetune_lr,
        data=found.images(data),
        report=listener.step,
        work=listener.work,
    )
