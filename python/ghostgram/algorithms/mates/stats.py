"""How well one ranking of documents tells another, and how sure that is. NumPy alone, and the same bits every time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]


class Interval(NamedTuple):
    """A confidence interval."""

    low: float
    high: float


def pearson(x: ArrayLike, y: ArrayLike) -> float:
    """Linear correlation, `sum (x - mean x)(y - mean y) / sqrt(sum (x - mean x)^2 sum (y - mean y)^2)`.

    Args:
        x: (n,) finite numbers.
        y: (n,) finite numbers.

    Returns:
        A number in [-1, 1]; nan where either does not vary.

    Raises:
        ValueError: Different lengths, more than one axis, or a value that is not finite.

    Cost:
        10 n FLOPs.
    """
    return _correlation(*_pair(x, y))


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Rank correlation: `pearson` of the ranks, equal values sharing the average of their ranks.

    Takes, returns and refuses what `pearson` does.

    Cost:
        Two sorts of n values.
    """
    x, y = _pair(x, y)
    return spearman_of_codes(codes_of(x), codes_of(y))


def top_overlap(x: ArrayLike, y: ArrayLike, share: float = 0.2) -> float:
    """The share of y's largest values that is also among x's: what a selection by x gets of one by y.

    Args:
        x: (n,) finite numbers.
        y: (n,) finite numbers.
        share: Which share of the n counts as top, in (0, 1]; at least one value does. Of equal values the earlier
            come first.

    Returns:
        A number in [0, 1]; about `share` for unrelated values. nan where n is 0.

    Raises:
        ValueError: As `pearson`; a share outside (0, 1].
    """
    x, y = _pair(x, y)
    if not 0 < share <= 1:
        raise ValueError(f"share: expected a number in (0, 1], got {share}")
    if not len(x):
        return float("nan")
    k = max(1, round(share * len(x)))
    of_x, of_y = (np.argsort(-values, kind="stable")[:k] for values in (x, y))
    return len(np.intersect1d(of_x, of_y)) / k


def bootstrap_interval(
    x: ArrayLike,
    y: ArrayLike,
    statistic: Callable[[Any, Any], float] = spearman,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Percentile bootstrap: quantiles of the statistic over resamples, with replacement, of the pairs (x_i, y_i).

    Resample r is a pure function of (seed, r, n) (`resample`), so that the bits depend on no other call.

    Args:
        x: (n, ...) values; `statistic` sees rows of them.
        y: (n, ...) values.
        statistic: (rows of x, rows of y) -> number. Resamples where it is nan are left out.
        resamples: How many.
        seed: Of the resamples.
        level: The share of resamples inside the interval.

    Returns:
        The interval; (nan, nan) where the statistic is nan in every resample.

    Raises:
        ValueError: Different lengths, no values, no resamples, or a level outside (0, 1).

    Cost:
        `resamples` statistics. Those of `spearman` need no sort: values are ranked once, and in each resample counted.
    """
    x, y = np.asarray(x), np.asarray(y)
    if len(x) != len(y) or not len(x):
        raise ValueError(f"x, y: expected equally many values and at least one, got {len(x)} and {len(y)}")
    if resamples < 1:
        raise ValueError(f"resamples: expected at least 1, got {resamples}")
    if not 0 < level < 1:
        raise ValueError(f"level: expected a number in (0, 1), got {level}")
    if statistic is spearman:
        x, y = (codes_of(values) for values in _pair(x, y))
        statistic = spearman_of_codes
    rows = (resample(len(x), r, seed) for r in range(resamples))
    drawn = np.array([statistic(x[row], y[row]) for row in rows])
    drawn = drawn[~np.isnan(drawn)]
    if not len(drawn):
        return Interval(float("nan"), float("nan"))
    return Interval(*np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2]).tolist())


def resample(n: int, number: int, seed: int) -> I64:
    """(n,) row numbers drawn with replacement from range(n) for n < 2^32: words of Philox at counter `number`.

    The words are NumPy's Philox4x64, whose stream is fixed; a word's upper half h becomes `h n >> 32`.
    """
    words = np.random.Philox(key=[seed % 2**64, n], counter=[0, 0, 0, number]).random_raw(n)
    return ((words >> np.uint64(32)) * np.uint64(n) >> np.uint64(32)).astype(np.int64)


def _pair(x: ArrayLike, y: ArrayLike) -> tuple[F64, F64]:
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"x, y: expected two arrays of one axis and equal length, got shapes {x.shape} and {y.shape}")
    for name, values in (("x", x), ("y", y)):
        if not np.isfinite(values).all():
            raise ValueError(f"{name}: expected finite values, got {values[~np.isfinite(values)][0]}")
    return x, y


def _correlation(x: F64, y: F64) -> float:
    # Sums, not BLAS: the order of a dot product's terms may depend on the number of threads.
    if not len(x):
        return float("nan")
    x, y = _centred(x), _centred(y)
    size = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return max(-1.0, min(1.0, float((x * y).sum()) / size)) if size > 0 else float("nan")


def _centred(values: F64) -> F64:
    """Without its mean, and scaled to a largest size of 1, so that no square leaves the range of float64."""
    if values.min() == values.max():  # whose mean may be off by a rounding
        return np.zeros_like(values)
    apart = values - values.mean()
    scaled: F64 = apart / np.abs(apart).max()
    return scaled


def codes_of(values: F64) -> I64:
    """Each value's place among the distinct values: all that a rank statistic needs."""
    return np.unique(values, return_inverse=True)[1].astype(np.int64)


def _ranks_of_codes(codes: I64) -> F64:
    counts = np.bincount(codes)
    return (np.cumsum(counts) - (counts - 1) / 2)[codes]


def spearman_of_codes(x: I64, y: I64) -> float:
    """`spearman` of values by their `codes_of`, or of some of them: no sort."""
    return _correlation(_ranks_of_codes(x), _ranks_of_codes(y))
