"""gumbel_topk by definition, in NumPy: the key of every document, sorted."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
U64 = NDArray[np.uint64]

LOW = np.uint64(0xFFFFFFFF)


def philox4x32_10(counter: tuple[U64, U64, U64, U64], key: int) -> tuple[U64, U64, U64, U64]:
    """The four random 32-bit words of each 128-bit counter, low word first; words are uint64 arrays."""
    c0, c1, c2, c3 = counter
    half = np.uint64(32)
    for turn in range(10):
        key0, key1 = (
            np.uint64((key + turn * 0x9E3779B9) % 2**32),
            np.uint64(((key >> 32) + turn * 0xBB67AE85) % 2**32),
        )
        p, q = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (q >> half) ^ c1 ^ key0, q & LOW, (p >> half) ^ c3 ^ key1, p & LOW
    return c0, c1, c2, c3


def uniform(ids: U64, seed: int) -> F64:
    """u in (0, 1): an odd multiple of 2^-53, from the top 52 bits of the first two words of the id's stream."""
    zero = np.zeros_like(ids)
    high, low, _, _ = philox4x32_10((ids & LOW, ids >> np.uint64(32), zero, zero), seed % 2**64)
    bits = (high << np.uint64(32) | low) >> np.uint64(12)
    return (bits.astype(np.float64) + 0.5) * 2.0**-52


def noise(ids: U64, seed: int) -> F64:
    """Standard Gumbel noise, -log(-log u)."""
    return -np.log(-np.log(uniform(ids, seed)))


def keys_of(scores: F64, ids: U64, seed: int, temperature: float) -> F64:
    """scores / temperature + noise; the scores themselves at temperature 0."""
    with np.errstate(over="ignore"):
        keys: F64 = scores / temperature + noise(ids, seed) if temperature > 0 else scores + 0.0
    return keys


def run(
    scores: F64, ids: I64 | None, keys: F64, picks: I64, held: I64, threshold: F64, fault: I64,
    k: int, seed: int, temperature: float, by_position: bool, finish: bool,
) -> None:  # fmt: skip
    """Leaves the best k of the reservoir and the documents in the reservoir, best first."""
    fault[:] = -1, 0, -1, 0
    nan = np.isnan(scores)
    if nan.any():
        fault[0] = np.argmax(nan)
    positions = np.arange(len(scores))
    own_ids = (positions if ids is None else ids).view(np.uint64)
    own_picks = positions if by_position else own_ids.view(np.int64)
    m = int(held[0])
    every_key = np.concatenate([keys[:m], keys_of(scores, own_ids, seed, temperature)[~nan]])
    every_id = np.concatenate([picks[:m].view(np.uint64), own_ids[~nan]])
    every_pick = np.concatenate([picks[:m], own_picks[~nan]])

    order = np.lexsort((every_pick, every_id, -every_key))
    key, id = every_key[order], every_id[order]
    same = (key[1:] == key[:-1]) & (id[1:] == id[:-1])
    best = np.delete(order, np.flatnonzero(same) + 1)[:k]
    m = len(best)
    keys[:m], picks[:m], held[0] = every_key[best], every_pick[best], m
    if k == 0:
        threshold[0] = np.inf
    elif m == k:
        threshold[0] = keys[k - 1]
    if finish:
        found, times = np.unique(every_id[best], return_counts=True)
        if (times > 1).any():
            fault[1:3] = 1, found[times > 1][0].view(np.int64)
