"""What a model's output means: one score per class and image.

Takes a model that returns a tensor, or a tuple or object with auxiliary outputs behind it; returns the scores, or the
share of images whose class they get right.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynprune.data.loading import Data, Images
from dynprune.errors import DynpruneError
from dynprune.state.copies import copied, doubled, same_randomness


def evaluate(model: nn.Module, data: Data, images: Images, device: torch.device | str = "cpu") -> float:
    """Share of the images whose class is predicted right, in the model's own precision. Its mode is restored."""
    return judge(model, data, images, device)[0]


@torch.no_grad()
def judge(model: nn.Module, data: Data, images: Images, device: torch.device | str = "cpu") -> tuple[float, float]:
    """As `evaluate`, and the mean cross-entropy in nats, without label smoothing."""
    was_training, right, loss = model.training, 0, 0.0
    dtype = next((value.dtype for value in model.parameters() if value.is_floating_point()), torch.float32)
    model.eval()
    try:
        for batch, labels in data.eval_batches(images):
            batch = batch.to(device, dtype, memory_format=torch.channels_last)
            scores = logits(model(batch)).cpu()
            right += int((scores.argmax(1) == labels).sum())
            loss += float(F.cross_entropy(scores.float(), labels, reduction="sum"))
    finally:
        model.train(was_training)
    return right / len(images), loss / len(images)


@torch.no_grad()
def exact_scores(model: nn.Module, images: Tensor) -> Tensor:
    """The scores of a copy in float64 and in evaluation mode, so that only real disagreements show; in the model's own
    precision where some function knows no other."""
    try:
        return logits(doubled(model).eval()(images.double()))
    except Exception:
        own = next((value.dtype for value in model.parameters() if value.is_floating_point()), torch.float32)
        return logits(copied(model).cpu().eval()(images.to(own)))


def logits(output: object) -> Tensor:
    """The class scores of a model that returns a tensor, or a tuple or object with auxiliary outputs behind it."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, (tuple, list)):
        return output[0]
    if hasattr(output, "logits"):
        return output.logits
    raise DynpruneError(
        f"The model returns {type(output).__name__}. Expected class scores as a tensor, or first in a tuple."
    )


def fitting(model: nn.Module, data: Data) -> Data:
    """The data as the network takes them: in colour, or in grey where it has one input channel. Raises DynpruneError
    for a network whose output cannot be trained on these classes, before the long work starts."""
    output = None
    for channels in dict.fromkeys((data.size[0], 3, 1)):
        fitted = data.with_channels(channels) if channels != 3 or data.size[0] == 3 else data
        if (output := output_of(model, fitted.example)) is not None:
            data = fitted
            break
    if output is None:
        return data  # tracing names the layer
    scores = logits(output)
    shape = tuple(scores.shape) if isinstance(scores, Tensor) else (type(scores).__name__,)
    if len(shape) != 2 or shape[1] != len(data.classes):
        raise DynpruneError(
            f"The model gives an output of shape {'x'.join(map(str, shape))} for one image. Expected "
            f"one score per class: 1x{len(data.classes)}. A factory should take num_classes."
        )
    return data


def output_of(model: nn.Module, example: Tensor) -> object:
    """What a copy of the model returns for an example in eval mode; None where it fails."""
    try:
        with torch.no_grad(), same_randomness(0):
            trial = copied(model).eval()
            return trial(
                example.to(
                    next((value.dtype for value in model.parameters() if value.is_floating_point()), torch.float32)
                )
            )
    except Exception:
        return None


class Scores(nn.Module):
    """The class scores alone, of a model that may return more."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return logits(self.model(x))
