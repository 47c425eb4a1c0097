"""Skill-it: domains gain weight by the losses of what training on them teaches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from ghostgram.algorithms.velocitune.guards import OFF, Guards
from ghostgram.algorithms.velocitune.rules.base import Proposal, Reweighter, chosen
from ghostgram.algorithms.velocitune.rules.observation import Seen
from ghostgram.algorithms.velocitune.simplex import F64, exponentiated


@dataclass(frozen=True)
class SkillItSettings:
    """Of `SkillIt`.

    Args:
        eta: Size of a step.
        window: How many last evaluations are summed.
    """

    eta: float = 0.2
    window: int = 3

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window: expected at least 1, got {self.window}")


class SkillIt(Reweighter):
    """`w ~ exp(eta A L)`, L the sum of the last W evaluations (all there are, at first); no memory of w.

    The first mixture is `w ~ exp(eta A 1)`; the prior says only how many domains there are.

    Args:
        graph: (K, K) A: `A[i, j]` is the effect of training on i for j.
        preset: "code" (eta .2, W 3), or settings.
        guards: Composed with the rule.

    Raises:
        ValueError: No finite square matrix, or no such preset.

    Source:
        arXiv 2307.14430, algorithm 1.
    """

    name = "skillit"
    reads = frozenset({"eval_loss"})
    presets: ClassVar[dict[str, SkillItSettings]] = {"code": SkillItSettings()}

    def __init__(self, graph: ArrayLike, preset: str | SkillItSettings = "code", *, guards: Guards = OFF) -> None:
        self.graph = np.array(graph, np.float64)
        if self.graph.ndim != 2 or self.graph.shape[0] != self.graph.shape[1] or not np.isfinite(self.graph).all():
            raise ValueError(f"graph: expected a finite (K, K) matrix, got {self.graph.tolist()}")
        super().__init__(*chosen(self.presets, preset, self.name), guards, {"graph": self.graph})

    def start(self, prior: F64, domains: tuple[str, ...]) -> F64:
        """As if all losses were 1."""
        if len(self.graph) != len(prior):
            raise ValueError(f"graph: expected ({len(prior)}, {len(prior)}) as prior has, got {self.graph.shape}")
        return self._weights(np.ones(len(prior)))

    def propose(self, seen: Seen) -> Proposal:
        """From the last evaluations alone."""
        past = self.memory.get("evaluations", np.empty((0, len(self.weights))))
        recent = np.vstack([past, seen["eval_loss"]])[-self.settings.window :]
        return Proposal(self._weights(recent.sum(0)), {"evaluations": recent}, {"score": self.graph @ recent.sum(0)})

    def _weights(self, losses: F64) -> F64:
        return exponentiated(np.ones(len(losses)), self.settings.eta * (self.graph @ losses))
