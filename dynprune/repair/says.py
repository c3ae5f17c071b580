"""What a network says, and how far two networks are apart in it.

Of a network with class scores it is the scores. Of any other it is what its last layers say, those behind which no
other layer comes: raw maps, boxes and embeddings, before anything is sorted, thresholded or thrown away. So networks
whose output is a list of detections can be compared, and learn from one another, as all others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynprune.data.scores import logits
from dynprune.repair.following import last_layers
from dynprune.repair.shares import WHOLE, Share
from dynprune.state.copies import generator
from dynprune.structure.channels import ChannelGraph
from dynprune.structure.labels import tensors_in

TEMPERATURE = 2.0
Said = list[Tensor]


@dataclass(frozen=True)
class Says:
    """layers: the names of the last ones; "" is the network itself; none where class scores are all that it returns.
    scores: whether outputs (images, classes) are class scores, which count by the classes that they make likely."""

    layers: tuple[str, ...] = ()
    scores: bool = True

    def of(self, model: nn.Module, run: Callable[[nn.Module], object]) -> tuple[Said, object]:
        """What a model says while `run` calls it, and what `run` returns."""
        if not self.layers:
            output = run(model)
            return [logits(output)], output
        heard: dict[str, Said] = {name: [] for name in self.layers}

        def hear(name: str) -> Callable:
            return lambda _module, _given, output: heard[name].extend(
                value for value in tensors_in(output) if value.is_floating_point()
            )

        hooks = [model.get_submodule(name).register_forward_hook(hear(name)) for name in self.layers]
        try:
            output = run(model)
        finally:
            for hook in hooks:
                hook.remove()
        return [value for own in heard.values() for value in own], output


SCORES = Says()


def what_says(
    model: nn.Module, graph: ChannelGraph, run: Callable[[nn.Module], object], *, scores: bool = False
) -> Says:
    """The last layers of a network, but for those whose own channels may go.

    model: in eval mode. run: calls it with a few examples. scores: whether it has classes.
    """
    removable = {tensor for group in graph for tensor, _dim in group.made}
    found = tuple(name for name in last_layers(model, run) if f"{name}.weight" not in removable)
    return Says(found or ("",), scores)


def are_scores(output: Tensor) -> bool:
    """Whether an output is (images, classes)."""
    return output.ndim == 2 and output.shape[1] > 1


def spread_of(said: Tensor, share: Share = WHOLE) -> Tensor:
    """The variance of an output over examples, mean over its places; over all of it where there is one example."""
    said = said.float()
    mean = share.total(said.mean(0)) / share.count if len(said) * share.count > 1 else said.mean()
    return (share.total((said - mean).square().mean()) / share.count).clamp(min=1e-12)


def own_loss(said: Said, seed: int, share: Share = WHOLE, *, scores: bool = True) -> Tensor:
    """A loss whose gradients, squared and averaged, say how much every output matters, summed over images.

    Of class scores (images, classes): cross-entropy with a class drawn from them. Of other outputs: a random
    projection, as of a squared error over the variance.
    """
    if scores and are_scores(said[0]):
        output = said[0]
        chance = torch.empty(len(output) * share.count, output.shape[1]).exponential_(generator=generator(seed))
        drawn = (output.detach().softmax(1) / share.own(chance).to(output.device)).argmax(1)
        return F.cross_entropy(output, drawn, reduction="sum")
    total = said[0].new_zeros(())
    for number, output in enumerate(said):
        chance = torch.randn(len(output) * share.count, *output.shape[1:], generator=generator(seed, number))
        each = spread_of(output.detach(), share) * output[0].numel() * len(said)
        total = total + (output * share.own(chance).to(output)).sum() / each.sqrt()
    return total


def distance_between(said: Said, before: Said, share: Share = WHOLE, *, scores: bool = True) -> float:
    """Of class scores (images, classes): the mean Kullback-Leibler divergence, in nats. Of other outputs: the mean
    squared difference over the variance, mean over the outputs (`spread_of`)."""
    if scores and are_scores(said[0]):
        divergence = F.kl_div(said[0].log_softmax(1), before[0].log_softmax(1), log_target=True, reduction="batchmean")
        value = float(share.total(divergence) / share.count)
        return value if math.isfinite(value) else math.inf
    values = []
    for now, then in zip(said, before, strict=True):
        gap = share.total((now - then).square().mean()) / share.count
        values.append(float(gap / spread_of(then, share)))
    value = sum(values) / len(values)
    return value if math.isfinite(value) else math.inf


def divergence(said: Tensor, teacher: Tensor, temperature: float = TEMPERATURE, *, scores: bool = True) -> Tensor:
    """How far one output is from the teacher's. Of class scores (images, classes), both softened: mean over images, on
    the scale of cross-entropy. Of others: the mean squared difference over the teacher's variance."""
    if not (scores and are_scores(said)):
        return (said - teacher).square().mean() / spread_of(teacher)
    return (
        F.kl_div(
            F.log_softmax(said / temperature, 1),
            F.log_softmax(teacher / temperature, 1),
            log_target=True,
            reduction="batchmean",
        )
        * temperature**2
    )


def apart(said: Said, teacher: Said, *, scores: bool = True) -> Tensor:
    """The mean divergence of all outputs of one shape; zero where there are none."""
    pairs: Sequence[tuple[Tensor, Tensor]] = [
        (now.float(), then.float()) for now, then in zip(said, teacher, strict=True) if now.shape == then.shape
    ]
    if not pairs:
        return said[0].new_zeros(())
    return torch.stack([divergence(now, then, scores=scores) for now, then in pairs]).mean()
