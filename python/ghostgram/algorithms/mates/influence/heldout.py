"""What held-out documents say of a fitted influence model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ghostgram.algorithms.mates.influence.targets import Labelled
from ghostgram.algorithms.mates.stats import bootstrap_interval, pearson, spearman, top_overlap


class HeldOut(NamedTuple):
    """How a model ranks the held-out documents of one reference."""

    reference: str
    spearman: float
    low: float
    high: float
    """The 95 % bootstrap interval of `spearman`."""
    pearson: float
    mse: float
    """In z-scores: 1 is what the mean of the training labels gets."""
    r2: float
    overlap: float
    """`top_overlap` of 20 %."""
    of_true_ranking: float | None
    """`spearman * sqrt(reliability)` of the labels: what is left for a fresh sample of the reference."""
    trained_on: int
    measured_on: int


@dataclass(frozen=True)
class Report:
    """What is known of a fit."""

    heads: tuple[HeldOut, ...]
    start: Literal["cold", "warm"]
    tried: dict[str, float]
    """Mean held-out Spearman of "warm" and "cold" on 20 % of the labels, where the better was to be taken."""
    floor: tuple[float, ...] | None
    """Spearman of `HashedNgramRidge` on the same split, where the model is another."""
    notes: dict[str, Any]
    """The encoder's own: strengths and iterations of a ridge, evaluations of a trained encoder."""

    @property
    def spearman(self) -> float:
        """The mean over references."""
        return float(np.mean([head.spearman for head in self.heads]))


def measured(labelled: Labelled, predicted: NDArray[np.floating], reliability: float | None) -> Iterator[HeldOut]:
    """Measures (n, R) predictions of the held-out documents, one reference after the other."""
    for r, name in enumerate(labelled.references):
        seen = np.isfinite(labelled.held_out.targets[:, r])
        truth, ours = labelled.held_out.targets[seen, r], predicted[seen, r].astype(np.float64)
        rho, mse = spearman(ours, truth), float(np.mean((ours - truth) ** 2))
        yield HeldOut(
            name,
            rho,
            *bootstrap_interval(ours, truth),
            pearson(ours, truth),
            mse,
            1 - mse / float(np.var(truth)),
            top_overlap(ours, truth),
            None if reliability is None else rho * reliability**0.5,
            int(np.isfinite(labelled.train.targets[:, r]).sum()),
            len(truth),
        )
