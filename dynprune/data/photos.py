"""From an image file to pixels: what a viewer would show.

Takes files as people have them: turned by EXIF, transparent, with a palette, in 16 or 32 bits or as real numbers;
returns RGB with 8 bits per colour. What cannot be converted rightly is refused by name. Images deeper than 8 bits say
nowhere which number is white, so that is decided once for all images of a folder (`Depth`), never for each by itself.
"""

from __future__ import annotations

import os
import struct
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dynprune.errors import DynpruneError

UNREADABLE = (
    OSError,
    EOFError,
    UnidentifiedImageError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    struct.error,
    Image.DecompressionBombError,
)
EXTENSIONS = (
    ".jpg",
    ".jpeg",
    ".jfif",
    ".png",
    ".webp",
    ".bmp",
    ".dib",
    ".gif",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
    ".pbm",
    ".pnm",
    ".tga",
    ".jp2",
    ".avif",
)
DEEP = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")  # Pillow's modes with more than 8 bits per pixel
# usual largest values; the first only of real numbers
WHITES = (1.0, 255.0, 1023.0, 4095.0, 16383.0, 65535.0, 2.0**24 - 1, 2.0**31 - 1, 2.0**32 - 1)
BACKGROUND = (255, 255, 255)  # behind what is transparent
FOUND_NAMED = 3


@dataclass(frozen=True)
class Depth:
    """Which number is white in images deeper than 8 bits, by Pillow's kind of pixel: "I" for whole numbers, "F" for
    real ones."""

    white: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        names = {"I": "whole numbers", "F": "real numbers"}
        return ", ".join(f"{names[kind]} from 0 to {white:g}" for kind, white in self.white.items())


def open_image(path: str, depth: Depth = Depth()) -> Image.Image:
    """The image as it should be seen, in RGB. Raises DynpruneError naming a file that cannot be read or converted."""
    try:
        with Image.open(path) as image:
            refuse_bomb(image)
            image.load()
            return ImageOps.exif_transpose(in_rgb(image, path, depth))
    except UNREADABLE as error:
        raise unreadable(path, error) from error


def in_rgb(image: Image.Image, path: str, depth: Depth) -> Image.Image:
    if image.mode in DEEP:
        kind = kind_of(image.mode)
        values = (
            np.asarray(image).astype(np.float64)
            if image.mode != "I;16B"
            else np.asarray(image.convert("I")).astype(np.float64)
        )
        white = depth.white.get(kind) or white_for(kind, *extremes(values, path), path)
        grey = Image.fromarray(np.rint(np.clip(values * (255 / white), 0, 255)).astype(np.uint8))
        grey.info, grey._exif = image.info, image.getexif()
        return rotated(image, grey).convert("RGB")
    if image.has_transparency_data:
        seen = image.convert("RGBA")
        plain = Image.new("RGBA", seen.size, (*BACKGROUND, 255))
        return rotated(image, Image.alpha_composite(plain, seen).convert("RGB"))
    return image if image.mode == "RGB" else rotated(image, image.convert("RGB"))


def rotated(image: Image.Image, new: Image.Image) -> Image.Image:
    """`new` with the EXIF orientation of `image`, which conversions may lose."""
    if orientation := image.getexif().get(0x0112):
        new.getexif()[0x0112] = orientation
    return new


def kind_of(mode: str) -> str:
    return "F" if mode == "F" else "I"


def extremes(values: np.ndarray, path: str) -> tuple[float, float]:
    if not np.isfinite(values).all():
        raise DynpruneError(f"The image {path} has pixels that are no finite numbers. Replace or remove the file.")
    return float(values.min(initial=0)), float(values.max(initial=0))


def white_for(kind: str, low: float, high: float, path: str) -> float:
    """The smallest usual white that no pixel exceeds. Raises DynpruneError for images that have no such range."""
    if low < 0:
        raise DynpruneError(
            f"The image {path} has pixels down to {low:g}. Expected numbers from 0 (black) on. "
            f"Convert such images to 8 or 16 bits per pixel."
        )
    for white in WHITES if kind == "F" else WHITES[1:]:
        if high <= white:
            return white
    raise DynpruneError(
        f"The image {path} has pixels up to {high:g}, for which there is no usual white. Convert such "
        f"images to 8 or 16 bits per pixel."
    )


def depth_of(paths: Iterable[str]) -> Depth:
    """The common range of all images deeper than 8 bits among these files. The others are only looked at, not
    decoded."""

    def look(path: str) -> tuple[str, float, float, str] | None:
        try:
            with Image.open(path) as image:
                if image.mode not in DEEP:
                    return None
                refuse_bomb(image)
                values = np.asarray(image if image.mode != "I;16B" else image.convert("I"))
                return kind_of(image.mode), *extremes(values, path), path
        except UNREADABLE as error:
            raise unreadable(path, error) from error

    highest: dict[str, tuple[float, str]] = {}
    with ThreadPoolExecutor() as pool:
        for found in pool.map(look, paths):
            if found:
                kind, low, high, path = found
                white_for(kind, low, high, path)
                highest[kind] = max(highest.get(kind, (0.0, path)), (high, path))
    return Depth({kind: white_for(kind, 0.0, high, path) for kind, (high, path) in highest.items()})


def refuse_bomb(image: Image.Image) -> None:
    """A small file can unpack to gigabytes. Pillow only warns up to twice its limit."""
    if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels")


def unreadable(path: str, error: BaseException) -> DynpruneError:
    why = (
        error.strerror
        if isinstance(error, OSError) and error.strerror
        else f"{type(error).__name__}: {str(error)[:100]}"
        if isinstance(error, ValueError)
        else type(error).__name__
    )
    return DynpruneError(f"Cannot read the image {path} ({why}). Replace or remove the file.")


def shown_size(path: str) -> tuple[int, int]:
    """Width and height as the image is to be seen."""
    try:
        with Image.open(path) as image:
            refuse_bomb(image)
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            return (image.height, image.width) if turned else image.size
    except UNREADABLE as error:
        raise unreadable(path, error) from error


def check_readable(paths: Iterable[str]) -> None:
    """Open every photo once before the long work starts; JPEGs at an eighth of their size, which is quick."""

    def check(path: str) -> None:
        try:
            with Image.open(path) as image:
                refuse_bomb(image)
                image.draft("RGB", (image.width // 8, image.height // 8))
                image.load()
        except UNREADABLE as error:
            raise unreadable(path, error) from error

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(check, paths):
            pass


@dataclass(frozen=True)
class Resize:
    """How a photo gets its size. interpolation: nearest, bilinear, bicubic, lanczos, box or hamming. margin: how many
    times the size is resized to, before the middle is cut out."""

    interpolation: str = "bilinear"
    margin: float = 8 / 7  # 224 of 256 pixels

    @property
    def mode(self) -> int:
        """Pillow's number of the interpolation; torchvision's transforms take it too."""
        return int(Image.Resampling[self.interpolation.upper()])


WHOLE = Resize(margin=1.0)


def resized(image: Image.Image, height: int, width: int, resize: Resize = WHOLE) -> Image.Image:
    """The middle of the image at this size, of the image's own proportions.

    Only what is shown is resized: a panorama of 12,000 x 2 pixels takes no more memory than another image.
    """
    if image.size == (width, height) and resize.margin == 1:
        return image
    scale = resize.margin * max(height / image.height, width / image.width)
    wide, high = min(image.width, width / scale), min(image.height, height / scale)
    left, top = (image.width - wide) / 2, (image.height - high) / 2
    return image.resize((width, height), Image.Resampling(resize.mode), box=(left, top, left + wide, top + high))


def files_in(folder: Path, skipped: Counter[str]) -> list[str]:
    """Image files anywhere under a folder, in order. skipped: counts the others by their ending; hidden files are not
    counted."""
    found = []

    def refuse(error: OSError) -> None:
        raise DynpruneError(
            f"Cannot read the folder {error.filename} ({error.strerror}). Make it readable or remove it."
        ) from error

    for place, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if name.startswith(".") or not os.path.isfile(os.path.join(place, name)):
                continue
            ending = os.path.splitext(name)[1].lower()
            if ending in EXTENSIONS:
                found.append(os.path.join(place, name))
            else:
                skipped[ending or "no ending"] += 1
    return sorted(found)


def in_words(skipped: Counter[str]) -> str:
    """What was left out, for people: '3 files that are no images were skipped (.txt 2, .db 1)'."""
    if not skipped:
        return ""
    kinds = ", ".join(f"{ending} {count}" for ending, count in skipped.most_common(FOUND_NAMED)) + (
        ", ..." if len(skipped) > FOUND_NAMED else ""
    )
    total = sum(skipped.values())
    subject, verb = ("file", "was") if total == 1 else ("files", "were")
    return f"{total} {subject} of kinds that are not read {verb} skipped ({kinds}); images are {', '.join(EXTENSIONS)}"
