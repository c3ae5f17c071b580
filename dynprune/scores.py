"""What a model's output means: one score per class and image.

Takes a model that returns a tensor, or a tuple or object with auxiliary outputs behind it; returns the scores, or the share of
images whose class they get right.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dynprune.data import Data, Images
from dynprune.errors import DynpruneError
from dynprune.tracing import evaluating


@torch.no_grad()
def evaluate(model: nn.Module, data: Data, images: Images, device: torch.device | str = "cpu") -> float:
    """Share of the images whose class is predicted right, in the model's own precision. Its mode is restored."""
    was_training, right = model.training, 0
    dtype = next((value.dtype for value in model.parameters()), torch.float32)
    model.eval()
    try:
        for batch, labels in data.eval_batches(images):
            batch = batch.to(device, dtype, memory_format=torch.channels_last)
            right += int((logits(model(batch)).argmax(1).cpu() == labels).sum())
    finally:
        model.train(was_training)
    return right / len(images)


def logits(output: object) -> Tensor:
    """The class scores of a model that returns a tensor, or a tuple or object with auxiliary outputs behind it."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, (tuple, list)):
        return output[0]
    if hasattr(output, "logits"):
        return output.logits
    raise DynpruneError(f"The model returns {type(output).__name__}. Expected class scores as a tensor, or first in a tuple.")


@torch.no_grad()
def check_output(model: nn.Module, classes: list[str], example: Tensor) -> None:
    """Refuse a network whose output cannot be trained on these classes, before the long work starts."""
    with evaluating(model):
        try:
            output = model(example)
        except Exception:
            return  # tracing names the layer
    shape = tuple(logits(output).shape)
    if len(shape) != 2 or shape[1] < len(classes):
        raise DynpruneError(f"The model gives an output of shape {'x'.join(map(str, shape))} for one image. Expected one score per class: "
                            f"1x{len(classes)}. A factory should take num_classes.")


class Scores(nn.Module):
    """The class scores alone, of a model that may return more."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return logits(self.model(x))
