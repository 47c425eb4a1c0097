"""Clusters of documents by the direction of their vectors, and shares of a budget by cluster."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

AT_ONCE = 2**25
"""Cosines to centres that are held at a time."""


class KMeans(NamedTuple):
    """Every document's cluster, and the unit vectors in the middle of clusters."""

    labels: I64  # (n,)
    centres: F64  # (clusters, d)


def kmeans(vectors: ArrayLike, clusters: int, seed: int = 0, rounds: int = 50) -> KMeans:
    """Spherical k-means: vectors at length 1, centres at length 1 again after every round.

    It begins with centres drawn one after another, a document with probability in proportion to 1 - cos to its nearest
    centre (k-means++), and ends when no document changes its cluster. A cluster that has lost all its documents takes
    the one that is farthest from its centre.

    Args:
        vectors: (n, d), none of length 0.
        clusters: From 1 to n.
        seed: Of the first centres, from 0 to 2^64 - 1.
        rounds: At most.

    Returns:
        Labels from 0 to clusters - 1. The same on one machine with as many BLAS threads.

    Raises:
        ValueError: A vector is 0 or not finite, or a number is out of its range.

    Cost:
        2 n d clusters FLOPs for the first centres and for every round.
    """
    units = np.asarray(vectors, np.float64)
    lengths = np.linalg.norm(units, axis=1, keepdims=True)
    if not (np.isfinite(lengths) & (lengths > 0)).all():
        raise ValueError("vectors: expected finite ones of positive length, got others")
    if not 1 <= clusters <= len(units):
        raise ValueError(f"clusters: expected 1 to {len(units)}, got {clusters}")
    units = units / lengths
    centres = _first_centres(units, clusters, np.random.Generator(np.random.Philox(seed)))
    labels, nearest = _nearest(units, centres)
    for _ in range(rounds):
        order = np.argsort(labels, kind="stable")
        present, starts = np.unique(labels[order], return_index=True)
        sums = np.zeros_like(centres)
        sums[present] = np.add.reduceat(units[order], starts)
        sizes = np.linalg.norm(sums, axis=1, keepdims=True)
        centres = np.where(sizes > 0, sums / np.where(sizes > 0, sizes, 1), centres)
        lost = np.setdiff1d(np.arange(clusters), present)
        centres[lost] = units[np.argsort(nearest, kind="stable")[: len(lost)]]
        before = labels
        labels, nearest = _nearest(units, centres)
        if np.array_equal(before, labels):
            break
    return KMeans(labels, centres)


def shares(sizes: ArrayLike, k: int) -> I64:
    """k in proportion to sizes, as integers that add up to k: largest remainder, of equal ones the first."""
    sizes = np.asarray(sizes, np.int64)
    total = max(int(sizes.sum()), 1)
    given, remainders = k * sizes // total, k * sizes % total
    order = np.argsort(-remainders, kind="stable")[: k - int(given.sum())]
    given[order] += 1
    return given


def _first_centres(units: F64, clusters: int, random: np.random.Generator) -> F64:
    chosen = [int(random.integers(len(units)))]
    apart = 1 - units @ units[chosen[0]]
    for _ in range(clusters - 1):
        weights = np.cumsum(np.maximum(apart, 0))
        drawn = random.random() * weights[-1]
        chosen.append(min(int(np.searchsorted(weights, drawn, side="right")), len(units) - 1))
        np.minimum(apart, 1 - units @ units[chosen[-1]], out=apart)
    return units[chosen]


def _nearest(units: F64, centres: F64) -> tuple[I64, F64]:
    """(n,) the centre of the largest cosine, and that cosine."""
    labels, cosines = np.empty(len(units), np.int64), np.empty(len(units))
    step = max(AT_ONCE // len(centres), 1)
    for start in range(0, len(units), step):
        part = units[start : start + step] @ centres.T
        best = part.argmax(axis=1)
        labels[start : start + step] = best
        cosines[start : start + step] = part[np.arange(len(part)), best]
    return labels, cosines
