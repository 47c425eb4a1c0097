"""Times callables against each other: machines drift by more than kernels differ, alternating rounds drift together."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ghostgram.testing.turns import CACHE_BYTES


def interleaved(
    benchmark: Any,
    ours: Callable[[], Any],
    rivals: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    cold: bool,
    rest: float = 0.0,
) -> dict[str, float]:
    """Median seconds of "ours" and of every rival, all called once per round.

    Args:
        benchmark: pytest-benchmark's fixture; `ours` is what its own table shows.
        ours: What is benchmarked.
        rivals: Name -> what it is compared with.
        rounds: How often each is called, after two rounds that are not counted.
        cold: Evict the caches before every call. Otherwise each call finds what the one before it has left there.
        rest: Seconds of sleep before every call, until the threads of the last one's pool have given up waiting for
            work; then each is called once for its own threads to wake up, and once more to be timed.
    """
    memory = np.ones(CACHE_BYTES // 8 if cold else 0)
    seconds: dict[str, list[float]] = {name: [] for name in rivals}

    def settle(call: Callable[[], Any]) -> None:
        if rest:
            time.sleep(rest)
            call()

    def before_ours() -> None:
        for name, rival in rivals.items():
            settle(rival)
            np.add(memory, 1, out=memory)
            started = time.perf_counter()
            rival()
            seconds[name].append(time.perf_counter() - started)
        settle(ours)
        np.add(memory, 1, out=memory)

    benchmark.pedantic(ours, setup=before_ours, rounds=rounds, warmup_rounds=2)
    return {"ours": benchmark.stats.stats.median} | {name: statistics.median(s[2:]) for name, s in seconds.items()}
