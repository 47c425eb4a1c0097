"""trajectory_match by definition: differences, products and sums in float64, dropped scalars left out."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]


def run(
    student: list[F64],
    start: list[F64] | None,
    target: list[F64] | None,
    mask: list[F64] | None,
    loss_gradient: F64 | None,
    loss: F64 | None,
    totals: F64,
    gradient: list[F64] | None,
    weights: list[float] | None,
    first: int,
) -> None:
    """Writes num / D, then (num, D, S, wrong), and 2 g m (student - target) / D where D is more than rounding."""
    m = list(_weights(student, mask, weights, first))
    target = [np.zeros_like(x) for x in student] if target is None else target
    if start is not None and loss is not None:
        totals[0] = _squares(m, [x - y for x, y in zip(student, target, strict=True)])
        totals[1] = _squares(m, [x - y for x, y in zip(start, target, strict=True)])
        totals[2] = _squares(m, start)
        totals[3] = 0 if mask is None else sum(np.sum(~(x >= 0)) for x in mask)
        with np.errstate(invalid="ignore", divide="ignore"):
            loss[...] = totals[0] / totals[1]
    if gradient is not None and totals[3] == 0 and not totals[1] <= 1e-12 * totals[2]:
        scale = 2 * (1.0 if loss_gradient is None else float(loss_gradient)) / totals[1]
        for out, w, x, y in zip(gradient, m, student, target, strict=True):
            out[...] = scale * w * np.where(w == 0, 0, x - y)


def _weights(student: list[F64], mask: list[F64] | None, weights: list[float] | None, first: int) -> Iterator[F64]:
    """m of every tensor."""
    flat = 0
    for t, x in enumerate(student):
        numbers = np.arange(flat, flat + x.size).reshape(x.shape)
        own = (1 if mask is None else mask[t]) * (1 if weights is None else weights[t])
        yield np.where(numbers < first, 0.0, own)
        flat += x.size


def _squares(m: list[F64], values: list[F64]) -> float:
    return float(sum(np.sum(w * np.where(w == 0, 0, x) ** 2) for w, x in zip(m, values, strict=True)))
