"""Coverage and exactness beside other tools, in one run: `python -m tests.compare_tools [--every N] [--tools A,B] [--out FILE]`.

Needs `pip install torch-pruning==1.6.1 torch-kirigami==0.2.0`. Every tool removes half of the channels that it can remove from the
same torchvision networks. *runs*: the pruned copy gives an output of the right shape. *exact*: that output equals the original's
when the weights that read removed channels are zero there. *traced*: seconds to find the structure.

To learn what the others kept, without relying on their records, they prune a network whose every parameter holds its own
position as a number; the numbers that are left tell the positions. The pruned copy is then filled with the values of a lively
network (non-trivial BatchNorm, so that mistakes show) at those positions.
"""

from __future__ import annotations

import argparse
import copy
import json
import signal
import sys
import time
import warnings

import torch
import torchvision

from dynprune.inspect import check_exactness
from dynprune.tracing import lively, trace

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
    return {"runs": not check.failure, "exact": check.ok, "diff": check.max_rel_diff, "kept": check.params_kept_share, "seconds": seconds,
            "mixed": len(check.mixed)}


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
    ignored = [m for m in small.modules() if isinstance(m, torch.nn.Linear) and m.out_features == 1000]
    started = time.perf_counter()
    pruner = tp.pruner.BasePruner(small, x.double(), importance=tp.importance.RandomImportance(), pruning_ratio=0.5, ignored_layers=ignored)
    seconds = time.perf_counter() - started
    pruner.step()
    return judge(model, small, x, seconds)


def torch_kirigami(model, x) -> dict:
    """Half of the candidates of each axis in one manual request: its greedy strategies analyse one joint removal per candidate and had
    not finished resnet18 after two minutes. Several patterns are offered, since shuffles and grouped convolutions allow only some."""
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
        chosen = [selection for candidates in by_axis.values() for number, candidate in enumerate(candidates) if number // stride % 2
                  for selection in candidate.remove]
        try:
            small, _ = pruner.apply(pruner.plan_remove(chosen))
            return judge(model, small, x, seconds)
        except PlanningError as error:
            refused = refused or error
    raise refused


@torch.no_grad()
def judge(original, small, x, seconds) -> dict:
    """Fill the pruned copy with the original's values, hide the removed channels from their consumers, compare."""
    masked, values = copy.deepcopy(original).double().eval(), {**dict(original.named_parameters()), **dict(original.named_buffers())}
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
    return {"runs": found.shape == expected.shape, "exact": difference < 1e-4, "diff": difference,
            "kept": sum(p.numel() for p in small.parameters()) / before, "seconds": seconds}


TOOLS = {"dynprune": ours, "torch-pruning": torch_pruning, "torch-kirigami": torch_kirigami}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="only every so many-th network")
    parser.add_argument("--tools", default=",".join(TOOLS), help="separated by commas")
    parser.add_argument("--max-params", type=float, default=100e6)
    parser.add_argument("--out")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    out = open(options.out, "w") if options.out else sys.stdout
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


if __name__ == "__main__":
    main()
