"""Peak resident memory of a call, as Linux counts it: allocations outside torch are seen too."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _kib(field: str) -> int:
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(field))


def start() -> int | None:
    """Gives free memory back, resets the high-water mark, and returns the KiB resident; None where Linux is not."""
    if not RESET.exists():
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    RESET.write_text("5")
    return _kib("VmRSS")


def peak_since(started: int | None) -> float | None:
    """MiB between what was resident at `start` and the most that was since."""
    return None if started is None else (_kib("VmHWM") - started) / 1024


@contextmanager
def pages_of_their_own() -> Iterator[None]:
    """Arrays of 64 KiB or more are resident while they live, and no longer: the heap keeps gaps. It costs time."""
    mallopt, mmap_threshold = ctypes.CDLL(None).mallopt, -3
    mallopt(mmap_threshold, 2**16)
    try:
        yield
    finally:
        mallopt(mmap_threshold, 2**25)  # where glibc's own goes in a process that frees large arrays
