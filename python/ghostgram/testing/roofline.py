"""What this machine can do at best, measured with the kernels' own build, and how near to it a kernel comes."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MEMORY_BYTES = 256 << 20
"""Far above the last-level cache's share of one process, or the cache is what gets measured."""


@dataclass(frozen=True)
class Roofs:
    """Rates per second, medians, on all threads of the pool."""

    flops: float
    """Multiply-adds out of registers; each counts two."""
    read: float
    """Bytes read."""
    copy: float
    """Bytes read plus bytes written."""
    triad: float
    """The same, of two arrays read and their sum written past the caches."""


def measure(
    seconds: float = 0.5, dtype: str = "float32", memory_bytes: int = MEMORY_BYTES, memory: Any = None
) -> Roofs:
    """Measures the roofs, each for `seconds`, in float32 memory that is given or made.

    Give memory of the kind that the kernel reads: NumPy asks for huge pages, torch does not.

    The multiply-add is the fastest that this build uses for products of `dtype`: for bfloat16 the processor's own dot
    product where it has one, float32's for values that are widened first.
    """
    from ghostgram import _C

    # Written to, because pages never touched are all one page of zeros, which stays in cache.
    if memory is None:
        memory = np.ones(memory_bytes // 4, np.float32)
    return Roofs(*_C.cpu.roofs(memory, seconds, dtype))


def percent_of_roof(flops: float, moved: float, seconds: float, roofs: Roofs) -> float:
    """The least time in which the roofs allow `flops` operations and `moved` bytes, as a percentage of `seconds`."""
    least = max(flops / roofs.flops, moved / max(roofs.read, roofs.copy, roofs.triad))
    return 100 * least / seconds


def processor() -> str:
    """The processor's own name, as far as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
