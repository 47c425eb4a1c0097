"""The weights that a run begins with, w_0."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from ghostgram.algorithms.velocitune.simplex import F64, normalised, uniform


def prior_weights(prior: str | float | ArrayLike, tokens: F64) -> F64:
    """Shares of tokens.

    Args:
        prior: "proportional" to what there is, "uniform", a temperature T for `p^(1/T)`, or (K,) numbers of any sum.
        tokens: (K,) that there are.

    Raises:
        ValueError: It is none of these.
    """
    if isinstance(prior, str):
        if prior not in ("proportional", "uniform"):
            raise ValueError(f'prior: expected "proportional", "uniform", a temperature or numbers, got {prior!r}')
        return normalised(tokens, "sizes") if prior == "proportional" else uniform(len(tokens))
    given = np.asarray(prior, np.float64)
    if given.ndim == 0:
        if not (np.isfinite(given) and given > 0):
            raise ValueError(f"prior: expected a positive temperature, got {prior}")
        return normalised(normalised(tokens, "sizes") ** (1 / given))
    if given.shape != tokens.shape:
        raise ValueError(f"prior: expected {len(tokens)} numbers, got {given.tolist()}")
    return normalised(given, "prior")
