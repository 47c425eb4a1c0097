"""Cases of gumbel_topk: reservoirs hardly larger than k, ties, repeated documents, ids beyond 32 bits, sorted scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ghostgram import _arrays, _dispatch
from ghostgram.testing import layouts

F64 = NDArray[np.float64]
DTYPES = ("float32", "float64", "bfloat16", "float16")
SEED = 0x123456789ABCDEF
KNOWN_BITS = "4a020ec69b7e4449"
"""Begins the SHA-256 of the ids and keys of 50 documents drawn with seed 2024 from scores i / 500 of ids i < 2000. What a
seed draws is part of the contract: a plan made last year must come out again, on any machine."""


@dataclass(frozen=True)
class Case:
    """One pool; `spare` is the room in the reservoir beyond k, `batches` how many calls the pool is spread over."""

    count: int
    k: int
    temperature: float = 1.0
    scores: str = "normal"
    ids: str = "none"
    spare: int = 512
    batches: int = 0
    """0: one call that picks positions; else calls that pick ids."""

    def __post_init__(self) -> None:
        if self.ids == "none" and self.batches:
            raise ValueError("ids: expected some, because positions begin again in every call")

    @property
    def id(self) -> str:
        """A name for test reports."""
        return f"N{self.count}k{self.k}T{self.temperature}-{self.scores}-ids_{self.ids}-spare{self.spare}-batches{self.batches}"

    @property
    def flops(self) -> int:
        """The 32-bit products of Philox's 10 rounds, less the two whose factor or result nobody needs: 18 for a document.

        Each takes the place of two float32 multiply-adds in a vector, which count two each.
        """
        return 4 * 18 * self.count

    def bytes(self, dtype: str) -> int:
        """What a perfect kernel moves once: scores and ids in, indices and keys out."""
        per_document = layouts.ITEM[dtype] + (0 if self.ids == "none" else 8)
        return self.count * per_document + 16 * min(self.k, self.count)


# fmt: off
CASES = [
    # Degenerate and tiny; k = 0, all, and more than all.
    Case(0, 5), Case(1, 1), Case(5, 0), Case(3000, 0), Case(7, 7), Case(7, 9, 0.5), Case(1, 0, 0.0),
    # One off the edges of vectors, of blocks and of claims; many rounds in a small reservoir.
    Case(511, 100), Case(512, 100), Case(513, 100, 2.0), Case(4999, 97), Case(8193, 1, 0.1), Case(8191, 1021, 3.0),
    Case(20011, 503, spare=700), Case(20011, 4001, ids="random"),
    # Scores in the worst orders, far apart, equal; no noise.
    Case(6007, 301, 1.0, "rising"), Case(6007, 301, 0.0, "rising"), Case(6007, 301, 1.0, "falling"),
    Case(5003, 211, 1.0, "wide"), Case(5003, 211, 0.0, "wide"), Case(5003, 211, 1.0, "equal"),
    Case(5003, 211, 0.0, "equal", ids="random"), Case(6007, 997, 0.0, ids="random"),
    # Ids beyond 32 bits, repeated documents, several calls.
    Case(4001, 301, 1.0, ids="high"), Case(4001, 301, 0.0, "equal", ids="high"), Case(6007, 701, 1.0, ids="repeated"),
    Case(3001, 2900, 1.0, ids="repeated", batches=2), Case(9001, 501, 2.0, ids="random", batches=5),
    Case(6007, 301, 1.0, "wide", ids="high", batches=3), Case(6007, 301, 0.0, "equal", ids="repeated", batches=3),
]

LARGE = [
    Case(300007, 20011, spare=65536), Case(200003, 1009, ids="high"), Case(300007, 150001, ids="random", spare=70000),
    Case(300007, 9001, 0.0, ids="repeated", spare=9000, batches=4), Case(1100003, 5003, spare=9000), # the last guesses
]
TYPICAL = [Case(1_000_000, 1_000, spare=65536), Case(100_000, 1_000, spare=65536)]
"""What `ghostgram bench` times: sizes that layers of small models have, and that the reference is done with in a second."""
# fmt: on


def inputs(case: Case, dtype: str, seed: int = 0) -> layouts.Values:
    """Scores as float64 values that their dtype represents exactly, and int64 ids."""
    rng = np.random.default_rng([seed, case.count, case.k])
    n = case.count
    ids: Any = None
    if case.ids == "random":
        ids = rng.permutation(3 * n)[:n]
    elif case.ids == "high":
        ids = rng.integers(-(2**63), 2**63, n)
    elif case.ids == "repeated":
        ids = rng.integers(0, max(1, n // 2), n)
    scores = np.zeros(n) if case.scores == "equal" else rng.standard_normal(n)
    if case.scores == "wide":
        scores = scores * 10.0 ** rng.integers(-4, 4, n)
    elif case.scores != "normal":
        scores = np.sort(scores)[:: 1 if case.scores == "rising" else -1]
    if case.ids == "repeated":
        scores = scores[ids]
    return {"scores": layouts.rounded(scores, dtype), "ids": ids}


def arrays(case: Case, values: layouts.Values, make: layouts.Make, dtype: str) -> dict[str, Any]:
    """The values as arrays of a framework."""
    ids = values["ids"]
    return {
        "scores": make(values["scores"], dtype, "contiguous"),
        "ids": None if ids is None else make(ids, "int64", "contiguous"),
    }


def reservoir(like: Any, size: int) -> tuple[Any, ...]:
    """An empty reservoir and what is wrong with it; its keys are poisoned with NaN, and the report with nonsense."""
    state = [
        _arrays.empty(like, (n,), dtype)
        for n, dtype in ((size, "float64"), (size, "int64"), (1, "int64"), (1, "float64"), (4, "int64"))
    ]
    for x, value in zip(state, (np.nan, 0, 0, -np.inf, 99), strict=True):
        x[...] = value
    return tuple(state)


def exact_keys(case: Case, values: layouts.Values) -> tuple[NDArray[np.int64], F64]:
    """What a pick may be, in rising order, and the reference's key of each: of repeated documents the first one."""
    n = case.count
    state = keys, picks, held, _, _ = reservoir(np.empty(0), n)
    by_position = case.batches == 0
    _dispatch.run(
        *("gumbel_topk", "reference", values["scores"], values["ids"], *state),
        *(n, SEED, case.temperature, by_position, True),
    )
    order = np.argsort(picks[: held[0]])
    return picks[order], keys[order]


def arguments(case: Case, made: dict[str, Any], state: tuple[Any, ...], batch: int) -> tuple[Any, ...]:
    """All that the room is called with for one batch."""
    scores, ids, batches = made["scores"], made["ids"], max(1, case.batches)
    part = slice(batch * case.count // batches, (batch + 1) * case.count // batches)
    inputs = scores[part], None if ids is None else ids[part]
    return (*inputs, *state, case.k, SEED, case.temperature, case.batches == 0, batch + 1 == batches)


def call(case: Case, made: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """All that the room is called with where there is one batch, and its outputs among it."""
    state = reservoir(made["scores"], min(case.k + case.spare, case.count))
    return arguments(case, made, state, 0), {"keys": state[0], "picks": state[1]}


def begin(arguments: tuple[Any, ...]) -> None:
    """Empties the reservoir that a call has filled, so that it can be called again."""
    arguments[4][...], arguments[5][...] = 0, -np.inf


def run(case: Case, made: dict[str, Any], backend: str) -> dict[str, Any]:
    """Runs the room itself, below the front door; what comes out is padded with zeros to min(k, n)."""
    state = keys, picks, held, _, fault = reservoir(made["scores"], min(case.k + case.spare, case.count))
    for batch in range(max(1, case.batches)):
        _dispatch.run("gumbel_topk", backend, *arguments(case, made, state, batch))
    m, size = int(held[0]), min(case.k, case.count)
    best = {"keys": np.zeros(size), "keys of the picks": np.zeros(size), "picks": np.zeros(size), "held": np.array([m])}
    best["fault"] = _arrays.to_float64(fault)
    known, known_keys = exact_keys(
        case, {name: None if x is None else _arrays.to_float64(x) for name, x in made.items()}
    )
    found = _arrays.to_float64(picks)[:m]
    best["keys"][:m] = _arrays.to_float64(keys)[:m]
    at = np.minimum(np.searchsorted(known, found), len(known) - 1)
    best["keys of the picks"][:m] = np.where(known[at] == found, known_keys[at], np.nan) if m else 0
    if case.temperature == 0:  # where keys are exact; elsewhere two that differ by a rounding may change places
        best["picks"][:m] = found
    return best


def scales(case: Case, values: layouts.Values) -> dict[str, F64]:
    """What errors are relative to: 1 + |score / temperature| + |noise| of the document where that is largest."""
    _, keys = exact_keys(case, values)
    largest = np.abs(values["scores"]).max(initial=0) / (case.temperature or 1)
    size = np.array(1 + 2 * largest + np.abs(keys).max(initial=0))  # |noise| <= |key| + |score / temperature|
    one = np.array(1.0)
    return {"keys": size, "keys of the picks": size, "picks": one, "held": one, "fault": one}


def bound(case: Case, dtype: str) -> float:
    """An error bound with respect to `scales`, whatever the dtype: everything after the scores is float64.

    x = -log u is off by 1 ulp, so by 2 u relatively, and -log x by that and 1 ulp of its own: 2 u (1 + |G|). Dividing
    adds u |score / temperature| and the sum u |key|: together at most 3 u (1 + |G| + |score / temperature|), in both
    sides of the comparison. The k-th largest of many keys is off by no more than the worst of them.
    """
    return 6 * layouts.UNIT["float64"]
