"""softmax_stats by definition, row by row in float64: probabilities near 1 are told by what they lack of it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]


def run(
    logits: F64,
    labels: F64 | I64,
    loss: F64,
    el2n: F64,
    entropy: F64,
    max_probability: F64,
    bad_row: I64,
    ignore_index: int,
) -> None:
    """Writes cross-entropy, ||p - q||_2, entropy and largest probability of every row; 0 where it is ignored.

    Not of rows whose class number is none: the first of these is bad_row, which is -1 if there are none.
    """
    classes = logits.shape[2]
    bad = np.zeros(logits.shape[:2], bool)
    if labels.ndim == 2:
        bad = (labels != ignore_index) & ((labels < 0) | (labels >= classes))
    bad_row[...] = np.argmax(bad) if bad.any() else -1
    for row in np.ndindex(logits.shape[:2]):
        if bad[row]:
            continue
        if labels.ndim == 2 and labels[row] == ignore_index:
            loss[row] = el2n[row] = entropy[row] = max_probability[row] = 0
        elif classes == 0 or not np.isfinite(logits[row].max()):
            loss[row] = el2n[row] = entropy[row] = max_probability[row] = np.nan
        else:
            first, others, log_total, entropy[row] = _softmax(logits[row])
            max_probability[row] = 1 / (1 + others)
            if labels.ndim == 2:
                of_label = _of_class_number(logits[row], int(labels[row]), first, others, log_total)
            else:
                of_label = _of_distribution(logits[row], np.asarray(labels[row], float), first, others, log_total)
            loss[row], el2n[row] = of_label


def _softmax(z: F64) -> tuple[int, float, float, float]:
    """The first largest logit's index, sum_{c != first} e^(z_c - z_first), logsumexp(z) - z_first, and the entropy."""
    first = int(np.argmax(z))
    below = z[first] - np.delete(z, first)
    below = below[np.isfinite(below)]
    weights = np.exp(-below)
    others = float(weights.sum())
    log_total = float(np.log1p(others))
    return first, others, log_total, log_total + float(weights @ below) / (1 + others)


def _of_class_number(z: F64, y: int, first: int, others: float, log_total: float) -> tuple[float, float]:
    """With Mx the largest other logit and q_c = e^(z_c - Mx) for c != y: e^(Mx - lse) sqrt(sum q^2 + (sum q)^2)."""
    loss = (z[first] - z[y]) + log_total
    rest = np.delete(z, y)
    nearest = rest.max(initial=-np.inf)
    if nearest == -np.inf:
        return loss, 0.0
    q = np.exp(rest - nearest)
    return loss, float(np.exp(nearest - z[first]) / (1 + others) * np.sqrt(np.sum(q * q) + np.sum(q) ** 2))


def _of_distribution(z: F64, q: F64, first: int, others: float, log_total: float) -> tuple[float, float]:
    """Class by class; the first's p - q is (1 - q) - (1 - p)."""
    given = q != 0
    loss = float(np.sum(q[given] * (z[first] - z[given])) + log_total * np.sum(q))
    difference = np.exp(z - z[first]) / (1 + others) - q
    difference[first] = (1 - q[first]) - others / (1 + others)
    largest = np.abs(difference).max()
    return loss, float(largest * np.sqrt(np.sum((difference / largest) ** 2)) if largest > 0 else 0.0)
