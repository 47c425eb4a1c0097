"""Cases of adam_dots: sizes around every tile edge, and moments and gradients that a careless step loses its digits on."""

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
INPUTS = ("a", "b", "clip", "m", "v", "D")
STEP_FLOPS = 18
"""Of one element's change of step: 16 multiplications, additions and the like, a root and a division."""
SMALLEST = {"float64": (2.0**-1022, 2.0**-998), "float32": (2.0**-126, 2.0**-116)}
"""By dtype of the sums: the smallest normal number, and what a root of v or a gradient is as good as 0 below."""


@dataclass(frozen=True)
class Case:
    """One set of sizes; `layout` names how a, b, m, v and D lie in memory.

    `kind` says what the elements are like: "trained" (gradients as large as the moments say), "small" ones (1e-4 of
    that: the naive difference of two steps has no digit left), "first" (the very first step: m = v = 0), "wide"
    (m, v and the gradient over tens of decades, with zeros among the moments), "huge" and "tiny" (gradients whose square
    is out of range, and moments as far out as they get), "none" (every gradient 0).
    """

    samples: int
    tokens: int
    d: int
    p: int
    directions: int
    layout: str = "contiguous"
    kind: str = "trained"
    step: int = 1000

    @property
    def id(self) -> str:
        """A name for test reports."""
        extra = f"+{self.kind}" if self.kind != "trained" else ""
        return f"B{self.samples}T{self.tokens}d{self.d}p{self.p}R{self.directions}-{self.layout}{extra}"

    @property
    def scalars(self) -> tuple[float, ...]:
        """eta, beta1, beta2, eps and both bias corrections of the step numbered `step`."""
        eps = 1e-30 if self.kind == "tiny" else 1e-8
        return (1e-3, 0.9, 0.95, eps, 1 - 0.9**self.step, 1 - 0.95**self.step)

    @property
    def flops(self) -> int:
        """Multiply-adds count two: the gradient and its dots; a root and a division count one each."""
        return self.samples * self.d * self.p * (2 * self.tokens + STEP_FLOPS + 2 * self.directions)

    def bytes(self, dtype: str) -> int:
        """What a perfect kernel reads and writes once."""
        sums = 8 if dtype == "float64" else 4
        rows = self.samples * self.tokens * (self.d + self.p) * layouts.ITEM[dtype]
        return rows + self.d * self.p * sums * (2 + self.directions) + self.samples * (1 + self.directions) * sums


# fmt: off
CASES = [
    # Degenerate and tiny.
    Case(0, 4, 3, 2, 1), Case(2, 0, 3, 2, 1), Case(2, 3, 0, 2, 1), Case(2, 3, 4, 0, 1), Case(2, 3, 4, 5, 0), Case(1, 1, 1, 1, 1),
    # One off each edge of the CPU's 14x32, 6x16 and 6x8 tiles and of the GPU tiles' powers of two.
    Case(2, 3, 31, 13, 1), Case(2, 3, 32, 14, 1), Case(2, 3, 33, 15, 1), Case(1, 2, 15, 5, 1), Case(1, 2, 17, 7, 2),
    Case(3, 16, 64, 64, 1), Case(3, 17, 65, 63, 2), Case(2, 33, 127, 129, 1),
    # Primes, the ends of T and R; gradients that are already formed (T = p = 1); one column of them.
    Case(7, 13, 101, 53, 3), Case(5, 1, 37, 41, 1), Case(1, 257, 19, 23, 1), Case(3, 5, 29, 31, 11),
    Case(6, 1, 500, 1, 2), Case(6, 1, 1, 70, 2),
    # Long rows of p and of d: many row groups, many column cuts.
    Case(2, 4, 16, 600, 1), Case(2, 4, 600, 16, 1),
    # Layouts.
    Case(3, 7, 40, 24, 2, "sliced"), Case(3, 7, 40, 24, 1, "transposed"), Case(4, 5, 33, 18, 1, "expanded"),
    # Elements of every kind, with sums of tokens and without.
    *(Case(3, tokens, 35, 20, 1, kind=kind) for kind in ("small", "wide", "huge", "tiny") for tokens in (1, 6)),
    Case(3, 4, 35, 20, 2, kind="first", step=1), Case(2, 3, 19, 15, 1, kind="none"), Case(2, 1, 35, 20, 1, step=2),
]

LARGE = [
    # Long tokens (several passes of the packed panels), and as many rows and columns as a layer has.
    Case(1, 4096, 40, 70, 1), Case(2, 2048, 300, 1000, 1), Case(4, 128, 768, 768, 2, kind="wide"),
]
TYPICAL = [Case(8, 128, 256, 1024, 1), Case(64, 1, 256, 256, 1)]
"""What `ghostgram bench` times: sizes that layers of small models have, and that the reference is done with in a second."""
# fmt: on


def inputs(case: Case, dtype: str, seed: int = 0) -> layouts.Values:
    """a, b, clip, m, v and D, as float64 values that their dtypes represent exactly."""
    rng = np.random.default_rng([seed, case.samples, case.tokens, case.d, case.p])
    sums = "float64" if dtype == "float64" else "float32"
    moments = moment_dtype(case, dtype)
    shape, sizes = (case.p, case.d), (case.samples, case.tokens)
    far = {} if dtype == "float16" else {"huge": 1e17, "tiny": 1e-17}
    root = ({"first": 0.0} | far).get(case.kind, 1e-3) * np.exp(rng.standard_normal(shape))
    if case.kind == "wide":
        root = 10 ** rng.uniform(-20, 0, shape)
    m = 0.3 * root * rng.standard_normal(shape)
    if case.kind == "wide":
        m *= 10 ** rng.uniform(-12, 2, shape)
        m[rng.random(shape) < 0.2] = 0
    if case.kind in ("wide", "none"):
        root[rng.random(shape) < 0.2] = 0
    of_tokens = 1 / math.sqrt(max(case.tokens, 1))
    limits = {"huge": (1e14, 1e17), "tiny": (1e-10, 1e-9)} if dtype != "float16" else {"huge": (100.0, 100.0)}
    a_size, b_size = limits.get(case.kind, (1.0, {"small": 1e-7, "none": 0.0}.get(case.kind, 1e-3) * of_tokens))
    if dtype == "float16" and case.kind not in limits and b_size:
        a_size, b_size = 1.0, max(b_size, 1e-3)
    a, b = (size * rng.standard_normal((*sizes, n)) for size, n in ((a_size, case.d), (b_size, case.p)))
    if case.kind == "wide":  # tokens of sizes that differ as much
        b *= 10 ** rng.uniform(-3 if dtype == "float16" else -12, 0, b.shape)
    a, b = layouts.rounded(a, dtype), layouts.rounded(b, dtype)
    if case.layout == "expanded" and case.samples:  # stride 0 over samples
        a = np.broadcast_to(a[:1], a.shape).copy()
    clip = layouts.rounded(rng.uniform(0.2, 1, case.samples), sums)
    D = layouts.rounded(rng.standard_normal((case.directions, *shape)), dtype)
    return {
        "a": a, "b": b, "clip": clip, "m": layouts.rounded(m, moments), "v": layouts.rounded(root**2, moments), "D": D,
        "smallest": SMALLEST[sums], "bound": bound(case, dtype),
    }  # fmt: skip


def moment_dtype(case: Case, dtype: str) -> str:
    """bfloat16 moments where the number of tokens is even; never float16 ones, which have no v of 1e-8."""
    if dtype == "float16" or (dtype == "bfloat16" and case.tokens % 2):
        return "float32"
    return dtype


def arrays(case: Case, values: layouts.Values, make: layouts.Make, dtype: str) -> dict[str, Any]:
    """The values as arrays of a framework, in the layout of the case; D in either dtype that it may have."""
    sums = "float64" if dtype == "float64" else "float32"
    shared = "contiguous" if case.layout == "expanded" else case.layout
    moments = moment_dtype(case, dtype)
    matrices = {name: make(values[name][None], moments, shared)[0] for name in ("m", "v")}
    return {
        "a": make(values["a"], dtype, case.layout), "b": make(values["b"], dtype, case.layout),
        "clip": make(values["clip"], sums, "contiguous"), **matrices,
        "D": make(values["D"], sums if case.directions % 2 else dtype, shared),
    }  # fmt: skip


def call(case: Case, made: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """All that the room is called with, and its outputs among it, poisoned with NaN."""
    out = layouts.poisoned(made["clip"], (case.samples, case.directions))
    return (*(made[name] for name in INPUTS), out, *case.scalars), {"out": out}


def run(case: Case, made: dict[str, Any], backend: str) -> dict[str, Any]:
    """Runs the room itself, below the front door."""
    arguments, outputs = call(case, made)
    _dispatch.run("adam_dots", backend, *arguments)
    return outputs


def scales(case: Case, values: layouts.Values) -> dict[str, F64]:
    """What rounding errors are relative to: both terms' sizes, and what an error of g makes of them.

    An error of g, relative to sum_t |b| |a|, is multiplied by the terms' derivatives, at most eta (1 - beta1) / (bc1 s)
    and pull h s0 / (r s^2), h / r growing and s falling with |g| at the ends of what g may be. Numbers below the
    smallest normal one may be taken for 0 wherever they appear, and gradients that are no larger than the floor.
    """
    a, b, clip, m, v, D = (values[name] for name in INPUTS)
    eta, beta1, beta2, eps, bc1, bc2 = case.scalars
    k, u, (tiny, floor) = math.sqrt((1 - beta2) / bc2), values["bound"], values["smallest"]
    out = np.zeros((case.samples, case.directions))
    for i in range(case.samples):
        g = clip[i] * (b[i].T @ a[i])
        sum_of_sizes = clip[i] * (np.abs(b[i]).T @ np.abs(a[i]))
        off = sum_of_sizes + (clip[i] * case.tokens * tiny + floor / k) / u
        r0, h = np.sqrt(v) * math.sqrt(beta2 / bc2), k * np.abs(g)
        r, s0, most = np.hypot(h, r0), r0 + eps, np.hypot(k * (np.abs(g) + u * off), r0)
        least = np.hypot(k * np.maximum(np.abs(g) - u * off, 0), r0) + eps
        pull = eta * beta1 * np.abs(m) / (bc1 * s0)
        growth = h * np.divide(h, r + r0, out=np.zeros_like(h), where=h > 0)
        terms = eta * (1 - beta1) * np.abs(g) / (bc1 * (r + eps)) + pull * growth / (r + eps)
        steepness = np.divide(k * (np.abs(g) + u * off), most, out=np.zeros_like(h), where=most > 0)
        slopes = eta * (1 - beta1) / bc1 / least + pull * k * steepness * s0 / least**2
        size = terms + slopes * off + pull * tiny + tiny
        out[i] = np.sum(size * np.abs(D), axis=(1, 2))
    return {"out": out}


def bound(case: Case, dtype: str) -> float:
    """A relative error bound with respect to `scales`.

    The gradient, a sum of T rounded products, is off by 3 sqrt(T) u of the sum of absolute values (Higham and Mary
    2019, lambda = 3). Then either term takes 22 roundings at most: constants 2, clipping 2, r0 and the root 5, sums
    with root and eps 3, pull 4, products 4, division 2. Up to 32 products with D of one lane are added in
    float32, 3 sqrt(32) u; tiles are added in float64. Half types are exact once widened.
    """
    unit = layouts.UNIT["float64" if dtype == "float64" else "float32"]
    return unit * (3 * math.sqrt(case.tokens) + 22 + 3 * math.sqrt(32))
