"""A uniform sample of a stream of documents that is the same for any order of the stream."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray


class BottomN:
    """Keeps the n documents with the smallest keyed hash of their id: BLAKE2b-64, ties by the smaller id.

    Documents of equal id count once. A smaller n keeps the beginning of what a larger one keeps.

    Args:
        n: How many to keep, at least 0.
        seed: From 0 to 2^64 - 1: the key.
    """

    def __init__(self, n: int, seed: int) -> None:
        if n < 0 or not 0 <= seed < 2**64:
            raise ValueError(f"sample: expected n >= 0 and a seed from 0 to 2^64 - 1, got {n} and {seed}")
        self._n = n
        self._keyed = hashlib.blake2b(digest_size=8, key=seed.to_bytes(8, "little"), person=b"ghostgram sample")
        self._tables: list[Any] = []
        self._hashes: list[NDArray[np.uint64]] = []
        self._bound = np.uint64(2**64 - 1)  # a document with a larger hash is not among the n
        self._held = 0

    def update(self, documents: Any) -> None:
        """Looks at the documents of a pyarrow.Table with a column doc_id."""
        digests = b"".join(map(self._hash, documents["doc_id"].to_pylist()))
        hashes = np.frombuffer(digests, np.dtype("<u8")).astype(np.uint64)
        near = np.flatnonzero(hashes <= self._bound)
        self._tables.append(documents.take(near))
        self._hashes.append(hashes[near])
        self._held += len(near)
        if self._held > 2 * max(self._n, 1024):
            self._cut()

    def table(self) -> Any:
        """The documents kept, by ascending hash; of those of equal id the first one seen. Needs an update before."""
        self._cut()
        return self._tables[0]

    def _hash(self, doc_id: bytes) -> bytes:
        keyed = self._keyed.copy()
        keyed.update(doc_id)
        return keyed.digest()

    def _cut(self) -> None:
        import pyarrow as pa

        table, hashes = pa.concat_tables(self._tables), np.concatenate(self._hashes)
        ids = np.frombuffer(b"".join(table["doc_id"].to_pylist()), ">u8").reshape(-1, 2)
        order = np.lexsort((ids[:, 1], ids[:, 0], hashes))
        again = (ids[order[1:]] == ids[order[:-1]]).all(axis=1)
        order = np.concatenate([order[:1], order[1:][~again]])[: self._n]
        self._tables, self._hashes, self._held = [table.take(order).combine_chunks()], [hashes[order]], len(order)
        if len(order) == self._n:
            self._bound = hashes[order[-1]] if self._n else np.uint64(0)
