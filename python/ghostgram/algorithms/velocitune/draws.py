"""Which sample a domain's n-th draw is: a fresh order every epoch, each sample once in it, and no state to save."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

I64 = NDArray[np.int64]
U64 = NDArray[np.uint64]

EPOCH, BATCH, QUOTAS, ROUNDS, REPLAY, BUFFER = range(6)
"""What random numbers are for: orders of epochs and batches, quotas, the cipher's keys, segments, shuffle buffers."""

SORTED = 1 << 20
"""Domains up to this size are ordered by sorted random keys, larger ones by a cipher, which has no table."""


def philox(seed: int, purpose: int, a: int, b: int, n: int) -> U64:
    """n words of Philox4x64-10 under the key (seed, 0), its counter starting at (0, a, b, purpose).

    NumPy keeps the words of its bit generators the same in all versions.

    Raises:
        ValueError: The seed is not in [0, 2^64).
    """
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed: expected 0 <= seed < 2^64, got {seed}")
    start = np.array([0, a, b, purpose], np.uint64)
    words: U64 = np.random.Philox(counter=start, key=np.array([seed, 0], np.uint64)).random_raw(n)
    return words


def shuffled(seed: int, purpose: int, a: int, b: int, n: int) -> I64:
    """0 ... n-1 in the order of n Philox words, ties by number: every order as likely as any other.

    Cost:
        A sort of n.
    """
    return np.argsort(philox(seed, purpose, a, b, n), kind="stable")


class Cipher:
    """A keyed bijection of 0 ... n-1 that is computed, not stored: a Feistel network on the next even number of bits.

    Eight rounds, and numbers that leave the range are encrypted again until they are inside (cycle walking), at most
    four times on average. Small domains are visibly not uniform under it: they are sorted instead.

    Args:
        n: Numbers.
        keys: (8,) one for each round.
    """

    def __init__(self, n: int, keys: U64) -> None:
        self.n, self.keys = n, keys
        bits = max(1, (n - 1).bit_length())
        self._half = np.uint64((bits + 1) // 2)

    def __call__(self, numbers: I64) -> I64:
        """Where each number goes.

        Args:
            numbers: (m,) in [0, n).

        Cost:
            About 50 to 200 integer operations a number.
        """
        there = self._encrypted(numbers.astype(np.uint64))
        while (outside := np.flatnonzero(there >= self.n)).size:
            there[outside] = self._encrypted(there[outside])
        return there.astype(np.int64)

    def _encrypted(self, numbers: U64) -> U64:
        left, right = numbers >> self._half, numbers & ((np.uint64(1) << self._half) - np.uint64(1))
        for key in self.keys:
            left, right = right, left ^ (_mixed(right ^ key) >> (np.uint64(64) - self._half))
        return (left << self._half) | right


def _mixed(words: U64) -> U64:
    """Every bit of the result depends on every bit of a word (the finaliser of SplitMix64)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


class Draws:
    """The samples of every domain in the order in which they are drawn: `perm(seed, k, d div n_k)[d mod n_k]`.

    Args:
        seed: Of the run, in [0, 2^64).
        sizes: Samples of each domain.
    """

    def __init__(self, seed: int, sizes: Sequence[int]) -> None:
        self.seed, self.sizes = seed, tuple(sizes)
        self._orders: dict[int, tuple[int, I64 | Cipher]] = {}  # by domain: the last epoch asked for

    def samples(self, domain: int, draws: I64) -> I64:
        """Which samples of a domain its draws are.

        Args:
            domain: Its number.
            draws: (m,) numbers of draws since the start of the run, over all changes of weights.

        Cost:
            A sort of n_k in every epoch, kept; from 2^20 samples on 200 operations a draw and nothing kept.
        """
        size = self.sizes[domain]
        epochs, places = np.divmod(draws, size)
        found = np.empty(len(draws), np.int64)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            order = self._order(domain, epoch, size)
            found[here] = order(places[here]) if isinstance(order, Cipher) else order[places[here]]
        return found

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_orders": {}}  # another process sorts for itself, which is cheaper than sending

    def _order(self, domain: int, epoch: int, size: int) -> I64 | Cipher:
        known = self._orders.get(domain)
        if known is None or known[0] != epoch:
            if size <= SORTED:
                order: I64 | Cipher = shuffled(self.seed, EPOCH, domain, epoch, size)
            else:
                order = Cipher(size, philox(self.seed, ROUNDS, domain, epoch, 8))
            known = self._orders[domain] = (epoch, order)
        return known[1]
