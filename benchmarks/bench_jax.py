"""What a call of grad_norms costs under JAX beside one of `x + 1`, and what a batch of calls costs.

`python benchmarks/bench_jax.py` prints medians of rounds in which all take turns, in microseconds, as docs/jax.md has.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ghostgram as gg

ROUNDS, CALLS = 30, 20
TINY = (2, 3, 4)
"""Samples, tokens and features of arrays that cost nothing themselves."""
BATCH = (64, 4, 32, 64)
"""A batch of calls, each too small to be worth sharing among threads."""


def ways() -> dict[str, Callable[[], Any]]:
    """Name -> one call, finished when it returns."""
    values = np.ones(TINY, np.float32)
    x, many = jnp.asarray(values), jnp.ones(BATCH)
    plus_one, norms = jax.jit(lambda x: x + 1), jax.jit(gg.grad_norms)
    batched = jax.jit(jax.vmap(gg.grad_norms))
    in_turn = jax.jit(lambda a, b: jax.lax.map(lambda ab: gg.grad_norms(*ab), (a, b)))
    return {
        "x + 1 in jit": lambda: plus_one(x).block_until_ready(),
        "grad_norms in jit": lambda: norms(x, x).block_until_ready(),
        "grad_norms of JAX arrays": lambda: gg.grad_norms(x, x).block_until_ready(),
        "grad_norms of NumPy arrays": lambda: gg.grad_norms(values, values),
        f"vmap over {BATCH[0]} calls": lambda: batched(many, many).block_until_ready(),
        f"lax.map over {BATCH[0]} calls": lambda: in_turn(many, many).block_until_ready(),
    }


def microseconds(call: Callable[[], Any]) -> float:
    """Of one call, as the mean of many."""
    started = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - started) / CALLS * 1e6


def main() -> None:
    """Prints one row for each way."""
    calls = ways()
    turns = [{name: microseconds(call) for name, call in calls.items()} for _ in range(ROUNDS + 2)][2:]
    print(f"jax {jax.__version__}, medians of {ROUNDS} rounds of {CALLS} calls")
    for name in calls:
        print(f"| {name} | {statistics.median(turn[name] for turn in turns):.1f} |")


if __name__ == "__main__":
    main()
