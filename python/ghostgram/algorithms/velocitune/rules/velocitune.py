"""Velocitune itself: domains that are slow on the way to their targets gain weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ghostgram.algorithms.velocitune.guards import OFF, ROBUST, Firing, Guards
from ghostgram.algorithms.velocitune.rules.base import Proposal, Reweighter, chosen
from ghostgram.algorithms.velocitune.rules.observation import Seen
from ghostgram.algorithms.velocitune.simplex import F64, Bool, exponentiated
from ghostgram.algorithms.velocitune.targets import Targets
from ghostgram.algorithms.velocitune.velocity import degenerate, held, shrunk, velocity, velocity_se


@dataclass(frozen=True)
class VelocituneSettings:
    """Of `Velocitune`.

    Args:
        eta: Size of a step.
        per: Share of the token budget that eta is for, so that more frequent updates are smaller ones; None: eta is
            that of every update.
        v_max: Upper end of the clamp of V; None for no clamp.
        warmup: So many first updates change nothing.
    """

    eta: float = 1.0
    per: float | None = None
    v_max: float | None = 1.0
    warmup: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.eta < np.inf:
            raise ValueError(f"eta: expected a number of at least 0, got {self.eta}")
        if self.per is not None and not 0 < self.per <= 1:
            raise ValueError(f"per: expected a share in (0, 1] or None, got {self.per}")
        if self.v_max is not None and not self.v_max > 0:
            raise ValueError(f"v_max: expected a positive number or None, got {self.v_max}")
        if self.warmup < 0:
            raise ValueError(f"warmup: expected at least 0 updates, got {self.warmup}")


class Velocitune(Reweighter):
    """`w_i <- w_i e^{eta V_i} / sum_j w_j e^{eta V_j}`, with `V = clamp((l - target) / (l_init - target), 0, 1)`.

    Args:
        targets: Initial and target losses.
        preset: "paper": eta 1 for every update, guards `OFF`. "robust": eta .3 for 1 % of the token budget, guards
            `ROBUST`. Or settings.
        budget: Tokens of the whole run; where eta is for a share of it.
        guards: In place of the preset's.

    Raises:
        ValueError: No such preset, or a budget missing or not positive.

    Cost:
        About 10 operations for each domain and update; evaluating the losses is all that counts.

    Source:
        arXiv 2411.14318, section 3. `per`, `warmup` and all guards but the first are ours.
    """

    name = "velocitune"
    reads = frozenset({"eval_loss"})
    targets: Targets
    presets: ClassVar[dict[str, VelocituneSettings]] = {
        "paper": VelocituneSettings(),
        "robust": VelocituneSettings(eta=0.3, per=0.01),
    }

    def __init__(
        self,
        targets: Targets,
        preset: str | VelocituneSettings = "robust",
        *,
        budget: float | None = None,
        guards: Guards | None = None,
    ) -> None:
        settings, name = chosen(self.presets, preset, self.name)
        given = {"l_init": targets.l_init, "target": targets.loss, "domains": targets.domains, "budget": budget}
        super().__init__(settings, name, guards if guards is not None else ROBUST if name == "robust" else OFF, given)
        if settings.per is not None and not (budget is not None and budget > 0):
            raise ValueError(f"budget: expected the tokens of the run, for an eta per share of it, got {budget}")
        self.targets, self.budget = targets, budget

    @property
    def needs(self) -> frozenset[str]:
        """Losses; their errors too, if noise is shrunk."""
        return super().needs | ({"eval_se"} if self.guards.shrink else frozenset())

    def start(self, prior: F64, domains: tuple[str, ...]) -> F64:
        """The prior, once the targets are known to be of the same domains."""
        self.targets.check(domains, self._degenerate(self.targets))
        return prior

    def propose(self, seen: Seen) -> Proposal:
        """Guards 1, 2 and 5, then the step above."""
        return self._step(seen, self.targets, np.zeros(len(self.weights), bool))

    def _degenerate(self, targets: Targets) -> Bool:
        """(K,) domains without a gap to speak of, by the guards' measure."""
        gap = targets.l_init - targets.loss
        return degenerate(gap, targets.se_init, targets.se_target, self.guards.min_gap, self.guards.k)

    def _step(self, seen: Seen, targets: Targets, unknown: Bool) -> Proposal:
        """With these targets; domains whose target is unknown are held, whatever the policy for missing gaps."""
        guards = self.guards
        gap = targets.l_init - targets.loss
        missing = self._degenerate(targets) | unknown
        if guards.degenerate == "raise" and (missing & ~unknown).any():
            without = {self.domains[i]: float(gap[i]) for i in np.flatnonzero(missing & ~unknown)}
            raise ValueError(f"degenerate: expected a gap of every domain, got {without}")
        raw = velocity(seen["eval_loss"], targets.l_init, targets.loss, None)
        v = velocity(seen["eval_loss"], targets.l_init, targets.loss, self.settings.v_max)
        ok, fired, eta = ~missing, list[Firing](), self._eta(seen.tokens)

        def note(guard: str, changed: F64, where: Bool) -> F64:
            for i in np.flatnonzero((np.abs(changed - v) > 1e-12) & where).tolist():
                fired.append(Firing(guard, self.domains[i], float(v[i]), float(changed[i])))
            return changed

        if guards.shrink and ok.any():
            se = velocity_se(v[ok], gap[ok], seen["eval_se"][ok], targets.se_init[ok], targets.se_target[ok])
            together = v.copy()
            together[ok] = shrunk(v[ok], se)
            v = note("shrink", together, ok)
        if guards.ema and "v" in self.memory:
            v = note("ema", guards.ema * self.memory["v"] + (1 - guards.ema) * v, ok)
        memory = {"tokens": np.array([seen.tokens], np.float64), "v": v}
        hold = missing & (guards.degenerate == "hold") | unknown
        v = note("degenerate", np.where(missing & ~hold, 0.0, v), missing & ~hold)
        if (self.weights[~hold] > 0).any():
            v = note("degenerate", held(v, self.weights, eta, ~hold), hold)
        shown = {"V_raw": raw, "V": v, "gap": gap, "degenerate": missing.astype(np.float64), "target": targets.loss}
        idle = self.updates < self.settings.warmup or not (self.weights[~hold] > 0).any()
        weights = self.weights if idle else exponentiated(self.weights, eta * v)
        return Proposal(weights, memory, shown, hold, tuple(fired))

    def _eta(self, tokens: float) -> float:
        """Of this update."""
        if self.settings.per is None:
            return float(self.settings.eta)
        assert self.budget is not None  # checked when it was given
        before = float(self.memory["tokens"][0]) if "tokens" in self.memory else 0.0
        if tokens < before:
            raise ValueError(f"tokens: expected at least the {before:g} of the last update, got {tokens}")
        return float(self.settings.eta * (tokens - before) / (self.settings.per * self.budget))
