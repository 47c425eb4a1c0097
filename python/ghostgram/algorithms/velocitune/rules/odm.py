"""Online data mixing: a bandit whose rewards are training losses, with an exploration that fades."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from ghostgram.algorithms.velocitune.guards import OFF, Guards
from ghostgram.algorithms.velocitune.rules.base import Proposal, Reweighter, chosen
from ghostgram.algorithms.velocitune.rules.observation import Seen
from ghostgram.algorithms.velocitune.simplex import exponentiated, normalised, total


@dataclass(frozen=True)
class ODMSettings:
    """Of `ODM`.

    Args:
        variant: "smoothed": `R_i = sigma R_i + (1 - sigma) e^loss_i` and weights ~ R. "exp3":
            `R_i += loss_i / 10 / w_i` and weights ~ e^{eps R}.
        sigma: Of "smoothed".
        warmup: Steps during which weights stay and rewards are not counted.
    """

    variant: Literal["smoothed", "exp3"] = "smoothed"
    sigma: float = 0.5
    warmup: int = 2000

    def __post_init__(self) -> None:
        if self.variant not in ("smoothed", "exp3"):
            raise ValueError(f'variant: expected "smoothed" or "exp3", got {self.variant!r}')
        if not (0 <= self.sigma < 1 and self.warmup >= 0):
            raise ValueError(
                f"sigma, warmup: expected a number in [0, 1) and one of at least 0, got {self.sigma}, {self.warmup}"
            )


class ODM(Reweighter):
    """`w_i = (1 - K eps_t) pi_i + eps_t`, `eps_t = min(1/K, sqrt(ln K / (K t)))`, pi from rewards R of all domains.

    Every domain present in the batch is rewarded at once (the group update); an absent one keeps its R.

    Args:
        preset: "smoothed" (which the authors name as the paper's), "exp3", or settings.
        guards: Composed with the rule.

    Raises:
        ValueError: No such preset.

    Source:
        arXiv 2312.02406, algorithm 1, in the form of its release.
    """

    name = "odm"
    reads = frozenset({"train_loss_sum", "train_tokens"})
    cadence = "every_step"
    presets: ClassVar[dict[str, ODMSettings]] = {"smoothed": ODMSettings(), "exp3": ODMSettings(variant="exp3")}

    def __init__(self, preset: str | ODMSettings = "smoothed", *, guards: Guards = OFF) -> None:
        super().__init__(*chosen(self.presets, preset, self.name), guards)

    def propose(self, seen: Seen) -> Proposal:
        """Rewards, then weights."""
        domains, tokens = len(self.weights), seen["train_tokens"]
        if seen.step <= self.settings.warmup:
            return Proposal(self.weights)
        present = tokens > 0
        loss = seen["train_loss_sum"] / np.where(present, tokens, 1)
        rewards = self.memory.get("rewards", np.zeros(domains))
        epsilon, last = exploration(domains, seen.step), float(self.memory.get("epsilon", np.array([1 / domains]))[0])
        if self.settings.variant == "smoothed":
            smooth = self.settings.sigma * rewards + (1 - self.settings.sigma) * np.exp(loss)
            rewards = np.where(present, smooth, rewards)
            chosen_by = normalised(rewards) if total(rewards) > 0 else np.full(domains, 1 / domains)
        else:
            drawn = np.where(self.weights > 0, self.weights, 1.0)  # a masked domain's last samples: no division by 0
            rewards = rewards + np.where(present, loss / 10 / drawn, 0.0)
            chosen_by = exponentiated(np.ones(domains), last * rewards)
        memory = {"rewards": rewards, "epsilon": np.array([epsilon])}
        return Proposal((1 - domains * epsilon) * chosen_by + epsilon, memory, {"score": rewards})


def exploration(domains: int, step: int) -> float:
    """`min(1/K, sqrt(ln K / (K t)))`."""
    return min(1 / domains, math.sqrt(math.log(domains) / (domains * step)))
