"""A training step with In-Run Data Shapley beside the plain one: what it costs, in which part, and in memory.

Every part is a share of the plain step's time; `layers` is what remains: forward and backward of tapped layers, against
those of plain ones.
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
from ghostgram.algorithms.in_run_shapley import engine

WIDTH, LAYERS, HEADS = 768, 4, 12
SAMPLES, TOKENS, VALIDATION = 16, 256, 1
ROUNDS = 5

PARTS = {
    "validation pass": (engine, "validation_gradients"),
    "linearisation": (engine.InRunShapley, "_linearised"),
    "gradient norms, sum check": (engine.InRunShapley, "_close_backward"),
    "values": (engine.InRunShapley, "_before_optimizer"),
    "log": (engine.InRunShapley, "_finish_step"),
}


class Trainee:
    """One copy of the model and its optimizer, trained with or without valuation."""

    def __init__(self, model: TinyLM, autocast: bool, validation: torch.Tensor | None) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0.1, foreach=True)
        self.loss = torch.autocast("cpu", torch.bfloat16, enabled=autocast)(next_byte_loss)
        self.shapley = None
        if validation is not None:
            self.shapley = gg.InRunShapley(self.model, self.optimizer, partial(self.loss, text=validation))

    def step(self, text: torch.Tensor) -> None:
        if self.shapley is None:
            self.loss(self.model, text).backward()
        else:
            with self.shapley.step(ids=range(len(text))):
                self.loss(self.model, text).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Random bytes to train on, and to validate with."""
    torch.manual_seed(0)
    return torch.randint(BYTES, (SAMPLES + VALIDATION, TOKENS + 1)).split([SAMPLES, VALIDATION])


def trainee(which: str, dtype: str, validation: torch.Tensor) -> Trainee:
    """The "plain" or the "scored" one; alike, and past Adam's first step, which has no second moment to go by."""
    torch.manual_seed(0)
    model = TinyLM(WIDTH, LAYERS, HEADS, TOKENS)
    return Trainee(model, dtype == "bfloat16", validation if which == "scored" else None)


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
        for name, (owner, attribute) in PARTS.items():
            patch.setattr(owner, attribute, timed(name, getattr(owner, attribute)))
        yield seconds


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def bench_step(benchmark, record, monkeypatch, dtype):
    text, validation = batch()
    plain, scored = (trainee(which, dtype, validation) for which in ("plain", "scored"))
    scored.step(text)
    plain_seconds: list[float] = []

    def plain_step() -> None:
        started = time.perf_counter()
        plain.step(text)
        plain_seconds.append(time.perf_counter() - started)

    with timed_parts(monkeypatch) as parts:
        benchmark.pedantic(scored.step, args=(text,), setup=plain_step, rounds=ROUNDS, warmup_rounds=1)
    plain_time = statistics.median(plain_seconds[1:])
    ratio = benchmark.stats.stats.median / plain_time
    shares = {name: statistics.median(parts[name][1:]) / plain_time for name in PARTS}
    record(
        dtype=dtype,
        plain_ms=1e3 * plain_time,
        ratio=ratio,
        **shares,
        layers=ratio - 1 - sum(shares.values()),
        peak_memory=peak_memory("scored", dtype) / peak_memory("plain", dtype),
    )


def peak_memory(which: str, dtype: str) -> int:
    """KiB that some training steps add at most to what a process holds before it has a model."""
    command = [sys.executable, __file__, which, dtype]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "examples")}
    return int(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout)


def high_water() -> int:
    """KiB at most resident so far; getrusage would count those of the process that started this one."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1])


if __name__ == "__main__":
    before = high_water()
    text, validation = batch()
    learner = trainee(sys.argv[1], sys.argv[2], validation)
    for _ in range(3):
        learner.step(text)
    print(high_water() - before)
