"""The velocity of a domain, `V = (l - target) / (l_init - target)`: what remains of the way to its target loss.

1 means that nothing is learned yet, 0 that the target is reached: a large V is a slow learner.
"""

from __future__ import annotations

import math

import numpy as np

from ghostgram.algorithms.velocitune.simplex import F64, Bool, mean, total


def velocity(loss: F64, l_init: F64, target: F64, v_max: float | None = 1.0) -> F64:
    """`clamp((l - target) / (l_init - target), 0, v_max)`.

    Args:
        loss: (K,) current losses, nats per token.
        l_init: (K,) losses of the model that training started from, on the same evaluation set.
        target: (K,) predicted losses at the end.
        v_max: The upper end of the clamp; None for no clamp at all, at either end.

    Returns:
        (K,); meaningless, but finite, where the gap `l_init - target` is not positive.

    Source:
        arXiv 2411.14318, section 3.
    """
    gap = l_init - target
    v = (loss - target) / np.where(gap > 0, gap, 1.0)
    return v if v_max is None else np.clip(v, 0.0, v_max)


def velocity_se(v: F64, gap: F64, se: F64, se_init: F64, se_target: F64) -> F64:
    """`sqrt(SE^2 + (1 - V)^2 SE_target^2 + V^2 SE_init^2) / gap`, the standard error of V.

    To first order, for independent errors. The current and the initial loss share their evaluation set, so of changes
    of V it is an upper bound.

    Args:
        v: (K,) velocities.
        gap: (K,) `l_init - target`, positive.
        se: (K,) of the current losses.
        se_init: (K,) of the initial ones.
        se_target: (K,) of the targets.
    """
    return np.asarray(np.sqrt(se**2 + ((1 - v) * se_target) ** 2 + (v * se_init) ** 2) / gap)


def degenerate(gap: F64, se_init: F64, se_target: F64, min_gap: float, k: float) -> Bool:
    """(K,) whether `gap <= max(min_gap, k sqrt(SE_init^2 + SE_target^2))`: nothing to learn, as far as is known."""
    return np.asarray(gap <= np.maximum(min_gap, k * np.sqrt(se_init**2 + se_target**2)))


def shrunk(v: F64, se: F64) -> F64:
    """`Vbar + max(0, 1 - e2 / s2) (V - Vbar)`: of the spread between domains, the part that is not noise.

    `e2` is the mean of SE^2, and `s2` the variance over domains, divided by K - 1, because then its expectation is the
    true spread and e2.

    Args:
        v: (K,) velocities.
        se: (K,) their standard errors.
    """
    centre = mean(v)
    if len(v) == 1:
        return v
    spread = total((v - centre) ** 2) / (len(v) - 1)
    kept = max(0.0, 1 - mean(se**2) / spread) if spread > 0 else 0.0
    return centre + kept * (v - centre)


def held(v: F64, weights: F64, eta: float, ok: Bool) -> F64:
    """V with the value, where not ok, that leaves the weight unchanged: `log(sum_ok w e^{eta V} / sum_ok w) / eta`.

    Args:
        v: (K,) velocities.
        weights: (K,) before the update; those of domains that are ok have a positive sum.
        eta: Of the update.
        ok: (K,) all others are held.
    """
    share = weights[ok] / total(weights[ok])
    if eta == 0:
        value = total(share * v[ok])  # the limit; any value leaves all weights unchanged
    else:
        top = float((eta * v[ok]).max())
        value = (top + math.log(total(share * np.exp(eta * v[ok] - top)))) / eta
    return np.where(ok, v, value)


def enough_tokens(tokens: float, se: float, gap: float, ratio: float = 0.05) -> int:
    """How many evaluation tokens bring the standard error to `ratio` of the gap: `tokens (se / (ratio gap))^2`.

    Args:
        tokens: Of an evaluation that was made.
        se: Its standard error, nats.
        gap: `l_init - target`, nats.
        ratio: Wanted.

    Raises:
        ValueError: One of them is not positive.
    """
    for name, value in (("tokens", tokens), ("se", se), ("gap", gap), ("ratio", ratio)):
        if not value > 0:
            raise ValueError(f"{name}: expected a positive number, got {value}")
    return math.ceil(tokens * (se / (ratio * gap)) ** 2)
