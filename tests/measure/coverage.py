"""Coverage over whole catalogues, one JSON line per network: `python -m tests.measure.coverage torchvision|dense|timm
[--sample N] [--out FILE]`.

Every network is traced, loses a random half of every group's arms, and is compared with the masked original. Not a test
of its own: it takes an hour. `--max-params` leaves out networks that do not fit in memory; what was left out is
printed.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import time
import warnings

import torch

from dynprune import zoo
from dynprune.structure.inspect import check_exactness, default_classes, inspect
from dynprune.structure.tracing import trace

# timm's files of transformers, mixers and hybrids; everything else is taken as a CNN
NOT_CNN = set(
    """
    beit cait coat convit crossvit davit deit dinov2 edgenext efficientformer efficientformer_v2
    efficientvit_msra eva fastvit flexivit focalnet gcvit hiera hieradet_sam2 levit maxxvit mlp_mixer mobilevit
    mvitv2 naflexvit nest nextvit pit pvt_v2 rdnet repvit samvit sequencer shvit starnet swiftformer
    swin_transformer swin_transformer_v2 swin_transformer_v2_cr tiny_vit tnt twins vision_transformer
    vision_transformer_hybrid vision_transformer_relpos vision_transformer_sam visformer vitamin volo xcit
    metaformer mambaout poolformer csatv2 cpubone deepseek_vit efficientvim efficientvit_mit gemma4_vit iformer
    lowformer mobilenetv5 qwen3_vit efficientformer
    """.split()
)


def torchvision_names() -> list[str]:
    import torchvision

    return [f"torchvision:{name}" for name in torchvision.models.list_models(module=torchvision.models)]


def dense_names() -> list[str]:
    import torchvision

    return [
        f"torchvision:{name}"
        for module in (torchvision.models.segmentation, torchvision.models.detection)
        for name in torchvision.models.list_models(module=module)
    ]


def measure_backbone(name: str) -> dict:
    """The detector's backbone, and the share of the whole detector that can be removed."""
    whole = inspect(name)
    backbone = zoo.build(name, 91, 0).eval().backbone
    x = torch.randn(1, 3, 320, 320, generator=torch.Generator().manual_seed(0))
    started = time.perf_counter()
    graph = trace(backbone, x)
    seconds = time.perf_counter() - started
    check = check_exactness(backbone, graph, (x,), 0.5, 0, seconds)
    return {
        "ok": check.ok,
        "diff": check.max_rel_diff,
        "kept": check.params_kept_share,
        "trace_s": seconds,
        "prunable": whole.prunable_params_share,
        "params": whole.params,
        "pins": sorted({pin.op for pin in whole.pinned}),
        "failure": check.failure,
        "not_shown": check.not_shown,
        "groups": len(graph),
        "mixed": len(check.mixed),
    }


def timm_names() -> list[str]:
    import timm
    from timm.models import _registry

    return [f"timm:{name}" for name in timm.list_models() if _registry._model_to_module[name] not in NOT_CNN]


def too_large(name: str, max_params: float) -> bool:
    """Judged on the meta device, where nothing is allocated."""
    try:
        with torch.device("meta"):
            return sum(p.numel() for p in zoo.find_factory(name)(1000).parameters()) > max_params
    except Exception:
        return False


def measure(name: str, max_params: float) -> dict:
    started = time.perf_counter()
    if too_large(name, max_params):
        return {"model": name, "left_out": f"more than {max_params:g} parameters"}
    try:
        if default_classes(name) == 91:
            return {
                "model": f"{name} (backbone compared)",
                **measure_backbone(name),
                "seconds": time.perf_counter() - started,
            }
        found = inspect(name, check=True)
        line = {
            "ok": found.check.ok,
            "diff": found.check.max_rel_diff,
            "kept": found.check.params_kept_share,
            "trace_s": found.check.trace_seconds,
            "prunable": found.prunable_params_share,
            "params": found.params,
            "pins": sorted({pin.op for pin in found.pinned}),
            "failure": found.check.failure,
            "not_shown": found.check.not_shown,
            "groups": found.groups,
            "mixed": len(found.check.mixed),
        }
    except Exception as error:
        line = {"ok": False, "error": f"{type(error).__name__}: {str(error)[:300]}"}
    gc.collect()
    return {"model": name, **line, "seconds": time.perf_counter() - started}


def table(lines: list[dict]) -> str:
    """One row per network."""
    rows = [
        "| network | parameters | prunable | largest difference | kept at 50 % | mixed groups | trace | pinned by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        if "prunable" not in line:
            rows.append(f"| {line['model']} | {line.get('left_out') or line.get('error')} | | | | | | |")
            continue
        pins = ", ".join(pin for pin in line["pins"] if pin != "output") or "-"
        rows.append(
            f"| {line['model'].partition(':')[2]} | {line['params'] / 1e6:.1f} M | "
            f"{100 * line['prunable']:.1f} % | "
            f"{line['diff']:.0e}{'' if line['ok'] else ' not shown' if line.get('not_shown') else ' **FAILED**'} | "
            f"{100 * line['kept']:.0f} % | {line['mixed']} of {line['groups']} | {line['trace_s']:.1f} s | {pins} |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "catalogue", choices=("torchvision", "dense", "timm", "table"), help="table: a Markdown table of the file --out"
    )
    parser.add_argument("--sample", type=int, default=0, help="a random sample of so many names (seed 0)")
    parser.add_argument("--max-params", type=float, default=1e9)
    parser.add_argument("--out")
    options = parser.parse_args()
    if options.catalogue == "table":
        print(table([json.loads(line) for line in open(options.out)]))
        return
    warnings.filterwarnings("ignore")
    names = {"torchvision": torchvision_names, "dense": dense_names, "timm": timm_names}[options.catalogue]()
    if options.sample:
        names = sorted(random.Random(0).sample(names, min(options.sample, len(names))))
    out = open(options.out, "a") if options.out else sys.stdout
    for name in names:
        print(json.dumps(measure(name, options.max_params)), file=out, flush=True)


if __name__ == "__main__":
    main()
