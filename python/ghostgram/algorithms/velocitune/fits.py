"""Scaling laws of one domain's loss, fitted by variable projection: deterministic, and many data sets at once.

    chinchilla      L = E + B / D^b
    chinchilla_nd   L = E + A / N^a + B / D^b
    anchored        L = l_init - G (1 - (1 + D / D0)^-b)

For given exponents the rest is linear, and solved with coefficients of at least 0; the exponents are found on a grid
and refined from its best cell by damped Gauss-Newton steps on the projected residuals. D and N are divided by their
geometric means first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from ghostgram.algorithms.velocitune.least_squares import bounded_least_squares
from ghostgram.algorithms.velocitune.simplex import F64

SLOWEST, FASTEST = 0.02, 1.5
"""Range of exponents."""

HUBER = 1e-3
"""Errors of log loss beyond it count linearly, if a fit is robust."""

_PASSES = 20
_STEPS_OF_A_PASS = 5
_DIFFERENCE = 1e-5
_STILL = 1e-11


@dataclass(frozen=True)
class Shape:
    """A law that is linear but for theta, logarithms of its nonlinear parameters.

    Args:
        form: Its name.
        nonlinear: Names of `exp(theta)`.
        linear: Names of the coefficients.
        grid: Values of each theta that are tried.
        columns: From theta (..., q), D (m,) and N (m,), both in units of their means, the (..., m, p) columns.
        base: Losses are `base + sign * columns @ coefficients`; one for each data set as (n, 1).
        sign: See `base`.
        prior: (mean, sd) of a normal prior of the first theta, or None.
        upper: From theta (..., q), the (..., p) largest coefficients; None for no limit.
    """

    form: str
    nonlinear: tuple[str, ...]
    linear: tuple[str, ...]
    grid: tuple[F64, ...]
    columns: Callable[[F64, F64, F64], F64]
    base: float | F64 = 0.0
    sign: float = 1.0
    prior: tuple[float, float] | None = None
    upper: Callable[[F64], F64] | None = None


@dataclass(frozen=True)
class Fit:
    """Laws of n data sets of m points."""

    shape: Shape
    units: tuple[float, float]
    """Geometric means of D and N."""
    theta: F64
    """(n, q)."""
    coefficients: F64
    """(n, p), in those units."""

    def at(self, tokens: F64 | Sequence[float], sizes: F64 | Sequence[float] | None = None) -> F64:
        """(n, points) losses at D, and N if the law has one."""
        x = np.asarray(tokens, np.float64) / self.units[0]
        z = np.ones(len(x)) if sizes is None else np.asarray(sizes, np.float64) / self.units[1]
        columns = self.shape.columns(self.theta, x, z)
        return np.asarray(self.shape.base + self.shape.sign * np.einsum("nmp,np->nm", columns, self.coefficients))

    def parameters(self) -> dict[str, float]:
        """Of the first data set, in the units of D and N that came in."""
        shape, (d, n) = self.shape, self.units
        values = dict(zip(shape.nonlinear, np.exp(self.theta[0]).tolist(), strict=True))
        values |= dict(zip(shape.linear, self.coefficients[0].tolist(), strict=True))
        if "B" in values:
            values["B"] *= d ** values["b"]
        if "A" in values:
            values["A"] *= n ** values["a"]
        if "D0" in values:
            values["D0"] *= d
        if shape.linear[0] == "E":
            values["E"] += float(shape.base)
        return values

    def at_bound(self) -> tuple[str, ...]:
        """Exponents of the first data set that lie at an end of their grid."""
        ends = [(values[0], values[-1]) for values in self.shape.grid]
        places = zip(self.shape.nonlinear, self.theta[0], ends, strict=True)
        return tuple(name for name, x, (low, high) in places if name != "D0" and min(x - low, high - x) < 1e-6)


def chinchilla(
    exponents: tuple[float, float] = (SLOWEST, FASTEST), floor: float = 0.0, largest: tuple[float, float] | None = None
) -> Shape:
    """`L = E + B / D^b`.

    Args:
        exponents: The least and the largest b.
        floor: The least E.
        largest: log of the largest B, and the geometric mean of D; None for no limit.

    Source:
        arXiv 2203.15556 at one N, whose `A / N^a` is part of E.
    """

    def columns(theta: F64, x: F64, z: F64) -> F64:
        power = np.exp(-np.exp(theta) * np.log(x))
        return np.stack([np.ones_like(power), power], -1)

    def upper(theta: F64) -> F64:
        assert largest is not None
        limit = np.exp(largest[0] - np.exp(theta[..., 0]) * np.log(largest[1]))
        return np.stack([np.full_like(limit, np.inf), limit], -1)

    grid = np.linspace(np.log(exponents[0]), np.log(exponents[1]), 400)
    return Shape("chinchilla", ("b",), ("E", "B"), (grid,), columns, floor, upper=upper if largest else None)


def chinchilla_nd() -> Shape:
    """`L = E + A / N^a + B / D^b`, arXiv 2203.15556, equation 2."""

    def columns(theta: F64, x: F64, z: F64) -> F64:
        of_size = np.exp(-np.exp(theta[..., :1]) * np.log(z))
        of_tokens = np.exp(-np.exp(theta[..., 1:]) * np.log(x))
        return np.stack([np.ones_like(of_size), of_size, of_tokens], -1)

    grid = np.linspace(np.log(SLOWEST), np.log(FASTEST), 60)
    return Shape("chinchilla_nd", ("a", "b"), ("E", "A", "B"), (grid, grid), columns)


def anchored(l_init: float | F64, span: tuple[float, float], prior: bool = True) -> Shape:
    """`L = l_init - G (1 - (1 + D / D0)^-b)`: exact at D = 0, where continued training starts.

    Args:
        l_init: Nats per token; one for each data set as (n, 1).
        span: The least and the largest D, in units of their geometric mean; D0 lies within a factor of 30 of them.
        prior: Whether log b is normal around log .5, sd .5; without it the interval of a target is wide.
    """

    def columns(theta: F64, x: F64, z: F64) -> F64:
        b, scale = np.exp(theta[..., :1]), np.exp(theta[..., 1:])
        return np.asarray(-np.expm1(-b * np.log1p(x / scale)))[..., None]

    grid = (
        np.linspace(np.log(SLOWEST), np.log(FASTEST), 60),
        np.linspace(np.log(span[0] / 30), np.log(span[1] * 30), 60),
    )
    shape = Shape("anchored", ("b", "D0"), ("G",), grid, columns, l_init, -1.0)
    return shape if not prior else Shape(**{**vars(shape), "prior": (float(np.log(0.5)), 0.5)})


def geometric_mean(values: F64) -> float:
    """`exp(mean log)`."""
    return float(np.exp(np.log(values).mean()))


def fit(
    shape: Shape, tokens: F64, losses: F64, se: F64, sizes: F64 | None = None, *, robust: bool = False, steps: int = 60
) -> Fit:
    """Weighted least squares, weights `1 / se`, of n data sets that share their D, N and se.

    Args:
        shape: The law.
        tokens: (m,) D, positive.
        losses: (n, m) nats per token.
        se: (m,) standard errors, positive.
        sizes: (m,) N, where the law has one.
        robust: Huber's loss of the error of log loss, by up to 20 reweighted passes of 5 steps.
        steps: At most so many from the best cell; they end once no parameter moves by 1e-11 of itself.

    Cost:
        A grid of 400 cells (3600 with two exponents) for each data set, at about 10 m FLOPs a cell, and some 20 steps.
    """
    units = geometric_mean(tokens), geometric_mean(sizes) if sizes is not None else 1.0
    x, z = tokens / units[0], sizes / units[1] if sizes is not None else np.ones(len(tokens))
    y = shape.sign * (losses - shape.base)
    problem = _Problem(shape, x, z, y, np.broadcast_to(1 / se, y.shape))
    theta = problem.refine(problem.best_cells(), steps)
    for _ in range(_PASSES if robust else 0):
        found = Fit(shape, units, theta, problem.coefficients(theta)).at(tokens, sizes)
        error = np.abs(np.log(losses / found))
        trust = np.sqrt(np.minimum(1.0, HUBER / np.maximum(error, HUBER)))
        problem = _Problem(shape, x, z, y, trust / se)
        before, theta = theta, problem.refine(theta, _STEPS_OF_A_PASS)
        if np.abs(theta - before).max() < _STILL:
            break
    return Fit(shape, units, theta, problem.coefficients(theta))


@dataclass(frozen=True)
class _Problem:
    shape: Shape
    x: F64
    z: F64
    y: F64  # (n, m)
    weights: F64  # (n, m)

    def _prior(self, theta: F64) -> F64:
        """(..., 0 or 1) residual of the prior."""
        if self.shape.prior is None:
            return theta[..., :0]
        centre, sd = self.shape.prior
        return (theta[..., :1] - centre) / sd

    def best_cells(self) -> F64:
        """(n, q) the cell of least squares for each data set; all share their weights, which are those of the first."""
        cells = np.array(list(product(*self.shape.grid)))
        columns = self.shape.columns(cells, self.x, self.z) * self.weights[0][:, None]
        y = (self.y * self.weights).T
        best = np.full((len(cells), y.shape[1]), np.inf)
        for kept in product((False, True), repeat=columns.shape[2]):
            if not any(kept):
                continue
            q, r = np.linalg.qr(columns[:, :, kept])
            inside = q.transpose(0, 2, 1) @ y
            allowed = (np.linalg.solve(r, inside) > 0).all(1)
            rest = (y**2).sum(0) - (inside**2).sum(1)
            best = np.where(allowed, np.minimum(best, rest), best)
        best = np.minimum(best, (y**2).sum(0)) + (self._prior(cells) ** 2).sum(1)[:, None]
        return np.asarray(cells[best.argmin(0)])

    def coefficients(self, theta: F64) -> F64:
        """(n, p)."""
        return self._projected(theta)[0]

    def residuals(self, theta: F64) -> F64:
        """(n, m and the prior's) of the best coefficients."""
        return np.concatenate([self._projected(theta)[1], self._prior(theta)], -1)

    def _projected(self, theta: F64) -> tuple[F64, F64]:
        columns = self.shape.columns(theta, self.x, self.z) * self.weights[..., None]
        upper = None if self.shape.upper is None else self.shape.upper(theta)
        return bounded_least_squares(columns, self.y * self.weights, upper)

    def refine(self, theta: F64, steps: int) -> F64:
        """Levenberg-Marquardt within the ends of the grid, all data sets side by side."""
        low, high = (np.array([values[end] for values in self.shape.grid]) for end in (0, -1))
        residuals = self.residuals(theta)
        cost, damping = (residuals**2).sum(-1), np.full(len(theta), 1e-3)
        shifts = _DIFFERENCE * np.eye(theta.shape[1])
        for _ in range(steps):
            slopes = [(self.residuals(theta + h) - self.residuals(theta - h)) / (2 * _DIFFERENCE) for h in shifts]
            jacobian = np.stack(slopes, -1)
            gradient = np.einsum("nmq,nm->nq", jacobian, residuals)
            normal = np.einsum("nmq,nmr->nqr", jacobian, jacobian)
            pinned = ((theta <= low) & (gradient > 0)) | ((theta >= high) & (gradient < 0))
            free = ~pinned[:, :, None] & ~pinned[:, None, :]
            curved = np.einsum("nqq->nq", normal)
            diagonal = np.where(pinned, 1.0, damping[:, None] * curved + np.finfo(float).tiny)
            normal = np.where(free, normal, 0.0) + diagonal[:, :, None] * np.eye(theta.shape[1])
            step = -np.linalg.solve(normal, np.where(pinned, 0.0, gradient)[..., None])[..., 0]
            trial = np.clip(theta + np.clip(step, -1, 1), low, high)
            there = self.residuals(trial)
            after = (there**2).sum(-1)
            better = after <= cost * (1 + 1e-13)  # near the minimum costs are equal but for rounding, and steps shrink
            moved = float(np.abs(np.where(better[:, None], trial - theta, 0.0)).max())
            theta, residuals = np.where(better[:, None], trial, theta), np.where(better[:, None], there, residuals)
            cost, damping = np.where(better, after, cost), np.where(better, damping / 10, damping * 10)
            if (better & (moved < _STILL) | (damping > 1e12)).all():
                break
        return theta
