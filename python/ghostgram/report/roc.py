"""Receiver operating characteristic, with ties counted as half."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray


class Roc(NamedTuple):
    """The corners of the curve, from (0, 0) to (1, 1), and the area under it."""

    fpr: NDArray[np.float64]
    tpr: NDArray[np.float64]
    auroc: float


def roc(scores: ArrayLike, labels: ArrayLike) -> Roc:
    """How well a score, larger for positives, tells the positives from the negatives.

    Samples of equal score enter the curve together, as one slanted segment; the area is therefore the probability
    that a random positive outscores a random negative, ties counted as half.

    Args:
        scores: (n,) finite or infinite numbers.
        labels: (n,) truth values; true is positive.

    Returns:
        False and true positive rates at every distinct threshold, and the AUROC.

    Raises:
        ValueError: Shapes differ, a score is not a number, or one of the two classes is empty.
    """
    score, positive = np.asarray(scores, np.float64), np.asarray(labels, np.bool_)
    if score.ndim != 1 or score.shape != positive.shape:
        raise ValueError(f"scores {score.shape} and labels {positive.shape} must be one vector each, of one length")
    if np.isnan(score).any():
        raise ValueError(f"{int(np.isnan(score).sum())} scores are not a number")
    if positive.all() or not positive.any():
        raise ValueError("a ROC needs positives and negatives")
    order = np.argsort(-score, kind="stable")
    ends_a_tie = np.append(np.diff(score[order]) != 0, True)
    hits = np.concatenate([[0], np.cumsum(positive[order])[ends_a_tie]])
    alarms = np.concatenate([[0], np.cumsum(~positive[order])[ends_a_tie]])
    doubled_area = (np.diff(alarms) * (hits[1:] + hits[:-1])).sum()  # integers: no rounding before the division
    pairs = int(hits[-1]) * int(alarms[-1])
    return Roc(alarms / alarms[-1], hits / hits[-1], float(doubled_area) / (2 * pairs))
