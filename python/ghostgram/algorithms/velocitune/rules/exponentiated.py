"""Exponentiated gradient: every domain's weight grows by the exponential of its score."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ghostgram.algorithms.velocitune.guards import OFF, Guards
from ghostgram.algorithms.velocitune.rules.base import Proposal, Reweighter
from ghostgram.algorithms.velocitune.rules.observation import Observation, Seen
from ghostgram.algorithms.velocitune.simplex import F64, exponentiated, mixed, uniform


class ExponentiatedGradient(Reweighter):
    """`w <- (1 - c) softmax(log w + eta s) + c / K`, with scores s of a subclass.

    Its settings have an `eta` and a `c`.
    """

    @abstractmethod
    def score(self, seen: Seen) -> tuple[F64, dict[str, F64]]:
        """(K,) s, and what to remember from now on."""

    def propose(self, seen: Seen) -> Proposal:
        """The step above."""
        score, memory = self.score(seen)
        stepped = exponentiated(self.weights, self.settings.eta * score)
        return Proposal(mixed(stepped, self.settings.c, uniform(len(score))), memory, {"score": score})


@dataclass(frozen=True)
class CustomSettings:
    """Of a rule of one's own.

    Args:
        score: From an observation the (K,) scores, finite; a function of the observation alone, because a state holds
            nothing of it.
        eta: Size of a step.
        c: Share of uniform weights.
    """

    score: Callable[[Observation], F64] = field(metadata={"kept": False})
    eta: float = 1.0
    c: float = 0.0


class Custom(ExponentiatedGradient):
    """Exponentiated gradient on scores of one's own.

    Args:
        score: See `CustomSettings`.
        eta: Size of a step.
        c: Share of uniform weights.
        needs: Fields of the observation that the score reads.
        guards: Composed with the rule.
    """

    name = "custom"
    reads = frozenset()

    def __init__(
        self,
        score: Callable[[Observation], F64],
        *,
        eta: float = 1.0,
        c: float = 0.0,
        needs: frozenset[str] = frozenset(),
        guards: Guards = OFF,
    ) -> None:
        super().__init__(CustomSettings(score, eta, c), "custom", guards)
        self._needs = needs

    @property
    def needs(self) -> frozenset[str]:
        """What the score reads, and the guards."""
        return self._needs | self.guards.needs

    def score(self, seen: Seen) -> tuple[F64, dict[str, F64]]:
        """What the function gives, checked."""
        s = np.array(self.settings.score(seen.observation), np.float64)
        if s.shape != (len(self.domains),) or not np.isfinite(s).all():
            raise ValueError(f"score: expected ({len(self.domains)},) finite numbers, got {s.tolist()}")
        return s, {}
