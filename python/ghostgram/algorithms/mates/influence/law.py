"""The law of a learning curve, `limit - scale * n^-power`, by least squares."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

F64 = NDArray[np.float64]

POWERS = np.linspace(0.1, 1.5, 141).tolist()


class Law(NamedTuple):
    """`rho(n) = limit - scale * n^-power`, the held-out Spearman of a model fitted on n labels."""

    limit: float
    scale: float
    power: float

    def at(self, n: float) -> float:
        """rho(n)."""
        return self.limit - self.scale * float(n**-self.power)

    def gain(self, n: float) -> float:
        """Of doubling: `rho(2 n) - rho(n)`."""
        return self.scale * float(n**-self.power) * (1 - float(2**-self.power))

    def enough(self, gain: float) -> float:
        """The n from which on doubling gains less than so much; 0 if it never gains anything."""
        return float((self.scale * (1 - 2**-self.power) / gain) ** (1 / self.power))


def fit_law(labels: ArrayLike, spearmans: ArrayLike) -> Law:
    """Least squares of `rho_i ~ limit - scale n_i^-power` with limit <= 1, scale >= 0 and .1 <= power <= 1.5.

    For one power the best limit and scale are in closed form, on whichever bound they meet; the power is found on a
    grid, then by golden section around its best place. Nothing is random.

    Args:
        labels: (m,) the n_i, of at least three sizes.
        spearmans: (m,) the rho_i.

    Raises:
        ValueError: Different lengths, fewer than three sizes, or values that are not finite.
    """
    n, rho = np.asarray(labels, np.float64), np.asarray(spearmans, np.float64)
    if n.shape != rho.shape or n.ndim != 1 or len(np.unique(n)) < 3:
        raise ValueError(f"labels: expected at least three sizes, one for each Spearman, got {n.tolist()}")
    if not (np.isfinite(rho).all() and (n > 0).all()):
        raise ValueError(f"spearmans: expected finite numbers of positive sizes, got {rho.tolist()}")

    def error(power: float) -> float:
        return float(_least(n, rho, power)[2])

    around = min(range(len(POWERS)), key=lambda k: error(POWERS[k]))
    low, high = POWERS[max(around - 1, 0)], POWERS[min(around + 1, len(POWERS) - 1)]
    golden = (math.sqrt(5) - 1) / 2
    while high - low > 1e-9:
        inner, outer = high - golden * (high - low), low + golden * (high - low)
        if error(inner) <= error(outer):
            high = outer
        else:
            low = inner
    power = float(min((low, high, POWERS[around]), key=error))
    limit, scale, _ = _least(n, rho, power)
    return Law(float(limit), float(scale) * float(n.max()) ** power, power)


def gains(labels: F64, spearmans: F64, at: float) -> F64:
    """(B,) what doubling `at` labels gains by the law of each row of spearmans (B, m); powers on the grid alone."""
    least, found = np.full(len(spearmans), np.inf), np.zeros(len(spearmans))
    for power in POWERS:
        _, scale, error = _least(labels, spearmans, power)
        better = error < least
        least[better] = error[better]
        found[better] = scale[better] * (at / labels.max()) ** -power * (1 - 2**-power)
    return found


def _least(n: F64, rho: F64, power: float) -> tuple[F64, F64, F64]:
    """Of one power the best limit, the best scale in units of the largest n, and the squared error; rho is (..., m)."""
    x = -((n / n.max()) ** -power)  # at most a few thousand, whatever n is
    spread = x - x.mean()
    scale = np.maximum(0.0, (spread * rho).sum(-1) / (spread * spread).sum())
    limit = rho.mean(-1) - scale * x.mean()
    at_bound = np.maximum(0.0, ((rho - 1) * x).sum(-1) / (x * x).sum())
    scale, limit = np.where(limit > 1, at_bound, scale), np.minimum(limit, 1.0)
    error = ((limit[..., None] + scale[..., None] * x - rho) ** 2).sum(-1)
    return limit, scale, error
