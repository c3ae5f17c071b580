"""Networks as people write them: constants out of the state dict, odd names, layers under two names, sizes that are
used in training only.

Each takes 3 x 16 x 16 images or larger and returns 4 scores; `tests.odd:NAME` is a model's name.
"""

from __future__ import annotations

import functools
import random
import threading
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Base(nn.Module):
    """Two convolutions and a head."""

    def __init__(self, num_classes: int = 4, into: int = 3):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(into, 16, 3), nn.Conv2d(16, 24, 3), nn.Linear(24, num_classes)

    def features(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu()).relu().mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


# -- values that no state dict holds -----------------------------------------------------------------------------------


class NonPersistent(Base):
    def __init__(self, num_classes: int = 4):
        super().__init__(num_classes)
        self.register_buffer("mixing", torch.randn(num_classes, num_classes), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) @ self.mixing


class NarrowedNonPersistent(Base):
    """The buffer has an entry per channel, so it is narrowed with them."""

    def __init__(self, num_classes: int = 4):
        super().__init__(num_classes)
        self.register_buffer("scale", torch.rand(1, 16, 1, 1) + 0.5, persistent=False)

    def features(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu() * self.scale).relu().mean((2, 3))


class PlainTensor(Base):
    def __init__(self, num_classes: int = 4):
        super().__init__(num_classes)
        self.sign = torch.randint(0, 2, (num_classes,)) * 2.0 - 1

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.sign.to(x.device)


class InContainers(Base):
    """Tensors in a list, in a dict in a tuple, in an object; an array; numbers."""

    def __init__(self, num_classes: int = 4):
        super().__init__(num_classes)
        self.scales = [torch.rand(()) + 1, torch.rand(())]
        self.deep = ({"shift": torch.randn(num_classes)}, 3)
        self.settings = SimpleNamespace(gain=torch.rand(1) + 0.5, factor=random.uniform(1, 2))
        self.array = np.random.rand(num_classes).astype(np.float32)
        self.order = torch.randperm(num_classes).tolist()

    def forward(self, x: Tensor) -> Tensor:
        y = (
            super().forward(x) * self.scales[0]
            + self.scales[1]
            + self.deep[0]["shift"] * self.settings.gain * self.settings.factor
        )
        return (y * torch.from_numpy(self.array))[:, self.order]


class HiddenLayer(Base):
    """A frozen random layer in a plain list, which no module registers."""

    def __init__(self, num_classes: int = 4):
        super().__init__(num_classes)
        self.extra = [nn.Linear(num_classes, num_classes).requires_grad_(False)]

    def forward(self, x: Tensor) -> Tensor:
        return self.extra[0](super().forward(x))


class InClosure(Base):
    """A random constant that only a function knows: it cannot be stored."""

    def __init__(self, num_classes: int = 4):
        super().__init__(num_classes)
        mixing = torch.randn(num_classes, num_classes)
        self.mix = lambda y: y @ mixing

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(super().forward(x))


TOP = torch.rand(4) + 0.5  # drawn when the module is imported: another process draws others
STEADY = torch.linspace(1, 2, 4)


@functools.lru_cache
def table(count: int) -> Tensor:
    return torch.linspace(1, 2, count)


class RandomAtTop(Base):
    """A random constant of the module, or of a class: it cannot be stored."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * TOP


class SteadyAtTop(Base):
    """Constants that any process makes alike, at the top of the file and in a cache."""

    def __init__(self, num_classes: int = 4):
        super().__init__(num_classes)
        self.register_buffer("table", table(num_classes), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * STEADY + self.table


class NotesDown(Base):
    """Keeps what it saw, in a list, a dict and an attribute that is empty at first; it computes nothing with that."""

    def __init__(self, num_classes: int = 4):
        super().__init__(num_classes)
        self.seen, self.maps, self.last, self.count = [], {}, None, 0

    def features(self, x: Tensor) -> Tensor:
        y = super().features(x)
        self.count += 1
        self.seen.append(x.mean())
        self.maps[self.count] = self.last = y
        return y


class MakesStatistics(Base):
    """Running statistics in an attribute that is None until the first training step."""

    def __init__(self, num_classes: int = 4):
        super().__init__(num_classes)
        self.mean = None

    def features(self, x: Tensor) -> Tensor:
        y = super().features(x)
        if self.training:
            self.mean = 0.9 * (0 if self.mean is None else self.mean) + 0.1 * y.detach().float().mean(0)
        return y if self.mean is None else y - self.mean


class Counts(Base):
    """A number that training changes and evaluation uses."""

    def __init__(self, num_classes: int = 4):
        super().__init__(num_classes)
        self.steps = 0

    def features(self, x: Tensor) -> Tensor:
        self.steps += self.training
        return super().features(x) * (1 + self.steps / 10)


class ExtraState(Base):
    """Its extra state changes what it computes."""

    def __init__(self, num_classes: int = 4):
        super().__init__(num_classes)
        self.power = random.randint(2, 10**6)

    def get_extra_state(self) -> object:
        return {"power": self.power, "names": ["a", "b"]}

    def set_extra_state(self, state: object) -> None:
        self.power = state["power"]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + self.power / 10**6)


class OddExtraState(Base):
    """Extra state that is no plain value, and that nothing depends on."""

    def get_extra_state(self) -> object:
        return threading.Lock

    def set_extra_state(self, state: object) -> None:
        raise AssertionError("never called with what was left out")


# -- names, aliases, attributes ----------------------------------------------------------------------------------------


class Alias(Base):
    def __init__(self, num_classes: int = 4):
        super().__init__(num_classes)
        self.encoder = nn.Sequential(self.a, nn.ReLU(), self.b)

    def features(self, x: Tensor) -> Tensor:
        return self.encoder(x).relu().mean((2, 3))


class Shared(nn.Module):
    """One parameter under two names of different layers."""

    def __init__(self, num_classes: int = 4):
        super().__init__()
        self.a, self.b, self.c = (
            nn.Conv2d(3, 16, 3, padding=1),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.Conv2d(16, 16, 3, padding=1),
        )
        self.c.weight = self.b.weight
        self.head = nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(self.b(self.a(x).relu()).relu()).mean((2, 3)))


def odd_names(num_classes: int = 4) -> nn.Module:
    net = nn.Sequential()
    for name, layer in (
        ("#1", nn.Conv2d(3, 16, 3)),
        ("a:b", nn.BatchNorm2d(16)),
        ("#1#2", nn.Conv2d(16, 8, 3)),
        ("ü 0", nn.AdaptiveAvgPool2d(1)),
        ("flat", nn.Flatten()),
        ("#[x, 1]", nn.Linear(8, 8)),
        ("head", nn.Linear(8, num_classes)),
    ):
        net.add_module(name, layer)
    return net


class Locked(Base):
    """Attributes that cannot be copied, alone and inside others."""

    def __init__(self, num_classes: int = 4):
        super().__init__(num_classes)
        self.lock, self.things = threading.Lock(), {"lock": [threading.RLock()], "scale": torch.tensor(1.5)}
        self.generator = (value for value in range(3))

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            return super().forward(x) * self.things["scale"]


class Asserts(Base):
    """Sizes that are remembered and only compared."""

    def __init__(self, num_classes: int = 4):
        super().__init__(num_classes)
        self.dim, self.wide = 16, 24

    def features(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        assert y.shape[1] == self.dim, "wrong number of channels"
        y = self.b(y).relu()
        if y.size(1) != self.wide:
            raise ValueError(f"expected {self.wide} channels")
        return y.mean((2, 3))


class HardAssert(Base):
    """A size in the code, which nothing can repair."""

    def features(self, x: Tensor) -> Tensor:
        y = super().features(x)
        assert y.shape[1] == 24, "twenty-four channels, please"
        return y


class Hooked(Base):
    """A hook that counts calls, and an attribute that forward changes."""

    def __init__(self, num_classes: int = 4):
        super().__init__(num_classes)
        self.calls, self.seen = 0, []
        self.a.register_forward_hook(functools.partial(self.count))

    def count(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        self.calls += 1
        self.seen.append(len(self.seen))


class InPlace(Base):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.sub_(0.5).div_(0.25))


# -- training and evaluation -------------------------------------------------------------------------------------------


class NoiseInTraining(Base):
    def __init__(self, num_classes: int = 4):
        super().__init__(num_classes)
        self.width = 24

    def features(self, x: Tensor) -> Tensor:
        y = super().features(x)
        return y * torch.ones(len(y), self.width).bernoulli_(0.9) if self.training else y


class FixedNoiseInTraining(Base):
    def features(self, x: Tensor) -> Tensor:
        y = super().features(x)
        return y + torch.randn(1, 24) * 0.1 if self.training else y


class SideHead(Base):
    """The side head always runs, and is returned in training only."""

    def __init__(self, num_classes: int = 4):
        super().__init__(num_classes)
        self.side = nn.Linear(24, num_classes)

    def forward(self, x: Tensor) -> object:
        y = self.features(x)
        scores, side = self.head(y), self.side(y)
        return (scores, side) if self.training else scores


class Statistics(nn.Module):
    """A norm with a child of its own, and a layer that evaluation does not use."""

    class Norm(nn.BatchNorm2d):
        def __init__(self, channels: int):
            super().__init__(channels)
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(super().forward(x))

    def __init__(self, num_classes: int = 4):
        super().__init__()
        self.conv, self.norm, self.head, self.unused = (
            nn.Conv2d(3, 16, 3),
            self.Norm(16),
            nn.Linear(16, num_classes),
            nn.Linear(4, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).mean((2, 3)))


# -- constants, scales, layers -----------------------------------------------------------------------------------------


class Encoded(Base):
    """Constants made of nothing go through a layer; a grid and a scale are returned beside the scores."""

    def __init__(self, num_classes: int = 4):
        super().__init__(num_classes)
        self.time, self.scale = nn.Linear(8, 24), nn.Parameter(torch.zeros(()))
        self.frequencies = torch.arange(8) / 8

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        code = self.time(torch.sin(self.frequencies * 3 + torch.linspace(0, 1, 8)))
        return self.head(self.features(x) + code), self.scale.exp(), torch.arange(4.0)


class Scale(nn.Module):
    def __init__(self, shape: tuple[int, ...], name: str):
        super().__init__()
        self.name = name
        setattr(self, name, nn.Parameter(torch.rand(shape) + 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * getattr(self, self.name)


def scaled(num_classes: int = 4, shape: tuple[int, ...] = (1, 16, 1, 1), name: str = "weight") -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3),
        Scale(shape, name),
        nn.Conv2d(16, 24, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, num_classes),
    )


class Foldable(nn.Module):
    """Two branches that `switch_to_deploy` folds into one convolution, by sizes that it remembers."""

    def __init__(self, into: int, out: int, groups: int = 1):
        super().__init__()
        self.in_channels, self.out_channels, self.groups = into, out, groups
        self.branches = nn.ModuleList(nn.Conv2d(into, out, size, padding=size // 2, groups=groups) for size in (3, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.folded(x) if hasattr(self, "folded") else sum(branch(x) for branch in self.branches))

    def switch_to_deploy(self) -> None:
        wide, small = self.branches
        self.folded = nn.Conv2d(self.in_channels, self.out_channels, 3, padding=1, groups=self.groups)
        self.folded.weight.data, self.folded.bias.data = (
            wide.weight.data + F.pad(small.weight.data, [1] * 4),
            wide.bias.data + small.bias.data,
        )
        del self.branches


def foldable(num_classes: int = 4) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3),
        Foldable(16, 16),
        Foldable(16, 24),
        Foldable(24, 24, 24),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, num_classes),
    )


class TakesTraining(nn.Module):
    """In evaluation it takes the kernel of its training branch."""

    def __init__(self, into: int, out: int):
        super().__init__()
        self.train_conv, self.eval_conv = nn.Conv2d(into, out, 3, padding=1), nn.Conv2d(into, out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.train_conv(x)
        self.eval_conv.weight.data, self.eval_conv.bias.data = self.train_conv.weight.data, self.train_conv.bias.data
        return self.eval_conv(x)


def rewrites(num_classes: int = 4) -> nn.Module:
    return nn.Sequential(
        TakesTraining(3, 16),
        nn.ReLU(),
        TakesTraining(16, 24),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, num_classes),
    )


def all_zero(num_classes: int = 4) -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, num_classes, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    nn.init.constant_(model[2].bias, -100.0)
    return model


def all_mixed(num_classes: int = 4) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.GroupNorm(1, 16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, num_classes),
    )


class DependsOnData(Base):
    """torch can train it and cannot export it."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        if y.mean() > 10:
            y = y * 2
        return self.head(y)


class ReturnsDict(Base):
    """Scores under a name in training mode, alone in evaluation."""

    def forward(self, x: Tensor) -> object:
        return {"out": super().forward(x)} if self.training else super().forward(x)


class NoBfloat16(Base):
    """An operator without a form for bfloat16."""

    def features(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        y = y * torch.linalg.det(y.mean((2, 3))[:, :4].view(-1, 2, 2)).view(-1, 1, 1, 1)
        return self.b(y).relu().mean((2, 3))


class Complex(Base):
    def __init__(self, num_classes: int = 4):
        super().__init__(num_classes)
        self.filter = nn.Parameter(torch.randn(24, dtype=torch.cfloat))

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.features(x) * self.filter).real)


class Noisy(Base):
    """Another output every time, in evaluation too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.rand(1, 4)


def lazy(num_classes: int = 4) -> nn.Module:
    return nn.Sequential(
        nn.LazyConv2d(16, 3),
        nn.LazyBatchNorm2d(),
        nn.ReLU(),
        nn.LazyConv2d(24, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.LazyLinear(num_classes),
    )


def half(num_classes: int = 4) -> nn.Module:
    return Base(num_classes).half()


def bfloat16(num_classes: int = 4) -> nn.Module:
    return Base(num_classes).bfloat16()


def grey(num_classes: int = 4) -> nn.Module:
    return Base(num_classes, into=1)


def five_channels(num_classes: int = 4) -> nn.Module:
    return Base(num_classes, into=5)


def needs_depth(depth: int, num_classes: int = 4) -> nn.Module:
    return Base(num_classes)


def raises(num_classes: int = 4) -> nn.Module:
    raise KeyError("no such size")


def ignores_classes() -> nn.Module:
    return Base(100)


class Factories:
    @staticmethod
    def make(num_classes: int = 4, into: int = 3) -> nn.Module:
        return Base(num_classes, into)
