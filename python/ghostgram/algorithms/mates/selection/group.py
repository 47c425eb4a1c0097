"""Groups of documents: what one adds to those already chosen, learned from rollouts, and the greedy order it gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ghostgram.algorithms.mates.selection.clusters import shares

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

_ROUNDS = 500  # of alternating least squares; planted relations take some ten


@dataclass(frozen=True)
class Relation:
    r"""What the t-th document of a sequence is worth after those before it.

        value_t = [alpha - alpha / (beta (t - 1)) sum_{i < t} cos(h_i, h_t)] (head . h_t),    [...] = alpha at t = 1

    Higher is better, as everywhere. `gamma` is alpha / beta, which stays finite where likeness costs nothing.

    Source:
        Group-MATES (arXiv 2502.14709), relational influence.
    """

    alpha: float
    gamma: float
    head: F64  # (d,)

    @property
    def beta(self) -> float:
        """alpha / gamma."""
        return self.alpha / self.gamma if self.gamma else float("inf")

    def values(self, vectors: ArrayLike) -> F64:
        """(N, T) values of N sequences of T documents with vectors (N, T, d), each in its own order."""
        h = np.asarray(vectors, np.float64)
        return (self.alpha - self.gamma * _likeness(h)) * (h @ self.head)


def fit_relation(vectors: ArrayLike, labels: ArrayLike, head: ArrayLike | None = None) -> Relation:
    """Least squares of rollout labels.

    With a head, alpha and gamma are the solution of one linear problem. Without one, the head is learned too: alpha is
    then 1, being the head's length, and head and gamma are solved for in turn, each time exactly, until the squared
    error stays.

    Args:
        vectors: (N, T, d) of the documents of N rollouts in the order in which they were trained on.
        labels: (N, T) influence of each step, `-(L_r(theta_{t+1}) - L_r(theta_t))`.
        head: (d,) of a model of single documents.

    Raises:
        ValueError: Shapes do not fit, a value is not finite, T is less than 2, or the squared error still falls after
            500 turns.

    Cost:
        2 N T d^2 FLOPs a turn with the head, 2 N T d without.
    """
    h, y = np.asarray(vectors, np.float64), np.asarray(labels, np.float64)
    if h.ndim != 3 or y.shape != h.shape[:2] or h.shape[1] < 2 or not len(h):
        raise ValueError(f"vectors, labels: expected (N, T, d) and (N, T) with T >= 2, got {h.shape} and {y.shape}")
    for name, array in (("vectors", h), ("labels", y)):
        if not np.isfinite(array).all():
            raise ValueError(f"{name}: expected finite values, got others")
    like = _likeness(h)
    if head is not None:
        own = np.asarray(head, np.float64)
        if own.shape != h.shape[2:]:
            raise ValueError(f"head: expected shape {h.shape[2:]}, got {own.shape}")
        single = h @ own
        alpha, gamma = _solve(np.stack([single.ravel(), -(like * single).ravel()], axis=1), y.ravel())
        return Relation(float(alpha), float(gamma), own)

    gamma, error = 0.0, float("inf")
    for _ in range(_ROUNDS):
        bracket = 1 - gamma * like
        learned = _solve((bracket[..., None] * h).reshape(-1, h.shape[2]), y.ravel())
        single = h @ learned
        shared = like * single
        gamma = float((shared * (single - y)).sum() / max(float((shared**2).sum()), 1e-300))
        before, error = error, float(((single - gamma * shared - y) ** 2).sum())
        if before - error <= 1e-10 * float((y**2).sum()):
            return Relation(1.0, gamma, learned)
    raise ValueError(f"labels: expected a fit within {_ROUNDS} turns, got an error that still falls, {error}")


def rerank(relation: Relation, vectors: ArrayLike, k: int, clusters: ArrayLike | None = None) -> I64:
    """The k documents that a greedy choice takes, each time the one worth most after those before it.

    Args:
        relation: What documents are worth.
        vectors: (n, d).
        k: From 0 to n.
        clusters: (n,) numbers, such as `clusters.kmeans` gives: documents are compared within their cluster alone,
            which gets its share of k (largest remainder). By default all are one.

    Returns:
        (k,) positions, cluster after cluster, each in the order of choice. Equal values go to the smaller position.

    Raises:
        ValueError: Shapes do not fit, or k is out of range.

    Cost:
        2 d FLOPs for each chosen document and each member of its cluster.
    """
    h = np.asarray(vectors, np.float64)
    single = h @ relation.head

    def worth(members: I64, step: int, total: F64, nearest: F64) -> F64:
        values: F64 = (relation.alpha - relation.gamma * total / max(step, 1)) * single[members]  # no likeness at first
        return values

    return _greedy(_units(h), k, clusters, worth)


def mmr(scores: ArrayLike, vectors: ArrayLike, k: int, trade: float = 0.5, clusters: ArrayLike | None = None) -> I64:
    """Maximal marginal relevance, the baseline: each time the largest `trade s - (1 - trade) max cos` to those chosen.

    Args:
        scores: (n,) of single documents, higher is better; standardised, if `trade` is to mean the same everywhere.
        vectors: (n, d).
        k: From 0 to n.
        trade: From 0 (unlike documents) to 1 (the best ones).
        clusters: As in `rerank`.

    Returns:
        As `rerank`.

    Raises:
        ValueError: Shapes do not fit, or k or `trade` is out of range.

    Cost:
        As `rerank`.

    Source:
        Carbonell and Goldstein (SIGIR 1998).
    """
    if not 0 <= trade <= 1:
        raise ValueError(f"trade: expected 0 to 1, got {trade}")
    s, units = np.asarray(scores, np.float64), _units(np.asarray(vectors, np.float64))
    if s.shape != units.shape[:1]:
        raise ValueError(f"scores: expected shape {units.shape[:1]} like vectors, got {s.shape}")

    def worth(members: I64, step: int, total: F64, nearest: F64) -> F64:
        return trade * s[members] - (1 - trade) * (nearest if step else 0)

    return _greedy(units, k, clusters, worth)


def _greedy(units: F64, k: int, clusters: ArrayLike | None, worth: Callable[[I64, int, F64, F64], F64]) -> I64:
    """Within each cluster, time and again the member that `worth` puts highest.

    `worth` is told the members, how many of them are chosen, and every member's total and largest cosine to those.
    """
    n = len(units)
    if not 0 <= k <= n:
        raise ValueError(f"k: expected 0 to {n}, got {k}")
    labels = np.zeros(n, np.int64) if clusters is None else np.asarray(clusters)
    if labels.shape != (n,):
        raise ValueError(f"clusters: expected shape {(n,)}, got {labels.shape}")
    order = np.argsort(labels, kind="stable")
    sizes = np.unique(labels, return_counts=True)[1]
    chosen = [np.zeros(0, np.int64)]
    for members, quota in zip(np.split(order, np.cumsum(sizes)[:-1]), shares(sizes, k).tolist(), strict=True):
        own = units[members]
        total, nearest = np.zeros(len(members)), np.full(len(members), -1.0)
        taken = np.zeros(quota, np.int64)
        for step in range(quota):
            values = worth(members, step, total, nearest)
            values[taken[:step]] = -np.inf
            taken[step] = np.argmax(values)
            cosines = own @ own[taken[step]]
            total += cosines
            np.maximum(nearest, cosines, out=nearest)
        chosen.append(members[taken])
    return np.concatenate(chosen)


def _units(vectors: F64) -> F64:
    """Every vector at length 1; zeros stay."""
    lengths = np.sqrt((vectors**2).sum(axis=-1, keepdims=True))
    units: F64 = vectors / np.where(lengths > 0, lengths, 1)
    return units


def _likeness(vectors: F64) -> F64:
    """(N, T) mean cosine of the t-th document to those before it, 0 at the first."""
    units = _units(vectors)
    before = np.cumsum(units, axis=1) - units
    likeness: F64 = (before * units).sum(axis=2) / np.maximum(np.arange(vectors.shape[1]), 1)
    return likeness


def _solve(columns: F64, y: F64) -> F64:
    """Least squares by the normal equations; of several solutions the shortest."""
    return np.linalg.lstsq(columns.T @ columns, columns.T @ y, rcond=None)[0].astype(np.float64)
