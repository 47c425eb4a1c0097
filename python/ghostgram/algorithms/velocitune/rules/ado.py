"""ADO: domains gain weight by how fast a law, fitted to their training losses online, says they are learning."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np

from ghostgram.algorithms.velocitune.fits import chinchilla, fit, geometric_mean
from ghostgram.algorithms.velocitune.guards import OFF, Guards
from ghostgram.algorithms.velocitune.rules.base import Proposal, Reweighter, chosen
from ghostgram.algorithms.velocitune.rules.observation import Seen
from ghostgram.algorithms.velocitune.simplex import F64, normalised

WINDOW, ORDER, EVERY = 101, 3, 10
"""Of the Savitzky-Golay filter, and how many steps lie between the points that are kept of it."""

_SLOWEST = 1e-3
_FLAT = -460.0  # a of a law that does not fall: not minus infinity, so that shares of nothing are defined
_UNSEEN = -1.0  # loss of a domain that no batch has held yet


@dataclass(frozen=True)
class ADOSettings:
    """Of `ADO`.

    Args:
        first: Step of the first fit; until then the prior holds.
        refit: Steps between fits.
        e_min: The least irreducible loss, nats. The release's penalties keep it at 1.65, too much for easy domains.
        steepest: The largest alpha.
        a_max: The largest a.
        count: n of the law: "all" samples seen, or those of the domain's "own".
        credit: Share of the last in the moving average of drawn shares.
        floor: The least rho, before it is normalised again.
    """

    first: int = 1000
    refit: int = 1000
    e_min: float = 0.0
    steepest: float = 0.8
    a_max: float = 6.5
    count: Literal["all", "own"] = "all"
    credit: float = 0.9
    floor: float = 0.01

    def __post_init__(self) -> None:
        if self.first < 2 * WINDOW + 4 * EVERY or self.refit < 1:
            raise ValueError(
                f"first, refit: expected at least {2 * WINDOW + 4 * EVERY} steps and at least 1, "
                f"got {self.first} and {self.refit}"
            )
        if self.count not in ("all", "own"):
            raise ValueError(f'count: expected "all" or "own", got {self.count!r}')


class Preference(NamedTuple):
    """(K,) each."""

    rho: F64
    """What the laws prefer."""
    sampling: F64
    """p, the weights to sample by."""
    mean: F64
    """The running mean of rho."""


class ADO(Reweighter):
    """`p = .9 pbar + .1 rho`, with rho from the slopes of laws `L(n) = e^E + e^a n^-alpha` of smoothed training losses.

    See `preference` for the formulas. Losses of every step are smoothed by a centred Savitzky-Golay filter (101, 3), of
    which every 10th point is kept, so the newest is 50 steps old; a domain that is absent from a batch has its last
    loss again. Windows that start in the first 101 steps are left out: a cubic does not follow a law there. The error
    of log loss is Huber's, 1e-3. The state holds the points, 2 K numbers every 10 steps.

    Args:
        preset: "paper"; "code" has the least irreducible loss of the release; or settings.
        guards: Composed with the rule.

    Raises:
        ValueError: No such preset.

    Cost:
        A fit of a domain with m points is about 4000 m FLOPs and some steps, each `refit` steps.

    Source:
        arXiv 2410.11820, section 3, from its formulas.
    """

    name = "ado"
    reads = frozenset({"train_loss_sum", "train_tokens", "seen"})
    cadence = "every_step"
    presets: ClassVar[dict[str, ADOSettings]] = {"paper": ADOSettings(), "code": ADOSettings(e_min=math.exp(0.5))}

    def __init__(self, preset: str | ADOSettings = "paper", *, guards: Guards = OFF) -> None:
        super().__init__(*chosen(self.presets, preset, self.name), guards)

    def propose(self, seen: Seen) -> Proposal:
        """Notes the losses, fits when it is time, and weighs by the laws."""
        settings, step = self.settings, seen.step
        memory = self._noted(seen)
        if "laws" not in memory and step < settings.first:
            return Proposal(self.weights, memory)
        if "laws" not in memory or step - int(memory["fitted"][0]) >= settings.refit:
            memory |= {"laws": self._laws(memory), "fitted": np.array([step], np.float64)}
        n = seen["seen"] if settings.count == "own" else np.full(len(self.weights), seen["seen"].sum())
        made = preference(memory["laws"], n, self.prior, memory["mean"], memory["drawn"], step, settings.floor)
        memory["mean"] = made.mean
        return Proposal(made.sampling, memory, {"score": made.rho})

    def _noted(self, seen: Seen) -> dict[str, F64]:
        """Memory with this step's losses, drawn shares and, every 10th step, one more point."""
        memory, domains = dict(self.memory), len(self.weights)
        counts = memory.get("counts", np.zeros(domains))
        fresh = seen["seen"] - counts
        if (fresh < 0).any():
            raise ValueError(f"seen: expected at least {counts.tolist()} of the last step, got {seen['seen'].tolist()}")
        drawn = memory.get("drawn", self.prior)
        if fresh.sum() > 0:
            drawn = self.settings.credit * drawn + (1 - self.settings.credit) * fresh / fresh.sum()
        tokens = seen["train_tokens"]
        last = memory["recent"][-1, :domains] if "recent" in memory else np.full(domains, _UNSEEN)
        loss = np.where(tokens > 0, seen["train_loss_sum"] / np.maximum(tokens, 1), last)
        row = np.concatenate([loss, seen["seen"]])[None]
        recent = np.concatenate([memory.get("recent", row[:0]), row])[-WINDOW:]
        points = memory.get("points", row[:0])
        if seen.step >= 2 * WINDOW and len(recent) == WINDOW and seen.step % EVERY == 0:
            losses = recent[:, :domains]
            smooth = np.where((losses != _UNSEEN).all(0), savitzky_golay(WINDOW, ORDER) @ losses, _UNSEEN)
            points = np.concatenate([points, np.concatenate([smooth, recent[WINDOW // 2, domains:]])[None]])
        memory |= {"counts": seen["seen"], "drawn": drawn, "recent": recent, "mean": memory.get("mean", self.prior)}
        return memory | ({"points": points} if len(points) else {})

    def _laws(self, memory: Mapping[str, F64]) -> F64:
        """(3, K): E, a and alpha of each domain, E as a loss in nats."""
        settings, domains = self.settings, len(self.weights)
        points = memory.get("points", np.empty((0, 2 * domains)))
        counts = points[:, domains:]
        if settings.count == "all":
            counts = np.repeat(counts.sum(1, keepdims=True), domains, 1)
        laws = np.empty((3, domains))
        for k in range(domains):
            if self.prior[k] == 0:
                laws[:, k] = 0.0, _FLAT, 0.0
                continue
            use = (points[:, k] > 0) & (counts[:, k] > 0)
            n, loss = counts[use, k], points[use, k]
            if len(np.unique(n)) < 4:
                raise ValueError(
                    f"train_tokens: expected losses of {self.domains[k]!r} at 4 counts or more to fit, "
                    f"got {len(np.unique(n))} by step {settings.first}"
                )
            largest = settings.a_max, geometric_mean(n)
            shape = chinchilla((_SLOWEST, settings.steepest), settings.e_min, largest)
            found = fit(shape, n, loss[None], loss, robust=True).parameters()
            laws[:, k] = found["E"], np.log(max(found["B"], np.exp(_FLAT))), found["b"]
        return laws


def preference(laws: F64, n: F64, prior: F64, mean: F64, drawn: F64, step: int, floor: float = 0.01) -> Preference:
    """Weights from laws: `slope = max(alpha, .05) (L - e^E) / n`, rho ~ `slope mu sqrt(h)`, at least the floor.

    Then `p = .9 pbar + .1 rho` of the old pbar, and `pbar += (rho - pbar) / (t + 1)`.

    Args:
        laws: (3, K): e^E in nats, a, alpha.
        n: (K,) samples seen.
        prior: (K,) mu; where it is 0, rho is.
        mean: (K,) pbar.
        drawn: (K,) h, the moving average of drawn shares.
        step: t.
        floor: Of rho.
    """
    _, a, alpha = laws
    slope = np.maximum(alpha, 0.05) * np.exp(a - alpha * np.log(n)) / n
    raised = np.maximum(normalised(slope * prior * np.sqrt(drawn), "slopes"), floor)
    rho = normalised(np.where(prior > 0, raised, 0.0))
    return Preference(rho, 0.9 * mean + 0.1 * rho, mean + (rho - mean) / (step + 1))


def savitzky_golay(window: int, order: int) -> F64:
    """(window,) what the values of a window add up with to its middle's, by a polynomial of least squares."""
    x = np.linspace(-1, 1, window)
    return np.asarray(np.linalg.pinv(np.vander(x, order + 1, increasing=True))[0])
