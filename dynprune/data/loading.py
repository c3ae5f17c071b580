"""Images with labels: the embedded digits, a folder of photos, or a torchvision dataset.

Takes the data settings, returns `Data` with three splits that are kept apart: `train` is learned from, `val` is what a
choice may look at, `test` is only reported. Small images live in memory as one uint8 tensor and are augmented a whole
batch at a time; photos are decoded by worker processes. All randomness is a function of (seed, epoch, step), so a
resumed run sees what an uninterrupted one would.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.model_selection import train_test_split
from torch import Tensor

from dynprune.data.photos import (
    EXTENSIONS,
    WHOLE,
    Depth,
    Resize,
    check_readable,
    depth_of,
    files_in,
    in_words,
    open_image,
    resized,
    shown_size,
)
from dynprune.data.preprocess import LUMINANCE, Preprocess
from dynprune.errors import DynpruneError
from dynprune.state.copies import generator

IN_MEMORY_SIDE = 96  # images up to this size are decoded once and kept; 50,000 of 96x96 take 1.4 GB
TORCHVISION = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "svhn": "SVHN", "fashion-mnist": "FashionMNIST"}
NO_FLIP = {"digits", "svhn"}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HELD_OUT = {"val": ("val", "valid", "validation", "dev"), "test": ("test", "testing")}  # names of folders beside train/


@dataclass
class ImagesInMemory:
    """Small images. pixels: uint8, shape (images, 3, side, side); labels: int64, shape (images,)."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> ImagesInMemory:
        return ImagesInMemory(self.pixels[indices], self.labels[indices])


@dataclass
class ImageFiles:
    """Photos on disk: paths and class numbers, decoded when needed. depth: what is white in those of more than 8
    bits."""

    paths: list[str]
    labels: Tensor
    depth: Depth = field(default_factory=Depth)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> ImageFiles:
        return ImageFiles([self.paths[i] for i in indices.tolist()], self.labels[indices], self.depth)


Images = ImagesInMemory | ImageFiles


@dataclass
class Data:
    """Three splits and how to turn them into normalised batches.

    size: channels, height and width of what the network is given; images are kept in colour and turned into grey for a
    network of one channel. mean, std: per channel, of pixels in 0..1. chooses, reports: which images validation and
    test are, in words. remarks: what users should know of how the images were read. depth: what is white in images of
    more than 8 bits.
    """

    name: str
    classes: list[str]
    size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train: Images
    val: Images
    test: Images
    chooses: str
    reports: str
    augment: str
    workers: int
    remarks: tuple[str, ...] = ()
    resize: Resize = Resize()
    depth: Depth = field(default_factory=Depth)

    @property
    def preprocess(self) -> Preprocess:
        """How one photo becomes an input. Images in memory were resized without a margin."""
        margin = 1.0 if isinstance(self.train, ImagesInMemory) else self.resize.margin
        resize = dataclasses.replace(self.resize, margin=margin)
        return Preprocess(self.size, self.mean, self.std, resize, self.depth.white)

    @property
    def example(self) -> Tensor:
        """An input of the right shape for tracing, (1, channels, height, width)."""
        return torch.randn(1, *self.size, generator=generator(0))

    def with_channels(self, channels: int) -> Data:
        """The same images for a network that takes so many channels, 3 or 1: then they are grey, of the mean of all
        colours' luminance."""
        if channels == self.size[0]:
            return self
        if (channels, self.size[0]) != (1, 3):
            raise DynpruneError(f"The network takes images of {channels} channels. Expected 3 (colour) or 1 (grey).")
        if isinstance(self.train, ImagesInMemory):
            grey = in_grey(self.train.pixels[:: max(1, len(self.train) // 5000)].float() / 255)
            mean, std = round(float(grey.mean()), 4), max(0.01, round(float(grey.std()), 4))
        else:
            mean, std = (
                round(sum(weight * value for weight, value in zip(LUMINANCE, values)), 4)
                for values in (IMAGENET_MEAN, IMAGENET_STD)
            )
        return dataclasses.replace(self, size=(1, *self.size[1:]), mean=(mean,), std=(std,))

    def steps_per_epoch(self, batch_size: int) -> int:
        """Enough for every image; the last batch is filled up, so that every step has the same shape."""
        return max(1, -(-len(self.train) // batch_size))

    def train_batches(
        self, batch_size: int, seed: int, epoch: int, start: int = 0, part: slice = slice(None)
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Augmented, normalised (images, labels) of one epoch from step `start` on; the order depends on seed and
        epoch. Every image comes at least once; the first of the order come again where the last batch is not full.

        part: which images of every batch are wanted; they come out as they do when all are.
        """
        steps, order = self.steps_per_epoch(batch_size), self.order(batch_size, seed, epoch)
        if isinstance(self.train, ImagesInMemory):
            for step in range(start, steps):
                batch = self.train.take(order[step * batch_size : (step + 1) * batch_size])
                images = augment_batch(batch.pixels, self.augment, generator(seed, epoch, step), part)
                yield self.normalise(images), batch.labels[part]
            return
        places = torch.arange(start * batch_size, steps * batch_size).view(-1, batch_size)[:, part]
        dataset = PhotoDataset(
            self.train.take(order[places.reshape(-1)]),
            self.size[1:],
            self.augment,
            (seed, epoch),
            places.reshape(-1).tolist(),
            self.resize,
        )
        for pixels, labels in loader(dataset, places.size(1), self.workers):
            yield self.normalise(pixels), labels

    def order(self, batch_size: int, seed: int, epoch: int) -> Tensor:
        """Which training images the batches of an epoch hold, one after another: (steps * batch_size,)."""
        order = torch.randperm(len(self.train), generator=generator(seed, epoch))
        wanted = self.steps_per_epoch(batch_size) * batch_size
        return order.repeat(-(-wanted // len(order)))[:wanted]

    def eval_batches(self, images: Images, batch_size: int = 500) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised (images, labels) of a split, in order, without augmentation."""
        if isinstance(images, ImagesInMemory):
            for start in range(0, len(images), batch_size):
                part = images.take(torch.arange(start, min(start + batch_size, len(images))))
                yield self.normalise(part.pixels), part.labels
            return
        dataset = PhotoDataset(images, self.size[1:], "none", resize=self.resize)
        for pixels, labels in loader(dataset, min(batch_size, 64), self.workers):
            yield self.normalise(pixels), labels

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 (n, 3, h, w) to float32 with mean 0 and standard deviation 1 per channel."""
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) * 255 for v in (self.mean, self.std))
        return ((pixels if self.size[0] == 3 else in_grey(pixels.float())) - mean) / std


def in_grey(pixels: Tensor) -> Tensor:
    """Luminance of colours, (n, 3, h, w) to (n, 1, h, w)."""
    return (pixels * torch.tensor(LUMINANCE).view(1, 3, 1, 1)).sum(1, keepdim=True)


def image_name(images: Images, number: int) -> str:
    """The path of a photo, the number of an image that has none."""
    return images.paths[number] if isinstance(images, ImageFiles) else f"image {number}"


def some(images: Images, count: int) -> Images:
    """At most `count` of the images, chosen by chance but always the same: the first ones may be of one class."""
    return images.take(some_of(len(images), count))


def some_of(total: int, count: int) -> Tensor:
    """Which these are: their numbers."""
    return torch.randperm(total, generator=generator(0))[:count]


def augment_batch(pixels: Tensor, augment: str, rng: torch.Generator, part: slice = slice(None)) -> Tensor:
    """Shift each image by up to an eighth of its side (zeros come in) and mirror half of them: one draw per image.
    Returns `part` of them.

    Crops by `unfold` and one index for the whole batch; torchvision's transforms would draw one crop for all.
    """
    if augment == "none":
        return pixels[part]
    n, _, height, width = pixels.shape
    pad = max(1, min(height, width) // 8)
    top, left = torch.randint(0, 2 * pad + 1, (2, n), generator=rng)[:, part]
    windows = F.pad(pixels[part], [pad] * 4).unfold(2, height, 1).unfold(3, width, 1)
    pixels = windows[torch.arange(len(top)), :, top, left]
    if augment == "crop+flip":
        mirrored = (torch.rand(n, generator=rng) < 0.5)[part]
        pixels = torch.where(mirrored.view(-1, 1, 1, 1), pixels.flip(3), pixels)
    return pixels


class PhotoDataset(torch.utils.data.Dataset):
    """Decodes photos: random resized crops and mirroring for training, the centre for evaluation. Yields uint8."""

    def __init__(
        self,
        files: ImageFiles,
        size: tuple[int, int],
        augment: str,
        seeds: tuple[int, ...] = (),
        places: Sequence[int] | None = None,
        resize: Resize = Resize(),
    ):
        """size: height and width. places: of each file in its epoch (default: in order); with `seeds` it decides the
        image's random changes."""
        self.files, self.size, self.seeds, self.places = (
            files,
            size,
            seeds,
            range(len(files)) if places is None else places,
        )
        self.resize = resize
        self.transform = None
        if augment != "none":
            from torchvision.transforms import v2  # 1 s to import: only photos need it

            flips = [v2.RandomHorizontalFlip()] if augment == "crop+flip" else []
            self.transform = v2.Compose(
                [v2.RandomResizedCrop(size, scale=(0.25, 1.0), interpolation=resize.mode), *flips]
            )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = open_image(self.files.paths[index], self.files.depth)
        if self.transform is None:
            image = resized(image, *self.size, self.resize)
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(generator(*self.seeds, self.places[index]).initial_seed())
                image = self.transform(image)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), int(self.files.labels[index])


def loader(dataset: PhotoDataset, batch_size: int, workers: int) -> Iterator:
    batches = torch.utils.data.DataLoader(dataset, batch_size, num_workers=workers)
    try:
        yield from batches
    except DynpruneError as error:  # a worker re-raises with its traceback as text: the last line is our message
        raise DynpruneError(str(error).strip().splitlines()[-1].partition("DynpruneError: ")[2] or str(error)) from None


# -- sources -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Which images, and what is done with them. name: digits, a dataset of torchvision's, or a folder of photos; root:
    where datasets lie.

    image_size: auto, 96, or 96x64 (height x width). val_fraction: share of the training images held back where there is
    no val/. augment: auto, none, crop, crop+flip. workers: processes that decode photos, -1 for one per core.
    batch_size: the least number of training images. seed: of the splits. mean, std: by which images are normalised,
    where that is not up to the images. resize: how they get their size.
    """

    name: str = "digits"
    root: str = "data"
    image_size: str = "auto"
    val_fraction: float = 0.1
    augment: str = "auto"
    workers: int = -1
    batch_size: int = 0
    seed: int = 0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    resize: Resize = Resize()

    def like(self, how: Preprocess) -> Source:
        """The same images, made as a network takes them that was trained before; of another size if that was asked
        for."""
        size = "x".join(map(str, how.size[1:])) if self.image_size == "auto" else self.image_size
        mean, std = (
            (how.mean, how.std) if how.size[0] == 3 else (self.mean, self.std)
        )  # of grey: by the images, as then
        return dataclasses.replace(self, image_size=size, resize=how.resize, mean=mean, std=std)


def load_data(source: Source) -> Data:
    """The data that `source.name` names, split and ready. Raises DynpruneError for anything that cannot be learned
    from."""
    if source.name == "digits":
        return load_digits(source)
    if source.name in TORCHVISION:
        return load_torchvision(source)
    path = Path(source.name)
    if path.is_dir():
        return load_folder(source, path)
    kind = "is a file" if path.exists() else "does not exist"
    raise DynpruneError(
        f'--data got "{source.name}", which {kind}. Expected digits, {", ".join(TORCHVISION)}, or a folder of photos.'
    )


def image_size(source: Source, side: int) -> tuple[int, int]:
    """Height and width that the settings ask for, or a square of this side."""
    if source.image_size == "auto":
        return side, side
    height, _, width = source.image_size.partition("x")
    return int(height), int(width or height)


def finish(
    source: Source,
    name: str,
    classes: list[str],
    size: tuple[int, int],
    train: Images,
    val: Images | None,
    test: Images,
    chooses: str,
    reports: str,
    remarks: tuple[str, ...] = (),
    depth: Depth = Depth(),
) -> Data:
    """Split validation off if there is none, measure mean and standard deviation, and settle the defaults."""
    if val is None:
        kept, held = split_indices(train.labels, source.val_fraction, source.seed)
        train, val = train.take(kept), train.take(held)
    if isinstance(train, ImagesInMemory):
        sample = train.pixels[:: max(1, len(train) // 5000)].float() / 255
        mean = tuple(round(v, 4) for v in sample.mean((0, 2, 3)).tolist())
        std = tuple(max(0.01, round(v, 4)) for v in sample.std((0, 2, 3)).tolist())
    else:
        mean, std = IMAGENET_MEAN, IMAGENET_STD
    if source.mean:
        mean, std = source.mean, source.std
    augment = source.augment
    if augment == "auto":
        augment = "crop" if name in NO_FLIP else "crop+flip"
    workers = os.cpu_count() or 1 if source.workers < 0 else source.workers
    if len(train) < max(2, source.batch_size):
        raise DynpruneError(
            f"--batch-size {source.batch_size or 2} is more than the {len(train)} training images. "
            f"Choose a smaller one or add images."
        )
    return Data(
        name,
        classes,
        (3, *size),
        mean,
        std,
        train,
        val,
        test,
        chooses,
        reports,
        augment,
        workers,
        remarks,
        source.resize,
        depth,
    )


def split_indices(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Two disjoint sets of indices, the second with about `share` of each class."""
    indices = np.arange(len(labels))
    try:
        kept, held = train_test_split(indices, test_size=share, stratify=labels.numpy(), random_state=seed)
    except ValueError as error:
        raise DynpruneError(
            f"{len(labels)} images in {len(labels.unique())} classes cannot be split with {share:.0%} "
            f"held back: every class needs images on both sides. Add images or change --val-fraction."
        ) from error
    return torch.from_numpy(np.sort(kept)), torch.from_numpy(np.sort(held))


def percent(share: float) -> str:
    return f"{100 * share:g} %"


def load_digits(source: Source) -> Data:
    """1,797 handwritten digits, 8x8 grey (UCI, CC BY 4.0; shipped with scikit-learn), enlarged; a fifth is the test
    split."""
    from sklearn.datasets import load_digits as read_digits

    raw = read_digits()
    size = image_size(source, 32)
    grey = torch.from_numpy(raw.images).float()[:, None] * (255 / 16)
    pixels = F.interpolate(grey, size=size, mode="bilinear").round().to(torch.uint8).expand(-1, 3, -1, -1)
    images = ImagesInMemory(pixels.contiguous(), torch.from_numpy(raw.target).long())
    rest, held = split_indices(images.labels, 0.2, 0)
    return finish(
        source,
        "digits",
        [str(i) for i in range(10)],
        size,
        images.take(rest),
        None,
        images.take(held),
        f"{percent(source.val_fraction)} of the training images",
        "test split, a fifth of all digits",
    )


def load_torchvision(source: Source) -> Data:
    import torchvision

    cls, root = getattr(torchvision.datasets, TORCHVISION[source.name]), source.root
    size = image_size(source, 32)
    splits = []
    for train in (True, False):
        options = {"split": "train" if train else "test"} if source.name == "svhn" else {"train": train}
        try:
            found = cls(root, download=False, **options)
        except RuntimeError:
            try:
                found = cls(root, download=True, **options)
            except Exception as error:
                raise DynpruneError(
                    f'{source.name} is not under --data-root "{root}" and could not be downloaded '
                    f"({type(error).__name__}: {str(error).splitlines()[0]}). Put it there by hand or "
                    f"check the connection."
                ) from error
        pixels = torch.as_tensor(np.asarray(found.data))
        if pixels.ndim == 3:
            pixels = pixels[:, None].expand(-1, 3, -1, -1)
        elif pixels.shape[-1] == 3:
            pixels = pixels.permute(0, 3, 1, 2)
        labels = torch.as_tensor(np.asarray(found.labels if source.name == "svhn" else found.targets)).long()
        splits.append(ImagesInMemory(fit(pixels, *size), labels))
    classes = list(getattr(found, "classes", None) or map(str, range(10)))
    return finish(
        source,
        source.name,
        classes,
        size,
        splits[0],
        None,
        splits[1],
        f"{percent(source.val_fraction)} of the training images",
        f"{source.name}'s test split",
    )


def fit(pixels: Tensor, height: int, width: int) -> Tensor:
    """Bring uint8 images to a size: those smaller by up to a quarter get a border of zeros, others are resized."""
    tall, wide = height - pixels.shape[-2], width - pixels.shape[-1]
    if 0 <= tall <= height // 4 and 0 <= wide <= width // 4:
        return F.pad(pixels, [wide // 2, wide - wide // 2, tall // 2, tall - tall // 2]).contiguous()
    return F.interpolate(pixels, size=(height, width), mode="bilinear", antialias=True).contiguous()


def load_folder(source: Source, path: Path) -> Data:
    """`train/` with `val/` (or `valid/`) and/or `test/`, or one folder per class that is split here.

    With only one held-out folder, that one is reported and validation comes out of train/.
    """
    chooses = f"{percent(source.val_fraction)} of train/"
    skipped: Counter[str] = Counter()
    folders = {entry.name.lower(): entry for entry in entries_of(path)}
    if "train" in folders:
        train, classes = scan(folders["train"], None, skipped)
        found = {
            split: folders[name]
            for split, names in HELD_OUT.items()
            if (name := next((name for name in names if name in folders), None))
        }
        held = {split: scan(folder, classes, skipped)[0] for split, folder in found.items()}
        if not held:
            raise DynpruneError(
                f"{path} has train/ but neither val/ nor test/ (nor "
                f"{', '.join(f'{name}/' for names in HELD_OUT.values() for name in names[1:])}). Add "
                f"one, or pass a folder with one folder per class."
            )
        if len(held) == 2:
            val, test, chooses, reports = held["val"], held["test"], f"{found['val'].name}/", f"{found['test'].name}/"
        else:
            split, test = next(iter(held.items()))
            val, reports = None, f"{found[split].name}/"
    else:
        everything, classes = scan(path, None, skipped)
        rest, kept = split_indices(everything.labels, source.val_fraction, source.seed)
        train, test, val = everything.take(rest), everything.take(kept), None
        chooses = f"{percent(source.val_fraction)} of what is left for training"
        reports = f"{percent(source.val_fraction)} of all images, split by --seed"
    splits = [part for part in (train, val, test) if part is not None]
    depth = depth_of(name for part in splits for name in part.paths)
    for part in splits:
        part.depth = depth
    remarks = [f"images deeper than 8 bits hold {depth}"] if depth.white else []
    remarks += [in_words(skipped)] if skipped else []
    size = image_size(source, guess_side(train))
    if max(size) > IN_MEMORY_SIDE:
        check_readable([name for part in splits for name in part.paths])

    def images(files: ImageFiles) -> Images:
        return decode(files, *size, source.resize) if max(size) <= IN_MEMORY_SIDE else files

    return finish(
        source,
        path.name,
        classes,
        size,
        images(train),
        None if val is None else images(val),
        images(test),
        chooses,
        reports,
        tuple(remarks),
        depth,
    )


def entries_of(folder: Path) -> list[Path]:
    """The folders in a folder, by name; hidden ones are left out."""
    try:
        return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise DynpruneError(
            f"Cannot read the folder {folder} ({error.strerror}). Make it readable or pass another --data."
        ) from error


def scan(folder: Path, classes: list[str] | None, skipped: Counter[str] | None = None) -> tuple[ImageFiles, list[str]]:
    """Image files of one folder per class. classes: those of train/, which a held-out folder must not exceed. skipped:
    counts other files."""
    skipped = Counter() if skipped is None else skipped
    found = [entry.name for entry in entries_of(folder)]
    if not found:
        raise DynpruneError(f"{folder} has no class folders. Expected one folder of images per class inside it.")
    if classes is None and len(found) < 2:
        raise DynpruneError(f'{folder} has a single class, "{found[0]}". Expected at least two class folders.')
    if classes is not None and (unknown := [name for name in found if name not in classes]):
        raise DynpruneError(
            f'{folder} has a class "{unknown[0]}" that train/ lacks. Classes in train/: {", ".join(classes[:10])}.'
        )
    names = found if classes is None else classes
    paths, labels = [], []
    for number, name in enumerate(names):
        if not (folder / name).is_dir():
            continue
        files = files_in(folder / name, skipped)
        if not files and classes is None:
            raise DynpruneError(
                f"{folder / name} has no images. Expected files ending in "
                f"{', '.join(EXTENSIONS)}.{' ' + in_words(skipped) if skipped else ''}"
            )
        paths += files
        labels += [number] * len(files)
    if not paths:
        raise DynpruneError(f"{folder} has no images. Expected files ending in {', '.join(EXTENSIONS)}.")
    return ImageFiles(paths, torch.tensor(labels)), names


def guess_side(files: ImageFiles) -> int:
    """32 up to 40 pixels, 64 up to 80, else 224; judged by the median of up to 100 images' longer sides."""
    sample = files.paths[:: max(1, len(files) // 100)][:100]
    longest = float(np.median([max(shown_size(path)) for path in sample]))
    return 32 if longest <= 40 else 64 if longest <= 80 else 224


def decode(files: ImageFiles, height: int, width: int, resize: Resize = WHOLE) -> ImagesInMemory:
    """All photos in memory: resized until they fill this size, and the middle kept."""
    whole = dataclasses.replace(resize, margin=1.0)
    pixels = torch.empty(len(files), 3, height, width, dtype=torch.uint8)

    def read(index: int) -> None:
        pixels[index] = torch.from_numpy(
            np.array(resized(open_image(files.paths[index], files.depth), height, width, whole))
        ).permute(2, 0, 1)

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(read, range(len(files)), chunksize=256):
            pass
    return ImagesInMemory(pixels, files.labels)
