"""Dynamic batch loading: domains far above their target loss, in nats, gain weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from ghostgram.algorithms.velocitune.guards import OFF, Guards
from ghostgram.algorithms.velocitune.rules.base import Proposal, Reweighter, chosen
from ghostgram.algorithms.velocitune.rules.observation import Seen
from ghostgram.algorithms.velocitune.simplex import F64, exponentiated, mixed, uniform
from ghostgram.algorithms.velocitune.targets import Targets

SHEARED_LLAMA_1_3B = {
    "web": 1.9643,
    "code": 0.7459,
    "books": 2.1393,
    "qa": 1.6117,
    "wiki": 1.7590,
    "papers": 1.4449,
    "c4": 2.1251,
}
"""Target losses of the released 1.3B model, nats per token of its tokenizer; predicted there from three model sizes."""


@dataclass(frozen=True)
class DBLSettings:
    """Of `DBL`.

    Args:
        eta: Size of a step.
        c: Share of uniform weights.
        variant: "exponentiated" steps from the last weights; "bandit" is `softmax(w + eta s)`, which forgets but for w
            itself; "constant" never moves.
        clip: Whether domains below their target count as at it.
    """

    eta: float = 1.0
    c: float = 1e-4
    variant: Literal["exponentiated", "bandit", "constant"] = "exponentiated"
    clip: bool = False

    def __post_init__(self) -> None:
        if self.variant not in ("exponentiated", "bandit", "constant"):
            raise ValueError(f'variant: expected "exponentiated", "bandit" or "constant", got {self.variant!r}')


class DBL(Reweighter):
    """`w <- (1 - c) softmax(log w + eta (l - target)) + c / K`.

    Args:
        targets: Losses to reach; initial ones are not read.
        preset: "code" as released, "paper" with `clip`, "bandit" and "constant" (variants of the release), or settings.
        guards: Composed with the rule.

    Source:
        Sheared LLaMA, arXiv 2310.06694, algorithm 1. That the paper clips at 0 is from its text, not its code.
    """

    name = "dbl"
    reads = frozenset({"eval_loss"})
    targets: Targets
    presets: ClassVar[dict[str, DBLSettings]] = {
        "code": DBLSettings(),
        "paper": DBLSettings(clip=True),
        "bandit": DBLSettings(variant="bandit"),
        "constant": DBLSettings(variant="constant"),
    }

    def __init__(self, targets: Targets, preset: str | DBLSettings = "code", *, guards: Guards = OFF) -> None:
        given = {"target": targets.loss, "domains": targets.domains}
        super().__init__(*chosen(self.presets, preset, self.name), guards, given)
        self.targets = targets

    def start(self, prior: F64, domains: tuple[str, ...]) -> F64:
        """The prior, once the targets are known to be of the same domains."""
        self.targets.check(domains, np.zeros(len(domains), bool))
        return prior

    def propose(self, seen: Seen) -> Proposal:
        """The step above, or a variant of it."""
        settings, w = self.settings, self.weights
        s = seen["eval_loss"] - self.targets.loss
        if settings.clip:
            s = np.maximum(s, 0.0)
        if settings.variant == "constant":
            return Proposal(w, shown={"score": s})
        stay = np.ones(len(w)) if settings.variant == "bandit" else w
        stepped = exponentiated(stay, settings.eta * s + (w if settings.variant == "bandit" else 0.0))
        return Proposal(mixed(stepped, settings.c, uniform(len(w))), shown={"score": s})
