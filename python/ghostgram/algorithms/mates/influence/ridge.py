"""Ridge regression, all strengths of one grid at once: by conjugate gradients on sparse rows, closed form on dense.

Both minimise `sum_i (y_i - c - x_i . w)^2 + lambda |w|^2` over w and the intercept c, which is not penalised:
with columns centred, `(X^T X + lambda) w = X^T (y - mean y)` and `c = mean y - mean x . w`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

_ENTRIES = 1 << 17  # of a block: 1 MiB of float64 beside the weights, in the second-level cache
_DENSE_ROWS = 4096


class Solutions(NamedTuple):
    """Ridge solutions, one for each strength."""

    weights: F64
    """(strengths, columns)."""
    intercepts: F64
    """(strengths,)."""
    iterations: int
    """Of conjugate gradients; 0 where the solution is in closed form."""
    residual: float
    """`|X^T y - (X^T X + lambda) w| / |X^T y|` of the smallest lambda, whose is the largest."""


@dataclass(frozen=True)
class SparseRows:
    """n sparse rows, none of them empty: row i has `values[k]` in `columns[k]` for k from starts[i] to starts[i + 1].

    NumPy alone and in one thread, with sums of a fixed order: the same bits whatever the number of threads.
    """

    starts: I64
    columns: I64  # NumPy gathers by no other integers without a copy
    values: F32
    width: int

    @classmethod
    def stacked(cls, parts: Sequence[SparseRows], width: int) -> SparseRows:
        """The rows of all parts, in their order."""
        counts = np.concatenate([np.empty(0, np.int64), *(np.diff(part.starts) for part in parts)])
        columns = np.concatenate([np.empty(0, np.int64), *(part.columns for part in parts)])
        values = np.concatenate([np.empty(0, np.float32), *(part.values for part in parts)])
        return cls(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), columns, values, width)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, rows: I64) -> SparseRows:
        counts = np.diff(self.starts)[rows]
        starts = np.concatenate([[0], np.cumsum(counts)])
        entries = np.arange(starts[-1]) + np.repeat(self.starts[rows] - starts[:-1], counts)
        return SparseRows(starts, self.columns[entries], self.values[entries], self.width)

    def _blocks(self) -> Iterator[tuple[slice, slice]]:
        """Rows, and their entries, of blocks of about `_ENTRIES` entries."""
        edges = np.unique(np.searchsorted(self.starts, np.arange(0, self.starts[-1] + _ENTRIES, _ENTRIES)))
        edges = np.minimum(edges, len(self))
        for first, last in pairwise(edges):
            yield slice(first, last), slice(self.starts[first], self.starts[last])

    def dot(self, weights: NDArray[np.floating]) -> F64:
        """(n,) `X w` of (columns,) weights; an entry depends on its row alone."""
        products = np.empty(len(self))
        for rows, entries in self._blocks():
            terms = weights.take(self.columns[entries]) * self.values[entries].astype(np.float64)
            products[rows] = np.add.reduceat(terms, self.starts[rows] - entries.start)
        return products

    def transposed_dot(self, coefficients: F64) -> F64:
        """(columns,) `X^T u` of (n,) coefficients."""
        terms = np.repeat(coefficients, np.diff(self.starts))
        terms *= self.values
        return np.asarray(np.bincount(self.columns, terms, self.width), np.float64)

    def ridge(self, targets: F64, strengths: Sequence[float], iterations: int, tolerance: float) -> Solutions:
        """Solves for all strengths at once by shifted conjugate gradients.

        The systems `(A + lambda) w = b` of one A and b share their Krylov space, so that those of larger strengths
        follow from the iterates of the smallest by three scalars each.

        Args:
            targets: (n,) y.
            strengths: The lambdas, positive and ascending.
            iterations: At most so many.
            tolerance: Stops when every residual is below this share of |b|.

        Returns:
            The solutions.

        Cost:
            Of an iteration: 4 FLOPs and two reads of 12 bytes for each entry; 6 FLOPs for each strength and each column
            that has entries.

        Source:
            Jegerlehner, hep-lat/9612014.
        """
        used = np.flatnonzero(np.bincount(self.columns, minlength=self.width))
        if len(used) < self.width:  # of a column without entries the weight is 0
            place = np.zeros(self.width, np.int64)
            place[used] = np.arange(len(used))
            packed = SparseRows(self.starts, place[self.columns], self.values, len(used))
            found = packed.ridge(targets, strengths, iterations, tolerance)
            weights = np.zeros((len(strengths), self.width))
            weights[:, used] = found.weights
            return found._replace(weights=weights)
        n, mean = len(self), float(targets.mean())
        centre = self.transposed_dot(np.full(n, 1 / n))

        def normal(w: F64) -> F64:  # X^T (X - 1 centre^T) w: what X^T lacks of its centring meets a sum of 0
            return self.transposed_dot(self.dot(w) - float((centre * w).sum()))

        shifts = np.asarray(strengths) - strengths[0]
        residual = self.transposed_dot(targets - mean)
        weights = np.zeros((len(shifts), self.width))
        directions = np.tile(residual, (len(shifts), 1))
        # Of strength k the residual is zeta_k times that of the weakest; what has converged is left alone for good.
        before, zeta = np.ones(len(shifts)), np.ones(len(shifts))
        live = np.arange(len(shifts))
        step_before, growth = 1.0, 0.0
        size = start = float((residual * residual).sum())
        done = 0
        while done < iterations:
            live = live[size * zeta[live] ** 2 > tolerance**2 * start]
            if not len(live):
                break
            image = normal(directions[0]) + strengths[0] * directions[0]
            step = size / float((directions[0] * image).sum())
            residual -= step * image
            size, size_before = float((residual * residual).sum()), size
            scale = step_before * before[live]
            past = step * growth * (before[live] - zeta[live])
            after = zeta[live] * scale / (past + scale * (1 + shifts[live] * step))
            growth = size / size_before
            for k, ratio, factor in zip(live, after / zeta[live], after, strict=True):
                weights[k] += step * ratio * directions[k]
                directions[k] *= growth * ratio**2
                directions[k] += factor * residual
            before[live], zeta[live], step_before = zeta[live], after, step
            done += 1
        relative = float(np.sqrt(size / start)) if start else 0.0
        return Solutions(weights, mean - (weights * centre).sum(1), done, relative)


@dataclass(frozen=True)
class Moments:
    """Sums over rows that are all a closed-form ridge needs; those of two sets of rows add up."""

    count: int
    xs: F64
    ys: float
    xxs: F64
    xys: F64

    @classmethod
    def of(cls, rows: F64, targets: F64) -> Moments:
        """Of (n, d) rows and (n,) targets."""
        return cls(len(rows), rows.sum(0), float(targets.sum()), rows.T @ rows, rows.T @ targets)

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.count + other.count,
            self.xs + other.xs,
            self.ys + other.ys,
            self.xxs + other.xxs,
            self.xys + other.xys,
        )

    def ridge(self, strengths: Sequence[float]) -> Solutions:
        """Solves for all strengths from one eigendecomposition of the centred `X^T X`: about 10 d^3 FLOPs."""
        centre, mean = self.xs / self.count, self.ys / self.count
        values, vectors = np.linalg.eigh(self.xxs - self.count * np.outer(centre, centre))
        inside = vectors.T @ (self.xys - self.xs * mean)
        weights = np.stack([vectors @ (inside / (np.maximum(values, 0) + strength)) for strength in strengths])
        return Solutions(weights, mean - weights @ centre, 0, 0.0)


@dataclass(frozen=True)
class DenseRows:
    """n dense rows, (n, d) float32. The same bits for one number of BLAS threads."""

    values: F32

    @property
    def width(self) -> int:
        """Columns."""
        return int(self.values.shape[1])

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: I64) -> DenseRows:
        return DenseRows(self.values[rows])

    def dot(self, weights: NDArray[np.floating]) -> F64:
        """(n,) `X w` of (columns,) weights; an entry depends on its row alone."""
        products: F64 = np.einsum("ij,j->i", self.values, weights, dtype=np.float64)
        return products

    def ridge(self, targets: F64, strengths: Sequence[float], iterations: int, tolerance: float) -> Solutions:
        """Solves for all strengths in closed form, float64, from `Moments` of blocks of rows; nothing iterates."""
        blocks = range(0, len(self), _DENSE_ROWS)
        parts = [
            Moments.of(self.values[i : i + _DENSE_ROWS].astype(np.float64), targets[i : i + _DENSE_ROWS])
            for i in blocks
        ]
        return sum(parts[1:], start=parts[0]).ridge(strengths)
