"""DoGE: domains whose gradients point along the validation gradient gain weight, after every step of a proxy run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ghostgram.algorithms.velocitune.guards import OFF, Guards
from ghostgram.algorithms.velocitune.rules.base import Proposal, Reweighter, chosen
from ghostgram.algorithms.velocitune.rules.observation import Seen
from ghostgram.algorithms.velocitune.simplex import F64, exponentiated, mean, uniform


@dataclass(frozen=True)
class DoGESettings:
    """Of `DoGE`.

    Args:
        mu: Size of the penalty for moving: a step is `s / mu`.
        most: s is clipped to [0, most * lr].
    """

    mu: float = 0.01
    most: float = 5.0

    def __post_init__(self) -> None:
        if not (self.mu > 0 and self.most > 0):
            raise ValueError(f"mu, most: expected positive numbers, got {self.mu} and {self.most}")


class DoGE(Reweighter):
    """`w <- softmax(log w + s / mu)`, `s_i = lr <g_i, g_val> / (mean_j |g_j| + 1e-6)` clipped to [0, 5 lr].

    From uniform weights, whatever the prior; the result of a run is `mean_weights`. Gradients are those of domains,
    clipped to norm 1; an absent domain has `align` and `grad_norm` 0.

    Args:
        preset: "code", or settings.
        guards: Composed with the rule.

    Source:
        arXiv 2310.15393, algorithm 1; the normalisation and clip are those of a re-implementation.
    """

    name = "doge"
    reads = frozenset({"lr", "align", "grad_norm"})
    cadence = "every_step"
    presets: ClassVar[dict[str, DoGESettings]] = {"code": DoGESettings()}

    def __init__(self, preset: str | DoGESettings = "code", *, guards: Guards = OFF) -> None:
        super().__init__(*chosen(self.presets, preset, self.name), guards)

    def start(self, prior: F64, domains: tuple[str, ...]) -> F64:
        """Uniform."""
        return uniform(len(prior))

    def propose(self, seen: Seen) -> Proposal:
        """The step above."""
        s = seen.lr * seen["align"] / (mean(seen["grad_norm"]) + 1e-6)
        s = np.clip(s, 0.0, self.settings.most * seen.lr)
        return Proposal(exponentiated(self.weights, s / self.settings.mu), shown={"score": s})
