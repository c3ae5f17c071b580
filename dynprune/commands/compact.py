"""`dynprune compact`: from a trained run, or from any trained network, to a compact one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, overload

from torch import Tensor, nn

from dynprune.budgets.fit import Fitter
from dynprune.budgets.limits import Budget
from dynprune.commands.train import run_name
from dynprune.data.loading import Data
from dynprune.deploy.compact import CompactResult
from dynprune.deploy.compact import compact as make_compact
from dynprune.deploy.several import Curve, draw_curve
from dynprune.deploy.trained import TrainedResult, compact_trained, refuse_shared
from dynprune.errors import DynpruneError
from dynprune.listener import SILENT, Listener
from dynprune.repair.examples import Reader
from dynprune.repair.shares import Share
from dynprune.repair.trained import Compacted, compact_module
from dynprune.runs.config import CompactConfig
from dynprune.runs.directory import Run
from dynprune.state.copies import copied
from dynprune.structure.calling import Inputs, arguments
from dynprune.structure.tracing import trace
from dynprune.training import distributed
from dynprune.training.recipe import use_bfloat16


@overload
def compact(
    what: str | Path,
    *,
    min_rate: float = 0.0,
    bn_images: int = 0,
    finetune_epochs: int = 0,
    finetune_lr: float = 0.01,
    data: str | Data = "",
    listener: Listener = SILENT,
) -> CompactResult: ...


@overload
def compact(
    what: CompactConfig, *, out: str | Path | None = None, overwrite: bool = False, listener: Listener = SILENT
) -> TrainedResult | None: ...


@overload
def compact(
    what: nn.Module,
    example_inputs: Inputs,
    data: Iterable,
    budget: str | Sequence[str] | Budget = "0.5",
    *,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    inputs: Callable[[Any], Any] | None = None,
    images: int = 512,
    search: float = 30.0,
    tune: float = 30.0,
    policy: str = "bandit",
    arms: str = "repairable",
    tune_lr: float | None = None,
    precision: str = "auto",
    seed: int = 0,
    listener: Listener = SILENT,
) -> Compacted: ...


def compact(what, *args, listener: Listener = SILENT, **options):
    """Make a network compact.

    *A run* (a path): remove the channels that `train` did not choose, prove that nothing else changed, and write
    RUN/compact.safetensors. min_rate: drop channels that ran in less than this share of the steps. bn_images:
    re-estimate BatchNorm statistics on so many training images. finetune_epochs: train the compact network on. data:
    where the run's data lie now, or the data themselves.

    *A trained network by name* (a CompactConfig with model, weights, data and budget): calibrate on training images,
    find widths by a bandit on frozen weights, cut, refit every layer, tune by distillation, prove, and write a run
    directory that `export` and `bench` take. out: that directory; overwrite: replace it.

    *A module* of any task, with example inputs as `trace` takes them and data, batches as a DataLoader gives them: the
    same, and nothing is written; the module stays as it is. A batch begins with inputs like the example's, or has them
    by name; inputs: a function that makes them of a batch that does not. Of (images, labels) with class labels, class
    scores are compared; of anything else what the last layers say (raw maps, boxes, embeddings), and no labels are
    needed. loss: `loss(model, batch)`, a mean over examples, to tune by beside that; the model is then in train mode.
    budget: as `--budget`, several in a list, or a `Budget`. images: how many calibration and measuring look at; repair
    looks at twice as many. search, tune: seconds. tune_lr: peak rate; without one 0.03, a tenth of it where there are
    neither labels nor a loss, and less where fewer than 150 steps fit. precision: of tuning; auto is bfloat16 for class
    scores alone, where the processor is fast at it. In a program that has joined torch.distributed all processes
    call it, each with batches of its own, as a DistributedSampler deals them out, and get the same network back.

    Raises DynpruneError, and writes nothing, when the input makes no sense, and when a proof or a budget fails.

    >>> dynprune.compact("runs/mine").macs
    >>> dynprune.compact(dynprune.CompactConfig("resnet20", "resnet20.pt", "photos/", budget=("0.5",))).accuracy
    >>> small = dynprune.compact(model, torch.zeros(1, 3, 224, 224), loader, "macs=0.5", tune=60).model
    >>> dynprune.compact(detector, ([torch.zeros(3, 320, 320)],), loader, loss=lambda m, b: sum(m(*b).values())).model
    """
    if isinstance(what, nn.Module):
        return of_module(what, *args, listener=listener, **options)
    if args:
        raise DynpruneError(f"compact got {len(args) + 1} arguments. Beside a run or a CompactConfig they need names.")
    if isinstance(what, CompactConfig):
        return of_trained(what, listener=listener, **options)
    return of_run(what, listener=listener, **options)


def of_run(
    run: str | Path,
    *,
    min_rate: float = 0.0,
    bn_images: int = 0,
    finetune_epochs: int = 0,
    finetune_lr: float = 0.01,
    data: str | Data = "",
    listener: Listener = SILENT,
) -> CompactResult:
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


def of_trained(
    config: CompactConfig, *, out: str | Path | None = None, overwrite: bool = False, listener: Listener = SILENT
) -> TrainedResult | None:
    config = config.validate()
    path = Path(out) if out else run_name(config, "compact")
    ranks = distributed.join(os.environ, config.device)
    try:
        return compact_trained(config, path, overwrite=overwrite, listener=listener, ranks=ranks)
    finally:
        distributed.leave()


def of_module(
    model: nn.Module,
    example_inputs: Inputs,
    data: Iterable,
    budget: str | Sequence[str] | Budget = "0.5",
    *,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    inputs: Callable[[Any], Any] | None = None,
    images: int = 512,
    search: float = 30.0,
    tune: float = 30.0,
    policy: str = "bandit",
    arms: str = "repairable",
    tune_lr: float | None = None,
    precision: str = "auto",
    seed: int = 0,
    listener: Listener = SILENT,
) -> Compacted:
    limits = budget if isinstance(budget, Budget) else Budget((budget,) if isinstance(budget, str) else tuple(budget))
    if precision not in ("auto", "float32", "bfloat16"):
        raise DynpruneError(f"precision is {precision!r}. Expected auto, float32 or bfloat16.")
    device, ranks = next(model.parameters()).device, distributed.joined()
    refuse_shared(limits, ranks)
    listener.note("tracing")
    given = arguments(example_inputs)
    graph = trace(model, given)
    fitter = Fitter(copied(model).cpu(), graph, given, limits, listener.work, whole=True)
    start = fitter.fit().widths
    return compact_module(
        model,
        graph,
        Reader(given, inputs),
        data,
        limits,
        start,
        fitter.cost,
        accepts=lambda widths: not fitter.in_ms or fitter.use(fitter.time(widths)) <= 1,
        loss=loss,
        images=images,
        search_seconds=search,
        policy=policy,
        choice=arms,
        tune_seconds=tune,
        tune_lr=tune_lr,
        bfloat16=lambda scores: use_bfloat16(precision if scores or precision != "auto" else "float32", device),
        seed=seed,
        report=listener.note,
        share=Share(ranks.rank, ranks.count),
        together=lambda narrow: distributed.learning_together(narrow, ranks),
    )


def curve(
    config: CompactConfig, shares: Sequence[float], out: str | Path | None = None, *, listener: Listener = SILENT
) -> Curve:
    """Accuracy, size and time of a trained network at several shares of its multiply-accumulates, before anybody
    decides. Nothing is tuned or kept but a plot, OUT/curve.png.

    Raises DynpruneError for shares outside (0, 1], and as `compact` does.

    >>> dynprune.commands.compact.curve(config, [0.75, 0.5, 0.25]).points[0].accuracy
    """
    if not shares or not all(0 < share <= 1 for share in shares):
        raise DynpruneError("--curve expects shares of the MACs in (0, 1], such as 0.75,0.5,0.25.")
    path = (Path(out) if out else run_name(config, "curve")) / "curve.png"
    return draw_curve(config.validate(), list(shares), path, listener)
