"""Damaged and hostile files against every command that reads one: `python -m tests.measure.fuzz [--count 2000] [--seed
0]`; and invented networks through all that we do: `python -m tests.measure.fuzz --networks 300`.

Bit flips, truncations, swapped headers, huge declared shapes, wrong types, hostile JSON, deep nesting, compressed
archives, image bombs, links, folders in place of files, other kinds of files. Each case is a command in a process of
its own. It must end by itself with success or one clear line: no traceback, no signal, at most 10 s of processor time
and 2 GiB of memory, nothing written outside the run, none of a stranger's code run. Linux only (it forks).
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
TINY = ["--model", "tests.models:tiny", "--image-size", "8", "--batch-size", "16"]
CPU_SECONDS, WALL_SECONDS, MEMORY_MIB = 10, 90, 2048
HOSTILE = [
    None,
    True,
    -1,
    0,
    10**30,
    2**63,
    1e308,
    float("nan"),
    "",
    "x" * 5000,
    "/etc/passwd",
    "../../outside/secret",
    "evil:build",
    [],
    {},
    [[]],
    {"a": {}},
    [1.5],
    ["evil"],
    [-1],
    [2**40],
    2**31,
    "torchvision:vit_h_14",
    "timm:resnet18",
    "\u0000",
    "1e400",
    [True],
    [None],
]


# -- damage ------------------------------------------------------------------------------------------------------------


def flip_bits(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    reach = min(len(changed), rng.choice((16, 256, 4096, len(changed))))  # headers lie at the beginning
    for _ in range(rng.choice((1, 1, 4, 64))):
        changed[rng.randrange(reach)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.choice((0, 1, 7, 8, 9, len(data) // 2, len(data) - 1, rng.randrange(len(data))))]


def noise(data: bytes, rng: random.Random) -> bytes:
    return rng.randbytes(rng.choice((1, 100, 10_000)))


def append(data: bytes, rng: random.Random) -> bytes:
    return data + rng.randbytes(100)


def spoil(tree: object, rng: random.Random, depth: int = 0) -> object:
    """A JSON value with one entry replaced, removed, or added."""
    if isinstance(tree, dict) and tree and (depth == 0 or rng.random() < 0.8):
        key = rng.choice(list(tree))
        action = rng.random()
        if action < 0.1:
            return {k: v for k, v in tree.items() if k != key}
        if action < 0.2:
            return {**tree, rng.choice(["", "__class__", "x" * 100, "a:b:c"]): rng.choice(HOSTILE)}
        return {**tree, key: spoil(tree[key], rng, depth + 1)}
    if isinstance(tree, list) and tree and rng.random() < 0.6:
        place = rng.randrange(len(tree))
        return (
            [*tree[:place], spoil(tree[place], rng, depth + 1), *tree[place + 1 :]]
            if rng.random() < 0.7
            else tree * rng.choice((0, 2, 1000))
        )
    return rng.choice(HOSTILE)


def spoil_json(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.1:
        return b"[" * 100_000 if rng.random() < 0.5 else b'{"a":' * 50_000
    return json.dumps(spoil(json.loads(data), rng)).encode()


def spoil_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Change what the header declares, or the JSON inside it, and write it back in due form."""
    length = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    what = rng.random()
    if what < 0.5 and "__metadata__" in header:
        ours = header["__metadata__"]["dynprune"]
        header["__metadata__"]["dynprune"] = spoil_json(ours.encode(), rng).decode()
    elif what < 0.8:
        entry = header[rng.choice(names)]
        change = rng.choice(("shape", "dtype", "data_offsets", "swap", "same bytes"))
        if change == "shape":
            entry["shape"] = rng.choice(([2**40], [2**62, 4], [-1], [], [1] * 1000, "big", [2**31, 2**31]))
        elif change == "dtype":
            entry["dtype"] = rng.choice(("I64", "F64", "U8", "BF16", "X", 7))
        elif change == "data_offsets":
            entry["data_offsets"] = rng.choice(([0, 2**60], [5, 1], [-1, 4], [0]))
        elif change == "swap":
            other = rng.choice(names)
            header[other], header[names[0]] = header[names[0]], header[other]
        else:  # the same bytes as another type: what is read has other numbers than it should
            entry["dtype"], entry["shape"] = "U8", [entry["data_offsets"][1] - entry["data_offsets"][0]]
    elif what < 0.9:
        header = {"__metadata__": header.get("__metadata__", {})}
        body = b""
    else:
        return struct.pack("<Q", rng.choice((2**63, 10**9, 0, 1, len(data)))) + data[8:]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def spoil_toml(data: bytes, rng: random.Random) -> bytes:
    lines = data.decode().splitlines()
    place = rng.randrange(len(lines))
    value = rng.choice(
        [
            "-1",
            "0",
            "1e999",
            "nan",
            "inf",
            '""',
            '"evil:build"',
            "[]",
            "[[1]]",
            "9" * 30,
            "true",
            '"/etc/passwd"',
            "{}",
            '"' + "x" * 9999 + '"',
            "2024-01-01",
            '["0.5"]',
            '["macs=1e-300"]',
            '"../../outside"',
            '"torchvision:vit_h_14"',
            "4096",
            "1000000000",
        ]
    )
    lines[place] = lines[place].partition("=")[0] + "= " + value
    return "\n".join(lines).encode()


def pickled(data: bytes, rng: random.Random) -> bytes:
    """What an unguarded reader would run."""

    class Evil:
        def __reduce__(self):
            return (os.system, ("touch ran",))

    return pickle.dumps(Evil())


def archive(data: bytes, rng: random.Random) -> bytes:
    """A torch.save file with other contents: an archive that unpacks to gigabytes, or one whose pickle is hostile."""
    out = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(data)) as old,
        zipfile.ZipFile(out, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as new,
    ):
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("data.pkl") and rng.random() < 0.5:
                content = pickled(data, rng)
            elif rng.random() < 0.2:
                content = bytes(3 * 10**8) if new.compression == zipfile.ZIP_DEFLATED else rng.randbytes(9)
            new.writestr(name, content)
    return out.getvalue()


def image_bomb(data: bytes, rng: random.Random) -> bytes:
    """A PNG of some kilobytes that declares, or holds, a great many pixels."""
    side = rng.choice((20_000, 60_000, 2**31 - 1))

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer = zlib.compressobj(9)
    lines = b"".join(packer.compress(bytes(side + 1)) for _ in range(min(side, 2000))) if side < 10**5 else b""
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
        + chunk(b"IDAT", lines + packer.flush())
        + chunk(b"IEND", b"")
    )


GENERAL = [flip_bits, flip_bits, truncate, noise, append]
DAMAGE: dict[str, list[Callable]] = {
    ".safetensors": [*GENERAL, *[spoil_safetensors] * 8, pickled],
    ".json": [*GENERAL, *[spoil_json] * 4],
    ".jsonl": GENERAL,
    ".toml": [*GENERAL, *[spoil_toml] * 5],
    ".onnx": [*GENERAL, *[flip_bits] * 4],
    ".pth": [*GENERAL, *[archive] * 3, pickled],
    ".png": [*GENERAL, *[image_bomb] * 3],
}


def replace(file: Path, outside: Path, rng: random.Random) -> str:
    """Put something that is not this file in its place."""
    what = rng.choice(("link outside", "dangling link", "link to itself", "folder", "device", "other file", "nothing"))
    siblings = [other for other in file.parent.iterdir() if other.is_file() and other != file]
    file.unlink()
    if what == "link outside":
        file.symlink_to(outside / "secret")
    elif what == "dangling link":
        file.symlink_to(outside / "created")
    elif what == "link to itself":
        file.symlink_to(file)
    elif what == "folder":
        file.mkdir()
    elif what == "device":
        file.symlink_to("/dev/zero")
    elif what == "other file" and siblings:
        shutil.copy(rng.choice(siblings), file)
    return what


# -- one case ----------------------------------------------------------------------------------------------------------


CASES: list[tuple[str, list[str], int]] = [  # file to damage, command, weight
    ("run/checkpoint.safetensors", ["compact", "run", "--trust"], 8),
    ("run/config.toml", ["compact", "run", "--trust"], 6),
    ("run/result.json", ["compact", "run", "--trust"], 1),
    ("run/checkpoint.safetensors", ["train", "--resume", "--override", "--epochs", "3", "--trust", "--out", "run"], 6),
    ("run/metrics.jsonl", ["train", "--resume", "--override", "--epochs", "3", "--trust", "--out", "run"], 3),
    ("run/config.toml", ["train", "--resume", "--trust", "--out", "run"], 4),
    ("run/compact.safetensors", ["export", "run", "--onnx", "--trust"], 6),
    ("run/config.toml", ["export", "run", "--onnx", "--trust"], 2),
    ("run/compact.safetensors", ["load", "run/compact.safetensors"], 8),
    ("zoo/compact.safetensors", ["load-untrusted", "zoo/compact.safetensors"], 10),
    ("run/compact.onnx", ["bench", "run", "--trust", "--batch", "1"], 3),
    ("run/result.json", ["bench", "run", "--trust", "--batch", "1"], 2),
    ("run/compact.onnx", ["bench", "run/dense.onnx", "run/compact.onnx", "--batch", "1"], 6),
    ("weights.safetensors", ["train", *TINY, "--epochs", "1", "--weights", "weights.safetensors", "--out", "new"], 4),
    ("weights.pth", ["train", *TINY, "--epochs", "1", "--weights", "weights.pth", "--out", "new"], 5),
    ("photos/train/a/3.png", ["train", "--data", "photos", *TINY, "--epochs", "1", "--out", "new"], 5),
    ("run/checkpoint.safetensors", ["plan", "--model", "resnet20", "--from", "run", "--no-latency"], 2),
    ("layers.json", ["layers", "layers.json"], 1),
    ("gates/gated.safetensors", ["load", "gates/gated.safetensors"], 6),
    ("gates/gated.safetensors", ["export", "gates", "--onnx", "--trust"], 5),
    ("gates/gate.toml", ["export", "gates", "--onnx", "--trust"], 3),
    ("gates/gate.toml", ["gate", "--resume", "--trust", "--out", "gates"], 3),
    ("gates/checkpoint.safetensors", ["gate", "--resume", "--trust", "--out", "gates"], 5),
    ("gates/gated.onnx", ["bench", "gates", "--trust"], 4),
    ("gates/result.json", ["bench", "gates", "--trust"], 2),
    (
        "run/compact.safetensors",
        ["gate", "run", *TINY[2:], "--trust", "--epochs", "1", "--target", "0.8", "--out", "new"],
        3,
    ),
]


def prepare(folder: Path) -> None:
    """Whole files of every kind, in `folder`."""

    def call(*arguments: str) -> None:
        subprocess.run(
            [sys.executable, "-m", "dynprune", *arguments],
            cwd=folder,
            check=True,
            capture_output=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )

    call("run", *TINY, "--epochs", "2", "--out", "run", "--batch", "1")
    call("train", "--model", "resnet20", "--image-size", "16", "--epochs", "1", "--batch-size", "256", "--out", "zoo")
    call("compact", "zoo")
    call("gate", *TINY, "--epochs", "1", "--target", "0.8", "--block", "4", "--out", "gates")
    call("export", "gates", "--onnx", "--trust")
    import numpy as np
    import torch
    from PIL import Image
    from safetensors.torch import save_file

    from tests import models

    state = models.tiny(10).state_dict()
    torch.save(state, folder / "weights.pth")
    save_file(state, folder / "weights.safetensors")
    for split in ("train", "val"):
        for name in "ab":
            (folder / "photos" / split / name).mkdir(parents=True)
            for number in range(20):
                pixels = np.random.default_rng(number).integers(0, 255, (12, 12, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / "photos" / split / name / f"{number}.png")
    (folder / "layers.json").write_text(
        json.dumps({"processor": "", "onnxruntime": "", "ms": {"conv2d": 1.0, "linear": 2.0}})
    )


def run_command(command: list[str]) -> None:
    """In the child: as `dynprune` would, with short timings."""
    from dynprune.budgets import latency
    from dynprune.cli import program as cli
    from dynprune.deploy import bench
    from dynprune.gates import bench as gated_bench
    from dynprune.gates import export as gated_export
    from dynprune.gates import file as gated_file
    from dynprune.gates import onnx as gated_onnx

    bench.SECONDS_PER_BATCH_SIZE, bench.RUNS = 0.01, (2, 3)
    gated_onnx.SITE_SECONDS, gated_onnx.SITE_RUNS, gated_export.TRIAL_SECONDS, gated_export.TRIAL_RUNS = (
        0.0,
        (1, 1),
        0.0,
        (1, 1),
    )
    gated_bench.IMAGES, gated_bench.REPEATS, gated_bench.TORCH_IMAGES = 3, 1, 2
    if command[0].startswith("load"):
        gated_file.load(command[1], trust=command[0] == "load")
    elif command[0] == "layers":
        latency.LayerTable(Path(command[1]))
    else:
        sys.argv = ["dynprune", *command]
        cli.main()


def fork_and_wait(command: list[str], folder: Path, log: Path) -> tuple[int, float, float]:
    """Exit status (negative for a signal), processor seconds, and peak MiB of the command in a child process."""
    child = os.fork()
    if child == 0:
        status = 70
        try:
            os.chdir(folder)
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
            sys.path.insert(0, str(folder))
            from dynprune.errors import DynpruneError

            try:
                run_command(command)
                status = 0
            except DynpruneError as error:
                print(f"error: {error}", file=sys.stderr)
                status = 1
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    deadline = time.monotonic() + WALL_SECONDS
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.005)


def fingerprint(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def try_networks(count: int, seed: int) -> int:
    """Invented networks: state untouched by trace; trained, compacted, exported; loaded in another process; all with
    equal outputs."""
    import traceback
    import warnings

    import hypothesis
    import torch
    from hypothesis import HealthCheck, Phase

    from tests import invent

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    ends, failures, went = Counter(), [], []
    with tempfile.TemporaryDirectory() as root:

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=count,
            deadline=None,
            phases=[Phase.generate],
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @hypothesis.given(invent.networks())
        def one(recipe: dict) -> None:
            folder = Path(root) / str(sum(ends.values()))
            try:
                found = invent.tried(recipe, folder)
            except Exception:
                failures.append(json.dumps(recipe))
                found = "failed"
                print(
                    f"{json.dumps(recipe)}\n    " + "\n    ".join(traceback.format_exc().strip().splitlines()[-3:]),
                    flush=True,
                )
            ends[found.partition(":")[0]] += 1
            if found.startswith("refused"):
                print(f"{json.dumps(recipe)}: {found}", flush=True)
            if found == "went through":
                went.append(folder)

        one()
        largest = max(invent.loaded_elsewhere(went).values(), default=0.0)
    print(
        f"{sum(ends.values())} networks: {ends['went through']} went through, {ends['refused']} refused before "
        f"training, {len(failures)} failed; loaded in another process, they differ by at most {largest:.0e} of the "
        f"largest output"
    )
    return 1 if failures or largest > 1e-4 else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--file", default="", help="only cases whose damaged file has this in its name")
    parser.add_argument("--networks", type=int, default=0, help="invent so many networks instead (`tests/invent.py`)")
    options = parser.parse_args(argv)
    if options.networks:
        return try_networks(options.networks, options.seed)
    cases = [case for case in CASES if options.file in case[0]]
    os.environ |= {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    import torchvision.transforms.v2  # noqa: F401

    from dynprune.display import tables as report  # noqa: F401 (before the forks, which then start at once)

    rng, failures, ends, peak, slowest = random.Random(options.seed), [], Counter(), 0.0, 0.0
    with tempfile.TemporaryDirectory() as root:
        pristine, outside, work = Path(root) / "pristine", Path(root) / "outside", Path(root) / "work"
        pristine.mkdir()
        outside.mkdir()
        prepare(pristine)
        (outside / "secret").write_text("secret")
        os.environ["HOME"] = str(work)
        before = fingerprint(outside)
        for number in range(options.count):
            name, command, _ = rng.choices(cases, [weight for _, _, weight in cases])[0]
            shutil.rmtree(work, ignore_errors=True)
            shutil.copytree(pristine, work)
            (work / "evil.py").write_text("import pathlib\npathlib.Path('ran').touch()\ndef build(): pass\n")
            file = work / name
            if rng.random() < 0.1:
                damage = replace(file, outside, rng)
            else:
                change = rng.choice(DAMAGE[file.suffix])
                damage = change.__name__
                file.write_bytes(change(file.read_bytes(), rng))
            log = Path(root) / "log"
            status, seconds, mebibytes = fork_and_wait(command, work, log)
            text = log.read_text(errors="replace")
            peak, slowest = max(peak, mebibytes), max(slowest, seconds)
            problem = (
                f"signal {-status}"
                if status < 0
                else "a traceback"
                if "Traceback" in text or status == 70
                else "more memory"
                if mebibytes > MEMORY_MIB
                else "no message"
                if status and "error" not in text.lower()
                else "wrote outside"
                if fingerprint(outside) != before
                else "ran a stranger's code"
                if (work / "ran").exists()
                else ""
            )
            ends["refused" if status else "went through"] += 1
            if problem:
                failures.append((number, problem))
                print(
                    f"case {number}: {problem}: {damage} of {name}, then {' '.join(command[:3])}\n    "
                    + "\n    ".join(text.strip().splitlines()[-6:]),
                    flush=True,
                )
                (outside / "secret").write_text("secret")
                (outside / "created").unlink(missing_ok=True)
    print(
        f"{options.count} cases: {ends['refused']} refused with one line, {ends['went through']} went through, "
        f"{len(failures)} failed; at most {slowest:.1f} s of processor time and {peak:.0f} MiB"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
