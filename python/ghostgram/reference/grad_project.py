"""grad_project by definition: every per-sample gradient is formed and projected, one at a time, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
U64 = NDArray[np.uint64]

LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)


def run(
    a: F64, b: F64, P_out: F64 | None, P_in: F64 | None, out: F64, kind: str, nonzeros: int, seed: int, layer: int
) -> None:
    """Writes P_out G_i P_in^T into a (B, k_out, k_in) output, or the count sketch of G_i into a (B, k) one."""
    d, p = a.shape[2], b.shape[2]
    gradients = (b[i].T @ a[i] for i in range(a.shape[0]))
    if kind == "sparse":
        buckets, signs = hashes(p, d, out.shape[1], nonzeros, seed, layer)
        for i, gradient in enumerate(gradients):
            terms = signs * gradient / np.sqrt(nonzeros)
            out[i] = np.bincount(buckets.ravel(), terms.ravel(), minlength=out.shape[1])
    else:
        left = matrix(kind, out.shape[1], p, 0, seed, layer) if P_out is None else P_out
        right = matrix(kind, out.shape[2], d, 1, seed, layer) if P_in is None else P_in
        for i, gradient in enumerate(gradients):
            out[i] = left @ gradient @ right.T


def matrix(kind: str, k: int, n: int, purpose: int, seed: int, layer: int) -> F64:
    """(k, n) of independent entries with mean 0 and variance 1 / k: signs, or normals by Box and Muller."""
    rows, cols = np.arange(k)[:, None], np.arange(n)
    if kind == "rademacher":
        word = philox((cols, rows // 128, purpose, layer), seed)[rows // 32 % 4, rows, cols]
        return np.asarray((1.0 - 2.0 * (word >> (rows % 32).astype(np.uint64) & np.uint64(1))) / np.sqrt(k), np.float64)
    words = philox((cols, rows // 4, purpose, layer), seed).astype(np.float64)
    pair = rows // 2 % 2
    radius = np.sqrt(-2 * np.log((words[2 * pair, rows, cols] + 0.5) / 2**32))
    turn = words[2 * pair + 1, rows, cols] / 2**32 + np.where(rows % 2, -0.25, 0.0)  # a sine is a later cosine
    return np.asarray(radius * _cosine(turn) / np.sqrt(k), np.float64)


def _cosine(turn: F64) -> F64:
    """cos(2 pi turn), relatively exact near its zeros too: within an eighth of a turn of the nearest quarter."""
    quarter = np.rint(4 * turn)
    angle = np.pi / 2 * (4 * turn - quarter)
    by_quarter = [np.cos(angle), -np.sin(angle), -np.cos(angle), np.sin(angle)]
    return np.choose(quarter.astype(np.int64) % 4, by_quarter)


def hashes(p: int, d: int, k: int, nonzeros: int, seed: int, layer: int) -> tuple[I64, F64]:
    """(nonzeros, p, d) buckets and signs: the j-th bucket of an entry lies in the j-th of `nonzeros` parts of k."""
    j, rows, cols = np.arange(nonzeros)[:, None, None], np.arange(p)[:, None], np.arange(d)
    word = philox((cols, rows // 4, 2 + j, layer), seed)[rows % 4, j, rows, cols]
    first = np.arange(nonzeros + 1) * k // nonzeros
    buckets = first[j] + (word * np.diff(first)[j].astype(np.uint64) >> HALF).astype(np.int64)
    return buckets.astype(np.int64), np.asarray(1.0 - 2.0 * (word & np.uint64(1)), np.float64)


def philox(counter: tuple[Any, Any, Any, Any], seed: int) -> U64:
    """(4, ...) words of Philox4x32-10 with key (seed, seed >> 32); the counter's four words broadcast together."""
    x = [np.asarray(word, np.uint64) for word in np.broadcast_arrays(*counter)]
    for round_ in range(10):
        key0 = np.uint64(seed + round_ * 0x9E3779B9 & 0xFFFFFFFF)
        key1 = np.uint64((seed >> 32) + round_ * 0xBB67AE85 & 0xFFFFFFFF)
        product0, product1 = x[0] * np.uint64(0xD2511F53), x[2] * np.uint64(0xCD9E8D57)
        x = [product1 >> HALF ^ x[1] ^ key0, product1 & LOW, product0 >> HALF ^ x[3] ^ key1, product0 & LOW]
    return np.stack(x)
