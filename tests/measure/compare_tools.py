"""Coverage and exactness beside other tools, in one run: `python -m tests.measure.compare_tools [--every N] [--tools
A,B] --out FILE`.

Needs `pip install torch-pruning==1.6.1 torch-kirigami==0.2.0`. Every tool removes half of the channels that it can
remove from the same torchvision networks. *runs*: the pruned copy gives an output of the right shape. *exact*: that
output equals the original's when the weights that read removed channels are zero there; where a LayerNorm mixes the
channels they cannot be equal, and a copy that runs counts. Then the seconds to find the structure and the lines of code
that each needs for all this.

To learn what the others kept, without relying on their records, they prune a network whose every parameter holds its
own position as a number; the numbers that are left tell the positions. The pruned copy is then filled with the values
of a lively network (non-trivial BatchNorm, so that mistakes show) at those positions.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import signal
import statistics
import time
import warnings
from pathlib import Path

import torch
import torchvision
from torchvision.models import VisionTransformer
from torchvision.models.convnext import CNBlock

from dynprune.structure.inspect import check_exactness
from dynprune.structure.tracing import lively, trace

SECONDS = 120  # per tool and network: one that hangs is stopped


class TooSlow(Exception):
    pass


def limited(function, *args):
    def stop(*_):
        raise TooSlow

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        return function(*args)
    finally:
        signal.alarm(0)


def ours(model, x) -> dict:
    started = time.perf_counter()
    graph = trace(model, x)
    seconds = time.perf_counter() - started
    check = check_exactness(model, graph, (x,), 0.5, 0, seconds)
    return {
        "runs": not check.failure,
        "exact": check.ok,
        "diff": check.max_rel_diff,
        "kept": check.params_kept_share,
        "seconds": seconds,
        "mixed": len(check.mixed),
    }


def coded(model):
    """A float64 copy in which every element of every tensor is its own flat position."""
    model = copy.deepcopy(model).double()
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.arange(tensor.numel(), dtype=torch.float64).view(tensor.shape))
    return model


def torch_pruning(model, x) -> dict:
    import torch_pruning as tp

    small = coded(model)
    ignored = [
        m
        for m in small.modules()
        if isinstance(m, torch.nn.Linear)
        and m.out_features == 1000
        or isinstance(m, torch.nn.Conv2d)
        and m.out_channels == 1000
    ]
    # what its users are told to say for these: parameters that belong to no layer, and widths that fit the attention
    # heads
    loose = [(module.layer_scale, 0) for module in small.modules() if isinstance(module, CNBlock)]
    heads = None
    if isinstance(small, VisionTransformer):
        loose, heads = [(small.class_token, 2), (small.encoder.pos_embedding, 2)], small.encoder.layers[0].num_heads
    started = time.perf_counter()
    pruner = tp.pruner.BasePruner(
        small,
        x.double(),
        importance=tp.importance.RandomImportance(),
        pruning_ratio=0.5,
        ignored_layers=ignored,
        unwrapped_parameters=loose,
        round_to=heads,
    )
    seconds = time.perf_counter() - started
    pruner.step()
    if heads:
        small.hidden_dim = small.conv_proj.out_channels
    return judge(model, small, x, seconds)


def torch_kirigami(model, x) -> dict:
    """Half of the candidates of each axis in one manual request: its greedy strategies analyse one joint removal per
    candidate and had not finished resnet18 after two minutes. Several patterns are offered, since shuffles and grouped
    convolutions allow only some."""
    from torch_kirigami import DependencyGraph
    from torch_kirigami.pruning import PlanningError, Pruner

    small = coded(model)
    started = time.perf_counter()
    graph = DependencyGraph.build(small, args=(x.double(),))
    seconds = time.perf_counter() - started
    pruner, by_axis = Pruner(small, graph=graph), {}
    for candidate in pruner.discover_candidates().candidates:
        by_axis.setdefault(candidate.axis, []).append(candidate)
    refused = None
    for stride in (1, 2, 4):
        chosen = [
            selection
            for candidates in by_axis.values()
            for number, candidate in enumerate(candidates)
            if number // stride % 2
            for selection in candidate.remove
        ]
        try:
            small, _ = pruner.apply(pruner.plan_remove(chosen))
            return judge(model, small, x, seconds)
        except PlanningError as error:
            refused = refused or error
    raise refused


@torch.no_grad()
def judge(original, small, x, seconds) -> dict:
    """Fill the pruned copy with the original's values, hide the removed channels from their consumers, compare."""
    masked, values = (
        copy.deepcopy(original).double().eval(),
        {**dict(original.named_parameters()), **dict(original.named_buffers())},
    )
    for name, tensor in [*small.named_parameters(), *small.named_buffers()]:
        if name not in values or not tensor.is_floating_point():
            continue
        full = values[name].double()
        codes = tensor.detach().round().long()
        if full.ndim >= 2 and full.shape[1] > 1 and name.endswith("weight"):
            kept = torch.unique(codes // (full[0, 0].numel()) % full.shape[1])
            gone = torch.ones(full.shape[1], dtype=torch.bool)
            gone[kept] = False
            masked.get_parameter(name)[:, gone] = 0
        tensor.data = full.reshape(-1)[codes]
    found, expected = small.eval()(x.double()), masked(x.double())
    difference = float((found - expected).abs().max() / expected.abs().max())
    before = sum(p.numel() for p in original.parameters())
    return {
        "runs": found.shape == expected.shape,
        "exact": difference < 1e-4,
        "diff": difference,
        "kept": sum(p.numel() for p in small.parameters()) / before,
        "seconds": seconds,
    }


TOOLS = {"dynprune": ours, "torch-pruning": torch_pruning, "torch-kirigami": torch_kirigami}


# what each needs to find the structure and to remove channels, without importance measures, strategies, checkpoints and
# command lines
SOURCES = {
    "dynprune": [f"structure/{name}.py" for name in ("labels", "rules", "numbers", "channels", "tracing", "surgery")],
    "torch-pruning": ["_helpers.py", "ops.py", "dependency", "pruner/function.py"],
    "torch-kirigami": ["bindings.py", "operator_recipes.py", "dep_graph"]
    + [
        f"pruning/{name}.py"
        for name in (
            "axis_domains",
            "candidates",
            "layouts",
            "plan",
            "planner",
            "pruner",
            "recipes",
            "rewrite",
            "state",
            "types",
            "validation",
        )
    ],
}


def lines_of_code(tool: str) -> int:
    """Lines that are not blank, comments and docstrings included, of the tool as it is installed."""
    root = Path(importlib.import_module(tool.replace("-", "_")).__file__).parent
    files = [
        file
        for name in SOURCES[tool]
        for file in (sorted((root / name).rglob("*.py")) if (root / name).is_dir() else [root / name])
    ]
    return sum(bool(line.strip()) for file in files for line in file.read_text(encoding="utf-8").splitlines())


def table(lines: list[dict]) -> str:
    """One row per tool, then the networks on which one did not succeed."""
    by_tool = {
        tool: {line["model"]: line for line in lines if line["tool"] == tool}
        for tool in dict.fromkeys(line["tool"] for line in lines)
    }
    common = [name for name in by_tool["dynprune"] if all("seconds" in found[name] for found in by_tool.values())]
    for found in by_tool.values():
        for (
            name,
            line,
        ) in found.items():  # where a norm mixes the channels, no tool's copy can equal the masked original
            line["exact"] |= line["runs"] and by_tool["dynprune"][name]["mixed"] > 0
    rows = [
        "| tool | networks | pruned copy runs | exact | structure found in, median of the networks that all trace "
        "| lines of code |",
        "|---|---|---|---|---|---|",
    ]
    for tool, found in by_tool.items():
        seconds = statistics.median(found[name]["seconds"] for name in common)
        rows.append(
            f"| {tool} | {len(found)} | {sum(line['runs'] for line in found.values())} | "
            f"{sum(line['exact'] for line in found.values())} | {seconds:.1f} s | {lines_of_code(tool):,} |"
        )
    rows += ["", "| network | tool | what happened |", "|---|---|---|"]
    for tool, found in by_tool.items():
        for name, line in found.items():
            if not line["exact"]:
                rows.append(
                    f"| {name} | {tool} | "
                    f"{line.get('error') or 'another output, difference ' + format(line['diff'], '.0e')} |"
                )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="only every so many-th network")
    parser.add_argument("--tools", default=",".join(TOOLS), help="separated by commas")
    parser.add_argument("--max-params", type=float, default=100e6)
    parser.add_argument("--out", required=True, help="one JSON line per network and tool")
    parser.add_argument("--table", action="store_true", help="only print the table of an earlier --out")
    options = parser.parse_args()
    if options.table:
        print(table([json.loads(line) for line in open(options.out)]))
        return
    warnings.filterwarnings("ignore")
    out = open(options.out, "w")
    for name in torchvision.models.list_models(module=torchvision.models)[:: options.every]:
        torch.manual_seed(0)
        extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        model = torchvision.models.get_model(name, weights=None, **extra).eval()
        if sum(p.numel() for p in model.parameters()) > options.max_params:
            continue
        side = 299 if name == "inception_v3" else 224
        with torch.no_grad():
            model, (x,) = lively(model, (torch.randn(1, 3, side, side),))
        for tool in options.tools.split(","):
            try:
                line = limited(TOOLS[tool], copy.deepcopy(model), x)
            except TooSlow:
                line = {"runs": False, "exact": False, "error": f"stopped after {SECONDS} s"}
            except Exception as error:
                line = {"runs": False, "exact": False, "error": f"{type(error).__name__}: {str(error)[:120]}"}
            print(json.dumps({"model": name, "tool": tool, **line}), file=out, flush=True)
    print(table([json.loads(line) for line in open(options.out)]))


if __name__ == "__main__":
    main()
