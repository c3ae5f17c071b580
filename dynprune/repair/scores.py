"""The last step of repair: the layer that makes the scores, refitted to the scores and not to its own outputs.

Takes a repaired network, the untouched one's scores of some images; changes the last layer in place. What matters of
scores is which classes they make likely, so here the fit minimises the mean Kullback-Leibler divergence, with a penalty
on the distance from the weights that regression found. That is convex, and a few steps of L-BFGS solve it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynprune.data.scores import logits
from dynprune.repair.shares import WHOLE, Share
from dynprune.structure import calling

PENALTY = 0.003  # of the mean square of a feature: how much a weight is held where regression left it
ITERATIONS = 30
PROBE_PENALTY, PROBE_ITERATIONS = 0.1, 100  # where there is no weight to be held at


@torch.no_grad()
def scores_layer(model: nn.Module, example: tuple) -> str | None:
    """The linear layer whose output is the class scores (images, classes), if there is one and it runs once."""
    outputs: list[tuple[str, Tensor | None]] = []

    def note(name: str) -> Callable:  # one that is given its input by name does not show it to hooks
        return lambda _layer, given, output: outputs.append((name, output if given else None))

    hooks = [
        layer.register_forward_hook(note(name)) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)
    ]
    try:
        said = logits(calling.call(model, example))
    finally:
        for hook in hooks:
            hook.remove()
    found = [name for name, output in outputs if output is said]
    names = [name for name, _ in outputs]
    return found[0] if len(found) == 1 and names.count(found[0]) == 1 and said.ndim == 2 and said.shape[1] > 1 else None


def refit_scores(narrow: nn.Module, name: str, batches: Sequence[tuple], said: Tensor, share: Share = WHOLE) -> None:
    """Refit one linear layer in place. narrow: in eval mode. batches: arguments of calls. said: the untouched
    network's scores of them, (images, classes); both of this process's share."""
    layer = narrow.get_submodule(name)
    assert isinstance(layer, nn.Linear), name
    rows = share.gathered(features(narrow, layer, batches).float())
    wanted, bias = share.gathered(said.float()).log_softmax(1), layer.bias is not None
    penalty = PENALTY * rows.square().mean()
    start = layer.weight.detach().float()
    weight = start.clone().requires_grad_(True)
    shift = (layer.bias.detach().float() if bias else rows.new_zeros(len(start))).clone().requires_grad_(bias)
    optimizer = torch.optim.LBFGS(
        [weight, shift] if bias else [weight], max_iter=ITERATIONS, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        scores = F.linear(rows, weight, shift).log_softmax(1)
        value = F.kl_div(scores, wanted, log_target=True, reduction="batchmean")
        value = value + penalty * (weight - start).square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        before = float(loss().detach())
        optimizer.step(loss)
        if not float(loss().detach()) <= before:  # numbers that float32 does not hold
            return
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias:
            layer.bias.copy_(shift)


def fit_to_labels(model: nn.Module, name: str, rows: Tensor, labels: Tensor, share: Share = WHOLE) -> None:
    """Fit one linear layer, in place, to class labels: logistic regression on what it is given (a linear probe). rows:
    from `features`, (images, columns); labels: (images,); both of this process's share."""
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear), name
    rows, wanted = share.gathered(rows.float()), share.gathered(labels)
    weight = torch.zeros_like(layer.weight, dtype=torch.float32, requires_grad=True)
    shift = rows.new_zeros(len(weight), requires_grad=layer.bias is not None)
    penalty = PROBE_PENALTY * rows.square().mean()
    optimizer = torch.optim.LBFGS(
        [weight, shift] if layer.bias is not None else [weight],
        max_iter=PROBE_ITERATIONS,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(rows, weight, shift), wanted) + penalty * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    if not bool(weight.isfinite().all() & shift.isfinite().all()):
        return
    with torch.no_grad():
        layer.weight.copy_(weight)
        if layer.bias is not None:
            layer.bias.copy_(shift)


@torch.no_grad()
def features(model: nn.Module, layer: nn.Module, batches: Iterable[tuple]) -> Tensor:
    """What a layer is given, (images, columns)."""
    found: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _layer, given: found.append(given[0].detach()))
    try:
        for inputs in batches:
            calling.call(model, inputs)
    finally:
        hook.remove()
    return torch.cat(found)
