"""A run of `dynprune gate`: steps (`session.py`) in the loop of `training/train.py`, then the gated file.

Takes a GateConfig and a run directory; leaves a checkpoint and a gated file that was read back and compared, and says
what the gates do on the test images.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from dynprune import zoo
from dynprune.data.loading import Data, load_data
from dynprune.data.scores import logits
from dynprune.errors import DynpruneError
from dynprune.files import artifact
from dynprune.gates import file as gated_file
from dynprune.gates.gating import GatedNetwork, fixed
from dynprune.gates.session import GateSession
from dynprune.gates.stats import GateStats, gate_stats
from dynprune.gates.surgery import closed_for_good
from dynprune.runs.config import GateConfig
from dynprune.runs.directory import GateRun
from dynprune.training.train import Progress, train

TOLERANCE = 1.02  # the mean over other images than those that set the threshold may lie this far above the target
FILE_TOLERANCE = 1e-4  # float32, and sums in another order


@dataclass(frozen=True)
class GateResult:
    """What gates reached on the test images. met: the mean cost is within the target, by less than the tolerance above
    it at most.
    dense_macs: of the ungated network; gate_macs: of the predictors; units: how many gates; closed_for_good: how many
    of them no image opens any more; file_max_diff: of the file, read back, over the largest output. static_*: of a
    static network of the same mean cost with the same training (`gates/beside.py`), None without one; verdict: of the
    two."""

    run: str
    base: str
    estimator: str
    target: float
    met: bool
    accuracy: float
    val_accuracy: float
    test_data: str
    macs: int
    dense_macs: int
    gate_macs: int
    path: str
    file_max_diff: float
    units: int
    closed_for_good: int
    stats: GateStats
    steps: int
    seconds: float
    static_accuracy: float | None = None
    static_macs: int | None = None
    static_seconds: float | None = None
    verdict: str = ""


def gate(
    config: GateConfig,
    run: GateRun,
    *,
    resume: bool = False,
    override: bool = False,
    data: Data | None = None,
    report: Callable[[Progress], None] = lambda _: None,
    note: Callable[[str], None] = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
    session: GateSession | None = None,
) -> GateResult:
    """Train gates, write RUN/gated.safetensors, read it back, and say what the gates do on the test images."""
    session = session or GateSession(config, data or load_data(config.source))
    config, data = session.config, session.data
    trained = train(config, run, resume=resume, override=override, report=report, note=note, stop=stop, session=session)
    model = session.model.cpu().eval()
    stats = gate_stats(model, data, data.test, note)
    if session.ungated:
        stats = dataclasses.replace(stats, share=1.0)
    facts = facts_of(session, stats.accuracy)
    cuts = [own.group for own in model.gates if own.cuts]
    fresh = run.gated_file.with_name("gated.unproven.safetensors")
    try:
        gated_file.save(
            fresh,
            model,
            facts,
            gated_file.GateFacts(config.block, config.hidden, cuts, config.estimator, config.target, stats.share),
            within=session.paths,
        )
        difference = file_difference(fresh, model, data, config)
        if not difference < FILE_TOLERANCE:
            raise DynpruneError(
                f"The gated file, read back, differs from the network that was saved by "
                f"{difference:.1e} of the largest output. Nothing was kept. Please report the model's "
                f"name."
            )
        fresh.replace(run.gated_file)
        for stale in (run.onnx_file, run.ungated_onnx_file, run.static_onnx_file):
            stale.unlink(missing_ok=True)
    except OSError as error:
        raise DynpruneError(
            f"Cannot write {run.gated_file} ({error.strerror}). The file that was there before is unchanged."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)
    result = GateResult(
        str(run.path),
        config.base or config.model,
        config.estimator,
        config.target,
        stats.share <= TOLERANCE * config.target,
        stats.accuracy,
        trained.val_accuracy,
        data.reports,
        round(stats.share * model.dense_macs),
        model.dense_macs,
        model.gate_macs,
        str(run.gated_file),
        difference,
        sum(len(own.sizes) for own in model.gates),
        sum(int(own.sum()) for own in closed_for_good(model).values()),
        stats,
        trained.steps,
        trained.seconds,
    )
    run.record("gate", asdict(result))
    return result


def facts_of(session: GateSession, accuracy: float) -> artifact.Facts:
    """What the file says of the network under the gates."""
    data, model = session.data, session.model
    if session.facts is not None:
        return dataclasses.replace(session.facts, accuracy=accuracy)
    return gated_file.facts_of_new(
        asdict(session.config),
        data.classes,
        list(data.size),
        list(data.mean),
        list(data.std),
        model.dense_macs,
        session.graph.params({}),
        accuracy,
    )


@torch.no_grad()
def file_difference(path: Path, model: GatedNetwork, data: Data, config: GateConfig) -> float:
    """Largest difference of the file's output, with the gates of the network that was saved, over the largest
    output."""
    network = zoo.build(config.model, len(data.classes), size=data.size)
    loaded = gated_file.load_gated(path, network)[0]
    batch = next(iter(data.eval_batches(data.val, 16)))[0]
    output, choices = model.run(batch, model.threshold)
    ours, theirs = (
        logits(output),
        logits(loaded.run(batch, fixed({own.group: opened for own, opened in zip(choices.gates, choices.open)}))[0]),
    )
    return float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1e-30))
