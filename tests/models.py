"""Networks of a few channels in which structural mistakes would show: residuals, concats, depthwise, grouped,
shared."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def perturb(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give BatchNorm non-trivial statistics and scales: with fresh ones (0 and 1) many mistakes stay invisible."""
    rng = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in (
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.5, 1.5),
                (module.weight, 0.5, 1.5),
                (module.bias, -0.3, 0.3),
            ):
                if tensor is not None:
                    tensor.data.copy_(torch.rand(tensor.shape, generator=rng) * (high - low) + low)
    return model.eval()


class Tiny(nn.Module):
    """Residual add, depthwise convolution, squeeze-excite, concat and flatten on 8x8 images or larger."""

    def __init__(self, num_classes: int = 10):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.conv1, self.bn1 = nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24)
        self.depthwise, self.bn2 = nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False), nn.BatchNorm2d(24)
        self.squeeze, self.excite = nn.Conv2d(24, 8, 1), nn.Conv2d(8, 24, 1)
        self.conv2, self.bn3 = nn.Conv2d(24, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.branch = nn.Conv2d(16, 12, 3, padding=1)
        self.head = nn.Linear(28 * 4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu6(self.bn2(self.depthwise(y)))
        y = y * torch.sigmoid(self.excite(F.silu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        x = x + self.bn3(self.conv2(y))
        x = torch.cat([x, torch.tanh(self.branch(x))], 1)
        return self.head(F.adaptive_avg_pool2d(x, 2).flatten(1))


class Grouped(nn.Module):
    """Grouped convolution, channel shuffle and chunk."""

    def __init__(self, num_classes: int = 4):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 32, 3, padding=1, groups=4)
        self.left, self.right = nn.Conv2d(16, 12, 1), nn.Conv2d(16, 12, 1)
        self.head = nn.Linear(12, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(F.relu(self.bn(self.stem(x))))
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        left, right = x.chunk(2, 1)
        return self.head(F.relu(self.left(left) + self.right(right)).mean((2, 3)))


class Shared(nn.Module):
    """One convolution used twice, so that what it reads and what it makes are tied."""

    def __init__(self, num_classes: int = 4):
        super().__init__()
        self.stem, self.twice = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.act = nn.PReLU(8)
        self.head = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        return self.head(self.twice(F.relu(self.twice(x))).amax((2, 3)))


class Sorting(nn.Module):
    """An operation without a rule: the channels it reads must be pinned, the inner layer stays free."""

    def __init__(self, num_classes: int = 4):
        super().__init__()
        self.stem, self.up, self.down = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 32), nn.Linear(32, 8)
        self.head = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        x = x + self.down(F.gelu(self.up(x)))
        return self.head(x.mean((1, 2)).sort(-1).values)


def tiny(num_classes: int = 10) -> nn.Module:
    return Tiny(num_classes)


def normed(num_classes: int = 10) -> nn.Module:
    """Every channel is normalised by all of them."""
    layers = [nn.Conv2d(3, 16, 3), nn.GroupNorm(1, 16), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.GroupNorm(1, 24), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, num_classes))


class Multiplied(nn.Module):
    """A depthwise convolution that makes two channels, another three, of each that it reads."""

    def __init__(self, num_classes: int = 4):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.twice, self.bn2 = nn.Conv2d(16, 32, 3, padding=1, groups=16), nn.BatchNorm2d(32)
        self.mix, self.thrice = nn.Conv2d(32, 8, 1), nn.Conv2d(8, 24, 3, padding=1, groups=8, bias=False)
        self.head = nn.Linear(24, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn2(self.twice(F.relu(self.bn(self.stem(x))))))
        return self.head(F.relu(self.thrice(F.relu(self.mix(x)))).mean((2, 3)))


def learned_tiny(data, epochs):
    """The tiny network after so many epochs of digits at 8 pixels; 12 bring it to some 95 %."""
    torch.manual_seed(0)
    model = tiny(10)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for epoch in range(epochs):
        for images, labels in data.train_batches(64, 0, epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return model.eval()
