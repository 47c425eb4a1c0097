"""Aioli: the effect of every domain on every loss is measured while training, by short sweeps over mixtures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ghostgram.algorithms.velocitune.guards import OFF, Guards
from ghostgram.algorithms.velocitune.rules.base import Proposal, Reweighter, chosen
from ghostgram.algorithms.velocitune.rules.observation import Seen
from ghostgram.algorithms.velocitune.simplex import F64, exponentiated, uniform


@dataclass(frozen=True)
class AioliSettings:
    """Of `Aioli`.

    Args:
        eta: Size of a step.
        rounds: Sweeps over all mixtures, at each update.
        steps: Training steps on each mixture of a sweep.
        f: Share of domain j in mixture j; the others share the rest.
        average: None: the weights remember, `w_j *= exp(eta sum_i A_ij)`. A number: they do not, and A is averaged in
            their place, with this share of the last average.
    """

    eta: float = 0.2
    rounds: int = 4
    steps: int = 5
    f: float = 0.75
    average: float | None = None

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.steps < 1:
            raise ValueError(f"rounds, steps: expected at least 1, got {self.rounds} and {self.steps}")
        if self.average is not None and not 0 <= self.average < 1:
            raise ValueError(f"average: expected a number in [0, 1) or None, got {self.average}")


class Aioli(Reweighter):
    """`w_j <- w_j exp(eta sum_i A_ij)`, normalised; from uniform weights, whatever the prior.

    Mixture P_j has the share f of domain j and `(1 - f) / (K - 1)` of each other. `R_ij` is the mean drop of loss i
    over `steps` training steps on P_j, and `A = R P^-1`; its minimum is subtracted if negative, then it is divided by
    its sum. The steps of the sweeps train the model and count as training.

    Args:
        preset: "paper", "ema" (an average of A in place of the memory of w), or settings.
        guards: Composed with the rule.

    Raises:
        ValueError: No such preset.

    Cost:
        `rounds * K * steps` training steps and `rounds * K` evaluations at each update, beside the evaluation that is
        given; all in `probe`.

    Source:
        arXiv 2411.05735, algorithm 1.
    """

    name = "aioli"
    reads = frozenset({"eval_loss", "probe"})
    presets: ClassVar[dict[str, AioliSettings]] = {"paper": AioliSettings(), "ema": AioliSettings(average=0.5)}

    def __init__(self, preset: str | AioliSettings = "paper", *, guards: Guards = OFF) -> None:
        super().__init__(*chosen(self.presets, preset, self.name), guards)

    def start(self, prior: F64, domains: tuple[str, ...]) -> F64:
        """Uniform; two domains at least, and mixtures that differ."""
        if len(prior) < 2 or not 1 / len(prior) < self.settings.f <= 1:
            raise ValueError(
                f"f: expected a share in (1 / K, 1] of at least 2 domains, got {self.settings.f} of {len(prior)}"
            )
        return uniform(len(prior))

    def propose(self, seen: Seen) -> Proposal:
        """Sweeps, then the step above."""
        settings, domains = self.settings, len(self.weights)
        mixtures = probe_mixtures(domains, settings.f)
        drops, before = np.zeros((domains, domains)), seen["eval_loss"]
        for _ in range(settings.rounds):
            for j, mixture in enumerate(mixtures):
                after = seen.probe(mixture, settings.steps)
                drops[:, j] += (before - after) / settings.rounds
                before = after
        effects, memory, stay = effects_of(drops, mixtures), {}, self.weights
        if settings.average is not None:
            effects = settings.average * self.memory.get("effects", effects) + (1 - settings.average) * effects
            memory, stay = {"effects": effects}, np.ones(domains)
        gain = effects.sum(0)
        return Proposal(exponentiated(stay, settings.eta * gain), memory, {"score": gain})


def probe_mixtures(domains: int, f: float) -> F64:
    """(K, K) row j: f on domain j, the rest shared by the others."""
    return np.full((domains, domains), (1 - f) / (domains - 1)) + np.eye(domains) * (f - (1 - f) / (domains - 1))


def effects_of(drops: F64, mixtures: F64) -> F64:
    """(K, K) A of `R = A P^T`, made at least 0 and of sum 1: what training on j does for loss i.

    Args:
        drops: (K, K) R: the drop of loss i on mixture j.
        mixtures: (K, K) P, a mixture each row.
    """
    effects = np.asarray(np.linalg.solve(mixtures, drops.T).T, np.float64)
    effects -= min(0.0, float(effects.min()))
    whole = float(effects.sum())
    if whole == 0:  # every effect is the same: no preference
        return np.full(drops.shape, 1 / drops.size)
    return effects / whole
