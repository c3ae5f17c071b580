"""A gated run as ONNX, with the form of each layer chosen by measurement, and the proof that it computes what torch
computes.

Takes a gated file and real validation images; writes `gated.onnx` (one image at a time, outputs `logits` and `gates`)
and, to compare with, `ungated.onnx`, the same network without gates. What the gates have closed for good is cut first.
On each image the gates that onnxruntime opened are replayed in torch in the whole network, and the scores compared; how
often both open the same is reported too.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor

from dynprune.budgets.latency import Report, interleaved, silent
from dynprune.data.loading import Data, some
from dynprune.data.scores import logits
from dynprune.deploy.export import data_and_path, metadata, with_scores
from dynprune.deploy.modules import TOLERANCE, writing
from dynprune.errors import DynpruneError
from dynprune.files.artifact import Facts
from dynprune.files.disk import write_bytes
from dynprune.files.onnxfile import open_session, read_opset, write_onnx
from dynprune.gates.file import GateFacts, load_gated
from dynprune.gates.gating import GatedNetwork, fixed
from dynprune.gates.onnx import FORMS, Rewriter, choose_forms, with_pairs
from dynprune.gates.surgery import all_units, cut_closed
from dynprune.runs.directory import GateRun
from dynprune.zoo import runs_code

PARITY_IMAGES = 128
TRIAL_IMAGES = 16  # whose gates decide between forms
TRIAL_SECONDS, TRIAL_RUNS = 2.0, (3, 50)


@dataclass(frozen=True)
class GatedExportResult:
    """forms: how many gated convolutions take each form. gates_agree: share of images for which onnxruntime opened what
    torch opens; a gate whose score is almost 0 may fall to either side. max_abs_diff and the rest: with onnxruntime's
    gates replayed in torch. units: of all gates; closed_for_good: of them, those that were cut; the file's output
    `gates` holds the others. most_share: cost of an image that opens all that is left."""

    path: str
    opset: int
    size_bytes: int
    max_abs_diff: float
    max_rel_diff: float
    top1_agreement: float
    gates_agree: float
    images: int
    fold_normalization: bool
    units: int
    closed_for_good: int
    most_share: float
    forms: dict[str, int]
    layers: dict[str, dict]


def load_run(run: GateRun) -> tuple[GatedNetwork, Facts, GateFacts]:
    """The run's gated network. A file of another model than the run's own settings name is refused."""
    if not run.gated_file.is_file():
        raise DynpruneError(f"{run.path} has no gated network yet. Finish it: dynprune gate --resume --out {run.path}")
    model, facts, gates = load_gated(run.gated_file, trust=runs_code(run.config.model))
    if facts.model != run.config.model:
        raise DynpruneError(
            f'{run.gated_file} is of "{facts.model}", the run of "{run.config.model}". Train the gates again.'
        )
    return model, facts, gates


def export_gated(
    run: GateRun,
    *,
    out: Path | None = None,
    opset: int | None = None,
    fold_normalization: bool = False,
    data: Data | None = None,
    report: Report = silent,
) -> GatedExportResult:
    """Write RUN/gated.onnx and RUN/ungated.onnx. Raises DynpruneError and leaves no file when onnxruntime disagrees
    with torch."""
    model, facts, gates = load_run(run)
    if gates.estimator == "random":
        raise DynpruneError(
            f"{run.path} has random gates, which only serve to compare with. Export one of "
            f"--estimator reinforce or gumbel."
        )
    data, path = data_and_path(run, run.gated_file, facts, data, out)
    small = cut_closed(model, data.example)
    ungated, cut = (with_scores(own.network, facts, fold_normalization) for own in (model, small))
    partial, base = (run.ungated_onnx_file.with_name(f"{name}.onnx.partial") for name in ("ungated", "cut"))
    with writing(path, partial, base):
        report("exporting the network without gates", 0, 0)
        for network, file in ((ungated, partial), (cut, base)):
            write_onnx(network.eval(), data.example, file, opset, metadata(facts, fold_normalization))
        rewriter = Rewriter(onnx.load(base), small, "model.")
        images = next(iter(data.eval_batches(some(data.val, TRIAL_IMAGES), TRIAL_IMAGES)))[0]
        with torch.no_grad():
            choices = small.run(images, small.threshold)[1]
        layers = choose_forms(rewriter, choices, report)
        report("timing the whole network", 0, 0)
        proto, layers = quickest(rewriter, layers, images)
        content = proto.SerializeToString()
        found = parity(model, content, data, facts, fold_normalization)
        if not found["difference"] <= TOLERANCE * found["largest"]:
            raise DynpruneError(
                f"onnxruntime differs from torch by {found['difference']:.1e} (largest output "
                f"{found['largest']:.1e}) with the same gates open. No file was written. Please "
                f"report the model's name."
            )
        write_bytes(path, content)
        partial.replace(run.ungated_onnx_file)
    units = [sum(len(gate.sizes) for gate in own.gates) for own in (model, small)]
    result = GatedExportResult(
        str(path),
        read_opset(path),
        path.stat().st_size,
        found["difference"],
        found["difference"] / max(found["largest"], 1e-30),
        found["top1"],
        found["agree"],
        found["images"],
        fold_normalization,
        units[0],
        units[0] - units[1],
        small.most_share,
        dict(Counter(line["form"] for line in layers.values())),
        layers,
    )
    run.record("export", asdict(result))
    return result


def quickest(rewriter: Rewriter, layers: dict[str, dict], images: Tensor) -> tuple[onnx.ModelProto, dict[str, dict]]:
    """The forms that won layer by layer, or, where that is quicker as a whole, only forms that keep the blocked layout,
    or none."""
    trials: list[tuple[dict[str, str], onnx.ModelProto]] = []
    for allowed in (
        FORMS,
        ("full", "layer", "blocks", "pair"),
        ("full", "layer", "pair"),
        ("full", "layer", "blocks"),
        ("full", "layer"),
        ("full",),
    ):
        forms = {weight: line["form"] for weight, line in with_pairs(layers, allowed).items()}
        if forms not in [known for known, _ in trials]:
            trials.append((forms, rewriter.rewrite(forms)))
    sessions = [open_session(proto.SerializeToString(), 1) for _, proto in trials]
    feeds = [(session, {session.get_inputs()[0].name: image[None].numpy()}) for session in sessions for image in images]
    samples = interleaved(feeds, TRIAL_SECONDS * len(trials), TRIAL_RUNS)
    took = [
        float(np.mean([np.min(own) for own in samples[i * len(images) : (i + 1) * len(images)]]))
        for i in range(len(trials))
    ]
    forms, proto = trials[int(np.argmin(took))]
    return proto, {weight: {**line, "form": forms[weight]} for weight, line in layers.items()}


@torch.no_grad()
def parity(model: GatedNetwork, content: bytes, data: Data, facts: Facts, folded: bool) -> dict:
    """Largest difference and largest output with onnxruntime's gates replayed in torch, equal classes, equal gates,
    images."""
    session = open_session(content)
    difference = largest = 0.0
    equal = agree = count = 0
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (facts.mean, facts.std))
    sizes = [len(gate.sizes) for gate in model.gates]
    for batch, _ in data.eval_batches(some(data.val, PARITY_IMAGES)):
        for image in batch.split(1):
            theirs, left = run_both(session, (image * std + mean if folded else image).numpy())
            opened = all_units(model, torch.from_numpy(left))
            again = fixed({gate.group: part for gate, part in zip(model.gates, opened.split(sizes, 1))})
            ours = logits(model.run(image, again)[0]).numpy()
            own = torch.cat(model.run(image, model.threshold)[1].open, 1)
            difference, largest = (
                max(difference, float(np.abs(ours - theirs).max())),
                max(largest, float(np.abs(ours).max())),
            )
            equal += int(ours.argmax() == theirs.argmax())
            agree += int(bool((own == opened).all()))
            count += 1
    return {
        "difference": difference,
        "largest": largest,
        "top1": equal / count,
        "agree": agree / count,
        "images": count,
    }


def run_both(session: onnxruntime.InferenceSession, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores and gates. Raises DynpruneError for a file that opens but cannot be executed, or has other outputs."""
    try:
        scores, gates = session.run(["logits", "gates"], {session.get_inputs()[0].name: image})
    except Exception as error:  # onnxruntime's own kinds have no common base
        raise DynpruneError(
            f"onnxruntime cannot execute this gated network ({str(error).splitlines()[0][:200]}). Export it again."
        ) from error
    return scores, gates
