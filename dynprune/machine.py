"""The machine that a result was measured on: versions and processor."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch


def environment() -> dict[str, object]:
    """Versions and hardware that a result depends on."""
    import onnxruntime

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def processor() -> str:
    """The processor's name, as the operating system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def multiplies_int8() -> bool:
    """Whether the processor has instructions that multiply and add up int8 (VNNI on x86, dot products on ARM); True
    where the operating system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return True
    flags = {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split()}
    return not flags or bool(flags & {"avx512_vnni", "avx_vnni", "avx_vnni_int8", "asimddp"})
