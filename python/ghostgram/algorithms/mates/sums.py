"""Mean and standard deviation that are the same bits in any order and sharding: sums of integers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

GRAIN = 2**20
"""Scores are rounded to 1 / GRAIN before they are added up."""

LIMIT = 2.0**22
"""Scores from here on are refused: their squares would leave the integers that are summed at once."""

AT_ONCE = 2**20
_HALF = 21  # bits of the lower half of q


@dataclass
class ExactSums:
    """n, sum q and sum q^2 of scores s, with q = rint(s 2^20), as integers of any size.

    Sums of integers do not depend on their order: `add` in any pieces and `merge` in any tree give equal numbers, so
    the mean and the standard deviation have the same bits. They are those of scores rounded to 2^-20, which moves the
    mean by at most 2^-21.
    """

    n: int = 0
    total: int = 0
    squares: int = 0

    def add(self, scores: F64) -> None:
        """Takes scores in.

        Args:
            scores: (n,) finite numbers below 2^22 in size.

        Raises:
            ValueError: One of them is not.

        Cost:
            About 10 integer operations a score.
        """
        for start in range(0, len(scores), AT_ONCE):
            self._take(_parts(scores[start : start + AT_ONCE]).sum(axis=1), min(AT_ONCE, len(scores) - start))

    def merge(self, other: ExactSums) -> None:
        """Takes in what another one has summed."""
        self.n, self.total, self.squares = self.n + other.n, self.total + other.total, self.squares + other.squares

    @property
    def mean(self) -> float:
        """The mean, correctly rounded; 0 of nothing."""
        return self.total / (self.n * GRAIN) if self.n else 0.0

    @property
    def std(self) -> float:
        """The standard deviation (of the population: divided by n); 0 of nothing."""
        if not self.n:
            return 0.0
        return math.sqrt((self.n * self.squares - self.total**2) / (self.n * GRAIN) ** 2)

    def _take(self, parts: I64, n: int) -> None:
        total, high, cross, low = (int(part) for part in parts)
        self.merge(ExactSums(n, total, (high << 2 * _HALF) + (cross << _HALF + 1) + low))


def add_by_group(sums: list[ExactSums], scores: F64, groups: NDArray[np.int32]) -> None:
    """Adds every score to the sums of its group.

    Args:
        sums: One for each group.
        scores: (n,) as `ExactSums.add` takes them; n at most `AT_ONCE`.
        groups: (n,) numbers of groups.
    """
    if not len(scores):
        return
    order = np.argsort(groups, kind="stable")
    present, starts, counts = np.unique(groups[order], return_index=True, return_counts=True)
    parts = np.add.reduceat(_parts(scores[order]), starts, axis=1)
    for column, (group, n) in enumerate(zip(present.tolist(), counts.tolist(), strict=True)):
        sums[group]._take(parts[:, column], n)


def _parts(scores: F64) -> I64:
    """(4, n): q, then a^2, a b and b^2 of q = a 2^21 + b, none of which reaches 2^63 when 2^20 of them are added."""
    if not (np.abs(scores) < LIMIT).all():
        wrong = scores[~(np.abs(scores) < LIMIT)][0]
        raise ValueError(f"scores: expected finite numbers below {LIMIT:.0f} in size, got {wrong}")
    q = np.rint(scores * GRAIN).astype(np.int64)
    a, b = q >> _HALF, q & ((1 << _HALF) - 1)
    return np.stack([q, a * a, a * b, b * b])
