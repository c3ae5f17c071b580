"""Tensors out of checkpoint files, without running any of their code.

Takes a file as torch.save or safetensors writes it, also of torch before 1.6; returns the mappings from names to
tensors that lie in it, wherever training scripts put them. A pickle can name any function to be called. Ours calls
none: tensors are described and read afterwards, plain containers are built, and whatever else the file names
(arguments, optimizers, whole models) becomes an empty `Foreign` object, so that it does not stand in the way.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # how files from before torch 1.6 begin
DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}
DEPTH = 6  # how deep in a file a state dict is looked for
PICKLE_BYTES = 256 * 2**20


class Foreign:
    """Stands for anything that a file names and that is no tensor, container or plain value. It does nothing, whatever
    is done to it."""

    name = "an unknown object"

    def __new__(cls, *_args: object, **_options: object) -> Foreign:
        return super().__new__(cls)

    def __init__(self, *_args: object, **_options: object) -> None:
        pass

    def __call__(self, *_args: object, **_options: object) -> Foreign:
        return Foreign()

    def __setstate__(self, _state: object) -> None:
        pass

    def __setitem__(self, _key: object, _value: object) -> None:
        pass

    def append(self, _value: object) -> None:
        pass

    extend = add = update = append
    __hash__ = object.__hash__


@dataclass(frozen=True)
class Storage:
    """Numbers of one kind in the file, by their key. start, count: the part of them that is meant, where it is one."""

    dtype: torch.dtype
    key: str
    count: int
    start: int = 0


@dataclass(frozen=True)
class Described:
    """A tensor that is not read yet."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class Rebuild:
    """A function of torch that makes a tensor, as far as we follow it. An object, so that a file cannot change it."""

    __slots__ = ("make",)
    make: Callable[..., object]

    def __init__(self, make: Callable[..., object]):
        object.__setattr__(self, "make", make)

    def __setattr__(self, _name: str, _value: object) -> None:
        pass

    def __setstate__(self, _state: object) -> None:
        pass

    def __call__(self, *args: object, **_options: object) -> object:
        return self.make(*args)


def described(storage: object, offset: Any, size: Any, stride: Any, *_rest: object) -> object:
    if not isinstance(storage, Storage):
        return Foreign()
    numbers = (offset, *size, *stride)
    if not all(type(number) is int and 0 <= number < 2**62 for number in numbers) or len(size) != len(stride):
        raise pickle.UnpicklingError("a tensor of impossible size")
    return Described(storage, offset, tuple(size), tuple(stride))


def whole_parameter(data: object, *_rest: object) -> object:
    return data


def from_kind(function: object, _kind: object, args: object, *_rest: object) -> object:
    # a subclass of Tensor
    return function(*args) if isinstance(function, Rebuild) and isinstance(args, tuple) else Foreign()


KNOWN: dict[tuple[str, str], Callable[[], object]] = {
    ("collections", "OrderedDict"): lambda: OrderedDict,
    ("torch", "Size"): lambda: tuple,
    ("torch._utils", "_rebuild_tensor"): lambda: Rebuild(described),
    ("torch._utils", "_rebuild_tensor_v2"): lambda: Rebuild(described),
    ("torch._utils", "_rebuild_parameter"): lambda: Rebuild(whole_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): lambda: Rebuild(whole_parameter),
    ("torch._tensor", "_rebuild_from_type_v2"): lambda: Rebuild(from_kind),
    ("builtins", "set"): lambda: set,
    ("__builtin__", "set"): lambda: set,
}


class Reader(pickle._Unpickler):
    """The interpreter of pickles that is written in Python: its memo takes no memory that the file only claims to
    need."""

    def find_class(self, module: str, name: str) -> object:
        if module in ("torch", "torch.storage", "torch.cuda") and name in DTYPES:
            return DTYPES[name]
        if (module, name) in KNOWN:
            return KNOWN[module, name]()
        return type("Foreign", (Foreign,), {"name": f"{module}.{name}"[:100]})

    def persistent_load(self, pid: object) -> object:
        if (
            not isinstance(pid, tuple)
            or len(pid) < 5
            or pid[0] != "storage"
            or not isinstance(pid[1], torch.dtype)
            or type(pid[4]) is not int
        ):
            return Foreign()
        view = pid[5] if len(pid) > 5 else None
        if isinstance(view, tuple) and len(view) == 3 and all(type(number) is int for number in view[1:]):
            return Storage(pid[1], str(pid[2]), view[2], view[1])
        return Storage(pid[1], str(pid[2]), pid[4])


@dataclass
class Contents:
    """What a file holds. tree: containers, plain values, Described and Foreign. read: the bytes of a storage, from a
    file that stays open."""

    tree: object
    read: Callable[[Storage], bytes]

    def tensor(self, item: Described) -> Tensor:
        """The described tensor. Raises ValueError where the file does not hold so many numbers."""
        data, width = self.read(item.storage), item.storage.dtype.itemsize
        count = min(len(data) // width - item.storage.start, item.storage.count)
        reach = (
            item.offset + sum((size - 1) * stride for size, stride in zip(item.size, item.stride)) + 1
            if all(item.size)
            else 0
        )
        if reach > count or math.prod(item.size) > max(count, 1) or count < 0:
            raise ValueError("a tensor that is larger than the numbers the file holds for it")
        if not math.prod(item.size):
            return torch.empty(item.size, dtype=item.storage.dtype)
        flat = torch.frombuffer(bytearray(data), dtype=item.storage.dtype)
        return flat[item.storage.start :].as_strided(item.size, item.stride, item.storage.start + item.offset).clone()


def read_contents(path: Path) -> Contents:
    """Read a file of torch.save. Raises ValueError, pickle.UnpicklingError and the like for what is none."""
    if zipfile.is_zipfile(path):
        return read_archive(path)
    with path.open("rb") as file:
        return read_legacy(file)


def read_archive(path: Path) -> Contents:
    """A zip archive: data.pkl, and every storage as a file of its own. It is not compressed, or it could unpack to far
    more than its size."""
    archive = zipfile.ZipFile(path)
    entries = {entry.filename: entry for entry in archive.infolist()}
    if any(name.endswith("/constants.pkl") for name in entries):
        raise ValueError("a TorchScript archive; save the model's state_dict() instead")
    if (
        any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values())
        or sum(entry.file_size for entry in entries.values()) > path.stat().st_size
    ):
        raise ValueError("a compressed archive, which torch.save does not write")
    main = next(
        (name for name in entries if name == "data.pkl" or name.endswith("/data.pkl") and name.count("/") == 1), None
    )
    if main is None or entries[main].file_size > PICKLE_BYTES:
        raise ValueError("a zip archive without a data.pkl, so not one of torch.save")
    prefix = main[: -len("data.pkl")]
    if prefix + "byteorder" in entries and archive.read(prefix + "byteorder") != b"little":
        raise ValueError("numbers in the byte order of another machine")
    tree = Reader(io.BytesIO(archive.read(main)), encoding="utf-8").load()

    def read(storage: Storage) -> bytes:
        return archive.read(f"{prefix}data/{storage.key}")

    return Contents(tree, read)


def read_legacy(file: io.BufferedReader) -> Contents:
    """Several pickles one after the other (a magic number, a version, the machine, the contents, the keys of the
    storages), then their numbers."""
    if Reader(file).load() != MAGIC or Reader(file).load() != PROTOCOL:
        raise ValueError("neither an archive nor an older file of torch.save")
    machine = Reader(file).load()
    if isinstance(machine, dict) and machine.get("little_endian", True) is not (sys.byteorder == "little"):
        raise ValueError("numbers in the byte order of another machine")
    storages: dict[str, Storage] = {}

    class Noting(Reader):
        def persistent_load(self, pid: object) -> object:
            found = super().persistent_load(pid)
            if isinstance(found, Storage):
                storages[found.key] = found
            return found

    tree, keys = Noting(file, encoding="utf-8").load(), Reader(file).load()
    numbers: dict[str, bytes] = {}
    if not isinstance(keys, list):
        raise ValueError("no list of storages")
    for key in keys:
        head = file.read(8)
        if str(key) not in storages or len(head) != 8:
            raise ValueError("a storage that nothing uses, or the end of the file too early")
        length = struct.unpack("<q", head)[0] * storages[str(key)].dtype.itemsize
        data = file.read(length) if 0 <= length < 2**40 else b""
        if len(data) != length:
            raise ValueError("the end of the file too early")
        numbers[str(key)] = data
    return Contents(tree, lambda storage: numbers[storage.key])


def state_dicts(contents: Contents) -> Iterator[tuple[str, dict[str, Described]]]:
    """Every mapping in the file that holds tensors by name, with the keys that lead there; the outermost first. Other
    entries are left out."""
    waiting: list[tuple[str, object, int]] = [("", contents.tree, 0)]
    seen: set[int] = set()
    while waiting:
        place, value, depth = waiting.pop(0)
        if not isinstance(value, Mapping) or id(value) in seen or depth > DEPTH:
            continue
        seen.add(id(value))
        tensors = {
            name: entry for name, entry in value.items() if isinstance(name, str) and isinstance(entry, Described)
        }
        if tensors:
            yield place, tensors
        waiting += [
            (f"{place}.{name}" if place else str(name), entry, depth + 1)
            for name, entry in value.items()
            if isinstance(entry, Mapping)
        ]
