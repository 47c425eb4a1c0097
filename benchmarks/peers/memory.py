"""Peak resident memory of a call, as Linux counts it: allocations outside torch are seen too."""

from __future__ import annotations

import ctypes
import gc
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
