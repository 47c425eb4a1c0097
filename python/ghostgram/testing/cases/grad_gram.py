"""Cases of grad_gram: token counts around every tile and group edge, one side and two, and the diagonal alone."""

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
    """One set of sizes; `second` is (B2, T2) of the second side, or None for the symmetric form."""

    samples: int
    tokens: int
    d: int
    p: int
    second: tuple[int, int] | None = None
    diagonal: bool = False
    layout: str = "contiguous"

    @property
    def id(self) -> str:
        """A name for test reports."""
        form = "diagonal" if self.diagonal else "x{}T{}".format(*self.second) if self.second else "symmetric"
        return f"B{self.samples}T{self.tokens}d{self.d}p{self.p}-{form}-{self.layout}"

    @property
    def pairs(self) -> float:
        """Pairs of tokens whose products are needed: half of them by symmetry without a second side."""
        rows = self.samples * self.tokens
        if self.second:
            return rows * self.second[0] * self.second[1]
        return rows * (self.tokens if self.diagonal else rows) / 2

    @property
    def flops(self) -> float:
        """Multiply-adds count two: two scores for every pair of tokens."""
        return 2 * self.pairs * (self.d + self.p)

    def bytes(self, dtype: str) -> int:
        """What a perfect kernel reads and writes once."""
        samples2, tokens2 = self.second or (self.samples, 0)
        results = self.samples * (1 if self.diagonal else samples2)
        tokens = self.samples * self.tokens + samples2 * tokens2
        return tokens * (self.d + self.p) * layouts.ITEM[dtype] + results * (8 if dtype == "float64" else 4)


# fmt: off
CASES = [
    # Degenerate and tiny.
    Case(0, 4, 3, 2), Case(2, 0, 3, 2), Case(2, 3, 0, 2), Case(2, 3, 4, 0), Case(1, 1, 1, 1), Case(1, 1, 1, 1, (1, 1)),
    Case(0, 4, 3, 2, diagonal=True), Case(2, 0, 3, 2, diagonal=True), Case(3, 2, 5, 4, (0, 2)),
    Case(3, 2, 5, 4, (2, 0)),
    Case(0, 2, 5, 4, (3, 2)), Case(1, 1, 1, 1, diagonal=True),
    # One off the 4-token tile and the edges of vectors; samples that share tiles and that do not.
    Case(5, 1, 15, 17), Case(3, 3, 16, 31), Case(3, 4, 8, 9), Case(2, 5, 7, 33), Case(7, 1, 3, 2, (5, 1)),
    Case(3, 1, 33, 20, (4, 6)), Case(2, 7, 20, 33, (5, 1)), Case(3, 5, 18, 12, (2, 9)),
    Case(5, 1, 15, 17, diagonal=True), Case(3, 3, 16, 31, diagonal=True), Case(3, 4, 8, 9, diagonal=True),
    Case(2, 5, 7, 33, diagonal=True), Case(3, 2, 47, 21, diagonal=True), Case(2, 9, 33, 1, diagonal=True),
    # The diagonal's short samples end at 16 tokens.
    Case(3, 16, 35, 18, diagonal=True), Case(3, 17, 35, 18, diagonal=True), Case(2, 13, 1031, 40, diagonal=True),
    # Several groups of samples, samples longer than a group (in pieces), more features than a block.
    Case(40, 3, 6, 5), Case(11, 13, 10, 7), Case(3, 37, 11, 6), Case(2, 101, 9, 8, (3, 67)), Case(37, 2, 5, 6, (2, 71)),
    Case(3, 37, 11, 6, diagonal=True), Case(2, 131, 9, 8, diagonal=True), Case(3, 6, 1031, 1027),
    Case(2, 5, 2053, 3, diagonal=True),
    # Layouts.
    Case(3, 7, 40, 24, (4, 5), layout="sliced"), Case(3, 7, 40, 24, layout="transposed"),
    Case(4, 5, 33, 18, layout="expanded"), Case(4, 5, 33, 18, diagonal=True, layout="sliced"),
]

LARGE = [
    Case(8, 256, 192, 320), Case(4, 1024, 64, 48, diagonal=True), Case(64, 16, 768, 768),
    Case(32, 64, 256, 256, (16, 40)),
]
TYPICAL = [Case(16, 64, 512, 512), Case(64, 16, 512, 512, diagonal=True)]
"""What `ghostgram bench` times: sizes that layers of small models have, and that the reference is done with in a second."""
# fmt: on


def inputs(case: Case, dtype: str, seed: int = 0) -> layouts.Values:
    """Both sides, as float64 values that `dtype` represents exactly."""
    rng = np.random.default_rng([seed, case.samples, case.tokens, case.d, case.p])
    values: layouts.Values = {"a": None, "b": None, "a2": None, "b2": None}
    sides = [("a", "b", (case.samples, case.tokens))] + ([("a2", "b2", case.second)] if case.second else [])
    for a, b, shape in sides:
        values[a] = layouts.rounded(rng.standard_normal((*shape, case.d)), dtype)
        values[b] = layouts.rounded(rng.standard_normal((*shape, case.p)), dtype)
    if case.layout == "expanded":  # stride 0 over samples
        values["a"] = np.broadcast_to(values["a"][:1], values["a"].shape).copy()
    return values


def arrays(case: Case, values: layouts.Values, make: layouts.Make, dtype: str) -> dict[str, Any]:
    """The values as arrays of a framework, in the layout of the case."""
    only_a = case.layout == "expanded"
    return {
        name: None if x is None else make(x, dtype, "contiguous" if only_a and name != "a" else case.layout)
        for name, x in values.items()
    }


def call(case: Case, made: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """All that the room is called with, and its outputs among it, poisoned with NaN."""
    columns = case.second[0] if case.second else case.samples
    out = layouts.poisoned_sums(made["a"], (case.samples,) if case.diagonal else (case.samples, columns))
    return (made["a"], made["b"], made["a2"], made["b2"], out), {"out": out}


def run(case: Case, made: dict[str, Any], backend: str) -> dict[str, Any]:
    """Runs the room itself, below the front door."""
    arguments, outputs = call(case, made)
    _dispatch.run("grad_gram", backend, *arguments)
    return outputs


def scales(case: Case, values: layouts.Values) -> dict[str, F64]:
    """The same sums over absolute values: what rounding errors are relative to."""
    a, b, a2, b2 = (layouts.absolute(values)[name] for name in ("a", "b", "a2", "b2"))
    first = (b.swapaxes(1, 2) @ a).reshape(case.samples, case.p * case.d)
    if case.diagonal:
        return {"out": np.sum(first * first, axis=1)}
    if a2 is None:
        return {"out": first @ first.T}
    return {"out": first @ (b2.swapaxes(1, 2) @ a2).reshape(len(a2), case.p * case.d).T}


def bound(case: Case, dtype: str) -> float:
    """A relative error bound with respect to `scales`.

    The scores are sums of d and of p rounded products, each off by 3 sqrt(n) u of its sum of absolute values
    (Higham and Mary 2019, lambda = 3); their errors add in the product. A tile's 16 products are summed by halving,
    in at most 5 roundings with the product's own, tiles in float64. Half types are exact once widened.
    """
    unit = layouts.UNIT["float64" if dtype == "float64" else "float32"]
    return 3 * unit * (math.sqrt(case.d) + math.sqrt(case.p) + 4)
