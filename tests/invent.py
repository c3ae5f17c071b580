"""Networks that nobody would write and everybody does: invented by hypothesis, tried from trace to ONNX.

`networks()` draws a recipe; `tests.invent:network?recipe=...` builds it, in any process. `tried` traces, trains,
compacts, exports and compares; `loaded_elsewhere` opens the files in another process. `python -m tests.measure.fuzz
--networks 300` does it for many.
"""

from __future__ import annotations

import base64
import json
import random
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
CLASSES, SIZE = 4, (3, 16, 16)
BLOCKS = (
    "conv",
    "residual",
    "depthwise",
    "grouped",
    "concat",
    "squeeze",
    "folding",
    "scale",
    "split",
    "shuffled",
    "transposed",
)
NORMS = ("batch", "batch without weights", "instance", "group", "spectral", "none")
CONSTANTS = ("buffer", "tensor", "list", "dict", "object", "array", "number", "order", "layer", "none")
TRAINING = ("noise", "fixed noise", "side", "dropout", "none")
NAMES = ("block{}", "#{}", "a:{}", "ü {}", "{}", "weight{}", "#[{}]")
EXTRAS = (
    "alias",
    "tied",
    "encoding",
    "asserts",
    "extra state",
    "lock",
    "writes input",
    "counter",
    "unused",
    "more outputs",
)


@st.composite
def networks(draw: st.DrawFn) -> dict:
    """A recipe: blocks with widths, norms and names; a constant that no state dict holds; what differs in training; and
    oddities."""
    blocks = draw(
        st.lists(
            st.fixed_dictionaries(
                {"kind": st.sampled_from(BLOCKS), "width": st.sampled_from([8, 12, 16]), "norm": st.sampled_from(NORMS)}
            ),
            min_size=1,
            max_size=4,
        )
    )
    return {
        "blocks": blocks,
        "names": draw(st.sampled_from(NAMES)),
        "constant": draw(st.sampled_from(CONSTANTS)),
        "training": draw(st.sampled_from(TRAINING)),
        "extras": sorted(draw(st.sets(st.sampled_from(EXTRAS), max_size=3))),
    }


def name_of(recipe: dict) -> str:
    return "tests.invent:network?recipe=" + base64.urlsafe_b64encode(json.dumps(recipe).encode()).decode().rstrip("=")


def network(num_classes: int, recipe: str) -> nn.Module:
    text = recipe + "=" * (-len(recipe) % 4)
    return Invented(json.loads(base64.urlsafe_b64decode(text)), num_classes)


def norm(kind: str, channels: int) -> nn.Module:
    return {
        "batch": lambda: nn.BatchNorm2d(channels),
        "batch without weights": lambda: nn.BatchNorm2d(channels, affine=False),
        "instance": lambda: nn.InstanceNorm2d(channels),
        "group": lambda: nn.GroupNorm(2, channels),
    }.get(kind, nn.Identity)()


class Scale(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(1, channels, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Block(nn.Module):
    """One of BLOCKS, 3x3, that keeps height and width."""

    def __init__(self, into: int, kind: str, width: int, norm_kind: str):
        super().__init__()
        self.kind, self.in_channels, self.out_channels = kind, into, width
        self.conv = nn.Conv2d(into, width, 3, padding=1)
        if norm_kind == "spectral":
            self.conv = nn.utils.parametrizations.spectral_norm(self.conv)
        self.norm = norm(norm_kind, width)
        if kind == "residual":
            self.more, self.skip = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(into, width, 1)
        elif kind == "depthwise":
            self.more = nn.Conv2d(width, width, 3, padding=1, groups=width)
        elif kind == "grouped":
            self.more = nn.Conv2d(width, width, 3, padding=1, groups=2)
        elif kind == "concat":
            self.more = nn.Conv2d(into, 4, 1)
            self.out_channels = width + 4
        elif kind == "squeeze":
            self.down, self.up = nn.Linear(width, 4), nn.Linear(4, width)
        elif kind == "folding":
            self.more = nn.Conv2d(into, width, 1)
        elif kind == "scale":
            self.more = Scale(width)
        elif kind == "split":
            self.part = width // 4
            self.more = nn.Conv2d(self.part, self.part, 3, padding=1)
        elif kind == "transposed":
            self.more = nn.ConvTranspose2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.conv(x)))
        if self.kind == "residual":
            return F.relu(self.more(y) + self.skip(x))
        if self.kind in ("depthwise", "grouped", "scale", "transposed"):
            return F.relu(self.more(y))
        if self.kind == "concat":
            return torch.cat([y, self.more(x)], 1)
        if self.kind == "squeeze":
            return y * self.up(F.relu(self.down(y.mean((2, 3))))).sigmoid()[:, :, None, None]
        if self.kind == "folding":
            return F.relu(y + self.more(x))
        if self.kind == "split":
            return torch.cat([self.more(y[:, : self.part]), y[:, self.part :]], 1)
        if self.kind == "shuffled":
            n, c, h, w = y.shape
            return y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return y


class Invented(nn.Module):
    def __init__(self, recipe: dict, classes: int):
        super().__init__()
        self.recipe, self.extras, into = recipe, set(recipe["extras"]), SIZE[0]
        self.blocks = nn.Sequential()
        for number, block in enumerate(recipe["blocks"]):
            made = Block(into, block["kind"], block["width"], block["norm"])
            self.blocks.add_module(recipe["names"].format(number), made)
            into = made.out_channels
        self.wide, self.head = into, nn.Linear(into, classes)
        self.add_constant(recipe["constant"], classes)
        if recipe["training"] == "side":
            self.side = nn.Linear(into, classes)
        if "alias" in self.extras:
            self.again = nn.Sequential(self.head)
        if "tied" in self.extras:
            self.one, self.two = nn.Conv2d(into, into, 1), nn.Conv2d(into, into, 1)
            self.two.weight = self.one.weight
        if "encoding" in self.extras:
            self.encoding = nn.Linear(5, into)
        if "unused" in self.extras:
            self.unused = nn.Linear(3, 3)
        if "lock" in self.extras:
            self.lock = threading.Lock()
        self.calls, self.factor = 0, random.uniform(0.5, 1.5)

    def add_constant(self, kind: str, classes: int) -> None:
        mixing = torch.randn(classes, classes)
        if kind == "buffer":
            self.register_buffer("mixing", mixing, persistent=False)
        elif kind == "tensor":
            self.mixing = mixing
        elif kind == "list":
            self.mixing = [mixing[:2], (mixing[2:],)]
        elif kind == "dict":
            self.mixing = {"deep": {"er": mixing}}
        elif kind == "object":
            self.mixing = SimpleNamespace(matrix=mixing, gain=random.random() + 0.5)
        elif kind == "array":
            self.mixing = mixing.numpy()
        elif kind == "number":
            self.mixing = float(mixing.abs().sum())
        elif kind == "order":
            self.mixing = torch.randperm(classes).tolist()
        elif kind == "layer":
            self.mixing = [nn.Linear(classes, classes).requires_grad_(False)]

    def mix(self, y: Tensor) -> Tensor:
        kind, value = self.recipe["constant"], getattr(self, "mixing", None)
        if kind in ("buffer", "tensor"):
            return y @ value
        if kind == "list":
            return y @ torch.cat([value[0], value[1][0]])
        if kind == "dict":
            return y @ value["deep"]["er"]
        if kind == "object":
            return y @ value.matrix * value.gain
        if kind == "array":
            return y @ torch.from_numpy(value).to(y)
        if kind == "number":
            return y * value
        if kind == "order":
            return y[:, value]
        return value[0](y) if kind == "layer" else y

    def get_extra_state(self) -> object:
        return {"factor": self.factor} if "extra state" in self.extras else {}

    def set_extra_state(self, state: object) -> None:
        self.factor = state.get("factor", self.factor)

    def forward(self, x: Tensor) -> object:
        if "writes input" in self.extras:
            x.sub_(0.1)
        if "counter" in self.extras and not torch.compiler.is_exporting():
            self.calls += 1
        y = self.blocks(x)
        if "asserts" in self.extras:
            assert y.shape[1] == self.wide, "another number of channels"
        if "tied" in self.extras:
            y = self.two(F.relu(self.one(y)))
        y = y.mean((2, 3))
        if "encoding" in self.extras:
            y = y + self.encoding(torch.linspace(0, 1, 5).to(y))
        if self.training and self.recipe["training"] == "noise":
            y = y * torch.ones(len(y), self.wide, device=y.device).bernoulli_(0.9)
        elif self.training and self.recipe["training"] == "fixed noise":
            y = y + 0.01 * torch.randn(1, sum(1 for _ in range(self.head.in_features)), device=y.device)
        elif self.recipe["training"] == "dropout":
            y = F.dropout(y, 0.1, self.training)
        scores = self.mix((self.again[0] if "alias" in self.extras else self.head)(y)) * self.factor
        if self.recipe["training"] == "side":
            side = self.side(y)
            if self.training:
                return scores, side
        return (scores, scores.new_ones(3), self.head.bias) if "more outputs" in self.extras else scores


# -- trying one out ----------------------------------------------------------------------------------------------------


def images():
    """A few images of four classes, in memory."""
    from dynprune.data.loading import Data, ImagesInMemory

    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(CLASSES).repeat(6)
    pixels = (torch.randint(0, 100, (len(labels), *SIZE), generator=rng) + 35 * labels.view(-1, 1, 1, 1)).to(
        torch.uint8
    )
    split = ImagesInMemory(pixels, labels)
    return Data(
        "invented",
        list("abcd"),
        SIZE,
        (0.4,) * 3,
        (0.2,) * 3,
        split,
        split,
        split,
        "the training images",
        "the training images",
        "none",
        0,
    )


def snapshot(model: nn.Module) -> dict:
    from dynprune.state.attributes import attribute_values

    tensors = {
        name: (value.clone(), value.data_ptr()) for name, value in [*model.named_parameters(), *model.named_buffers()]
    }
    plain = {
        path: value.clone() if isinstance(value, Tensor) else np.copy(value) if isinstance(value, np.ndarray) else value
        for path, value in attribute_values(model)
    }
    return {"tensors": tensors, "plain": plain, "modes": [module.training for module in model.modules()]}


def equal(one: object, other: object) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return (
        torch.equal(one, other)
        if isinstance(one, Tensor)
        else bool(np.array_equal(one, other))
        if isinstance(one, np.ndarray)
        else one == other
    )


def tried(recipe: dict, folder: Path) -> str:
    """Trace, rehearse, train, compact and export one network in `folder`; leaves x.pt and ours.pt there for
    `loaded_elsewhere`.

    Returns "went through", or the words with which it was refused before training. Raises AssertionError for anything
    else.
    """
    import dynprune
    from dynprune import zoo
    from dynprune.data.scores import logits
    from dynprune.deploy.compact import compact
    from dynprune.deploy.export import export
    from dynprune.errors import DynpruneError
    from dynprune.files.onnxfile import open_session
    from dynprune.files.onnxfile import run as execute
    from dynprune.runs.config import TrainConfig
    from dynprune.runs.directory import Run
    from dynprune.training.rehearsal import rehearse
    from dynprune.training.session import Session
    from dynprune.training.train import train

    data, name = images(), name_of(recipe)
    model, x = zoo.build(name, CLASSES, 0), data.example
    before, draws = snapshot(model), (torch.get_rng_state(), random.getstate())
    kept = x.clone()
    dynprune.trace(model, x)
    assert (
        equal(before, snapshot(model))
        and torch.equal(x, kept)
        and torch.equal(torch.get_rng_state(), draws[0])
        and random.getstate() == draws[1]
    ), "trace changed something"
    config = TrainConfig(
        model=name,
        epochs=2,
        batch_size=8,
        budget=("0.6",),
        align="1",
        min_width=2,
        precision="float32",
        threads=1,
        lr=0.02,
    )
    try:
        session = Session(config, data)
        rehearse(session)
    except DynpruneError as error:
        return f"refused: {error}"
    run = Run.create(folder, session.config, True)
    trained = train(config, run, session=session)
    compacted = compact(run, data=data)
    assert compacted.accuracy == trained.accuracy and compacted.max_rel_diff < 1e-5, (
        trained.accuracy,
        compacted.accuracy,
        compacted.max_rel_diff,
    )
    exported = export(run, data=data)
    images_of_noise = torch.randn(3, *SIZE, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        ours = logits(session.model.eval()(images_of_noise.clone()))
    onnx = open_session(Path(exported.path))
    theirs = torch.from_numpy(execute(onnx, {onnx.get_inputs()[0].name: images_of_noise.numpy()}))
    torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-4)
    torch.save((images_of_noise, ours), folder / "ours.pt")
    return "went through"


def loaded_elsewhere(folders: list[Path]) -> dict[str, float]:
    """Open the compact files in another process: per folder, the largest difference over the largest output."""
    code = (
        "import sys, json, random, numpy, torch, dynprune; from pathlib import Path; from dynprune.data.scores "
        "import logits; torch.manual_seed(987); random.seed(65); out = {}\nfor name in sys.argv[1:]:\n    x, ours "
        "= torch.load(Path(name) / 'ours.pt')\n    with torch.no_grad(): theirs = logits(dynprune.load(Path(name) "
        "/ 'compact.safetensors', trust=True)(x))\n    out[name] = float((ours - theirs).abs().max() / "
        "ours.abs().max().clamp(min=1e-30))\nprint(json.dumps(out))"
    )
    done = subprocess.run([sys.executable, "-c", code, *map(str, folders)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)
