"""Least squares of a few coefficients within limits, many problems side by side."""

from __future__ import annotations

from itertools import product

import numpy as np

from ghostgram.algorithms.velocitune.simplex import F64

_FREE, _AT_0, _AT_TOP = 0, 1, 2


def bounded_least_squares(columns: F64, y: F64, upper: F64 | None = None) -> tuple[F64, F64]:
    """Least squares with coefficients from 0 to an upper limit, by trying which of them are at an end.

    The best has the others at their unconstrained least squares, so it is the best of those tries that stay within.

    Args:
        columns: (..., m, p), p at most 3.
        y: (..., m).
        upper: (..., p), or None for no limit.

    Returns:
        (..., p) coefficients and (..., m) residuals, fitted less given.
    """
    p = columns.shape[-1]
    best, coefficients, residuals = np.full(y.shape[:-1], np.inf), np.zeros((*y.shape[:-1], p)), -y
    for places in product((_FREE, _AT_0, _AT_TOP) if upper is not None else (_FREE, _AT_0), repeat=p):
        at_top = np.array(places) == _AT_TOP
        tried = np.where(at_top, upper if upper is not None else 0.0, 0.0) * np.ones_like(coefficients)
        if not np.isfinite(tried).all():
            continue
        free = [j for j in range(p) if places[j] == _FREE]
        rest = y - np.einsum("...mp,...p->...m", columns, tried)
        tried[..., free] = _least_squares(columns[..., free], rest)
        within = (tried[..., free] > 0).all(-1)
        if upper is not None:
            within &= (tried <= upper).all(-1)
        error = np.einsum("...mp,...p->...m", columns, tried) - y
        cost = np.where(within, (error**2).sum(-1), np.inf)
        won = cost < best
        best = np.where(won, cost, best)
        coefficients = np.where(won[..., None], tried, coefficients)
        residuals = np.where(won[..., None], error, residuals)
        if len(free) == p and within.all():
            break  # the unconstrained ones, which come first, are the best there are
    return coefficients, residuals


def _least_squares(columns: F64, y: F64) -> F64:
    """(..., p) by Gram-Schmidt, which for so few columns beats a library call for each small matrix."""
    p = columns.shape[-1]
    basis: list[F64] = []
    r = np.zeros((*y.shape[:-1], p, p))
    for j in range(p):
        v = columns[..., j]
        for i, q in enumerate(basis):
            r[..., i, j] = (q * v).sum(-1)
            v = v - r[..., i, j, None] * q
        norm = np.sqrt((v * v).sum(-1))
        r[..., j, j] = np.where(norm > 0, norm, np.inf)  # a column of zeros gets the coefficient 0
        basis.append(v / r[..., j, j, None])
    solution = np.zeros((*y.shape[:-1], p))
    for j in reversed(range(p)):
        inside = (basis[j] * y).sum(-1)
        later = (r[..., j, j + 1 :] * solution[..., j + 1 :]).sum(-1)
        solution[..., j] = (inside - later) / r[..., j, j]
    return solution
