"""From domain weights to a domain for every position of the data stream, in integers: the same on every machine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from heapq import heapify, heappop, heappush

import numpy as np
from numpy.typing import ArrayLike

from ghostgram.algorithms.velocitune.draws import QUOTAS, philox

Q = 1 << 30
"""What integer weights add up to."""


def integer_weights(weights: ArrayLike | Sequence[int]) -> tuple[int, ...]:
    """Weights as integers that add up to 2^30: rounded by largest remainder, ties to the first.

    Args:
        weights: (K,) numbers >= 0, not all 0, of any sum. Floats count as the rationals that they are, so the same
            floats give the same integers everywhere.

    Raises:
        ValueError: A weight is negative or not finite, or none is positive.
    """
    given = [weight.item() if isinstance(weight, np.generic) else weight for weight in np.asarray(weights)]
    if not all(math.isfinite(weight) and weight >= 0 for weight in given) or not any(given):
        raise ValueError(f"weights: expected finite numbers >= 0, not all 0, got {given}")
    exact = [Fraction(weight) for weight in given]
    scale = Q / sum(exact, Fraction())
    whole = [math.floor(weight * scale) for weight in exact]
    remainders = [weight * scale - floor for weight, floor in zip(exact, whole, strict=True)]
    for k in sorted(range(len(exact)), key=lambda k: (-remainders[k], k))[: Q - sum(whole)]:
        whole[k] += 1
    return tuple(whole)


def carried(owed: Sequence[int], weights: Sequence[int]) -> tuple[int, ...]:
    """What each domain is owed at the start of new weights, in draws of 1/2^30; it adds up to 0.

    A domain whose new weight is 0 is owed nothing: what it was owed, or had too much, goes to the others by weight.

    Args:
        owed: (K,) at the end of the old weights.
        weights: (K,) new integer weights.
    """
    lost = sum(each for each, weight in zip(owed, weights, strict=True) if not weight)
    kept = [each + lost * weight // Q if weight else 0 for each, weight in zip(owed, weights, strict=True)]
    left = sum(owed) - sum(kept)  # what rounding down has left, less than the number of domains
    for k in [k for k, weight in enumerate(weights) if weight][:left]:
        kept[k] += 1
    return tuple(kept)


class EarliestDeadline:
    """Which domain each position belongs to, so that every domain is within one draw of its share at every position.

    Of the domains with positive weight W_k, K' of them, let D = 2K' - 2 and c_k the draws so far. At position
    p = 1, 2, ... a domain is released once `D (a_k + p W_k - c_k Q) >= Q`; of those released the one whose deadline
    `(Q (D (c_k + 1) - 1) - D a_k) / (D W_k)` comes first is drawn, ties to the first in order. From a_k = 0 that keeps
    `|c_k - p W_k / Q| <= 1 - 1 / (2K' - 2)`.

    a_k is what a domain is owed from earlier weights. Without it, counts would start anew at every change: a domain
    whose share of a batch is below one half would never be drawn where weights change with every batch.

    Args:
        weights: (K,) integers that add up to 2^30.
        carry: (K,) a_k, which add up to 0 and are 0 where the weight is; None for zeros.
        position: Positions done under these weights.
        counts: (K,) draws in them; None for zeros.

    Cost:
        Four operations on heaps of K' a position, about 3 us.

    Source:
        R. Tijdeman, The chairman assignment problem (Discrete Mathematics 32, 1980); the carry is this library's.
    """

    def __init__(
        self,
        weights: Sequence[int],
        carry: Sequence[int] | None = None,
        position: int = 0,
        counts: Sequence[int] | None = None,
    ) -> None:
        self.weights, self.position = tuple(weights), position
        self.carry = tuple(carry) if carry is not None else (0,) * len(self.weights)
        self.counts = list(counts) if counts is not None else [0] * len(self.weights)
        active = [k for k, weight in enumerate(self.weights) if weight]
        self._only = active[0] if len(active) == 1 else None
        self._slack = 2 * len(active) - 2
        self._waiting = [(self._release(k), k) for k in active] if self._only is None else []
        heapify(self._waiting)
        self._released: list[tuple[int, int]] = []

    def take(self, n: int) -> list[int]:
        """The domains of the next n positions."""
        if self._only is not None:
            self.counts[self._only] += n
            self.position += n
            return [self._only] * n
        waiting, released, drawn = self._waiting, self._released, []
        for position in range(self.position + 1, self.position + n + 1):
            while waiting and waiting[0][0] <= position:
                k = heappop(waiting)[1]
                heappush(released, (self._deadline(k), k))
            k = heappop(released)[1]
            self.counts[k] += 1
            heappush(waiting, (self._release(k), k))
            drawn.append(k)
        self.position += n
        return drawn

    def owed(self) -> tuple[int, ...]:
        """(K,) a_k + p W_k - c_k Q: what each domain is short of its share, in draws of 1/2^30."""
        each = zip(self.carry, self.weights, self.counts, strict=True)
        return tuple(a + self.position * weight - count * Q for a, weight, count in each)

    def copy(self) -> EarliestDeadline:
        """One that goes on from here by itself."""
        return EarliestDeadline(self.weights, self.carry, self.position, self.counts)

    def _release(self, k: int) -> int:
        """The first position at which domain k may be drawn again."""
        return -((self._slack * (self.carry[k] - self.counts[k] * Q) - Q) // (self._slack * self.weights[k]))

    def _deadline(self, k: int) -> int:
        """Orders deadlines: different ones are 2^-60 apart at least, so that 2^60 times them differ rounded down."""
        due = Q * (self._slack * (self.counts[k] + 1) - 1) - self._slack * self.carry[k]
        return (due << 60) // self.weights[k]


def multinomial(weights: Sequence[int], seed: int, batch: int, n: int) -> list[int]:
    """n domains drawn independently by weight, from Philox under the seed and the batch's number.

    Args:
        weights: (K,) integers that add up to 2^30.
        seed: Of the run.
        batch: Number of the batch.
        n: Positions.
    """
    uniform = philox(seed, QUOTAS, batch, 0, n) >> np.uint64(34)
    drawn: list[int] = np.searchsorted(np.cumsum(weights), uniform.astype(np.int64), side="right").tolist()
    return drawn


def sequence_weights(weights: ArrayLike, lengths: ArrayLike | None) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Shares of sequences that give these shares of tokens: proportional to w_k / E[length_k].

    Args:
        weights: (K,) shares of tokens.
        lengths: (K,) mean tokens of a sequence of each domain; None where they are equal.

    Raises:
        ValueError: The numbers of domains differ, or a length is not positive and finite.
    """
    shares = np.asarray(weights, np.float64)
    if lengths is None:
        return shares
    tokens = np.asarray(lengths, np.float64)
    if tokens.shape != shares.shape or not (np.isfinite(tokens) & (tokens > 0)).all():
        raise ValueError(f"lengths: expected {len(shares)} finite numbers > 0, got {tokens.tolist()}")
    return shares / tokens
