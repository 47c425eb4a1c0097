"""Sets of document ids that millions are looked up in."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

I64 = NDArray[np.int64]
U64 = NDArray[np.uint64]
Bool = NDArray[np.bool_]

WIDTH = 16
"""Bytes of a document id."""


def words(column: Any, name: str = "doc_id") -> U64:
    """The ids of a fixed_size_binary(16) array of pyarrow, without a copy: (n, 2) little-endian 64-bit words.

    Raises:
        ValueError: An id is null.
    """
    if column.null_count:
        raise ValueError(f"{name}: expected {WIDTH} bytes everywhere, got {column.null_count} nulls")
    if not len(column):
        return np.empty((0, 2), np.uint64)
    end = column.offset + len(column)
    return np.frombuffer(column.buffers()[1], "<u8", 2 * end).reshape(-1, 2)[column.offset :]


def binary(ids: U64) -> Any:
    """The pyarrow array of (n, 2) words: the inverse of `words`."""
    import pyarrow as pa

    data = np.ascontiguousarray(ids, "<u8")
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(WIDTH), len(ids), [None, pa.py_buffer(data)])


def distinct(ids: U64) -> tuple[U64, I64]:
    """The different ones of (n, 2) words, sorted, and how often each is there."""
    ordered = ids[np.lexsort((ids[:, 1], ids[:, 0]))]
    new = np.append(True, (ordered[1:] != ordered[:-1]).any(axis=1))[: len(ids)]
    first = np.flatnonzero(new)
    return ordered[first], np.diff(first, append=len(ids))


def name_of(ids: U64) -> str:
    """One id of two words, as hexadecimal digits."""
    return ids.astype("<u8").tobytes().hex()


class Lookup:
    """Distinct 64-bit ids to find others in.

    A table of 16 to 32 flags an id says of most strangers that they are not here, for the price of one read; only the
    rest are searched for.
    """

    def __init__(self, ids: U64):
        ordered = np.sort(ids)
        self.ids = ordered[np.append(True, ordered[1:] != ordered[:-1])[: len(ids)]]  # np.unique's hashing is slower
        bits = max(10, int(16 * len(self.ids)).bit_length())
        self._shift = np.uint64(64 - bits)
        self._flags = np.zeros(1 << bits, bool)
        self._flags[self._slots(self.ids)] = True

    def find(self, ids: U64) -> tuple[I64, I64]:
        """Of (n,) ids the positions of those that are here, and where in `self.ids` they are."""
        at = np.flatnonzero(self._flags[self._slots(ids)])
        asked = ids[at]
        place = np.minimum(np.searchsorted(self.ids, asked), max(len(self.ids) - 1, 0))
        here = self.ids[place] == asked if len(self.ids) else np.zeros(0, bool)
        return at[here], place[here]

    def _slots(self, ids: U64) -> U64:
        return (ids * np.uint64(0x9E3779B97F4A7C15)) >> self._shift


class IdSet:
    """Documents by all 16 bytes of their ids.

    Args:
        ids: (n, 2) words, distinct or not.
    """

    def __init__(self, ids: U64):
        first, second = ids[np.lexsort((ids[:, 1], ids[:, 0]))].T
        self._second = second
        self._lookup = Lookup(first)
        self._starts = np.searchsorted(first, self._lookup.ids)
        self._runs = np.diff(self._starts, append=len(first))

    def __len__(self) -> int:
        return len(self._second)

    def has(self, ids: U64) -> Bool:
        """(n,) whether each of (n, 2) words is here."""
        found = np.zeros(len(ids), bool)
        at, place = self._lookup.find(ids[:, 0])
        second = ids[at, 1]
        for step in range(int(self._runs.max(initial=0))):  # nearly always 1: ids of equal first words
            inside = step < self._runs[place]
            held = self._second[np.where(inside, self._starts[place] + step, 0)]
            found[at] |= inside & (held == second)
        return found
