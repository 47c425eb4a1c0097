"""Shapes on which the cost model is fitted and held out, and the times of every way, forced through the front door.

Float32 torch tensors; ways take turns, in warm caches. A time is the median CPU time of one thread: several threads
that meet another process on a core wait milliseconds for it, which swamps calls that take microseconds.
"""

from __future__ import annotations

import importlib
import random
import statistics
import time
from dataclasses import dataclass
from unittest import mock

import torch

import ghostgram as gg

WAYS = {"norms": ("M", "G"), "dots": ("M", "P"), "gram": ("G", "M")}

# The held-out grid shares no number of samples, no layer and no number of tokens but 1 with the fitted one.
FITTED = {
    "tokens": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
    "samples": (2, 16, 64),
    "layers": ((64, 64), (64, 1024), (256, 256), (768, 768), (1024, 256), (2048, 64), (1024, 1024), (768, 3072)),
    "shapes": 70,
}
HELD_OUT = {
    "tokens": (1, 3, 5, 12, 24, 48, 96, 197, 384, 640),
    "samples": (1, 8, 40, 128),
    "layers": ((96, 384), (300, 100), (512, 512), (64, 4096), (4096, 32), (16, 2048), (1536, 384), (1024, 4096)),
    "shapes": 30,
}
MOST_OPERATIONS = 1e9  # multiply-adds of the slower way: some 10 ms, so that a grid takes a minute
PASSES = 2  # over a whole grid: what else the machine does for some seconds falls into one of them
ROUNDS = (2, 25)  # of a pass
SECONDS_PER_SHAPE = 0.03


@dataclass(frozen=True)
class Shape:
    """What the cost model is asked."""

    want: str
    samples: int
    tokens: int
    d: int
    p: int
    directions: int = 0
    second: tuple[int, int] | None = None

    def operations(self) -> float:
        """Multiply-adds of the slower way."""
        rows, gradient = self.samples * self.tokens, self.d * self.p
        if self.want == "norms":
            return max((rows + self.samples) * gradient, rows * self.tokens * (self.d + self.p))
        if self.want == "dots":
            return self.directions * (rows + self.samples) * gradient
        samples2, tokens2 = self.second or (self.samples, self.tokens)
        materialised = samples2 * tokens2 + -(-samples2 // 16) * rows + samples2 * self.samples
        return max(materialised * gradient, rows * samples2 * tokens2 * (self.d + self.p))


def grid(want: str, kind: dict, seed: int = 0) -> list[Shape]:
    """Shapes drawn without replacement, those that take too long left out."""
    extras = {
        "norms": [{}],
        "dots": [{"directions": 1}, {"directions": 3}, {"directions": 8}],
        "gram": [{}] + [{"second": (b2, t2)} for b2 in (1, 4, 20) for t2 in kind["tokens"]],
    }[want]
    every = [
        Shape(want, b, t, d, p, **extra)
        for b in kind["samples"]
        for t in kind["tokens"]
        for d, p in kind["layers"]
        for extra in extras
    ]
    affordable = [shape for shape in every if shape.operations() <= MOST_OPERATIONS]
    return random.Random(seed).sample(affordable, kind["shapes"])


def measure(shapes: list[Shape]) -> list[dict[str, float]]:
    """Median seconds of every way of every shape."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    passes = [[_rounds(shape) for shape in shapes] for _ in range(PASSES)]
    torch.set_num_threads(threads)
    return [
        {way: statistics.median(t for took in each for t in took[way]) for way in WAYS[shape.want]}
        for shape, each in zip(shapes, zip(*passes, strict=True), strict=True)
    ]


def _rounds(shape: Shape) -> dict[str, list[float]]:
    """Seconds of every way in each round of one pass; the first two are not counted."""
    inputs = [torch.randn(shape.samples, shape.tokens, n) for n in (shape.d, shape.p)]
    if shape.directions:
        inputs.append(torch.randn(shape.directions, shape.p, shape.d))
    if shape.second:
        inputs += [torch.randn(*shape.second, n) for n in (shape.d, shape.p)]
    door = getattr(gg, f"grad_{shape.want}")
    module = importlib.import_module(door.__module__)

    def turn() -> dict[str, float]:
        took = {}
        for way in WAYS[shape.want]:
            with mock.patch.object(module, "choose_way", new=lambda *_, way=way, **__: way):
                started = time.thread_time()
                door(*inputs)
                took[way] = time.thread_time() - started
        return took

    turn()
    wanted = min(max(round(SECONDS_PER_SHAPE / sum(turn().values())), ROUNDS[0]), ROUNDS[1])
    turns = [turn() for _ in range(wanted)]
    return {way: [took[way] for took in turns] for way in WAYS[shape.want]}
