"""What is timed: a GPU, by its own events and with a cold cache; or, in a rehearsal, this processor by its clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from ghostgram.testing import roofline

# Data sheets, dense: bytes per second of memory, FLOPs per second of bfloat16 and of TF32 tensor cores.
SHEETS = {
    "A100": (2.0e12, 312e12, 156e12),
    "H100": (3.35e12, 989e12, 495e12),
    "H200": (4.8e12, 989e12, 495e12),
    "B200": (8.0e12, 2250e12, 1125e12),
}


class Gpu:
    """The current CUDA device."""

    device = "cuda"
    tiny = False

    def __init__(self) -> None:
        self.name = torch.cuda.get_device_name()
        # Twice any L2. Writing it also takes longer than a call takes to be launched, so that the events around the
        # call see the card's work alone.
        self._flush = torch.empty(512 << 20, dtype=torch.uint8, device="cuda")
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def seconds(self, call: Callable[[], Any]) -> float:
        """How long the card works on one call."""
        self._flush.zero_()
        first, last = self._events
        first.record()
        call()
        last.record()
        last.synchronize()
        return 1e-3 * float(first.elapsed_time(last))

    def peak_bytes(self, call: Callable[[], Any]) -> int:
        """The most memory that a call has in use beside what was in use before it."""
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before


class Rehearsal:
    """This processor, with sizes that an emulator bears: all runs as on a card, and no number means a thing."""

    device = "cpu"
    tiny = True
    name = "rehearsal"

    def seconds(self, call: Callable[[], Any]) -> float:
        """The processor's time for one call."""
        started = time.perf_counter()
        call()
        return time.perf_counter() - started

    def peak_bytes(self, call: Callable[[], Any]) -> int:
        """Not known of a processor."""
        call()
        return 1


Card = Gpu | Rehearsal


def sheet(name: str) -> dict[str, float]:
    """The data sheet's rates of a card that is known by its name."""
    for known, (memory, bf16, tf32) in SHEETS.items():
        if known in name:
            return {"sheet_gbytes": memory / 1e9, "sheet_bf16_tflops": bf16 / 1e12, "sheet_tf32_tflops": tf32 / 1e12}
    return {}


def measured(card: Card, alternate: Callable[..., dict[str, float]]) -> dict[str, float]:
    """What torch reaches here: bytes read and written by a copy, FLOPs of square products in bfloat16 and in TF32."""
    numbers, side = (1 << 28, 8192) if not card.tiny else (1 << 10, 16)
    x, y = (torch.zeros(numbers, device=card.device) for _ in range(2))
    wide = [torch.randn(side, side, device=card.device) for _ in range(2)]
    half = [m.bfloat16() for m in wide]

    def in_tf32() -> None:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.mm(*wide)
        torch.backends.cuda.matmul.allow_tf32 = False

    ways = {"copy": lambda: y.copy_(x), "bf16": lambda: torch.mm(*half), "tf32": in_tf32}
    seconds = alternate(card.seconds, ways, rounds=10)
    return {
        "copy_gbytes": 8 * numbers / seconds["copy"] / 1e9,
        "bf16_tflops": 2 * side**3 / seconds["bf16"] / 1e12,
        "tf32_tflops": 2 * side**3 / seconds["tf32"] / 1e12,
    }


def roofs_for(dtype: str, rates: dict[str, float]) -> roofline.Roofs:
    """The measured roofs of a dtype. A float32 product is three TF32 ones where its error shall stay float32's."""
    flops = 1e12 * (rates["tf32_tflops"] / 3 if dtype == "float32" else rates["bf16_tflops"])
    memory = 1e9 * rates["copy_gbytes"]
    return roofline.Roofs(flops, memory, memory, memory)
