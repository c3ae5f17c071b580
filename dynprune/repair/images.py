"""Which images calibration, repair and the search look at.

Takes the data, a network and a seed; returns tensors. Training images are fitted to, validation images measure
distances from the untouched network (without their labels), test images are never touched. Where images are large,
fewer are taken at once, so that activations fit a bound.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dynprune.data.loading import Data
from dynprune.data.loading import Images as Split
from dynprune.errors import DynpruneError
from dynprune.repair.shares import WHOLE, Share
from dynprune.repair.trained import ACTIVATIONS, Images, activation_bytes
from dynprune.state.copies import generator

FEWEST, MOST = 512, 1024  # training images for calibration; twice as many for repair
MULTIPLICATIONS = 6e11  # that calibration may take in one forward pass of them all, unless they are the fewest
PULL = 256  # training images that a repair within the search looks at
JUDGES = 512  # validation images that measure the distance from the untouched network


def enough(macs: int) -> int:
    """How many training images to calibrate a network of so many multiply-accumulates on: more is better, and takes
    longer."""
    return int(min(MOST, max(FEWEST, MULTIPLICATIONS / max(1, macs))))


def sample_images(
    model: nn.Module, data: Data, count: int, seed: int, device: torch.device, share: Share = WHOLE
) -> Images:
    """Training images without augmentation for calibration, twice as many for repair, and validation images to judge
    by.

    model: in eval mode, on the device. count: of training images for calibration, at most, in all processes together;
    each reads its share.
    """
    dtype = next((value.dtype for value in model.parameters() if value.is_floating_point()), torch.float32)
    most = max(16, int(ACTIVATIONS // activation_bytes(model, (data.example.to(device, dtype),))))

    def even(images: int) -> int:
        """So many that all processes have equal shares."""
        if images < share.count:
            raise DynpruneError(
                f"{share.count} processes cannot share {images} images. Expected at least one for each, to calibrate, "
                "to repair and to measure with. Start fewer processes."
            )
        return images // share.count * share.count

    half = len(data.train) // 2
    others = even(min(2 * count, len(data.train) - half, most * share.count))
    count = even(min(count, half))
    order = torch.randperm(len(data.train), generator=generator(seed, 7))
    judging = torch.randperm(len(data.val), generator=generator(seed, 8))
    judging = judging[: even(min(JUDGES, most, len(judging)))]

    def take(split: Split, indices: Tensor) -> Tensor:
        batches = [batch for batch, _ in data.eval_batches(split.take(share.own(indices)))]
        return torch.cat(batches).to(device, dtype, memory_format=torch.channels_last)

    pull = even(min(others, max(16, min(PULL, others // 2))))
    return Images(
        [(take(data.train, batch),) for batch in order[:count].split(even(max(share.count, min(128, most))))],
        (take(data.train, order[count : count + others]),),
        (take(data.train, order[count : count + pull]),),
        (take(data.val, judging),),
        share=share,
    )
