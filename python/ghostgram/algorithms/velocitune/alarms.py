"""What a person should hear of while weights move."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ghostgram.algorithms.velocitune.simplex import F64

MOST, ALIKE, NOISY, RISES = 0.9, 0.02, 0.1, 3
"""Weight of one domain; spread of V; share of the gap that is noise; rises of V in a row."""


class Alarm(NamedTuple):
    """One thing to hear of."""

    name: str
    """"largest", "floor", "rising", "noisy", "easy", "alike", "share" or "epochs"."""
    domain: str
    """"" if it is of all of them."""
    text: str


@dataclass(frozen=True)
class Sight:
    """What alarms are raised from, at one update."""

    weights: F64
    floor: F64
    """(K,) least weight that the guards leave."""
    loss: F64 | None
    se: F64 | None
    velocity: F64 | None
    """(K,) as measured, before the clamp and the guards that act on it."""
    gap: F64 | None
    low: F64 | None
    """(K,) lower ends of the targets' intervals, nan where there is none."""
    early: bool
    off: F64
    """(K,) samples drawn less samples asked for."""
    bound: float
    """The most that this may be."""
    epochs: F64
    cap: float | None


class Watch:
    """Raises alarms; what it must remember between updates is part of a run's state.

    Args:
        domains: Names.
    """

    def __init__(self, domains: Sequence[str]) -> None:
        self.domains = tuple(domains)
        self._velocity: F64 | None = None
        self._rises = np.zeros(len(self.domains), np.int64)

    def look(self, seen: Sight) -> list[Alarm]:
        """The alarms of an update."""
        w = seen.weights
        found = self._of("largest", (w > MOST) & (len(w) > 1), "has the weight {:.4f}: the run is all but its alone", w)
        found += self._of("floor", (w < seen.floor - 1e-12) & (w > 0), "has the weight {:.3g}, less than its floor", w)
        if seen.velocity is not None:
            found += self._velocities(seen.velocity)
        if seen.se is not None and seen.gap is not None:
            noisy = (seen.gap > 0) & (seen.se > NOISY * seen.gap)
            ratio = seen.se / np.where(seen.gap > 0, seen.gap, 1.0)
            found += self._of("noisy", noisy, "has a standard error of {:.3f} of its gap: evaluate more of it", ratio)
        if seen.loss is not None and seen.low is not None and seen.early:
            beaten = seen.loss < seen.low  # never where there is no interval
            found += self._of("easy", beaten, "is at {:.4f} nats, below its target's interval already", seen.loss)
        off = np.abs(seen.off) > seen.bound
        found += self._of("share", off, "was drawn {:+.1f} times beside what weights ask for", seen.off)
        if seen.cap is not None:
            found += self._of(
                "epochs", seen.epochs > seen.cap, "has been read {:.2f} times, more than its cap", seen.epochs
            )
        return found

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes."""
        return {"velocity": None if self._velocity is None else self._velocity.tolist(), "rises": self._rises.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state."""
        self._velocity = None if state["velocity"] is None else np.array(state["velocity"], np.float64)
        self._rises = np.array(state["rises"], np.int64)

    def _velocities(self, velocity: F64) -> list[Alarm]:
        rising = velocity > (velocity if self._velocity is None else self._velocity)
        self._rises, self._velocity = np.where(rising, self._rises + 1, 0), velocity.copy()
        found = self._of("rising", self._rises >= RISES, "is being forgotten: V rose to {:.3f}", velocity)
        if len(velocity) > 1 and np.ptp(velocity) < ALIKE:
            found.append(Alarm("alike", "", f"all V are within {np.ptp(velocity):.3f}: this update is noise"))
        return found

    def _of(self, name: str, which: np.ndarray[Any, np.dtype[np.bool_]], text: str, values: F64) -> list[Alarm]:
        return [
            Alarm(name, self.domains[k], f"{self.domains[k]} {text.format(values[k])}")
            for k in np.flatnonzero(which).tolist()
        ]
