"""A training step with In-Run Data Shapley beside the plain one: what it costs, in which part, and in memory.

Every part is a share of the plain step's time; `rest` is what remains: forward and backward of tapped layers against
those of plain ones, a copy of the weights, sums.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_lm import BYTES, TinyLM, next_byte_loss

import ghostgram as gg
from ghostgram.algorithms.in_run_shapley import directions, log, scoring, validation

WIDTH, LAYERS, HEADS = 768, 4, 12
SAMPLES, TOKENS, VALIDATION = 16, 256, 1
ROUNDS = 5

WAYS: dict[str, dict[str, Any]] = {
    "order 1": {"order": 1},
    "order 2": {"order": 2, "late": "stored"},
    "order 2 replayed": {"order": 2, "late": "replay"},
}
PARTS = {
    "validation gradients": [(validation.ValidationSets, "gradients")],
    "validation losses": [(validation.ValidationSets, "losses")],
    "directions": [(directions, "first_order"), (directions.Line, "begin"), (directions.Line, "times")],
    "to the middle and back": [(directions.Line, "go_to"), (directions.Line, "leave")],
    "late dots": [(scoring.Scorer, "_take_late")],
    "gradient norms, sum check": [(scoring.GradientRecord, "__init__"), (scoring.Scorer, "_check")],
    "log": [(log.RunLog, "samples"), (log.RunLog, "change")],
}


class Trainee:
    """One copy of the model and its optimizer, trained with or without valuation."""

    def __init__(self, model: TinyLM, autocast: bool, way: str, validation: torch.Tensor) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0.1, foreach=True)
        self.loss = torch.autocast("cpu", torch.bfloat16, enabled=autocast)(next_byte_loss)
        self.shapley = None
        if way != "plain":
            self.shapley = gg.InRunShapley(self.model, self.optimizer, partial(self.loss, text=validation), **WAYS[way])

    def step(self, text: torch.Tensor) -> None:
        if self.shapley is None:
            self.loss(self.model, text).backward()
        else:
            with self.shapley.step(ids=range(len(text)), losses=lambda: self.loss(self.model, text)):
                self.loss(self.model, text).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Random bytes to train on, and to validate with."""
    torch.manual_seed(0)
    return torch.randint(BYTES, (SAMPLES + VALIDATION, TOKENS + 1)).split([SAMPLES, VALIDATION])


def trainee(way: str, dtype: str, validation: torch.Tensor) -> Trainee:
    """A "plain" one or one of `WAYS`, all alike."""
    torch.manual_seed(0)
    model = TinyLM(WIDTH, LAYERS, HEADS, TOKENS)
    return Trainee(model, dtype == "bfloat16", way, validation)


@contextmanager
def timed_parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[float]]]:
    """The seconds of every call of each part of the engine."""
    seconds: dict[str, list[float]] = defaultdict(list)

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            started = time.perf_counter()
            result = function(*args)
            seconds[name].append(time.perf_counter() - started)
            return result

        return call

    with monkeypatch.context() as patch:
        for name, targets in PARTS.items():
            for owner, attribute in targets:
                patch.setattr(owner, attribute, timed(name, getattr(owner, attribute)))
        yield seconds


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("way", WAYS)
def bench_step(benchmark, record, monkeypatch, way, dtype):
    text, held_out = batch()
    plain, scored = trainee("plain", dtype, held_out), trainee(way, dtype, held_out)
    scored.step(text)  # Adam's first step has no second moment to go by
    plain_seconds: list[float] = []

    def plain_step() -> None:
        started = time.perf_counter()
        plain.step(text)
        plain_seconds.append(time.perf_counter() - started)

    with timed_parts(monkeypatch) as parts:
        benchmark.pedantic(scored.step, args=(text,), setup=plain_step, rounds=ROUNDS, warmup_rounds=1)
    plain_time = statistics.median(plain_seconds[1:])
    ratio = benchmark.stats.stats.median / plain_time
    shares = {name: sum(parts[name]) / (ROUNDS + 1) / plain_time for name in PARTS}
    record(
        way=way,
        dtype=dtype,
        plain_ms=1e3 * plain_time,
        ratio=ratio,
        **shares,
        rest=ratio - 1 - sum(shares.values()),
        **memory(way, dtype),
    )


def memory(way: str, dtype: str) -> dict[str, float]:
    """A scored process' peak over a plain one's, less what both hold before they have a model.

    `peak_memory` is what the system sees: with glibc's malloc that includes what is free, but lies between blocks in
    use. In `live_memory` freed blocks go back at once, so that the peak is what is alive: in later steps, and over the
    plain process' later steps too in Adam's first one, which keeps every layer's (a, b).
    """
    seen = {which: peaks(which, dtype) for which in (way, "plain")}
    live = {which: peaks(which, dtype, MALLOC_MMAP_THRESHOLD_="65536") for which in (way, "plain")}
    return {
        "peak_memory": max(seen[way]) / max(seen["plain"]),
        "live_memory": live[way][1] / live["plain"][1],
        "live_memory_first_step": live[way][0] / live["plain"][1],
    }


def peaks(way: str, dtype: str, **env: str) -> list[int]:
    """KiB that a process adds at most to what it holds before it has a model: in the first step, and in later ones."""
    command = [sys.executable, __file__, way, dtype]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "examples")} | env
    output = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    return [int(word) for word in output.split()]


def high_water() -> int:
    """KiB at most resident so far; getrusage would count those of the process that started this one."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1])


if __name__ == "__main__":
    before = high_water()
    text, held_out = batch()
    learner = trainee(sys.argv[1], sys.argv[2], held_out)
    learner.step(text)
    print(high_water() - before)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    for _ in range(2):
        learner.step(text)
    print(high_water() - before)
