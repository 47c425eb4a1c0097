"""Cases of grad_stats: sizes around every tile edge, layouts the kernels must take as they are, work counted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ghostgram import _dispatch
from ghostgram.testing import layouts

F64 = NDArray[np.float64]
DTYPES = ("float32", "float64", "bfloat16", "float16")


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
        sums = 8 if dtype == "float64" else 4
        rows = self.samples * self.tokens * (self.d + self.p) * layouts.ITEM[dtype]
        return rows + self.d * self.p * sums * (1 + self.directions) + self.samples * (1 + self.directions) * sums


# fmt: off
CASES = [
    # Degenerate and tiny.
    Case(0, 4, 3, 2, 1), Case(2, 0, 3, 2, 1), Case(2, 3, 0, 2, 1), Case(2, 3, 4, 0, 1), Case(1, 1, 1, 1, 1),
    # One off each edge of the CPU's 14x32, 6x16 and 6x8 tiles and of the GPU tiles' powers of two.
    Case(2, 3, 31, 13, 1), Case(2, 3, 32, 14, 1), Case(2, 3, 33, 15, 1), Case(1, 2, 15, 5, 1), Case(1, 2, 17, 7, 2),
    Case(3, 16, 64, 64, 1), Case(3, 15, 63, 65, 1), Case(3, 17, 65, 63, 2), Case(2, 33, 127, 129, 1),
    # Primes, and the ends of T and K; 521 tokens are several blocks of the CPU's L1 for every instruction set.
    Case(7, 13, 101, 53, 3), Case(5, 1, 37, 41, 1), Case(1, 521, 19, 23, 0), Case(3, 5, 29, 31, 16),
    # Long rows of p and of d: many row groups, many column cuts.
    Case(2, 4, 16, 600, 1), Case(2, 4, 600, 16, 1),
    # Layouts, sums on top of sums, and values far from 1.
    Case(3, 7, 40, 24, 2, "sliced"), Case(3, 7, 40, 24, 1, "transposed"), Case(4, 5, 33, 18, 1, "expanded"),
    Case(3, 6, 35, 20, 1, accumulate=True), Case(3, 9, 34, 20, 1, scale=1e-4), Case(2, 9, 34, 20, 1, scale=30.0),
]

LARGE = [
    # Long tokens (several passes of the packed panels), too much to pack at once on either side, and the sizes of the
    # benchmark.
    Case(1, 4096, 40, 70, 1), Case(3, 3000, 33, 29, 1), Case(3, 2048, 900, 1000, 1),
    Case(3, 2048, 1000, 900, 2, accumulate=True), Case(3, 2048, 40, 3000, 1), Case(3, 2048, 3000, 40, 1),
    Case(8, 256, 768, 3072, 1), Case(16, 128, 768, 768, 1),
]
TYPICAL = [Case(8, 128, 256, 1024, 1), Case(32, 16, 512, 512, 1)]
"""What `ghostgram bench` times: sizes that layers of small models have, and that the reference is done with in a second."""
# fmt: on


def inputs(case: Case, dtype: str, seed: int = 0) -> layouts.Values:
    """a, b, D and a starting weight_grad, as float64 values that `dtype` represents exactly."""
    rng = np.random.default_rng([seed, case.samples, case.tokens, case.d, case.p])
    sizes = (case.samples, case.tokens)
    a, b = (layouts.rounded(case.scale * rng.standard_normal((*sizes, n)), dtype) for n in (case.d, case.p))
    D = layouts.rounded(rng.standard_normal((case.directions, case.p, case.d)), dtype) if case.directions else None
    start = rng.standard_normal((case.p, case.d))
    if case.layout == "expanded" and case.samples:  # stride 0 over samples
        a = np.broadcast_to(a[:1], a.shape).copy()
    return {"a": a, "b": b, "D": D, "weight_grad": layouts.rounded(start, "float32")}


def arrays(case: Case, values: layouts.Values, make: layouts.Make, dtype: str) -> dict[str, Any]:
    """The values as arrays of a framework, in the layout of the case; weight_grad is the output's starting value."""
    sums = "float64" if dtype == "float64" else "float32"
    made = {
        name: None if x is None else make(x, dtype, case.layout) for name, x in values.items() if name != "weight_grad"
    }
    D_layout = "contiguous" if case.layout == "expanded" else case.layout
    if values["D"] is not None:
        made["D"] = make(values["D"], sums if case.directions % 2 else dtype, D_layout)
    return made | {"weight_grad": make(values["weight_grad"], sums, "contiguous")}


def call(case: Case, made: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """All that the room is called with, and its outputs among it, poisoned with NaN."""
    a, b, weight_grad = made["a"], made["b"], made["weight_grad"]
    if not case.accumulate:
        weight_grad = layouts.poisoned(weight_grad)
    norms2 = layouts.poisoned(weight_grad, (case.samples,))
    dots = layouts.poisoned(weight_grad, (case.samples, case.directions))
    arguments = (a, b, made["D"], weight_grad, norms2, dots, case.accumulate)
    return arguments, {"weight_grad": weight_grad, "norms2": norms2, "dots": dots}


def run(case: Case, made: dict[str, Any], backend: str) -> dict[str, Any]:
    """Runs the room itself, below the front door."""
    arguments, outputs = call(case, made)
    _dispatch.run("grad_stats", backend, *arguments)
    return outputs


def scales(case: Case, values: layouts.Values) -> dict[str, F64]:
    """For every output, the same sums over absolute values: what rounding errors are relative to."""
    a, b, D, start = (layouts.absolute(values)[name] for name in ("a", "b", "D", "weight_grad"))
    gradients = np.einsum("itp,itd->ipd", b, a, optimize=True)
    return {
        "weight_grad": gradients.sum(0) + (start if case.accumulate else 0),
        "norms2": np.sum(gradients**2, axis=(1, 2)),
        "dots": np.zeros((case.samples, 0)) if D is None else np.einsum("ipd,kpd->ik", gradients, D, optimize=True),
    }


def bound(case: Case, dtype: str) -> float:
    """A relative error bound with respect to `scales`.

    A sum of n rounded products is off by at most n u of the sum of absolute values, and by about sqrt(n) u when
    roundings are independent; 3 sqrt(n) u is the probabilistic bound (Higham and Mary 2019, lambda = 3) for
    n = T + B terms of weight_grad, each sample's tile being finished before it is added, plus one for the products with
    D. Squares double the relative error of what is squared. Sums over tiles are float64. Inputs are exact in their
    dtype and products are made in float32, so half types have float32's bound.
    """
    unit = layouts.UNIT["float64" if dtype == "float64" else "float32"]
    return 6 * unit * (math.sqrt(case.tokens + case.samples) + 4)
