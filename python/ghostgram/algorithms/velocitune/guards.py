"""What keeps weights from following noise, missing gaps and used-up data.

In their fixed order: (1) degenerate gaps, (2) noise shrinkage and (5) the moving average act on velocities, before the
rule; (3) the cap of a step, (4) the floor, (6) the cap of epochs and (7) frozen domains act on any rule's weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from ghostgram.algorithms.velocitune.simplex import F64, Bool, check_share, exponentiated, mean, mixed, total, uniform


class Firing(NamedTuple):
    """One guard that changed something of one domain."""

    guard: str
    """"degenerate", "shrink", "ema", "max_step", "floor", "max_epochs" or "frozen"."""
    domain: str
    before: float
    """Of a velocity ("degenerate", "shrink", "ema") or of a weight (the others)."""
    after: float


@dataclass(frozen=True)
class Guards:
    """Which guards are on.

    Args:
        degenerate: What becomes of a domain whose gap is degenerate: "hold" leaves its weight unchanged, "zero" gives
            it the velocity 0, "raise" is an error.
        min_gap: A gap of at most so many nats is degenerate.
        k: And one of at most so many of its standard errors.
        shrink: Whether velocities are drawn together by the part of their spread that is noise.
        ema: Share of the last velocity in the moving average; 0 for none.
        max_step: Cap of `|eta V - mean|`, or of the same change of log weights of another rule; None for none.
        floor: c of `(1 - c) w + c w'`.
        floor_to: w': the "prior" weights, or "uniform" ones.
        max_epochs: A domain of which so many epochs have been seen gets the weight 0; None for no cap.
        frozen: Names of domains that keep their weight.

    Raises:
        ValueError: A number is out of its range.
    """

    degenerate: Literal["hold", "zero", "raise"] = "hold"
    min_gap: float = 0.0
    k: float = 0.0
    shrink: bool = False
    ema: float = 0.0
    max_step: float | None = None
    floor: float = 0.0
    floor_to: Literal["prior", "uniform"] = "prior"
    max_epochs: float | None = None
    frozen: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.degenerate not in ("hold", "zero", "raise"):
            raise ValueError(f'degenerate: expected "hold", "zero" or "raise", got {self.degenerate!r}')
        if self.floor_to not in ("prior", "uniform"):
            raise ValueError(f'floor_to: expected "prior" or "uniform", got {self.floor_to!r}')
        if not (self.min_gap >= 0 and self.k >= 0):
            raise ValueError(f"min_gap, k: expected numbers of at least 0, got {self.min_gap} and {self.k}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema: expected a number in [0, 1), got {self.ema}")
        check_share(self.floor, "floor")
        for name, value in (("max_step", self.max_step), ("max_epochs", self.max_epochs)):
            if value is not None and not value > 0:
                raise ValueError(f"{name}: expected a positive number or None, got {value}")

    @property
    def needs(self) -> frozenset[str]:
        """Fields of an observation that these guards read, whatever the rule."""
        return frozenset({"seen", "avail"} if self.max_epochs is not None else ())

    def after(
        self, before: F64, proposed: F64, prior: F64, domains: Sequence[str], held: Bool, seen: F64, avail: F64
    ) -> tuple[F64, tuple[Firing, ...]]:
        """The guards that follow a rule: 3, 4, 6, 7.

        Args:
            before: (K,) weights in force.
            proposed: (K,) of the rule.
            prior: (K,) of the start.
            domains: Names.
            held: (K,) whose weight guard 1 holds: the cap of a step leaves them out.
            seen: (K,) samples drawn so far, if epochs are capped.
            avail: (K,) samples of each domain, if epochs are capped.

        Returns:
            The weights to put in force, and what fired.

        Raises:
            ValueError: All domains that have weight are used up, or the frozen ones leave no weight to give.
        """
        fired: list[Firing] = []
        w = proposed

        def note(guard: str, changed: F64) -> F64:
            for i in np.flatnonzero(np.abs(changed - w) > 1e-12).tolist():
                fired.append(Firing(guard, domains[i], float(w[i]), float(changed[i])))
            return changed

        if self.max_step is not None:
            w = note("max_step", _capped_step(before, w, held, self.max_step))
        if self.floor > 0:
            w = note("floor", mixed(w, self.floor, prior if self.floor_to == "prior" else uniform(len(w))))
        used_up = np.zeros(len(w), bool) if self.max_epochs is None else seen >= self.max_epochs * avail
        if used_up.any():
            w = note("max_epochs", _without(w, used_up, domains))
        kept = np.isin(domains, self.frozen) & ~used_up
        if kept.any():
            w = note("frozen", _keeping(before, w, kept, domains))
        return w / total(w), tuple(fired)


OFF = Guards()
"""As the paper has it: only gaps of at most 0 are degenerate, and held."""

ROBUST = Guards(min_gap=1e-3, k=3.0, shrink=True, max_step=0.5, floor=1e-3, max_epochs=4.0)
"""No moving average: the weights integrate the velocities already, and more lag makes them swing further."""


def _capped_step(before: F64, proposed: F64, held: Bool, most: float) -> F64:
    """The change of log weights, less its mean over domains, clipped; held ones and those at 0 keep what they have."""
    moving = ~held & (before > 0) & (proposed > 0)
    if not moving.any():
        return proposed
    step = np.log(proposed[moving] / before[moving])
    step -= mean(step)
    if (np.abs(step) <= most).all():
        return proposed
    w = proposed.copy()
    w[moving] = total(proposed[moving]) * exponentiated(before[moving], np.clip(step, -most, most))
    return w


def _without(w: F64, used_up: Bool, domains: Sequence[str]) -> F64:
    left = np.where(used_up, 0.0, w)
    if not total(left) > 0:
        names = [name for name, over in zip(domains, used_up, strict=True) if over]
        raise ValueError(f"max_epochs: expected a domain with data left, got {names} used up, which hold all weight")
    return left / total(left)


def _keeping(before: F64, w: F64, kept: Bool, domains: Sequence[str]) -> F64:
    rest = 1 - total(before[kept])
    free = total(w[~kept])
    if free <= 0 and rest > 1e-12:
        names = [name for name, keeps in zip(domains, kept, strict=True) if not keeps]
        raise ValueError(f"frozen: expected other domains to take the weight {rest:.6g}, got 0 of {names}")
    return np.where(kept, before, w * (rest / free if free > 0 else 0.0))
