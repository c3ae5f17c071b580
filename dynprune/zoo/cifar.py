"""The papers' networks for 32x32 images: VGG with BatchNorm, ResNet, pre-activation ResNet and DenseNet.

Each factory takes the number of classes and returns an ordinary module for 3-channel images of 32x32 or more pixels.
Sources: Simonyan & Zisserman 2015 (VGG, with one linear layer as is usual for CIFAR), He et al. 2016 (ResNet section
4.2; a 1x1 convolution where a shortcut changes width, their option B), He et al. 2016b (pre-activation), Huang et al.
2017 (DenseNet without bottleneck or compression).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VGG_WIDTHS = {
    16: (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512),
    19: (64, 64, "pool", 128, 128, "pool", 256, 256, 256, 256, "pool", 512, 512, 512, 512, "pool", 512, 512, 512, 512),
}


def initialise(model: nn.Module) -> nn.Module:
    """Normal weights with the variance that keeps activations' size through ReLU (He et al. 2015), by fan-in."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
    return model


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


class VGG(nn.Module):
    def __init__(self, depth: int, classes: int):
        super().__init__()
        layers: list[nn.Module] = []
        width = 3
        for item in VGG_WIDTHS[depth]:
            if isinstance(item, int):
                layers += [conv3x3(width, item), nn.BatchNorm2d(item), nn.ReLU(inplace=True)]
                width = item
            else:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = conv3x3(inputs, outputs, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv3x3(outputs, outputs), nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class PreActivationBottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, width, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), conv3x3(width, width, stride)
        self.bn3, self.conv3 = nn.BatchNorm2d(width), nn.Conv2d(width, 4 * width, 1, bias=False)
        changes = stride != 1 or inputs != 4 * width
        self.shortcut = nn.Conv2d(inputs, 4 * width, 1, stride=stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(x))
        kept = x if self.shortcut is None else self.shortcut(y)
        y = self.conv2(F.relu(self.bn2(self.conv1(y))))
        return kept + self.conv3(F.relu(self.bn3(y)))


class ResNet(nn.Module):
    """Three stages of 16, 32, 64 channels with `blocks` residual blocks each."""

    def __init__(self, blocks: int, classes: int):
        super().__init__()
        self.conv1, self.bn1 = conv3x3(3, 16), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*[BasicBlock(16, 16, 1) for _ in range(blocks)])
        self.layer2 = nn.Sequential(*[BasicBlock(32 if i else 16, 32, 1 if i else 2) for i in range(blocks)])
        self.layer3 = nn.Sequential(*[BasicBlock(64 if i else 32, 64, 1 if i else 2) for i in range(blocks)])
        self.classifier = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))


class PreActivationResNet(nn.Module):
    def __init__(self, blocks: int, classes: int):
        super().__init__()
        self.conv1 = conv3x3(3, 16)
        stages, inputs = [], 16
        for stage, width in enumerate((16, 32, 64)):
            for i in range(blocks):
                stages.append(PreActivationBottleneck(inputs, width, 2 if stage and not i else 1))
                inputs = 4 * width
        self.blocks = nn.Sequential(*stages)
        self.bn = nn.BatchNorm2d(inputs)
        self.classifier = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.blocks(self.conv1(x))))
        return self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))


class DenseLayer(nn.Module):
    def __init__(self, inputs: int, growth: int):
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(inputs), conv3x3(inputs, growth)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(F.relu(self.bn(x)))], 1)


class Transition(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(channels), nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


class DenseNet(nn.Module):
    def __init__(self, layers_per_block: int, growth: int, classes: int):
        super().__init__()
        self.conv1 = conv3x3(3, 16)
        width = 16
        features: list[nn.Module] = []
        for block in range(3):
            for _ in range(layers_per_block):
                features.append(DenseLayer(width, growth))
                width += growth
            if block < 2:
                features.append(Transition(width))
        self.features = nn.Sequential(*features)
        self.bn = nn.BatchNorm2d(width)
        self.classifier = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.features(self.conv1(x))))
        return self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))


def vgg16(num_classes: int = 10) -> nn.Module:
    return initialise(VGG(16, num_classes))


def vgg19(num_classes: int = 10) -> nn.Module:
    return initialise(VGG(19, num_classes))


def resnet20(num_classes: int = 10) -> nn.Module:
    return initialise(ResNet(3, num_classes))


def resnet56(num_classes: int = 10) -> nn.Module:
    return initialise(ResNet(9, num_classes))


def resnet164(num_classes: int = 10) -> nn.Module:
    return initialise(PreActivationResNet(18, num_classes))


def densenet40(num_classes: int = 10) -> nn.Module:
    return initialise(DenseNet(12, 12, num_classes))
