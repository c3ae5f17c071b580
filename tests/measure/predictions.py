"""Four ways to ask a compact network of the same photos, and how often they agree.

`python -m tests.measure.predictions RUN PHOTOS --count 500` takes photos of any folder, gives them many sizes and modes
(EXIF turned, grey, palette, transparent, 16 bit), and asks the command, `dynprune.load`, the ten lines of `dynprune
guide predict`, and the file of `export --fold-resize`, if there is one. The ten lines are for photos in 8 bits without
transparency, and are asked of those alone.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import dynprune
from dynprune.data.photos import files_in
from dynprune.data.scores import logits
from dynprune.guide import page

MODES = ("RGB", "turned", "grey", "palette", "alpha", "deep")


def photos(source: Path, folder: Path, count: int, seed: int) -> dict[str, str]:
    """Write `count` photos; returns the mode of each path."""
    from collections import Counter

    rng, files, made = np.random.default_rng(seed), files_in(source, Counter()), {}
    for number, name in enumerate(rng.choice(files, count, replace=len(files) < count)):
        mode = MODES[number % len(MODES)]
        size = tuple(int(side) for side in np.exp(rng.uniform(np.log(8), np.log(900), 2)))
        image = Image.open(name).convert("RGB").resize(size, Image.Resampling.BICUBIC)
        path = folder / f"{number:04d}.png"
        if mode == "turned":
            path, exif = path.with_suffix(".jpg"), image.getexif()
            exif[0x0112] = int(rng.integers(2, 9))
            image.save(path, exif=exif, quality=95)
        elif mode == "deep":
            grey = np.asarray(image.convert("L")).astype(np.uint16) * 257
            Image.fromarray(grey).save(path)
        else:
            if mode == "alpha":
                image.putalpha(Image.fromarray(rng.integers(0, 256, size[::-1]).astype(np.uint8)))
            kinds = {"grey": "L", "palette": "P"}
            (image.convert(kinds[mode]) if mode in kinds else image).save(path)
        made[str(path)] = mode
    return made


def by_command(file: Path, folder: Path) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "dynprune", "predict", str(file), str(folder), "--top", "1", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    return {own["path"]: own["classes"][0]["class"] for own in json.loads(done.stdout)["images"]}


def by_load(file: Path, paths: list[str]) -> dict[str, str]:
    model = dynprune.load(file)
    with torch.no_grad():
        said = {path: logits(model(torch.from_numpy(model.preprocess(path)[None]))).argmax() for path in paths}
    return {path: model.classes[int(number)] for path, number in said.items()}


def by_lines(file: Path, paths: list[str]) -> dict[str, str]:
    (program,) = re.findall(r"^```python\n(.*?)^```$", page("predict"), re.MULTILINE | re.DOTALL)
    said = {}
    for path in paths:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            code = program.replace("compact.onnx", str(file)).replace("photo.jpg", path)
            exec(compile(code, "predict.md", "exec"), {})
        said[path] = out.getvalue().rsplit(" ", 1)[0]
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        modes = photos(given.photos, Path(folder), given.count, given.seed)
        paths = sorted(modes)
        plain = [path for path in paths if modes[path] not in ("alpha", "deep")]
        ours = by_command(given.run / "compact.onnx", Path(folder))
        others = {
            "dynprune.load": by_load(given.run / "compact.safetensors", paths),
            "ten lines": by_lines(given.run / "compact.onnx", plain),
        }
        if (given.run / "compact.photos.onnx").is_file():
            others["resizing in the graph"] = by_command(given.run / "compact.photos.onnx", Path(folder))
        for name, said in others.items():
            differ = [path for path, label in said.items() if ours[path] != label]
            kinds = sorted({modes[path] for path in differ})
            print(f"{name}: {len(said) - len(differ)} of {len(said)} as the command {kinds if differ else ''}")


if __name__ == "__main__":
    main()
