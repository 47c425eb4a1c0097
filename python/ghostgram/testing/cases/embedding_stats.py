"""Cases of embedding_stats: all ids equal, all distinct, padded; ids that repeat one row of memory for all samples."""

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
    """One set of sizes; `layout` names how ids and b lie in memory, `ids` how they repeat."""

    samples: int
    tokens: int
    rows: int
    features: int
    directions: int
    ids: str = "random"
    padding_idx: int = -1
    id_dtype: str = "int64"
    layout: str = "contiguous"

    def __post_init__(self) -> None:
        if self.samples * self.tokens and self.rows < (self.tokens if self.ids == "distinct" else 1):
            raise ValueError(f"rows: expected one for every {self.ids} id, got {self.rows}")

    @property
    def id(self) -> str:
        """A name for test reports."""
        padding = f"pad{self.padding_idx}-" if self.padding_idx >= 0 else ""
        sizes = f"B{self.samples}T{self.tokens}V{self.rows}E{self.features}K{self.directions}"
        return f"{sizes}-{self.ids}-{padding}{self.id_dtype}-{self.layout}"

    @property
    def flops(self) -> int:
        """Multiply-adds count two: a row's sum, its square and its dots, as if no id repeated."""
        return self.samples * self.tokens * self.features * (1 + 2 * (1 + self.directions))

    def bytes(self, dtype: str) -> int:
        """What a perfect kernel reads once, as if no id repeated: ids, b, and the rows of D."""
        id_bytes = 8 if self.id_dtype == "int64" else 4
        row = self.features * layouts.ITEM[dtype]
        return self.samples * self.tokens * (id_bytes + row * (1 + self.directions))


# fmt: off
CASES = [
    # Degenerate and tiny.
    Case(0, 4, 3, 2, 1), Case(2, 0, 3, 2, 1), Case(2, 3, 4, 0, 1), Case(1, 1, 1, 1, 1), Case(3, 5, 4, 3, 0),
    # Repetition, and padding at both ends of the table and outside it.
    Case(3, 17, 5, 7, 1), Case(2, 31, 1, 9, 1, "equal"), Case(2, 31, 40, 9, 2, "distinct"), Case(3, 17, 5, 7, 1, padding_idx=0),
    Case(3, 17, 5, 7, 2, padding_idx=4), Case(2, 8, 1, 5, 1, "equal", padding_idx=0), Case(3, 6, 5, 4, 1, padding_idx=9),
    # One off the edges of vectors, of four of them, and of the cuts of columns.
    Case(3, 13, 11, 63, 1), Case(3, 13, 11, 64, 1), Case(3, 13, 11, 65, 3), Case(2, 7, 5, 255, 1), Case(2, 7, 5, 513, 1),
    Case(1, 5, 3, 1031, 2), Case(70, 3, 9, 300, 1),
    # Types and layouts.
    Case(3, 17, 5, 33, 1, id_dtype="int32"), Case(3, 7, 6, 20, 1, layout="sliced"), Case(3, 7, 6, 20, 2, layout="transposed"),
    Case(4, 9, 12, 20, 1, "distinct", layout="expanded"), Case(4, 9, 3, 20, 1, layout="expanded", padding_idx=1),
]

LARGE = [Case(16, 512, 5003, 768, 1), Case(2, 4096, 97, 512, 2), Case(8, 128, 200, 768, 1, "distinct", layout="expanded")]
TYPICAL = [Case(16, 256, 5000, 512, 1), Case(16, 256, 100, 512, 1)]
"""What `ghostgram bench` times: sizes that layers of small models have, and that the reference is done with in a second."""
# fmt: on


def inputs(case: Case, dtype: str, seed: int = 0) -> layouts.Values:
    """ids, b and D, as float64 values that their dtypes represent exactly."""
    rng = np.random.default_rng([seed, case.samples, case.tokens, case.rows, case.features])
    shape = (case.samples, case.tokens)
    if case.ids == "random":
        ids = rng.integers(0, case.rows, shape)
        if case.padding_idx >= 0:
            ids = np.where(rng.random(shape) < 0.3, case.padding_idx, ids)
    else:
        ids = np.broadcast_to(np.arange(case.tokens) if case.ids == "distinct" else 0, shape)
    if case.layout == "expanded" and case.samples:
        ids = np.broadcast_to(ids[:1], shape)
    D = rng.standard_normal((case.directions, case.rows, case.features)) if case.directions else None
    return {
        "ids": ids.astype(np.float64),
        "b": layouts.rounded(rng.standard_normal((*shape, case.features)), dtype),
        "D": None if D is None else layouts.rounded(D, dtype),
    }


def arrays(case: Case, values: layouts.Values, make: layouts.Make, dtype: str) -> dict[str, Any]:
    """The values as arrays of a framework; only ids are ever expanded, and never sliced out of a NaN-filled array."""
    sums = "float64" if dtype == "float64" else "float32"
    b_layout = "contiguous" if case.layout == "expanded" else case.layout
    return {
        "ids": make(values["ids"], case.id_dtype, "contiguous" if case.layout == "sliced" else case.layout),
        "b": make(values["b"], dtype, b_layout),
        "D": None if values["D"] is None else make(values["D"], sums if case.directions % 2 else dtype, b_layout),
    }


def call(case: Case, made: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """All that the room is called with, and its outputs among it, poisoned with NaN."""
    norms2 = layouts.poisoned_sums(made["b"], (case.samples,))
    dots = layouts.poisoned_sums(made["b"], (case.samples, case.directions))
    arguments = (made["ids"], made["b"], made["D"], norms2, dots, case.padding_idx)
    return arguments, {"norms2": norms2, "dots": dots}


def run(case: Case, made: dict[str, Any], backend: str) -> dict[str, Any]:
    """Runs the room itself, below the front door."""
    arguments, outputs = call(case, made)
    _dispatch.run("embedding_stats", backend, *arguments)
    return outputs


def scales(case: Case, values: layouts.Values) -> dict[str, F64]:
    """For every output, the same sums over absolute values: what rounding errors are relative to."""
    norms2, dots = np.zeros(case.samples), np.zeros((case.samples, case.directions))
    for i, ids in enumerate(values["ids"].astype(np.int64)):
        counted = ids != case.padding_idx
        rows, where = np.unique(ids[counted], return_inverse=True)
        gradient = np.zeros((len(rows), case.features))
        np.add.at(gradient, where, np.abs(values["b"][i][counted]))
        norms2[i] = np.sum(gradient**2)
        if values["D"] is not None:
            dots[i] = np.sum(gradient * np.abs(values["D"][:, rows]), axis=(1, 2))
    return {"norms2": norms2, "dots": dots}


def bound(case: Case, dtype: str) -> float:
    """A relative error bound with respect to `scales`.

    A row is a sum of at most T terms, off by 3 sqrt(T) u (Higham and Mary 2019, lambda = 3); squaring doubles that; the
    sum of E products over its lanes adds 3 sqrt(E) u at most. Sums over rows are float64. Half types are exact once
    widened.
    """
    unit = layouts.UNIT["float64" if dtype == "float64" else "float32"]
    return 3 * unit * (2 * math.sqrt(case.tokens) + math.sqrt(case.features) + 4)
