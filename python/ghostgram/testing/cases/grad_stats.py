"""Cases of grad_stats: sizes around every tile edge, layouts the kernels must take as they are, work counted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ghostgram.testing import layouts

UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
"""Unit roundoff by dtype."""


@dataclass(frozen=True)
class Case:
    """One set of sizes; `layout` names how a, b and D lie in memory."""

    samples: int
    tokens: int
    d: int
    p: int
    directions: int
    layout: str = "contiguous"
    accumulate: bool = False
    scale: float = 1.0

    @property
    def id(self) -> str:
        """A name for test reports."""
        extra = ("+acc" if self.accumulate else "") + (f"*{self.scale:g}" if self.scale != 1 else "")
        return f"B{self.samples}T{self.tokens}d{self.d}p{self.p}K{self.directions}-{self.layout}{extra}"

    @property
    def flops(self) -> int:
        """Multiply-adds count two: the gradient, its square and its dots."""
        return 2 * self.samples * self.d * self.p * (self.tokens + 1 + self.directions)

    def bytes(self, dtype: str) -> int:
        """What a perfect kernel reads and writes once."""
        item = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}[dtype]
        sums = 8 if dtype == "float64" else 4
        rows = self.samples * self.tokens * (self.d + self.p) * item
        return rows + self.d * self.p * sums * (1 + self.directions) + self.samples * (1 + self.directions) * sums


CASES = [
    # Degenerate and tiny.
    Case(0, 4, 3, 2, 1), Case(2, 0, 3, 2, 1), Case(2, 3, 0, 2, 1), Case(2, 3, 4, 0, 1), Case(1, 1, 1, 1, 1),
    # One off each edge of the CPU's 14x32, 6x16 and 6x8 tiles and of the GPU tiles' powers of two.
    Case(2, 3, 31, 13, 1), Case(2, 3, 32, 14, 1), Case(2, 3, 33, 15, 1), Case(1, 2, 15, 5, 1), Case(1, 2, 17, 7, 2),
    Case(3, 16, 64, 64, 1), Case(3, 15, 63, 65, 1), Case(3, 17, 65, 63, 2), Case(2, 33, 127, 129, 1),
    # Primes, and the ends of T and K.
    Case(7, 13, 101, 53, 3), Case(5, 1, 37, 41, 1), Case(1, 257, 19, 23, 0), Case(3, 5, 29, 31, 16),
    # Long rows of p and of d: many row groups, many column cuts.
    Case(2, 4, 16, 600, 1), Case(2, 4, 600, 16, 1),
    # Layouts, sums on top of sums, and values far from 1.
    Case(3, 7, 40, 24, 2, "sliced"), Case(3, 7, 40, 24, 1, "transposed"), Case(4, 5, 33, 18, 1, "expanded"),
    Case(3, 6, 35, 20, 1, accumulate=True), Case(3, 9, 34, 20, 1, scale=1e-4), Case(2, 9, 34, 20, 1, scale=30.0),
]

LARGE = [
    # Long tokens (several passes of the packed panels), and the sizes of the benchmark.
    Case(1, 4096, 40, 70, 1), Case(3, 3000, 33, 29, 1), Case(8, 256, 768, 3072, 1), Case(16, 128, 768, 768, 1),
]


def inputs(case: Case, dtype: str, seed: int = 0) -> dict[str, NDArray[np.float64] | None]:
    """a, b, D and a starting weight_grad, as float64 values that `dtype` represents exactly."""
    rng = np.random.default_rng([seed, case.samples, case.tokens, case.d, case.p])
    a = case.scale * rng.standard_normal((case.samples, case.tokens, case.d))
    b = case.scale * rng.standard_normal((case.samples, case.tokens, case.p))
    D = rng.standard_normal((case.directions, case.p, case.d)) if case.directions else None
    start = rng.standard_normal((case.p, case.d))
    rounded = [None if x is None else layouts.rounded(x, dtype) for x in (a, b, D)]
    if case.layout == "expanded" and case.samples:  # stride 0 over samples
        rounded[0] = np.broadcast_to(rounded[0][:1], a.shape).copy()
    return {"a": rounded[0], "b": rounded[1], "D": rounded[2], "weight_grad": layouts.rounded(start, "float32")}


def scales(a: NDArray[np.float64], b: NDArray[np.float64], D: NDArray[np.float64] | None) -> dict[str, NDArray[np.float64]]:
    """For every output, the same sum over absolute values: what rounding errors are relative to."""
    gradients = [np.abs(y).T @ np.abs(x) for x, y in zip(a, b, strict=True)]
    zero = np.zeros((b.shape[-1], a.shape[-1]))
    return {
        "weight_grad": sum(gradients, start=zero),
        "norms2": np.array([np.sum(g * g) for g in gradients]),
        "dots": np.array([np.sum(g * np.abs(D), axis=(1, 2)) for g in gradients]) if D is not None else np.zeros((len(a), 0)),
    }


def bound(case: Case, dtype: str) -> float:
    """A relative error bound with respect to `scales`.

    A sum of n rounded products is off by at most n u of the sum of absolute values, and by about sqrt(n) u when
    roundings are independent; 3 sqrt(n) u is the probabilistic bound (Higham and Mary 2019, lambda = 3) for
    n = T + B terms of weight_grad, each sample's tile being finished before it is added, plus one for the products with
    D. Squares double the relative error of what is squared. Sums over tiles are float64. Inputs are exact in their
    dtype and products are made in float32, so half types have float32's bound.
    """
    unit = UNIT["float64" if dtype == "float64" else "float32"]
    return 6 * unit * (float(case.tokens + case.samples) ** 0.5 + 4)
