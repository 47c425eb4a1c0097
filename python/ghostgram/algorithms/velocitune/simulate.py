"""A toy run of any rule that reads evaluation losses, to choose its interval and step before spending compute.

Losses fall as `floor + gap exp(-n / tau)` in the domain's own tokens n. Weights integrate velocities and velocities
integrate weights, a loop of second order without damping: weights overshoot and swing, more so the rarer updates are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ghostgram.algorithms.velocitune.rules.base import Reweighter
from ghostgram.algorithms.velocitune.rules.observation import Observation
from ghostgram.algorithms.velocitune.simplex import F64, normalised
from ghostgram.algorithms.velocitune.targets import Targets

_ENDLESS = 1e300  # samples of a domain of a toy


@dataclass(frozen=True)
class Toy:
    """Domains whose losses fall exponentially in their own tokens; made by `Toy.of`."""

    tau: F64
    gap: F64
    floor: F64

    @classmethod
    def of(cls, tau: ArrayLike, gap: ArrayLike = 1.0, floor: ArrayLike = 0.0) -> Toy:
        """Such domains.

        Args:
            tau: (K,) tokens in which the gap falls to 1 / e.
            gap: (K,), or one for all: nats between the loss before any token and after endlessly many.
            floor: (K,), or one for all: nats after endlessly many.

        Raises:
            ValueError: Vectors of different lengths, or a tau or gap that is not positive.
        """
        vectors = [np.atleast_1d(np.array(values, np.float64)) for values in (tau, gap, floor)]
        shape = vectors[0].shape
        fits = len(shape) == 1 and all(x.shape in (shape, (1,)) for x in vectors)
        if not fits or not (vectors[0] > 0).all() or not (vectors[1] > 0).all():
            given = ", ".join(str(x.tolist()) for x in vectors)
            raise ValueError(f"tau, gap, floor: expected (K,) numbers, tau and gap positive, got {given}")
        return cls(*(np.broadcast_to(x, shape).copy() for x in vectors))

    def loss(self, tokens: F64) -> F64:
        """(K,) losses after (K,) tokens of each domain."""
        return np.asarray(self.floor + self.gap * np.exp(-tokens / self.tau))

    def targets(self) -> Targets:
        """What a perfect prediction would give: the floors."""
        domains = [str(i) for i in range(len(self.floor))]
        return Targets.given(domains, self.floor + self.gap, self.floor)


@dataclass(frozen=True)
class Simulation:
    """What happened, at the start and after each of U updates."""

    tokens: F64
    """(U + 1,) trained on."""
    weights: F64
    """(U + 1, K)."""
    losses: F64
    """(U + 1, K) true ones, without the noise of evaluations."""
    seen: F64
    """(U + 1, K) tokens of each domain."""

    @property
    def shares(self) -> F64:
        """(K,) of all tokens."""
        return normalised(self.seen[-1])

    @property
    def swing(self) -> F64:
        """(K,) the largest less the smallest weight of the second half of the updates."""
        late = self.weights[len(self.weights) // 2 :]
        return np.asarray(late.max(0) - late.min(0))


def simulate(
    rule: Reweighter, toy: Toy, prior: ArrayLike, total: float, interval: float, *, se: float = 0.0, seed: int = 0
) -> Simulation:
    """Runs a rule on a toy: tokens are drawn by the weights for an interval, then the rule is updated.

    Args:
        rule: Of `eval_loss`, and `eval_se` if it wants; initialised here, with domains "0", "1", ...
        toy: How losses fall.
        prior: (K,) weights of the start.
        total: Tokens of the whole run.
        interval: Tokens between updates; `total` is a multiple of it.
        se: Standard error of every evaluation, nats, added as noise.
        seed: Of the noise.

    Returns:
        The course of weights, losses and tokens.

    Raises:
        ValueError: The rule needs what a toy has not, or `total` is no multiple of `interval`.

    Cost:
        Some microseconds an update.
    """
    if lacking := rule.needs - {"eval_loss", "eval_se", "seen", "avail"}:
        raise ValueError(f"rule: expected one that needs evaluation losses only, got {rule.name}, needing {lacking}")
    updates = round(total / interval) if interval > 0 else 0
    if updates < 1 or abs(updates * interval - total) > 1e-9 * total:
        raise ValueError(f"interval: expected a positive number that divides the total {total}, got {interval}")
    rng = np.random.default_rng(seed)
    weights = [rule.init(prior)]
    seen = [np.zeros(len(weights[0]))]
    for update in range(1, updates + 1):
        seen.append(seen[-1] + interval * weights[-1])
        observed = toy.loss(seen[-1]) + se * rng.normal(size=len(seen[-1]))
        weights.append(
            rule.update(
                Observation(
                    step=update,
                    tokens=update * interval,
                    eval_loss=observed,
                    eval_se=np.full(len(observed), se),
                    seen=seen[-1],
                    avail=np.full(len(observed), _ENDLESS),
                )
            )
        )
    tokens = np.arange(updates + 1, dtype=np.float64) * interval
    return Simulation(tokens, np.array(weights), np.array([toy.loss(each) for each in seen]), np.array(seen))
