"""Weights of domains: points of the simplex, and the exponentiated step between them.

Sums are correctly rounded (`math.fsum`), so that they do not depend on the order of the domains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

F64 = NDArray[np.float64]
Bool = NDArray[np.bool_]


def total(values: F64) -> float:
    """The sum, correctly rounded."""
    return math.fsum(values.tolist())


def mean(values: F64) -> float:
    """The mean over domains."""
    return total(values) / len(values)


def normalised(values: ArrayLike, name: str = "weights") -> F64:
    """Divides by the sum: (K,) shares or counts become weights.

    Args:
        values: (K,) finite numbers, none negative, not all 0.
        name: What an error calls them.

    Raises:
        ValueError: They are anything else.
    """
    x = np.array(values, np.float64)
    if x.ndim != 1 or not len(x) or not (np.isfinite(x) & (x >= 0)).all() or not total(x) > 0:
        raise ValueError(f"{name}: expected (K,) numbers of at least 0 with a positive sum, got {x.tolist()}")
    return x / total(x)


def exponentiated(weights: F64, step: F64) -> F64:
    """`w_i e^{s_i} / sum_j w_j e^{s_j}`, as a softmax of `log w + s`; a weight of 0 stays 0.

    Args:
        weights: (K,) of the simplex.
        step: (K,) finite; a constant added to all changes nothing.

    Cost:
        A logarithm and an exponential for each domain.
    """
    logits = np.full(len(weights), -np.inf)
    np.log(weights, out=logits, where=weights > 0)
    logits += step
    powers = np.exp(logits - logits.max())
    return np.asarray(powers / total(powers))


def mixed(weights: F64, share: float, other: F64) -> F64:
    """`(1 - c) w + c w'`."""
    return (1 - share) * weights + share * other


def uniform(domains: int) -> F64:
    """`1 / K` each."""
    return np.full(domains, 1 / domains)


def check_share(value: float, name: str) -> None:
    """Raises a ValueError unless the value is in [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a number in [0, 1], got {value}")


def check_names(names: Sequence[str], of: str) -> tuple[str, ...]:
    """The names as a tuple; a ValueError if one comes twice or there are none."""
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{of}: expected different names of at least one domain, got {list(names)}")
    return tuple(names)
