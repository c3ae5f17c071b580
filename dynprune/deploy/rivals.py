"""What Torch-Pruning makes of a network at the same budget, with each of its importances.

Takes a model, data and a bound in MACs; returns a smaller model. Every rival gets what helps it: gradients of labelled
training images where its importance asks for them, the largest ratio of channels that meets the bound, and BatchNorm's
statistics estimated anew.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynprune.data.loading import Data, some
from dynprune.data.scores import logits
from dynprune.errors import DynpruneError
from dynprune.state.copies import copied
from dynprune.structure.tracing import trace

# magnitude, taylor, hessian: the same ratio in every layer; isomorphic: Taylor, ranked among layers of one kind, so
# that widths differ (Fang et al., ECCV 2024)
IMPORTANCES = ("magnitude", "taylor", "hessian", "isomorphic")
TRIALS = 12  # of the bisection for the ratio
GRADIENT_BATCHES, GRADIENT_BATCH = 4, 128  # labelled images for Taylor
SQUARED = 64  # labelled images whose gradients are squared one by one
NORM_IMAGES = 1024  # training images, not augmented, with which BatchNorm's statistics are estimated


def torch_pruning():
    try:
        import torch_pruning as tp
    except ImportError as error:
        raise DynpruneError(
            'This comparison needs Torch-Pruning. Install it: pip install "dynprune[compare]".'
        ) from error
    return tp


def prune(
    model: nn.Module, data: Data, macs: float, importance: str = "magnitude", seed: int = 0, *, norms: bool = True
) -> nn.Module:
    """A smaller copy with the largest ratio of channels that meets the MACs. norms: estimate BatchNorm anew.

    Raises DynpruneError where it cannot cut so far, or what it makes does not run.
    """
    torch_pruning()
    gradients = gradients_for(importance, model, data, seed)
    best, low, high = None, 0.0, 1.0
    for _ in range(TRIALS):
        ratio = (low + high) / 2
        small = cut(model, data, ratio, importance, gradients)
        try:
            cost = trace(small, data.example).macs({})
        except DynpruneError as error:
            raise DynpruneError(
                f"What Torch-Pruning makes of this network does not run ({error}) Leave dense+prune out."
            ) from error
        if cost <= macs:
            best, high = small, ratio
        else:
            low = ratio
    if best is None:
        raise DynpruneError(
            f"Torch-Pruning cannot cut this network to {macs:.0f} MACs. Leave dense+prune out, or "
            f"choose a larger budget."
        )
    if norms:
        images = some(data.train, NORM_IMAGES)
        estimate_norms(best, (batch for batch, _ in data.eval_batches(images, 128)))
    return best


def cut(model: nn.Module, data: Data, ratio: float, importance: str, gradients: dict[str, Tensor]) -> nn.Module:
    tp, small = torch_pruning(), copied(model).eval()
    for name, parameter in small.named_parameters():
        parameter.requires_grad_(True)
        parameter.grad = gradients[name].clone() if name in gradients else None
    ranked = {
        "magnitude": tp.importance.GroupMagnitudeImportance(p=2),
        "hessian": tp.importance.GroupHessianImportance(),
    }.get(importance) or tp.importance.GroupTaylorImportance()
    scores = [
        module
        for module in small.modules()
        if isinstance(module, nn.Linear) and module.out_features == len(data.classes)
    ]
    together = importance == "isomorphic"
    tp.pruner.BasePruner(
        small,
        data.example,
        importance=ranked,
        pruning_ratio=ratio,
        ignored_layers=scores,
        global_pruning=together,
        isomorphic=together,
    ).step()
    small.zero_grad(set_to_none=True)
    return small.eval()


def gradients_for(importance: str, model: nn.Module, data: Data, seed: int) -> dict[str, Tensor]:
    """What an importance reads as gradients: of the loss, or for hessian their squares, image by image."""
    if importance == "magnitude":
        return {}
    scored = copied(model).eval().requires_grad_(True)
    batches = data.train_batches(SQUARED if importance == "hessian" else GRADIENT_BATCH, seed, 0)
    found: dict[str, Tensor] = {}
    for images, labels in itertools.islice(batches, 1 if importance == "hessian" else GRADIENT_BATCHES):
        for x, y in zip(images.split(1), labels.split(1)) if importance == "hessian" else [(images, labels)]:
            scored.zero_grad(set_to_none=True)
            F.cross_entropy(logits(scored(x)), y).backward()
            for name, parameter in scored.named_parameters():
                if parameter.grad is not None:
                    seen = parameter.grad.square() if importance == "hessian" else parameter.grad
                    found[name] = found[name] + seen if name in found else seen.clone()
    return found


@torch.no_grad()
def estimate_norms(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """BatchNorm's statistics anew, averaged over batches. Leaves the model in eval mode."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    for images in batches:
        model(images)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
    model.eval()
