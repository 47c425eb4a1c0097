"""The first reading of a scored pool: its domains, sizes and the scale of its scores."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ghostgram.algorithms.mates.selection.scores import Batch, Scores
from ghostgram.algorithms.mates.sums import ExactSums, add_by_group

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

STANDARDISE = ("pool", "domain", "none")


@dataclass(frozen=True)
class Survey:
    """What the eligible documents are, by domain in the order of names."""

    domains: list[str]
    rows: I64
    tokens: I64  # as far as they are known
    pool: ExactSums
    means: F64  # what z = (score - mean) / std takes, by domain
    stds: F64

    def z(self, batch: Batch) -> F64:
        """The standardised scores of a batch that has scores and domains."""
        standard: F64 = (batch.scores - self.means[batch.domains]) / self.stds[batch.domains]
        return standard


def survey(pool: Scores, standardise: str) -> Survey:
    """Reads scores, tokens and domains once, and numbers the domains by name.

    Where scores do not vary, z is 0.

    Args:
        pool: The scored documents.
        standardise: What mean and deviation are those of: the "pool"'s, the "domain"'s, or 0 and 1 ("none").
    """
    rows, tokens = np.zeros(0, np.int64), np.zeros(0, np.int64)
    sums: list[ExactSums] = []
    for batch in pool.batches("scores", "tokens", "domains"):
        known = len(pool.domains)
        rows, tokens = (np.pad(held, (0, known - len(held))) for held in (rows, tokens))
        sums += [ExactSums() for _ in range(known - len(sums))]
        rows += np.bincount(batch.domains, minlength=known)
        tokens += np.bincount(batch.domains, np.maximum(batch.tokens, 0), minlength=known).astype(np.int64)
        if standardise == "domain":
            add_by_group(sums, batch.scores, batch.domains)
        elif known:
            sums[0].add(batch.scores)
    whole = ExactSums()
    for part in sums:
        whole.merge(part)
    before = pool.sort_domains()
    used = {
        "pool": [whole] * len(before),
        "domain": [sums[number] for number in before],
        "none": [],
    }[standardise]
    means = np.array([part.mean for part in used]) if used else np.zeros(len(before))
    stds = np.array([part.std or 1.0 for part in used]) if used else np.ones(len(before))
    return Survey(pool.domains, rows[before], tokens[before], whole, means, stds)
