"""Random numbers that belong to documents: a function of a document's id, the seed, the stage and the purpose."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from ghostgram.ops import gumbel_topk

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
U64 = NDArray[np.uint64]


def stream(seed: int, stage: int, purpose: str) -> int:
    """The Philox key of one purpose in one stage: BLAKE2b-64 of the three, as an integer from 0 to 2^64 - 1."""
    named = f"{seed} {stage} {purpose}".encode()
    return int.from_bytes(hashlib.blake2b(named, digest_size=8).digest(), "little")


def gumbel(ids: U64, key: int) -> F64:
    """The standard Gumbel noise that `gg.GumbelTopK` gives these ids, to the bit.

    A key of the room is score / temperature + noise, so the keys of zero scores at temperature 1 are the noise itself:
    all of them are asked for, with the positions they belong to.

    Args:
        ids: (n,) 64-bit ids, repeats allowed.
        key: The stream's, from 0 to 2^64 - 1.

    Returns:
        (n,) numbers from -3.60 to 36.74.

    Cost:
        A Philox block, two logarithms and two sorts of n.
    """
    distinct, where = np.unique(ids, return_inverse=True)
    n, zeros = len(distinct), np.zeros(len(distinct))
    _, signed = gumbel_topk.checked(zeros, distinct)
    order, keys = gumbel_topk.compute(zeros, signed, *gumbel_topk.options(n, key, 1.0), "auto")
    noise = np.empty(n)
    noise[order] = keys
    return noise[where]


def shuffled(ids: U64, key: int) -> I64:
    """The positions of distinct ids in an order that the stream alone decides, every order as likely as any other."""
    order: I64 = gumbel_topk.gumbel_topk(np.zeros(len(ids)), len(ids), ids=ids, seed=key)
    return order
