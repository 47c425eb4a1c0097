"""Cases of softmax_stats: rows sure and unsure, right and wrong, tied, masked, rising; class numbers and distributions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ghostgram import _arrays, _dispatch
from ghostgram.testing import layouts

F64 = NDArray[np.float64]
DTYPES = ("float32", "float64", "bfloat16", "float16")
IGNORED = -100
OUTPUTS = ("loss", "el2n", "entropy", "max_probability")


@dataclass(frozen=True)
class Case:
    """One set of sizes; `rows` names what the logits are like, `labels` what the labels are."""

    samples: int
    tokens: int
    classes: int
    rows: str = "normal"
    labels: str = "int64"
    layout: str = "contiguous"

    def __post_init__(self) -> None:
        if self.samples * self.tokens and not self.classes and self.labels.startswith("int"):
            raise ValueError("classes: expected at least one for a label to name, got 0")

    @property
    def id(self) -> str:
        """A name for test reports."""
        return f"B{self.samples}T{self.tokens}C{self.classes}-{self.rows}-{self.labels}-{self.layout}"

    @property
    def flops(self) -> int:
        """Multiply-adds count two: a polynomial, its argument and three sums per logit; once more per distribution."""
        return self.samples * self.tokens * self.classes * (25 if self.labels.startswith("int") else 50)

    def bytes(self, dtype: str) -> int:
        """What a perfect kernel reads once: logits and labels."""
        rows = self.samples * self.tokens
        distributions = not self.labels.startswith("int")
        label = self.classes * layouts.ITEM[dtype] if distributions else 8
        return rows * (self.classes * layouts.ITEM[dtype] + label)


# fmt: off
CASES = [
    # Degenerate and tiny: one class is certain, two make everything a sigmoid.
    Case(0, 4, 3), Case(2, 0, 3), Case(1, 1, 1), Case(3, 5, 1), Case(4, 7, 2), Case(4, 7, 2, "sure"), Case(2, 3, 0, labels="ignored"),
    Case(0, 4, 3, labels="soft"), Case(3, 2, 1, labels="soft"), Case(3, 5, 2, "sure", "soft"),
    # Labels of both types, and rows left out.
    Case(3, 5, 10, labels="int32"), Case(3, 5, 10, labels="some ignored"),
    # One off the edges of vectors, of four of them, and of blocks.
    Case(2, 3, 15), Case(2, 3, 16, "sure"), Case(2, 3, 17), Case(3, 3, 63), Case(3, 3, 65, "sure"), Case(2, 2, 101, "ties"),
    Case(2, 2, 1023, "sure"), Case(2, 2, 1024), Case(2, 2, 1025, "sure"), Case(1, 3, 2049, "rising"), Case(1, 2, 5003, "ties"),
    # Every block brings a new largest logit, or nothing but the same, or is far from the last, or cannot be.
    Case(1, 2, 4999, "rising"), Case(1, 2, 4999, "falling"), Case(2, 2, 3001, "equal"), Case(2, 2, 3001, "wide"), Case(4, 3, 300, "wide"),
    Case(2, 2, 3001, "masked"), Case(5, 5, 40, "masked"), Case(3, 3, 7, "alone"), Case(2, 2, 2500, "alone"), Case(4, 4, 2500, "sure"),
    # Distributions.
    Case(3, 3, 17, "normal", "soft"), Case(3, 3, 65, "sure", "soft"), Case(2, 2, 1031, "masked", "soft"), Case(2, 2, 2501, "wide", "soft"),
    Case(4, 3, 33, "sure", "one-hot"), Case(4, 3, 1100, "normal", "the softmax"), Case(3, 3, 65, "ties", "soft wide"), Case(2, 2, 50, "alone", "soft"),
    # Few rows so long that they are cut.
    Case(1, 2, 70001, "rising"), Case(1, 1, 99991, "normal", "soft"),
    # Many short rows make one task; layouts.
    Case(40, 50, 7), Case(5, 7, 300, layout="sliced"), Case(5, 7, 300, "sure", layout="transposed"), Case(4, 6, 33, layout="expanded"),
    Case(5, 7, 40, "normal", "soft", "sliced"), Case(5, 7, 40, "normal", "soft", "transposed"),
]

LARGE = [Case(8, 16, 50257), Case(2, 1, 262147, "sure"), Case(1, 3, 131072, "rising", "soft wide"), Case(16, 128, 1000, "sure")]
TYPICAL = [Case(1, 128, 32000), Case(16, 64, 1000)]
"""What `ghostgram bench` times: sizes that layers of small models have, and that the reference is done with in a second."""
# fmt: on


def inputs(case: Case, dtype: str, seed: int = 0) -> layouts.Values:
    """Logits and labels, as float64 values that their dtypes represent exactly."""
    rng = np.random.default_rng([seed, case.samples, case.tokens, case.classes])
    shape = (case.samples, case.tokens, case.classes)
    y = rng.integers(0, max(case.classes, 1), shape[:2])
    logits = layouts.rounded(_logits(case, rng, y), dtype)
    if case.layout == "expanded":
        logits = np.broadcast_to(logits[:1], shape).copy()
    if case.labels in ("int32", "int64"):
        return {"logits": logits, "labels": y.astype(np.float64)}
    if "ignored" in case.labels:
        left_out = rng.random(y.shape) < (0.5 if case.labels == "some ignored" else 2)
        return {"logits": logits, "labels": np.where(left_out, IGNORED, y).astype(np.float64)}
    q = layouts.rounded(_distributions(case, rng, y, logits), _label_dtype(case, dtype))
    return {"logits": logits, "labels": q}


def _logits(case: Case, rng: np.random.Generator, y: NDArray[np.int64]) -> F64:
    shape = (*y.shape, case.classes)
    z = 3 * rng.standard_normal(shape)
    if case.rows == "sure":  # of the label, or of another class
        z[..., :1] += np.where(rng.random(y.shape) < 0.5, 0.0, rng.uniform(5, 60, y.shape))[..., None]
        margin = rng.uniform(5, 60, y.shape)
        np.put_along_axis(z, y[..., None], np.take_along_axis(z, y[..., None], -1) + margin[..., None], -1)
    elif case.rows == "ties":
        z = np.round(z / 3)
    elif case.rows == "equal":
        z = np.full(shape, 2.5)
    elif case.rows == "rising":
        z = np.sort(z, -1)
    elif case.rows == "falling":
        z = -np.sort(z, -1)
    elif case.rows == "wide":
        z = rng.uniform(-1e4, 1e4, shape)
    elif case.rows in ("masked", "alone"):  # the label's class never is
        z[rng.random(shape) < (0.5 if case.rows == "masked" else 2)] = -np.inf
        np.put_along_axis(z, y[..., None], 1.0, -1)
    return z


def _distributions(case: Case, rng: np.random.Generator, y: NDArray[np.int64], logits: F64) -> F64:
    shape = logits.shape
    if case.labels == "one-hot":
        return np.asarray(np.arange(case.classes) == y[..., None], np.float64)
    if case.labels == "the softmax":
        q = np.exp(logits - logits.max(-1, keepdims=True))
        return np.asarray(q / q.sum(-1, keepdims=True))
    q = rng.random(shape) ** 8 + 1e-3
    return np.where(np.isfinite(logits), q / max(case.classes, 1), 0.0)


def _label_dtype(case: Case, dtype: str) -> str:
    return "float32" if case.labels == "soft wide" and dtype != "float64" else dtype


def arrays(case: Case, values: layouts.Values, make: layouts.Make, dtype: str) -> dict[str, Any]:
    """The values as arrays of a framework; class numbers are never sliced out of a NaN-filled array."""
    if values["labels"].ndim == 3:
        labels = make(values["labels"], _label_dtype(case, dtype), case.layout)
    else:
        kind = case.labels if case.labels.startswith("int") else "int64"
        labels = make(values["labels"], kind, "transposed" if case.layout == "transposed" else "contiguous")
    return {"logits": make(values["logits"], dtype, case.layout), "labels": labels}


def call(case: Case, made: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """All that the room is called with, and its outputs among it, poisoned with NaN."""
    found = {name: layouts.poisoned_sums(made["logits"], (case.samples, case.tokens)) for name in OUTPUTS}
    bad_row = _arrays.empty(made["logits"], (), "int64")
    return (made["logits"], made["labels"], *found.values(), bad_row, IGNORED), found


def run(case: Case, made: dict[str, Any], backend: str) -> dict[str, Any]:
    """Runs the room itself, below the front door."""
    arguments, outputs = call(case, made)
    _dispatch.run("softmax_stats", backend, *arguments)
    bad_row = int(arguments[-2])
    assert bad_row == -1, f"row {bad_row} has no class number"
    return outputs


def scales(case: Case, values: layouts.Values) -> dict[str, F64]:
    """For every output, what its rounding errors are relative to; the outputs themselves and little else, see `bound`."""
    found = {name: np.zeros((case.samples, case.tokens)) for name in OUTPUTS}
    for row in np.ndindex(case.samples, case.tokens):
        z, label = values["logits"][row], values["labels"][row]
        if label.ndim == 0 and label == IGNORED:
            continue
        first = int(np.argmax(z))
        gaps = z[first] - np.delete(z, first)
        gaps = gaps[np.isfinite(gaps)]
        lead = float(gaps.min(initial=np.inf))
        weights, below = np.exp(-gaps), gaps - lead if len(gaps) else gaps
        others = float(weights.sum())
        p, log_total = weights / (1 + others), math.log1p(others)
        entropy = log_total + float(p @ gaps)
        unsure = float(np.sum(p * (1 + below)))
        tiny = case.classes * 1e-30  # below the least numbers of float32, whatever the unit roundoff
        found["max_probability"][row] = (1 + unsure) / (1 + others)
        found["entropy"][row] = entropy + float(np.sum(p * (1 + below) * (5 + gaps + entropy))) + tiny
        if label.ndim == 0:
            y = int(label)
            away = others / (1 + others) if y == first else 1.0
            found["loss"][row] = (z[first] - z[y]) + log_total + unsure + tiny
            found["el2n"][row] = away + 3 * unsure + tiny
        else:
            given = label != 0
            parts = float(np.sum(label[given] * (z[first] - z[given])))
            found["loss"][row] = parts + (log_total + unsure) * float(label.sum()) + tiny
            found["el2n"][row] = abs(1 - label[first]) + float(np.delete(label, first).sum()) + 3 * unsure + tiny
    return found


def bound(case: Case, dtype: str) -> float:
    """A relative error bound with respect to `scales`.

    Let x_c be how far logit c lies below the second largest. Its weight is relative to a reference within 4 of that;
    rounding the difference costs (x_c + 4) u, the exponential 3 u and 0.05 u more per unit of x_c: 7 u (1 + x_c) at most.
    A block's sum of 1024 weights over 4 lanes and 2 sums, or 4 lanes and 1 for distributions, is off by 3 sqrt(256) u
    more (Higham and Mary 2019, lambda = 3); a row's blocks are added in float64, which for float64 logits adds
    3 sqrt(C / 512) u. So the sum of the probabilities other than the largest is off by that times sum p_c (1 + x_c),
    `unsure`: no more than (1 + log C) times itself. It is added to positive numbers only, or to ones at least as large
    as what is taken away: loss, el2n and largest probability have that error and one rounding of themselves (el2n has
    it from both its sums, and from the sum it is divided by). A weight enters the entropy with (first - z_c) and in
    log(total), and the entropy is divided by the total: a factor of 5 + (first - z_c) + entropy with the reference's 4.
    """
    unit = layouts.UNIT["float64" if dtype == "float64" else "float32"]
    return unit * (3 * math.sqrt(256) + 7 + 3 * math.sqrt(case.classes / 512))
