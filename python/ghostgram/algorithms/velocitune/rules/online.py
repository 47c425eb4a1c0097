"""Velocitune without proxy runs: targets are refitted from the main run's own evaluations."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from ghostgram.algorithms.velocitune.estimate import Form, UnderdeterminedFit, estimate_targets
from ghostgram.algorithms.velocitune.guards import Guards
from ghostgram.algorithms.velocitune.rules.base import Proposal
from ghostgram.algorithms.velocitune.rules.observation import Seen
from ghostgram.algorithms.velocitune.rules.velocitune import Velocitune, VelocituneSettings
from ghostgram.algorithms.velocitune.simplex import F64, Bool
from ghostgram.algorithms.velocitune.targets import DomainTarget, Point, Targets


class OnlineVelocitune(Velocitune):
    """`Velocitune` whose targets are fitted anew at every update, to all evaluations so far.

    A domain whose points do not determine its target yet (`UnderdeterminedFit`: too few, too short a span, less than a
    sixteenth of the run, too wide an interval) keeps its weight. `shown["target"]` and `shown["undetermined"]` tell.
    Evaluations of one run are points of a law only while its learning rate is constant, and weights that change
    make them points of no fixed mixture: targets from proxy runs are better where these can be paid for.

    Args:
        domains: Names.
        l_init: (K,) losses before training.
        budget: Tokens of the whole run, which targets are for.
        preset: As of `Velocitune`.
        se_init: (K,) standard errors of `l_init`, or one for all.
        form: Law, as of `estimate_targets`.
        resamples: As of `estimate_targets`.
        guards: In place of the preset's.

    Raises:
        ValueError: As `Velocitune`; or no budget.

    Cost:
        `estimate_targets` at every update. The state holds 2 K + 1 numbers for each.
    """

    name = "velocitune-online"
    reads = frozenset({"eval_loss", "eval_se"})

    def __init__(
        self,
        domains: Sequence[str],
        l_init: ArrayLike,
        budget: float,
        preset: str | VelocituneSettings = "robust",
        *,
        se_init: ArrayLike = 0.0,
        form: Form = "anchored",
        resamples: int = 100,
        guards: Guards | None = None,
    ) -> None:
        if not 0 < budget < np.inf:
            raise ValueError(f"budget: expected the tokens of the run, got {budget}")
        nothing_yet = Targets.given(domains, l_init, l_init, se_init=se_init)
        super().__init__(nothing_yet, preset, budget=budget, guards=guards)
        self.given |= {"form": form, "resamples": resamples}
        self._tokens, self._form, self._resamples = budget, form, resamples

    def propose(self, seen: Seen) -> Proposal:
        """Fits, then steps as `Velocitune` does."""
        row = np.concatenate([[seen.tokens], seen["eval_loss"], seen["eval_se"]])[None]
        rows = np.concatenate([self.memory.get("evaluations", row[:0]), row])
        targets, unknown = self._refitted(rows)
        made = self._step(seen, targets, unknown)
        shown = {**made.shown, "undetermined": unknown.astype(np.float64)}
        return made._replace(memory={**made.memory, "evaluations": rows}, shown=shown)

    def _refitted(self, rows: F64) -> tuple[Targets, Bool]:
        """Targets, and which are unknown: these are at l_init."""
        found: dict[str, DomainTarget] = {}
        unknown = np.zeros(len(self.domains), bool)
        for k, (name, start) in enumerate(self.targets.by_domain.items()):
            points = [Point(*row) for row in rows[:, [0, 1 + k, 1 + len(self.domains) + k]].tolist()]
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # said at every update they would say nothing
                    one = {name: points}, {name: (start.l_init, start.se_init)}
                    fitted = estimate_targets(*one, self._tokens, self._form, resamples=self._resamples)
                found[name] = fitted.by_domain[name]
            except UnderdeterminedFit:
                found[name], unknown[k] = start, True
        return Targets(found, self._tokens), unknown
