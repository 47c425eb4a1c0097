"""Weights that never move: the baselines, and the weights of offline methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from ghostgram.algorithms.velocitune.guards import OFF, Guards
from ghostgram.algorithms.velocitune.rules.base import Proposal, Reweighter, chosen
from ghostgram.algorithms.velocitune.rules.observation import Seen
from ghostgram.algorithms.velocitune.simplex import F64, normalised


@dataclass(frozen=True)
class StaticSettings:
    """Of `Static`.

    Args:
        temperature: T of `w ~ p^(1/T)`: 1 keeps the prior p, None is infinite: every domain of positive p is equal.
        weights: Given ones in place of that, of a mixing law or regression fitted elsewhere.
    """

    temperature: float | None = 1.0
    weights: tuple[float, ...] | None = None


class Static(Reweighter):
    """No update at all: `w ~ p^(1/T)`, or weights given.

    Args:
        preset: "proportional" (T = 1), "temperature" (T = 2), "uniform" (T infinite), or settings.
        guards: Composed with the rule.

    Raises:
        ValueError: No such preset, or a temperature that is not positive.
    """

    name = "static"
    reads = frozenset()
    presets: ClassVar[dict[str, StaticSettings]] = {
        "proportional": StaticSettings(),
        "temperature": StaticSettings(temperature=2.0),
        "uniform": StaticSettings(temperature=None),
    }

    def __init__(self, preset: str | StaticSettings = "proportional", *, guards: Guards = OFF) -> None:
        super().__init__(*chosen(self.presets, preset, self.name), guards)
        if self.settings.temperature is not None and not 0 < self.settings.temperature < np.inf:
            raise ValueError(f"temperature: expected a positive number or None, got {self.settings.temperature}")

    @classmethod
    def of(cls, weights: ArrayLike) -> Static:
        """Weights found elsewhere, such as by RegMix: (K,) in the order of the domains."""
        return cls(StaticSettings(weights=tuple(normalised(weights).tolist())))

    def start(self, prior: F64, domains: tuple[str, ...]) -> F64:
        """The weights, for good."""
        given = self.settings.weights
        if given is None:
            power = 0.0 if self.settings.temperature is None else 1 / self.settings.temperature
            return normalised((prior > 0) * (prior / prior.max()) ** power)
        if len(given) != len(prior):
            raise ValueError(f"weights: expected {len(prior)} as prior has, got {len(given)}")
        return normalised(given)

    def propose(self, seen: Seen) -> Proposal:
        """What is there."""
        return Proposal(self.weights)
