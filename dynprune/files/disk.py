"""Files that are whole or absent: bytes, text, and tensors with facts as safetensors.

Written beside their place, flushed and renamed. What is read is checked before it is believed; nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dynprune.errors import DynpruneError

SCHEMA = 2
READABLE = (1, 2)  # 1: before tensors from attributes were stored
HEADER_BYTES = 32 * 2**20  # longest JSON that is parsed; those of large networks take some hundred KB


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file or nothing: beside its place, flushed to disk, then renamed."""
    temporary = path.with_name(path.name + ".partial")
    try:
        temporary.unlink(missing_ok=True)  # left by a kill, or a link that leads elsewhere
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise DynpruneError(
            f"Cannot write {path} ({error.strerror}). The file that was there before is unchanged."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, content: str) -> None:
    write_bytes(path, content.encode("utf-8", "surrogateescape"))  # names of files need not be UTF-8


def write_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Mapping) -> None:
    """A safetensors file with `facts` as one JSON string in its header. Tensors are made contiguous and unshared."""
    own = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
    write_bytes(path, save(own, metadata={"dynprune": json.dumps({"schema": SCHEMA, **facts})}))


def kind_of(path: Path) -> str:
    """What a file that `write_tensors` wrote holds, "" for any other file."""
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("dynprune") or ""
            facts = json.loads(text) if 0 < len(text) < HEADER_BYTES else {}
            return str(facts.get("kind", "")) if isinstance(facts, dict) else ""
    except (SafetensorError, ValueError, RecursionError, OSError):
        return ""


def read_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], dict]:
    """Tensors and facts of a file that `write_tensors` wrote with `facts["kind"] == kind`."""
    with opened(path, kind) as (file, facts):
        return {name: file.get_tensor(name) for name in file.keys()}, facts


def read_facts(path: Path, kind: str) -> dict:
    """The facts alone; see `read_tensors`."""
    with opened(path, kind) as (_, facts):
        return facts


@contextlib.contextmanager
def opened(path: Path, kind: str) -> Iterator[tuple[Any, dict]]:
    """A safetensors file of ours, open, with its facts. Raises DynpruneError for others, and for damaged ones."""
    wanted = f"Expected a {kind} file written by dynprune"
    if not path.is_file():
        raise DynpruneError(f"No file {path}. {wanted}.")
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("dynprune") or ""
            facts = json.loads(text) if 0 < len(text) < HEADER_BYTES else None
            if not isinstance(facts, dict) or facts.get("kind") != kind:
                raise DynpruneError(f"{path} is not one of ours, or of another kind. {wanted}.")
            if facts.get("schema") not in READABLE or isinstance(facts["schema"], bool):
                raise DynpruneError(
                    f"{path} has schema {str(facts.get('schema'))[:20]}, this version reads "
                    f"{' and '.join(map(str, READABLE))}. Write it again with this version."
                )
            yield file, facts
    except (SafetensorError, ValueError, RecursionError, OSError) as error:
        raise DynpruneError(
            f"{path} is damaged or not a safetensors file ({str(error).splitlines()[0][:200]}). {wanted}."
        ) from error
