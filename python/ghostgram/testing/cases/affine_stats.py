"""Cases of affine_stats: LayerNorm (mean and rstd), RMSNorm (rstd), a plain scale, a bias; each also channels first."""

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
INPUTS = ("b", "x", "mean", "rstd", "D_weight", "D_bias")
KINDS = {"layer": ("x", "mean", "rstd"), "rms": ("x", "rstd"), "scale": ("x",), "bias": ()}
"""Which inputs each kind of layer has beside b."""


@dataclass(frozen=True)
class Case:
    """One set of sizes; `layout` names how b and x lie in memory.

    With `groups`, b and x are (B, C, S): C / groups = `features` channels in each group, S = `tokens` points of space.
    """

    samples: int
    tokens: int
    features: int
    directions: int
    kind: str = "layer"
    layout: str = "contiguous"
    offset: float = 0.0
    groups: int | None = None

    @property
    def channels(self) -> int:
        """The length of the weight and of the bias."""
        return self.features * (1 if self.groups is None else self.groups)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of b and x."""
        rows = (self.tokens, self.channels) if self.groups is None else (self.channels, self.tokens)
        return (self.samples, *rows)

    @property
    def id(self) -> str:
        """A name for test reports."""
        far = f"+{self.offset:g}" if self.offset else ""
        groups = "" if self.groups is None else f"G{self.groups}x"
        return f"B{self.samples}T{self.tokens}{groups}F{self.features}K{self.directions}-{self.kind}-{self.layout}{far}"

    @property
    def flops(self) -> int:
        """Multiply-adds count two: normalising, both products, then norms and dots of the sums."""
        per_element = 1 if self.kind == "bias" else 5 if self.groups is None else 4
        parts = 1 if self.kind == "bias" else 2
        return self.samples * self.channels * (self.tokens * per_element + 2 * parts * (1 + self.directions))

    def bytes(self, dtype: str) -> int:
        """What a perfect kernel reads once: b, and x and its statistics where there are any."""
        wide = self.samples * self.tokens * self.channels * layouts.ITEM[dtype]
        return wide * (1 if self.kind == "bias" else 2)


# fmt: off
CASES = [
    # Degenerate and tiny.
    Case(0, 4, 3, 1), Case(2, 0, 3, 1), Case(2, 3, 0, 1), Case(1, 1, 1, 1), Case(3, 5, 4, 0), Case(0, 4, 3, 0, "bias"),
    # Every kind of layer; one off the four tokens taken together and the edges of vectors.
    Case(3, 4, 15, 1), Case(3, 5, 16, 2, "rms"), Case(2, 3, 17, 1, "scale"), Case(3, 7, 31, 3, "bias"),
    Case(3, 8, 33, 1),
    Case(5, 13, 101, 2), Case(2, 9, 63, 1, "rms"), Case(2, 6, 1025, 1), Case(2, 6, 1031, 1, "bias"),
    # One sample, a few with long tokens (cut), more than 64 (grouped).
    Case(1, 1, 37, 1), Case(1, 257, 19, 1), Case(2, 4099, 5, 1, "rms"), Case(65, 2, 20, 1), Case(131, 3, 9, 2, "scale"),
    # Layouts, and inputs whose mean must be subtracted before anything else is rounded.
    Case(3, 7, 40, 2, layout="sliced"), Case(3, 7, 40, 1, layout="transposed"), Case(4, 5, 33, 1, layout="expanded"),
    Case(3, 6, 35, 1, offset=30.0),
    # Channels first: nothing at all; a space of one; groups of one channel and a group of all; every kind.
    Case(0, 4, 3, 1, groups=2), Case(2, 0, 3, 1, groups=2), Case(2, 3, 0, 1, groups=2), Case(1, 1, 1, 1, groups=1),
    Case(3, 1, 5, 2, groups=3), Case(3, 1, 1, 1, groups=37), Case(2, 49, 1, 1, groups=19), Case(2, 49, 19, 1, groups=1),
    Case(3, 7, 3, 2, "rms", groups=4), Case(2, 23, 11, 1, "scale", groups=1), Case(3, 101, 6, 3, "bias", groups=1),
    # One off a vector and off four together, in float32 and float64 lanes of every width; few samples and many.
    *(Case(2, space, 3, 1, groups=2) for space in (3, 4, 5, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129)),
    Case(1, 4099, 1, 1, groups=1), Case(1, 257, 2, 1, groups=65), Case(65, 9, 2, 1, groups=5),
    Case(131, 18, 3, 2, "rms", groups=3),
    Case(3, 21, 4, 2, layout="sliced", groups=5), Case(3, 21, 4, 1, layout="transposed", groups=5),
    Case(4, 35, 3, 1, layout="expanded", groups=2), Case(3, 34, 4, 1, offset=30.0, groups=3),
]

LARGE = [
    Case(16, 512, 768, 1), Case(512, 16, 768, 1, "rms"), Case(2, 2048, 300, 2),
    Case(16, 784, 8, 1, groups=32), Case(128, 49, 16, 2, groups=32), Case(2, 20011, 1, 1, groups=24),
]
TYPICAL = [Case(16, 256, 768, 1), Case(16, 784, 8, 1, groups=32)]
"""What `ghostgram bench` times: sizes that layers of small models have, and that the reference is done with in a second."""
# fmt: on


def inputs(case: Case, dtype: str, seed: int = 0) -> layouts.Values:
    """b, x, mean, rstd and both directions, as float64 values that their dtypes represent exactly."""
    rng = np.random.default_rng([seed, case.samples, case.tokens, case.features])
    shape = case.shape
    values: layouts.Values = dict.fromkeys(INPUTS)
    values["b"] = layouts.rounded(rng.standard_normal(shape), dtype)
    x = layouts.rounded(case.offset + rng.standard_normal(shape), dtype)
    if case.layout == "expanded":
        x = np.broadcast_to(x[:1], shape).copy()
    made = {"x": x}
    normalised = x if case.groups is None else x.reshape(case.samples, case.groups, case.features * case.tokens)
    if normalised.shape[-1]:
        made["mean"] = layouts.rounded(normalised.mean(-1), "float32")
        made["rstd"] = layouts.rounded(1 / np.sqrt(normalised.var(-1) + 1e-5), "float32")
    else:  # as frameworks have it; and nothing may come of it
        made["mean"] = made["rstd"] = np.full(normalised.shape[:2], np.nan)
    values |= {name: made[name] for name in KINDS[case.kind]}
    if case.directions:
        for name in ("D_bias",) if case.kind == "bias" else ("D_weight", "D_bias"):
            values[name] = layouts.rounded(rng.standard_normal((case.directions, case.channels)), "float32")
    return values


def arrays(case: Case, values: layouts.Values, make: layouts.Make, dtype: str) -> dict[str, Any]:
    """The values as arrays of a framework: b and x in the layout of the case, only x ever expanded."""
    sums = "float64" if dtype == "float64" else "float32"
    layout = {"b": "contiguous" if case.layout == "expanded" else case.layout, "x": case.layout}
    return {
        name: None if x is None else make(x, dtype if name in layout else sums, layout.get(name, "contiguous"))
        for name, x in values.items()
    }


def call(case: Case, made: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """All that the room is called with, and its outputs among it, poisoned with NaN."""
    shapes = {"grad": (case.channels,), "norms2": (case.samples,), "dots": (case.samples, case.directions)}
    outputs = {
        f"{part}_{what}": None if part == "weight" and made["x"] is None else layouts.poisoned_sums(made["b"], shape)
        for what, shape in shapes.items()
        for part in ("weight", "bias")
    }
    arguments = (*(made[name] for name in INPUTS), *outputs.values(), case.groups is not None)
    return arguments, {name: x for name, x in outputs.items() if x is not None}


def run(case: Case, made: dict[str, Any], backend: str) -> dict[str, Any]:
    """Runs the room itself, below the front door."""
    arguments, outputs = call(case, made)
    _dispatch.run("affine_stats", backend, *arguments)
    return outputs


def scales(case: Case, values: layouts.Values) -> dict[str, F64]:
    """For every output, the same sums over absolute values: what rounding errors are relative to."""
    b, x, mean, rstd, D_weight, D_bias = (layouts.absolute(values)[name] for name in INPUTS)
    tokens = 1 if case.groups is None else 2
    parts = {"bias": (b.sum(tokens), D_bias)}
    if x is not None:
        if case.groups is not None:
            mean, rstd = (None if y is None else y.repeat(case.features, axis=1) for y in (mean, rstd))
        xhat = (x + (0 if mean is None else mean[..., None])) * (1 if rstd is None else rstd[..., None])
        parts["weight"] = (np.sum(b * xhat, axis=tokens), D_weight)
    found = {}
    for part, (rows, D) in parts.items():
        found[f"{part}_grad"] = rows.sum(0)
        found[f"{part}_norms2"] = np.sum(rows * rows, axis=1)
        found[f"{part}_dots"] = np.zeros((case.samples, 0)) if D is None else rows @ D.T
    return found


def bound(case: Case, dtype: str) -> float:
    """A relative error bound with respect to `scales`.

    xhat takes two roundings (channels first, one of them after the sum), its product with b one, and a per-sample sum
    of T of them is off by 3 sqrt(T) u (Higham and Mary 2019, lambda = 3); samples of a group add at most 3 sqrt(B) u, groups are summed in float64. Squaring
    doubles the error of what is squared; the sum of F products over its lanes adds 3 sqrt(F) u at most. Half types are
    exact once widened.
    """
    unit = layouts.UNIT["float64" if dtype == "float64" else "float32"]
    return 3 * unit * (2 * math.sqrt(case.tokens + case.samples) + math.sqrt(case.channels) + 6)
