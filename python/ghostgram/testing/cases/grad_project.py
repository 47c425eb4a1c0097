"""Cases of grad_project: both kinds at sizes around every tile, panel and block edge, matrices given and drawn."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ghostgram import _dispatch
from ghostgram.reference import grad_project as reference
from ghostgram.testing import layouts

F64 = NDArray[np.float64]
DTYPES = ("float32", "float64", "bfloat16", "float16")


@dataclass(frozen=True)
class Case:
    """One set of sizes; `size` is (k_out, k_in), or (k, nonzeros) where sparse; `given` names matrices not drawn."""

    samples: int
    tokens: int
    d: int
    p: int
    size: tuple[int, int]
    kind: str = "rademacher"
    given: tuple[str, ...] = ()
    layout: str = "contiguous"
    seed: int = 2**40 + 7
    layer: int = 3

    @property
    def id(self) -> str:
        """A name for test reports."""
        sizes = f"B{self.samples}T{self.tokens}d{self.d}p{self.p}k{self.size[0]}x{self.size[1]}"
        return "-".join([sizes, self.kind, *self.given, self.layout])

    @property
    def sparse(self) -> bool:
        """Whether this is a count sketch."""
        return self.kind == "sparse"

    @property
    def flops(self) -> int:
        """Multiply-adds count two, a scattered entry one."""
        if self.sparse:
            return self.samples * self.d * self.p * (2 * self.tokens + self.size[1])
        k_out, k_in = self.size
        return 2 * self.samples * self.tokens * (self.p * k_out + self.d * k_in + k_out * k_in)

    def bytes(self, dtype: str) -> int:
        """What a perfect kernel reads and writes once."""
        sums = 8 if dtype == "float64" else 4
        rows = self.samples * self.tokens * (self.d + self.p) * layouts.ITEM[dtype]
        features = {"P_out": self.p * self.size[0], "P_in": self.d * self.size[1]}
        results = self.samples * (self.size[0] if self.sparse else self.size[0] * self.size[1])
        return rows + sums * (results + sum(features[name] for name in self.given))


BOTH = ("P_out", "P_in")
# fmt: off
CASES = [
    # Degenerate and tiny.
    *(Case(*sizes, (3, 2), kind) for kind in ("rademacher", "sparse")
      for sizes in ((0, 4, 3, 2), (2, 0, 3, 2), (2, 3, 0, 2), (2, 3, 4, 0), (1, 1, 1, 1))),
    Case(2, 3, 5, 4, (1, 1)), Case(2, 3, 5, 4, (1, 1), "sparse"), Case(2, 3, 5, 4, (0, 2), given=BOTH),
    # One off the panels of 32 and 16 rows, the tiles of 28, 14, 12 and 6, the 128 rows and 16 columns of a draw.
    Case(3, 5, 15, 17, (13, 31)), Case(2, 7, 16, 33, (14, 32)), Case(2, 7, 17, 16, (15, 33)), Case(2, 9, 129, 31, (29, 17)),
    Case(3, 4, 20, 9, (129, 16)), Case(1, 3, 9, 20, (12, 257)), Case(2, 5, 7, 5, (6, 8)), Case(2, 5, 7, 5, (7, 15)),
    # Blocks of 128 features and groups of 56 or 48 tokens; samples that share a group; one long sample.
    Case(1, 55, 127, 128, (4, 5)), Case(1, 57, 257, 130, (3, 16)), Case(19, 3, 11, 12, (5, 6)), Case(113, 1, 13, 10, (3, 4)),
    Case(1, 1009, 7, 6, (5, 3)), Case(29, 31, 23, 37, (2, 33)),
    Case(3, 5, 37, 19, (6, 9), "gaussian"), Case(2, 3, 17, 130, (35, 33), "gaussian"), Case(1, 2, 5, 3, (4, 4), "gaussian"),
    # Matrices of the caller's own, both or one of them.
    Case(3, 5, 37, 19, (6, 9), given=BOTH), Case(2, 9, 130, 31, (33, 17), given=BOTH),
    Case(2, 5, 18, 33, (17, 40), "gaussian", ("P_in",)), Case(2, 5, 18, 33, (17, 40), given=("P_out",)),
    # Tiles of 8 x 3 and 4 x 3 elements, blocks of 32 x 48, pieces of 32 tokens, vectors of 16, 8 and 4 samples.
    Case(3, 5, 2, 7, (5, 1), "sparse"), Case(3, 5, 3, 8, (8, 2), "sparse"), Case(2, 7, 4, 9, (7, 3), "sparse"),
    Case(2, 3, 47, 31, (16, 1), "sparse"), Case(2, 3, 48, 32, (17, 4), "sparse"), Case(2, 3, 49, 33, (64, 5), "sparse"),
    Case(8, 66, 10, 11, (9, 1), "sparse"), Case(16, 33, 10, 11, (9, 2), "sparse"), Case(17, 34, 5, 9, (9, 1), "sparse"),
    Case(1, 64, 10, 11, (9, 1), "sparse"), Case(1, 1009, 7, 6, (13, 2), "sparse"), Case(5, 3, 13, 10, (6, 6), "sparse"),
    Case(67, 1, 13, 10, (11, 1), "sparse"), Case(83, 2, 50, 70, (257, 2), "sparse"), Case(2, 3, 20, 300, (33, 1), "sparse"),
    Case(2, 2, 700, 5, (60, 33), "sparse"),
    # Layouts.
    *(Case(4, 5, 33, 18, (9, 6), kind, given, layout)
      for kind, given in (("rademacher", BOTH), ("sparse", ())) for layout in ("sliced", "transposed", "expanded")),
]

LARGE = [
    Case(8, 256, 768, 3072, (64, 64)), Case(256, 1, 768, 3072, (16, 16), "gaussian"), Case(3, 700, 333, 217, (65, 129)),
    Case(8, 256, 768, 768, (4096, 1), "sparse"), Case(256, 1, 768, 768, (4096, 4), "sparse"), Case(3, 700, 333, 217, (999, 2), "sparse"),
]
TYPICAL = [Case(8, 128, 256, 1024, (32, 32)), Case(32, 16, 256, 256, (2048, 1), "sparse")]
"""What `ghostgram bench` times: sizes that layers of small models have, and that the reference is done with in a second."""
# fmt: on


def inputs(case: Case, dtype: str, seed: int = 0) -> layouts.Values:
    """a, b and the matrices given, as float64 values that `dtype` represents exactly."""
    rng = np.random.default_rng([seed, case.samples, case.tokens, case.d, case.p])
    a, b = (rng.standard_normal((case.samples, case.tokens, n)) for n in (case.d, case.p))
    if case.layout == "expanded":  # stride 0 over samples
        a = np.broadcast_to(a[:1], a.shape)
    P_out, P_in = (rng.standard_normal(shape) for shape in zip(case.size, (case.p, case.d), strict=True))
    values = {"a": a, "b": b} | {name: P for name, P in (("P_out", P_out), ("P_in", P_in)) if name in case.given}
    return {"P_out": None, "P_in": None} | {name: layouts.rounded(x, dtype) for name, x in values.items()}


def arrays(case: Case, values: layouts.Values, make: layouts.Make, dtype: str) -> dict[str, Any]:
    """The values as arrays of a framework; only a is ever expanded. Matrices come in the dtype of a or of its sums."""
    sums = "float64" if dtype == "float64" else "float32"
    plain = "contiguous" if case.layout == "expanded" else case.layout
    made = {"a": make(values["a"], dtype, case.layout), "b": make(values["b"], dtype, plain)}
    for name in BOTH:
        P = values[name]
        if P is not None:
            P = make(P[None], sums if case.size[0] % 2 else dtype, plain)[0]
        made[name] = P
    return made


def call(case: Case, made: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """All that the room is called with, and its outputs among it, poisoned with NaN."""
    out = layouts.poisoned_sums(made["a"], (case.samples, *(case.size[:1] if case.sparse else case.size)))
    given = (made["a"], made["b"], made["P_out"], made["P_in"])
    options = (case.kind, case.size[1] if case.sparse else 0, case.seed, case.layer)
    return (*given, out, *options), {"out": out}


def run(case: Case, made: dict[str, Any], backend: str) -> dict[str, Any]:
    """Runs the room itself, below the front door."""
    arguments, outputs = call(case, made)
    _dispatch.run("grad_project", backend, *arguments)
    return outputs


def scales(case: Case, values: layouts.Values) -> dict[str, F64]:
    """The same sums over absolute values: what rounding errors are relative to."""
    a, b, P_out, P_in = (layouts.absolute(values)[name] for name in ("a", "b", "P_out", "P_in"))
    if not case.sparse:
        k_out, k_in = case.size
        drawn = (case.kind, case.seed, case.layer)
        P_out = np.abs(reference.matrix(drawn[0], k_out, case.p, 0, *drawn[1:])) if P_out is None else P_out
        P_in = np.abs(reference.matrix(drawn[0], k_in, case.d, 1, *drawn[1:])) if P_in is None else P_in
        return {"out": (b @ P_out.T).swapaxes(1, 2) @ (a @ P_in.T)}
    k, nonzeros = case.size
    buckets, _ = reference.hashes(case.p, case.d, k, nonzeros, case.seed, case.layer)
    sums = np.zeros((case.samples, k))
    for i in range(case.samples):
        terms = np.broadcast_to(b[i].T @ a[i], buckets.shape) / math.sqrt(nonzeros)
        sums[i] = np.bincount(buckets.ravel(), terms.ravel(), minlength=k)
    return {"out": sums}


def bound(case: Case, dtype: str) -> float:
    """A relative error bound with respect to `scales`.

    A sum of n rounded products is off by at most 3 sqrt(n) u of its sum of absolute values (Higham and Mary 2019,
    lambda = 3). Kronecker: tokens are sums of d and of p products, whose errors add in the product of two, and these are
    summed over T; a drawn normal is rounded once and, in float64, off by a few units; the scale is rounded and multiplied
    with. Sparse: an entry is a sum of T products; a bucket gets d p nonzeros / k entries on average, of which all rounds
    but those between pieces of a sample are in the sums' dtype, and the fullest bucket gets no more than six standard
    deviations more. Half types are exact once widened.
    """
    unit = layouts.UNIT["float64" if dtype == "float64" else "float32"]
    if not case.sparse:
        return 3 * unit * (math.sqrt(case.d) + math.sqrt(case.p) + math.sqrt(case.tokens) + 8)
    load = case.d * case.p / max(1, case.size[0] // case.size[1])
    return 3 * unit * (math.sqrt(case.tokens) + math.sqrt(load + 6 * math.sqrt(load) + 6) + 4)
