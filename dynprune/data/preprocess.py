"""From a photo to what a network is given: one rule, which every file carries.

Takes the facts of a file, or an ONNX file's metadata; turns image files into float32 inputs. The entry `preprocess` of
an ONNX file is JSON with these keys (schema 1): `size` (channels, height, width), `interpolation` (a name of Pillow's),
`margin` (photos are resized until `margin` times height and width fit in, and the middle is cut out), `colour` (RGB, or
grey: luminance after ITU-R BT.601), `mean` and `std` (of pixels in 0..1, per channel), `white` (which number is white
in images deeper than 8 bits, by Pillow's kind of pixel, where the training images said so).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import numpy as np

from dynprune.data.photos import Depth, Resize, open_image, resized
from dynprune.errors import DynpruneError

SCHEMA = 1
LUMINANCE = (0.299, 0.587, 0.114)  # of red, green, blue (ITU-R BT.601)


@dataclass(frozen=True)
class Preprocess:
    """size: channels, height, width. mean, std: per channel, of pixels in 0..1."""

    size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: Resize = Resize()
    white: dict[str, float] = field(default_factory=dict)

    def __call__(self, path: str) -> np.ndarray:
        """The input for one image file, float32, (channels, height, width). Raises DynpruneError for files that cannot
        be read."""
        image = resized(open_image(path, Depth(self.white)), *self.size[1:], self.resize)
        return self.of_pixels(np.asarray(image))

    def of_pixels(self, pixels: np.ndarray) -> np.ndarray:
        """The input for an image that has its size already, uint8, (height, width, 3)."""
        values = pixels.astype(np.float32).transpose(2, 0, 1) / 255
        if self.size[0] == 1:
            values = np.tensordot(np.array(LUMINANCE, np.float32), values, 1)[None]
        mean, std = (np.array(own, np.float32).reshape(-1, 1, 1) for own in (self.mean, self.std))
        return (values - mean) / std

    def as_json(self, folded: bool = False) -> str:
        """As an ONNX file carries it. folded: normalisation is in the graph."""
        channels = self.size[0]
        return json.dumps(
            {
                "schema": SCHEMA,
                "size": list(self.size),
                **asdict(self.resize),
                "colour": "RGB" if channels == 3 else "grey",
                "mean": [0.0] * channels if folded else list(self.mean),
                "std": [1.0] * channels if folded else list(self.std),
                "white": self.white,
            }
        )

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], name: str) -> Preprocess:
        """Of an ONNX file's metadata. Raises DynpruneError where it does not say, or in another schema."""
        if "preprocess" not in metadata:
            raise DynpruneError(
                f"{name} does not say how images become inputs. Expected a file that dynprune export wrote; export it "
                "again if an older version did."
            )
        try:
            how = json.loads(metadata["preprocess"])
            if how["schema"] != SCHEMA:
                raise ValueError(f"schema {how['schema']}")
            channels, height, width = map(int, how["size"])
            resize = Resize(str(how["interpolation"]), float(how["margin"]))
            assert (
                resize.mode >= 0
                and resize.margin > 0
                and channels in (1, 3)
                and 0 < height <= 4096
                and 0 < width <= 4096
            )
            mean, std = (tuple(map(float, how[key])) for key in ("mean", "std"))
            assert len(mean) == len(std) == channels and all(std)
            return cls((channels, height, width), mean, std, resize, {k: float(v) for k, v in how["white"].items()})
        except (ValueError, KeyError, TypeError, AssertionError, AttributeError) as error:
            raise DynpruneError(
                f"{name} garbles its entry preprocess ({type(error).__name__}: {str(error)[:100]}). Export it again."
            ) from error
