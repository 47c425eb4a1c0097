"""Random numbers that are a function of one seed, a stream's name, counters and an id, and of nothing else.

Nothing has a state: a number can be drawn again at any time, in any order, on any process. Global generators are
neither read nor seeded.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    import torch

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
U64 = NDArray[np.uint64]

LOW, HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


def uniforms(seed: int, stream: str, counters: Sequence[int], ids: ArrayLike, count: int) -> F64:
    """Numbers uniform on [0, 1), of every id alone: whatever the other ids are, and wherever it stands.

    The number j of an id is the upper 53 of 64 bits of the Philox4x32-10 block (id, j // 2) under the key of (seed,
    stream, counters), times 2^-53: the first 64 bits for an even j, the others for an odd one. So a larger count
    continues a smaller one.

    Args:
        seed: Any integer.
        stream: What the numbers are for, such as "dsa": streams of different names are independent.
        counters: Where in the run they are needed, such as (iteration, inner step). (1,) and (1, 0) differ.
        ids: (n,) integers of 64 bits, repeats allowed.
        count: Numbers for each id, at least 0.

    Returns:
        (n, count) float64.

    Raises:
        TypeError: ids are no integers.
        ValueError: ids have another shape than (n,), or count is negative.

    Cost:
        A Philox block (about 120 passes over n numbers of 8 bytes) for every two numbers of an id.

    Source:
        Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
    """
    own = np.asarray(ids)
    if own.ndim != 1:
        raise ValueError(f"ids: expected shape (n,), got {own.shape}")
    if own.dtype.kind not in "iu" and own.size:
        raise TypeError(f"ids: expected integers, got {own.dtype}")
    count = operator.index(count)
    if count < 0:
        raise ValueError(f"count: expected at least 0, got {count}")
    words = own.astype(np.int64).view(np.uint64)[:, None]
    blocks = np.arange((count + 1) // 2, dtype=np.uint64)[None, :]
    bits = _philox((words & LOW, words >> HALF, blocks, np.zeros_like(blocks)), _key(seed, stream, counters))
    numbers = np.stack([high << HALF | low for high, low in (bits[:2], bits[2:])], axis=-1) >> np.uint64(11)
    return numbers.reshape(len(own), 2 * blocks.size)[:, :count].astype(np.float64) * 2.0**-53


def permutation(seed: int, stream: str, counters: Sequence[int], n: int) -> I64:
    """(n,) the numbers 0 to n - 1 in an order that the key alone decides, every order as likely as any other."""
    order: I64 = np.argsort(uniforms(seed, stream, counters, np.arange(n), 1)[:, 0], kind="stable")
    return order


def integer(seed: int, stream: str, counters: Sequence[int], low: int, high: int) -> int:
    """A number uniform on {low, ..., high - 1}, up to (high - low) 2^-53.

    Raises:
        ValueError: There is no such number, or more than 2^53 of them.
    """
    if not 0 < high - low <= 2**53:
        raise ValueError(f"high: expected low < high <= low + 2^53, got low = {low} and high = {high}")
    return low + int(uniforms(seed, stream, counters, [0], 1)[0, 0] * (high - low))


def generator(seed: int, stream: str, counters: Sequence[int]) -> torch.Generator:
    """A torch generator of its own for the CPU, seeded by the key: for what only torch can draw."""
    import torch

    return torch.Generator().manual_seed(_key(seed, stream, counters))


def _key(seed: int, stream: str, counters: Sequence[int]) -> int:
    """The Philox key, 0 to 2^64 - 1: BLAKE2b-64 of a text that no two different arguments share."""
    named = f"{operator.index(seed)} {stream!r} {[operator.index(c) for c in counters]}".encode()
    return int.from_bytes(hashlib.blake2b(named, digest_size=8).digest(), "little")


def _philox(counter: tuple[U64, U64, U64, U64], key: int) -> tuple[U64, U64, U64, U64]:
    """Philox4x32-10: four random words of 32 bits, in lanes of 64, for each counter of four; they broadcast."""
    c0, c1, c2, c3 = counter
    for turn in range(10):
        key0 = np.uint64((key + turn * 0x9E3779B9) % 2**32)
        key1 = np.uint64(((key >> 32) + turn * 0xBB67AE85) % 2**32)
        p, q = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (q >> HALF) ^ c1 ^ key0, q & LOW, (p >> HALF) ^ c3 ^ key1, p & LOW
    return c0, c1, c2, c3
