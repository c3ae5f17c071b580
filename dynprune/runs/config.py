"""Every setting once: its type, default, check and meaning.

`TrainConfig` (`train`) and `GateConfig` (`gate`) are what the Python API takes. The command line builds its options
from the same fields (`cli/`), and a run directory keeps the resolved values as `config.toml`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import tomli_w

from dynprune.budgets.limits import Budget, parse_limit
from dynprune.errors import DynpruneError

if TYPE_CHECKING:
    from dynprune.data.loading import Source
    from dynprune.execution.explore import Exploration

ENOUGH = 200  # steps with which a small network learns something; with fewer than half of them hardly anything
LARGEST = 1e18  # of any number among the settings: the product of two still fits a float32
AUTO = -1.0  # of a share that is chosen
POLICIES = ("cucb", "random", "static", "dense")
ESTIMATORS = ("gumbel", "reinforce", "supervised", "random")
LOGS = ("csv", "tensorboard")  # forms in which metrics are written beside metrics.jsonl
SEARCHES = ("bandit", "greedy", "random", "none")  # ways to find widths on frozen weights
CHOICES = ("repairable", "magnitude", "random")  # ways to choose arms of a trained network
PATHS = {"data", "data_root", "weights", "base"}  # settings that may be a place on disk
DATASETS = ("digits", "cifar10", "cifar100", "svhn", "fashion-mnist")  # data that a name stands for
DURATION = re.compile(r"(\d+(?:\.\d+)?)(s|m|h)|0")


def setting(
    default: object,
    meaning: str,
    *,
    choices: tuple[str, ...] = (),
    check: Callable[[Any], bool] | None = None,
    expected: str = "",
    auto: object = None,
) -> Any:
    """A field with its meaning and the values it accepts: one of `choices`, or whatever passes `check` (`expected` in
    words). auto: the number that stands for "auto" on the command line, to be chosen once the data are known
    (`resolved`)."""
    return dataclasses.field(
        default=default,
        metadata={"help": meaning, "choices": choices, "check": check, "expected": expected, "auto": auto},
    )


def positive(value: float) -> bool:
    return value > 0


def fraction(value: float) -> bool:
    return 0 <= value < 1


def own(config: object) -> set[str]:
    """The names of a dataclass's fields."""
    return {field.name for field in dataclasses.fields(config)}  # type: ignore[arg-type]


def anchored(name: str, value: Any, folder: Path | None = None) -> Any:
    """A setting's value, made absolute where it is a path that exists; relative ones are looked for in `folder`, and
    from here."""
    if name not in PATHS or not isinstance(value, str) or not value:
        return value
    for base in ([folder] if folder else []) + [Path()]:
        path = base / value
        try:
            if path.exists() and (name != "data" or path.is_dir() and value not in DATASETS):
                return str(path.absolute())
        except (OSError, ValueError):
            continue
    return value


def of_type(value: object, wanted: type) -> bool:
    """Whether a setting has its default's type: a whole number will do for a float, a bool for nothing else, a tuple
    holds text."""
    if wanted is tuple:
        return isinstance(value, tuple) and all(isinstance(entry, str) for entry in value)
    if isinstance(value, bool) or wanted is bool:
        return isinstance(value, bool) and wanted is bool
    if wanted is float:
        return isinstance(value, int | float)
    return isinstance(value, wanted)


@dataclasses.dataclass(frozen=True)
class Task:
    """What every command needs that works on a network and its data. `validate()` raises DynpruneError for the first
    value that does not fit."""

    # what runs of earlier versions did, whose files do not say it
    BEFORE: ClassVar[dict[str, object]] = {}

    model: str = setting(
        "vgg16",
        "Network: a zoo name (vgg16, vgg19, resnet20, resnet56, resnet164, densenet40), torchvision:NAME, timm:NAME, "
        "or package.module:factory for your own code.",
    )
    weights: str = setting(
        "",
        "Start from trained weights: a file (safetensors, or a state dict as torch.save writes it), or by name: "
        "pretrained, IMAGENET1K_V2 and the like of torchvision, a tag of timm.",
    )
    data: str = setting(
        "digits",
        "digits (embedded), a folder of photos (train/ with val/ or valid/ and/or test/, or one folder per class), "
        "cifar10, cifar100, svhn, or fashion-mnist.",
    )
    data_root: str = setting("data", "Where torchvision's datasets are kept; downloaded there only if absent.")
    image_size: str = setting(
        "auto",
        "Size of the images in pixels: 224, or 96x64 (height x width); auto picks a square from the data (32 or 64 for "
        "small images, 224 for photos).",
        check=lambda v: (
            v == "auto"
            or re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3})?", v) is not None
            and max(map(int, v.split("x"))) <= 4096
        ),
        expected="auto, a number of pixels up to 4096, or two of them such as 96x64",
    )
    val_fraction: float = setting(
        0.1,
        "Share of the training images held back for validation where the data has no val/ split of its own.",
        check=lambda v: 0 < v < 1,
        expected="a number between 0 and 1",
    )
    augment: str = setting(
        "auto",
        "Random changes of training images: crop, crop+flip, none; auto flips except for digits.",
        choices=("auto", "none", "crop", "crop+flip"),
    )
    workers: int = setting(
        -1,
        "Processes that decode photos; -1 takes one per core. Small images are held in memory.",
        check=lambda v: -1 <= v <= 256,
        expected="-1 to 256",
    )
    precision: str = setting(
        "auto",
        "auto takes bfloat16 autocast where the processor is fast at it; float64 is slow and for comparing runs.",
        choices=("auto", "float32", "bfloat16", "float64"),
    )
    device: str = setting("auto", "auto takes a GPU if there is one; else cpu, cuda, cuda:1, ...")
    threads: int = setting(
        0, "CPU threads for computing; 0 leaves PyTorch's choice.", check=lambda v: 0 <= v <= 1024, expected="0 to 1024"
    )
    seed: int = setting(
        0,
        "Seed of initial weights, data order, augmentation and selections.",
        check=lambda v: 0 <= v < 2**32,
        expected="a number from 0 to 4294967295",
    )

    def __post_init__(self) -> None:
        if type(self.image_size) is int:  # one number is a square; 0 was once what auto is
            object.__setattr__(self, "image_size", str(self.image_size or "auto"))

    def validate(self) -> Self:
        for field in dataclasses.fields(self):
            value, meta = getattr(self, field.name), field.metadata
            flag = "--" + field.name.replace("_", "-")
            if not of_type(value, type(field.default)):
                raise DynpruneError(f"{flag} got {value!r}. Expected {type(field.default).__name__}.")
            if isinstance(value, int | float) and not abs(value) < LARGEST:
                raise DynpruneError(
                    f"{flag} got {'nan' if value != value else 'too large a number'}. Expected one below {LARGEST:g}."
                )
            if meta["choices"] and value not in meta["choices"]:
                raise DynpruneError(f'{flag} got "{value}". Choose one of: {", ".join(meta["choices"])}.')
            if meta["check"] and not meta["check"](value):
                raise DynpruneError(f"{flag} got {value}. Expected {meta['expected']}.")
        return self

    @property
    def begins_with(self) -> str:
        """The file that the network's weights come from, "" for none."""
        return self.weights

    @property
    def source(self) -> Source:
        """Which images, and what is done with them: as for the weights, where these are named or in a compact file."""
        from dynprune.data.loading import Resize, Source  # torch comes with it
        from dynprune.files.artifact import preprocess_in
        from dynprune.zoo.pretrained import is_name, preprocessing_of

        source = Source(
            self.data, self.data_root, self.image_size, self.val_fraction, self.augment, self.workers, seed=self.seed
        )
        if not is_name(self.weights):
            how = preprocess_in(self.begins_with) if self.begins_with else None
            return source.like(how) if how else source
        made = preprocessing_of(self.model, self.weights)
        size = "x".join(map(str, made.size)) if source.image_size == "auto" else source.image_size
        resize = Resize(made.interpolation, made.margin)
        return dataclasses.replace(source, image_size=size, mean=made.mean, std=made.std, resize=resize)

    def anchored(self) -> Self:
        """The same settings with absolute paths, which mean the same from any folder."""
        return dataclasses.replace(self, **{name: anchored(name, getattr(self, name)) for name in PATHS & own(self)})

    def to_toml(self) -> str:
        return tomli_w.dumps(dataclasses.asdict(self.anchored()))

    @classmethod
    def from_toml(cls, path: Path) -> Self:
        """Read a run's `config.toml`; unknown or ill-typed entries are refused by name."""
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8", errors="surrogateescape"))
        except (OSError, ValueError, RecursionError) as error:
            raise DynpruneError(
                f"{path} cannot be read as TOML ({error}). Expected the config.toml of a run."
            ) from error
        fields = {field.name: field for field in dataclasses.fields(cls)}
        values = {**cls.BEFORE, **values}
        for name, value in list(values.items()):
            if name not in fields:
                raise DynpruneError(f'{path} has an unknown setting "{name}". Known settings: {", ".join(fields)}.')
            wanted = type(fields[name].default)
            if name == "image_size" and type(value) is int:
                continue
            if wanted is tuple and isinstance(value, list):
                value = values[name] = tuple(value)
            if not of_type(value, wanted):
                raise DynpruneError(f"{path}: {name} is {value!r}. Expected {wanted.__name__}.")
        return cls(**values).validate()


@dataclasses.dataclass(frozen=True)
class Recipe(Task):
    """What every kind of training needs besides."""

    epochs: int = setting(20, "Passes over the training images.", check=positive, expected="at least 1")
    batch_size: int = setting(
        0,
        "Images per step; auto takes 128, or less where there are so few images that a run would have too few steps to "
        "learn from.",
        check=lambda v: v == 0 or v > 1,
        expected="auto, or at least 2",
        auto=0,
    )
    optimizer: str = setting("sgd", "sgd (Nesterov momentum) or adamw.", choices=("sgd", "adamw"))
    lr: float = setting(
        0.0,
        "Peak learning rate; auto takes 0.1 (adamw: 0.001) for batches of 128, half of it with --weights, and less for "
        "smaller ones, by the square root; train doubles it as long as short trials say that this helps, in runs of "
        "1200 steps or more from scratch.",
        check=lambda v: v >= 0,
        expected="auto, or more than 0",
        auto=0.0,
    )
    momentum: float = setting(0.9, "Momentum of sgd.", check=fraction, expected="a number in [0, 1)")
    weight_decay: float = setting(5e-4, "Weight decay.", check=lambda v: v >= 0, expected="0 or more")
    schedule: str = setting("cosine", "Learning rate after the warm-up.", choices=("cosine", "linear", "constant"))
    warmup: float = setting(
        0.1,
        "Share of the steps in which the learning rate rises linearly to its peak.",
        check=fraction,
        expected="a share in [0, 1)",
    )
    label_smoothing: float = setting(
        0.0, "Label smoothing of the cross-entropy loss.", check=fraction, expected="a number in [0, 1)"
    )
    checkpoint_every: str = setting(
        "5m",
        "How often the state is saved, besides at the end of each epoch: 200 (steps), 90s, 5m, 2h, or never.",
        check=lambda v: v == "never" or re.fullmatch(r"0*[1-9][0-9]*[smh]?", v) is not None,
        expected="steps such as 200, a time such as 90s, 5m or 2h, or never",
    )
    log: str = setting(
        "",
        "Write the metrics of each epoch in other forms too: csv (metrics.csv), tensorboard (needs pip install "
        "'dynprune[tensorboard]'), or both: csv,tensorboard.",
        check=lambda v: all(kind in LOGS for kind in v.split(",")) or v == "",
        expected="csv, tensorboard, or both with a comma between",
    )
    no_onnx: bool = setting(
        False, "Train although the network cannot be exported to ONNX; compact, gate and load still work."
    )

    def validate(self) -> Self:
        super().validate()
        if "tensorboard" in self.log and importlib.util.find_spec("tensorboard") is None:
            raise DynpruneError('--log tensorboard needs a package: pip install "dynprune[tensorboard]"')
        return self

    def resolved(self, images: int, processes: int = 1) -> Self:
        """The settings with nothing left to choose, for so many training images.

        The batch is the largest of 128, 64, ... 8 with which the run has ENOUGH steps; the learning rate falls with its
        square root (Krizhevsky 2014, section 5), and is half as large for a trained network. Numbers that were given
        stay.
        """
        sizes = [size for size in (128, 64, 32, 16, 8) if size <= images] or [max(2, images)]
        batch = self.batch_size or next((size for size in sizes if self.epochs * images / size >= ENOUGH), sizes[-1])
        batch = batch if self.batch_size else -(-batch // processes) * processes
        peak = {"sgd": 0.1, "adamw": 0.001}[self.optimizer] / (2 if self.weights else 1)
        rate = self.lr or peak * min(1.0, math.sqrt(batch / 128))
        return dataclasses.replace(self, batch_size=batch, lr=rate)

    @property
    def source(self) -> Source:
        """Which images, and what is done with them; as many as a batch takes, at least."""
        return dataclasses.replace(super().source, batch_size=self.batch_size)

    @property
    def checkpoint_interval(self) -> tuple[float, float]:
        """Steps and seconds between checkpoints; the one that was not asked for is infinite."""
        number = math.inf if self.checkpoint_every == "never" else float(self.checkpoint_every.rstrip("smh"))
        unit = self.checkpoint_every[-1]
        return (
            (math.inf, number * {"s": 1, "m": 60, "h": 3600}[unit])
            if unit in "smh" and number < math.inf
            else (number, math.inf)
        )


@dataclasses.dataclass(frozen=True)
class Limited:
    """What a network may cost, and which widths are allowed."""

    budget: tuple[str, ...] = setting(
        ("0.25",),
        "What may be executed: 0.25 or macs=0.25 (share of the dense network's multiply-accumulates), macs=80M, "
        "params=0.11, params=1.5M, latency=0.3 (share of its onnxruntime time at batch 1 on one thread), latency=2ms. "
        "Several hold at once.",
    )
    min_width: int = setting(1, "No layer gets narrower than this.", check=positive, expected="at least 1")
    max_width_share: float = setting(
        1.0,
        "No layer keeps more than this share of its channels.",
        check=lambda v: 0 < v <= 1,
        expected="a share in (0, 1]",
    )
    keep: tuple[str, ...] = setting((), "Layers that are never narrowed, by name or pattern such as layer1.*.")
    align: str = setting(
        "auto",
        "Widths are multiples of this number; auto takes what onnxruntime runs fastest: 16 (8 without AVX-512), or 8 "
        "or 4 where a layer is narrow.",
        check=lambda v: v == "auto" or v.isdecimal() and int(v) > 0,
        expected="auto or a number from 1",
    )
    int8: bool = setting(
        False, "Ship in int8: milliseconds in --budget are those of int8 files, and export writes one beside float32."
    )


def budget_of(config: Limited, allocation: str) -> Budget:
    """The budget that the settings state, with widths spread so."""
    return Budget(
        config.budget, allocation, config.align, config.min_width, config.max_width_share, config.keep, config.int8
    )


@dataclasses.dataclass(frozen=True)
class TrainConfig(Limited, Recipe):
    """Settings of one training run with dynamic channel execution, or of what it is compared with.

    Fields are the options of `dynprune train`, with its defaults and in its units (`lr=0.1`,
    `checkpoint_every="5m"`); `dynprune train --help` explains each. `validate`, which `train` calls, raises
    DynpruneError for values that make no sense.

    >>> dynprune.TrainConfig(data="photos/", model="resnet20", budget=("0.25",), epochs=15)
    """

    BEFORE: ClassVar[dict[str, object]] = {"distill": 0.0, "no_repair": True}

    time: str = setting(
        "",
        "Train for so long in all, from the command's start to its last line: 90s, 30m, 8h. In place of --epochs; "
        "batch, learning rate and growth are chosen for that time from steps that are measured, where they are not "
        "given.",
        check=lambda v: v == "" or DURATION.fullmatch(v) is not None and v != "0",
        expected="a time such as 90s, 30m or 8h",
    )
    policy: str = setting(
        "cucb",
        "Which channels run: cucb (the bandit), random (same schedule, chosen by chance), static (a thin network of "
        "the same widths; with --weights, of the largest channels), dense (everything).",
        choices=POLICIES,
    )
    allocation: str = setting(
        "auto",
        "How widths are spread: uniform (the same share of every layer), balanced (uses several budgets at once by "
        "narrowing layers with many parameters per MAC more), learned (balanced, then moved half-way through "
        "exploration by what the bandit found a channel of each layer to be worth), or searched (by a bandit that "
        "tries widths on frozen weights: those of --weights, or of a network trained at full width for --scout steps); "
        "auto searches with --weights, and else is uniform.",
        choices=("auto", "uniform", "balanced", "learned", "searched"),
    )
    search_time: str = setting(
        "30s",
        "How long widths are searched for: 30s, 3m, 1h.",
        check=lambda v: DURATION.fullmatch(v) is not None and v != "0",
        expected="a time such as 30s, 3m or 1h",
    )
    scout: int = setting(
        150,
        "With --allocation searched and no --weights: steps at full width before widths are searched for; what they "
        "trained is thrown away.",
        check=positive,
        expected="at least 1",
    )
    no_repair: bool = setting(
        False, "With --weights, begin with the largest channels as they are cut, not with a repaired network."
    )
    distill: float = setting(
        0.9,
        "With --weights: weight in the loss of what the untouched network says; the labels have the rest. One forward "
        "pass more per step.",
        check=lambda v: 0 <= v <= 1,
        expected="a share in [0, 1]",
    )
    explore: float = setting(
        0.005,
        "Share of the steps in which the bandit explores before it settles; as many as playing every channel once "
        "takes, at least; 0 explores nothing.",
        check=fraction,
        expected="a share in [0, 1)",
    )
    hold: int = setting(
        20,
        "Steps for which a selection is held while exploring; shortened when the run is short.",
        check=positive,
        expected="at least 1",
    )
    bonus: float = setting(
        0.1,
        "Scale c of the exploration bonus in the index mean + c*sqrt(3 ln t / 2T).",
        check=lambda v: v >= 0,
        expected="0 or more",
    )
    grow: float = setting(
        AUTO,
        "Share of the steps, from the first, in which layers are narrower than the budget allows, at half of its "
        "multiplications; then they grow to their widths. Training gets cheaper: 0.667 saves a third, worth half as "
        "many epochs again. auto is 0, and with --time 0.667 where few epochs fit and narrower steps turn out so "
        "much quicker that it pays.",
        check=lambda v: v == AUTO or fraction(v),
        expected="auto, or a share in [0, 1)",
        auto=AUTO,
    )
    paper: bool = setting(
        False, "CUCB as published, to compare with: bonus scale 1, and a new selection at every step to the end."
    )
    keep_weights: str = setting(
        "last",
        "Which weights are kept: last, those of the last step, or best, those of the epoch with the best accuracy on "
        "validation images. What is reported is of the weights that are kept, on test images.",
        choices=("last", "best"),
    )
    reservoir: str = setting(
        "device",
        "Where the full-width parameters rest: device, or cpu to leave a GPU's memory to the narrow model.",
        choices=("device", "cpu"),
    )
    compile: bool = setting(
        False, "Compile the narrow model (torch.compile) if a trial shows that this run is long enough to pay for it."
    )

    def resolved(self, images: int, processes: int = 1) -> Self:
        """As of any recipe; nothing grows unless it was asked for, or chosen for a time (`training/within.py`)."""
        return dataclasses.replace(super().resolved(images, processes), grow=max(0.0, self.grow))

    @property
    def may_grow(self) -> bool:
        """Whether it is left open whether layers grow, and they can."""
        changes = self.policy == "dense" or self.paper or self.compile or self.allocation == "learned"
        return self.grow == AUTO and not (changes or self.weights)

    @property
    def finds_rate(self) -> bool:
        """Whether the learning rate is left open, and the usual one may be far from the best."""
        return not (self.lr or self.weights or self.paper)

    @property
    def allowed(self) -> Budget:
        """What the network may cost, and which widths are allowed; a search begins with uniform ones."""
        return budget_of(self, "uniform" if self.allocation in ("auto", "searched") else self.allocation)

    @property
    def searches(self) -> bool:
        """Whether widths are searched for on a trained network."""
        return self.allocation == "searched" or self.allocation == "auto" and bool(self.weights)

    @property
    def scouts(self) -> bool:
        """Whether widths are searched for on a network that has to be trained for it."""
        return self.allocation == "searched" and not self.weights

    @property
    def exploration(self) -> Exploration:
        """How arms are tried out."""
        from dynprune.execution.explore import Exploration  # torch comes with it

        return Exploration(
            self.policy, self.explore, self.hold, self.bonus, self.paper, self.allocation == "learned", self.seed
        )

    def validate(self) -> Self:
        super().validate()
        for text in self.budget:
            parse_limit(text)
        if self.paper and self.policy != "cucb":
            raise DynpruneError(f"--paper is a form of --policy cucb. Got --policy {self.policy}.")
        if self.allocation == "learned" and self.policy != "cucb":
            raise DynpruneError(
                f"--allocation learned needs the bandit, --policy cucb. Got --policy {self.policy}; "
                f"choose --allocation balanced."
            )
        if self.allocation == "searched" and self.policy == "dense":
            raise DynpruneError("--allocation searched looks for widths, and --policy dense keeps them all. Drop one.")
        if self.grow > 0 and (self.paper or self.policy == "dense"):
            raise DynpruneError(
                f"--grow does not go with {'--paper' if self.paper else '--policy dense'}: there is "
                f"nothing to grow from. Drop it."
            )
        changing = ["--allocation learned"] * (self.allocation == "learned") + ["--grow"] * (self.grow > 0)
        if len(changing) > 1:
            raise DynpruneError(
                "--allocation learned and --grow both change widths during training. Choose one of the two."
            )
        if changing and self.compile:
            raise DynpruneError(
                f"{changing[0]} changes widths during training, so what --compile made would be "
                f"thrown away. Choose one of the two."
            )
        return self


@dataclasses.dataclass(frozen=True)
class CompactConfig(Limited, Task):
    """Settings of one compaction of a trained network, without a run.

    Fields are the options of `dynprune compact`, with its defaults and in its units: times are texts such as "30s".
    `validate` (which `compact` calls) raises DynpruneError for values that make no sense.

    >>> dynprune.CompactConfig("resnet20", "resnet20.pt", "photos/", budget=("macs=0.5",), tune="3m")
    """

    budget: tuple[str, ...] = setting(
        ("0.5",),
        "What the compact network may cost: 0.5 or macs=0.5 (share of the multiply-accumulates), macs=80M, "
        "params=0.11, params=1.5M, latency=0.3 (share of its onnxruntime time at batch 1 on one thread), latency=2ms. "
        "Several hold at once.",
    )
    max_drop: float = setting(
        0.0,
        "In place of --budget: the smallest network that loses at most so many points of accuracy on validation "
        "images, before tuning; 0 goes by the budget.",
        check=lambda v: 0 <= v < 100,
        expected="points from 0 to 100",
    )
    tune: str = setting(
        "30s",
        "How long the compact network is trained to say what the untouched one says: 30s, 3m, 1h, or 0 for not at all.",
        check=lambda v: DURATION.fullmatch(v) is not None,
        expected="a time such as 30s, 3m or 1h, or 0",
    )
    search: str = setting(
        "bandit",
        "How widths are found: bandit (tries widths on frozen weights, with repair), greedy or random (to compare "
        "with), or none (the allocation alone).",
        choices=SEARCHES,
    )
    search_time: str = setting(
        "30s",
        "How long widths are searched for: 30s, 3m, 1h.",
        check=lambda v: DURATION.fullmatch(v) is not None and v != "0",
        expected="a time such as 30s, 3m or 1h",
    )
    allocation: str = setting(
        "uniform",
        "Widths that the search begins with: uniform (the same share of every layer) or balanced (uses several budgets "
        "at once by narrowing layers with many parameters per MAC more).",
        choices=("uniform", "balanced"),
    )
    arms: str = setting(
        "repairable",
        "Which channels go: repairable (those that the rest can make up for), magnitude (the smallest), or random.",
        choices=CHOICES,
    )
    no_repair: bool = setting(False, "Leave the weights as they are cut, to compare with.")
    images: int = setting(
        0,
        "Training images that calibration looks at; repair looks at twice as many others, or fewer where they are "
        "large. auto takes 1024, or down to 512 where one takes long.",
        check=lambda v: v == 0 or 16 <= v <= 100_000,
        expected="auto, or 16 to 100000",
        auto=0,
    )
    tune_lr: float = setting(
        0.0,
        "Peak learning rate of tuning, reached after a fifth of the time; auto takes 0.03, and less where fewer than "
        "150 steps fit into the time.",
        check=lambda v: v >= 0,
        expected="auto, or more than 0",
        auto=0.0,
    )

    @property
    def allowed(self) -> Budget:
        """What the network may cost, and which widths are allowed."""
        return Budget(
            self.budget, self.allocation, self.align, self.min_width, self.max_width_share, self.keep, self.int8
        )

    def validate(self) -> Self:
        super().validate()
        for text in self.budget:
            parse_limit(text)
        if self.precision == "float64":
            raise DynpruneError("--precision got float64. compact works in float32, and tunes in float32 or bfloat16.")
        return self


def seconds_in(duration: str) -> float:
    """ "30s", "3m", "1h" or "0" in seconds."""
    found = DURATION.fullmatch(duration)
    if found is None:
        raise DynpruneError(f'Got "{duration}". Expected a time such as 30s, 3m or 1h, or 0.')
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]] if found[1] else 0.0


@dataclasses.dataclass(frozen=True)
class GateConfig(Recipe):
    """Settings of one training run of gates that decide per image which channels to compute.

    Fields are the options of `dynprune gate`, with its defaults and in its units. `validate`, which `gate` calls,
    raises DynpruneError for values that make no sense.

    >>> dynprune.GateConfig(base="runs/mine", target=0.33, epochs=10)
    """

    base: str = setting("", "Run whose compact (or dense) network gets the gates; empty for a new network.")
    target: float = setting(
        0.33,
        "Mean share of the ungated network's multiply-accumulates that an image may cost, gates included; 1 leaves "
        "every gate open: the ungated network on the same schedule.",
        check=lambda v: 0 < v <= 1,
        expected="a share in (0, 1]",
    )
    estimator: str = setting(
        "gumbel",
        "How gates learn: gumbel (straight-through), reinforce (policy gradient, with a forward pass more per step), "
        "supervised (told what each channel is worth to the loss of each image, with a forward and a backward pass "
        "more), or random (gates that learn nothing, to compare with).",
        choices=ESTIMATORS,
    )
    block: int = setting(
        16,
        "Neighbouring channels that share a gate. 16 is what onnxruntime computes at once; 1 gates every channel, "
        "which keeps most accuracy and saves least time; 0 gates whole layers, and blocks of 16 in layers that the "
        "network cannot do without.",
        check=lambda v: 0 <= v <= 4096,
        expected="0 to 4096",
    )
    hidden: int = setting(
        16, "Hidden units of each gate's predictor.", check=lambda v: 0 < v <= 4096, expected="1 to 4096"
    )
    gate_lr: float = setting(0.02, "Learning rate of the gates (Adam).", check=positive, expected="more than 0")
    entropy: float = setting(
        0.01,
        "Weight of the gates' entropy, which keeps them from deciding too early.",
        check=lambda v: v >= 0,
        expected="0 or more",
    )
    gates_first: float = setting(
        0.0,
        "Share of the steps in which only the gates learn, supervised, before the weights join.",
        check=fraction,
        expected="a share in [0, 1)",
    )
    settle: float = setting(
        0.5,
        "Share of the steps at the end in which the gates stay as they are and the weights learn to live with them.",
        check=fraction,
        expected="a share in [0, 1)",
    )
    distill: float = setting(
        0.7,
        "Of a trained network (RUN or --weights): weight in the loss of what it said before it had gates; the labels "
        "have the rest. Closed gates lose less, for one more forward pass per step.",
        check=lambda v: 0 <= v <= 1,
        expected="a share in [0, 1]",
    )

    no_static: bool = setting(
        False,
        "Do not train the static network of the same mean cost that the result is put beside. It has the same steps, "
        "which cost less than those of gates.",
    )

    @property
    def begins_with(self) -> str:
        return str(Path(self.base) / "compact.safetensors") if self.base else self.weights

    def validate(self) -> Self:
        super().validate()
        if self.gates_first + self.settle >= 1:
            raise DynpruneError(
                f"--gates-first {self.gates_first} and --settle {self.settle} leave no steps to learn "
                f"both. Their sum must be below 1."
            )
        if self.precision == "float64":
            raise DynpruneError("--precision got float64. gate works in float32 or bfloat16.")
        return self
