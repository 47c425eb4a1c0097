"""Times callables against each other: machines drift by more than kernels differ, alternating rounds drift together."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

CACHE_BYTES = 256 << 20
"""Written before a cold call: more than the last-level cache holds."""

Call = Callable[[], Any]


def alternated(
    seconds: Callable[[Call], float], ways: Mapping[str, Call], *, rounds: int, uncounted: int = 2
) -> dict[str, float]:
    """Median seconds of every way, by a clock of its own: all take turns, and the first rounds are not counted."""
    turns = [{name: seconds(way) for name, way in ways.items()} for _ in range(rounds + uncounted)][uncounted:]
    return {name: statistics.median(turn[name] for turn in turns) for name in ways}


def within(budget: float, seconds: Callable[[Call], float], ways: Mapping[str, Call]) -> dict[str, float]:
    """The same, with as many rounds as fit into `budget` seconds: three at least, and no more than a thousand."""
    alternated(seconds, ways, rounds=1, uncounted=0)
    one_round = wall(lambda: alternated(seconds, ways, rounds=1, uncounted=0))
    return alternated(seconds, ways, rounds=min(1000, max(3, int(budget / one_round))), uncounted=0)


def wall(call: Call) -> float:
    """How long one call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
