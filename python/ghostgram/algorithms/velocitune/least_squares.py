"""Least squares of a few coefficients within limits, many problems side by side."""

from __future__ import annotations

from itertools import product

import numpy as np

from ghostgram.algorithms.velocitune.simplex import F64, Bool

_FREE, _AT_0, _AT_TOP = 0, 1, 2


def bounded_least_squares(columns: F64, y: F64, upper: F64 | None = None) -> tuple[F64, F64]:
    """Least squares with coefficients from 0 to an upper limit, by trying which of them are at an end.

    The best has the others at their unconstrained least squares, so it is the best of those tries that stay within; and
    where no coefficient has to be at an end, nothing else is tried.

    Args:
        columns: (n, m, p), p at most 3.
        y: (n, m).
        upper: (n, p), or None for no limit.

    Returns:
        (n, p) coefficients and (n, m) residuals, fitted less given.
    """
    p = columns.shape[-1]
    coefficients, within = _tried((_FREE,) * p, columns, y, upper)
    at_end = np.flatnonzero(~within)
    if len(at_end):
        some = None if upper is None else upper[at_end]
        coefficients[at_end] = _best_at_ends(columns[at_end], y[at_end], some)
    return coefficients, np.einsum("nmp,np->nm", columns, coefficients) - y


def _best_at_ends(columns: F64, y: F64, upper: F64 | None) -> F64:
    """(n, p) the best of all tries with a coefficient at an end; all at 0 is one of them, so there is a best."""
    n, _, p = columns.shape
    best, coefficients = np.full(n, np.inf), np.zeros((n, p))
    for places in product((_FREE, _AT_0) if upper is None else (_FREE, _AT_0, _AT_TOP), repeat=p):
        tried, within = _tried(places, columns, y, upper)
        error = np.einsum("nmp,np->nm", columns, tried) - y
        cost = np.where(within, (error**2).sum(-1), np.inf)
        won = cost < best
        best, coefficients = np.where(won, cost, best), np.where(won[:, None], tried, coefficients)
    return coefficients


def _tried(places: tuple[int, ...], columns: F64, y: F64, upper: F64 | None) -> tuple[F64, Bool]:
    """(n, p) least squares with coefficients in their places, and (n,) whether all are within the limits."""
    tried = np.zeros((len(y), len(places)))
    free = [j for j, place in enumerate(places) if place == _FREE]
    for j in (j for j, place in enumerate(places) if place == _AT_TOP):
        assert upper is not None
        tried[:, j] = upper[:, j]
    if not np.isfinite(tried).all():  # at the end of a range that has none
        return np.zeros_like(tried), np.zeros(len(y), bool)
    tried[:, free] = _least_squares(columns[:, :, free], y - np.einsum("nmp,np->nm", columns, tried))
    within = (tried[:, free] > 0).all(axis=1)
    if upper is not None:
        within &= (tried <= upper).all(axis=1)
    return tried, np.asarray(within)


def _least_squares(columns: F64, y: F64) -> F64:
    """(n, p) by Gram-Schmidt, which for so few columns beats a library call for each small matrix."""
    p = columns.shape[-1]
    basis: list[F64] = []
    r = np.zeros((len(y), p, p))
    for j in range(p):
        v = columns[:, :, j]
        for i, q in enumerate(basis):
            r[:, i, j] = np.einsum("nm,nm->n", q, v)
            v = v - r[:, i, j, None] * q
        norm = np.sqrt(np.einsum("nm,nm->n", v, v))
        r[:, j, j] = np.where(norm > 0, norm, np.inf)  # a column of zeros gets the coefficient 0
        basis.append(v / r[:, j, j, None])
    solution = np.zeros((len(y), p))
    for j in reversed(range(p)):
        inside = np.einsum("nm,nm->n", basis[j], y)
        later = (r[:, j, j + 1 :] * solution[:, j + 1 :]).sum(-1)
        solution[:, j] = (inside - later) / r[:, j, j]
    return solution
