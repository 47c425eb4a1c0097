"""Word 1-grams and 2-grams of texts, hashed into the columns of a sparse matrix, thousands of documents a call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from ghostgram.algorithms.mates.influence.ridge import SparseRows

U8 = NDArray[np.uint8]
U64 = NDArray[np.uint64]

_SPACE, _LETTER, _MARK, _SIGN = range(4)
_BATCH_BYTES, _BATCH_TEXTS = 1 << 18, 1 << 12  # what fits a core's cache; a text's row does not depend on its batch
_MOST_COUNTED = 1 << 16
_BITS = 18

_M, _K = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93  # odd


def _mixed(words: U64) -> U64:
    """The finaliser of splitmix64: every bit of the result depends on every bit of the word."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _classes() -> U8:
    """What the first byte of a UTF-8 character says of it."""
    classes = np.full(256, _MARK, np.uint8)
    classes[:33] = classes[127] = _SPACE
    for letters in ("az", "AZ", "09", "__"):
        classes[ord(letters[0]) : ord(letters[1]) + 1] = _LETTER
    classes[0xC3:0xE2] = _LETTER  # Latin with accents to Thai; 0xC2 and 0xE2 begin punctuation and symbols
    classes[0xE3:] = _SIGN  # ideographs, kana, hangul, emoji
    return classes


def _byte_words() -> U64:
    """A random word for each byte, one for both cases of an ASCII letter, 0 for what separates words."""
    lower = np.frombuffer(bytes(range(256)).lower(), np.uint8).astype(np.uint64)
    words = _mixed((lower + np.uint64(1)) * np.uint64(_M))
    words[_CLASSES == _SPACE] = 0
    return words


def _powers(base: int, count: int) -> U64:
    powers = np.full(count, base, np.uint64)
    powers[:1] = 1
    return np.multiply.accumulate(powers)


_CLASSES = _classes()
_BYTE_WORDS = _byte_words()
_POWERS, _INVERSES = (_powers(base, 2 * _BATCH_BYTES) for base in (_M, pow(_M, -1, 2**64)))
_LOG = np.log1p(np.arange(_MOST_COUNTED))


def ngrams(texts: Sequence[str], bits: int = _BITS) -> SparseRows:
    """Rows of hashed n-gram counts, `log1p(count) / |log1p(counts)|`, and of the length of the text.

    A word is a run of letters and digits or a run of punctuation; white space separates, ASCII case is ignored, and
    each character of scripts without spaces (from U+3000 on: ideographs, kana, hangul) is a word. Words and pairs of
    neighbours are in column `hash >> (64 - bits)`. The last column is `(log(1 + words) - 5) / 2`.

    The hash is arithmetic mod 2^64 on UTF-8 bytes: the same on every machine and in every release.

    Args:
        texts: n texts.
        bits: Of the hash, 1 to 18.

    Returns:
        n rows of 2^bits + 1 columns. A row depends on its text alone, to the bit.

    Raises:
        ValueError: Bits outside 1 to 18.

    Cost:
        About 100 ns a byte of text on one core; 12 bytes a distinct n-gram.
    """
    if not 1 <= bits <= _BITS:
        raise ValueError(f"bits: expected 1 to {_BITS}, got {bits}")
    return SparseRows.stacked([_rows(batch, bits) for batch in _batches(texts)], 2**bits + 1)


def _batches(texts: Sequence[str]) -> Iterator[list[bytes]]:
    batch, size = list[bytes](), 0
    for text in texts:
        encoded = text.encode("utf-8", "replace")
        if batch and (size + len(encoded) > _BATCH_BYTES or len(batch) == _BATCH_TEXTS):
            yield batch
            batch, size = [], 0
        batch.append(encoded)
        size += len(encoded)
    if batch:
        yield batch


def _rows(texts: list[bytes], bits: int) -> SparseRows:
    owners, hashes = _words(texts)
    words = np.bincount(owners, minlength=len(texts))
    pairs = owners[1:] == owners[:-1]
    couples = _mixed(hashes[:-1][pairs] * np.uint64(_K) + hashes[1:][pairs])
    owner = np.concatenate([owners, owners[1:][pairs]]).astype(np.uint32)
    column = (np.concatenate([hashes, couples]) >> np.uint64(64 - bits)).astype(np.uint32)
    keys = np.sort(owner << np.uint32(bits) | column)  # at most 12 + 18 bits
    firsts = np.flatnonzero(np.diff(keys, prepend=np.uint32(2**32 - 1)))
    counts = np.diff(firsts, append=len(keys))
    keys, values = keys[firsts], _LOG[np.minimum(counts, _MOST_COUNTED - 1)]
    entries = np.bincount(keys >> np.uint32(bits), minlength=len(texts))
    starts = np.concatenate([[0], np.cumsum(entries)])
    norms, some = np.ones(len(texts)), entries > 0
    norms[some] = np.sqrt(np.add.reduceat(values * values, starts[:-1][some]))
    # A text's length goes after its n-grams, so that no row is empty.
    places = np.arange(len(keys)) + np.repeat(np.arange(len(texts)), entries)
    lengths = starts[1:] + np.arange(len(texts))
    columns, out = np.empty(len(keys) + len(texts), np.int64), np.empty(len(keys) + len(texts), np.float32)
    columns[places], columns[lengths] = keys & np.uint32(2**bits - 1), 2**bits
    out[places], out[lengths] = values / np.repeat(norms, entries), (np.log1p(words) - 5) / 2
    return SparseRows(np.append(starts[:-1] + np.arange(len(texts)), len(out)), columns, out, 2**bits + 1)


def _words(texts: list[bytes]) -> tuple[NDArray[np.int64], U64]:
    """Every word's text and 64-bit hash, in the order of the texts."""
    data = np.frombuffer(b"\n".join([*texts, b""]), np.uint8)
    classes = _CLASSES[data]
    begins = np.empty(len(data), np.bool_)
    if len(data) and data.max() >= 0x80:  # bytes inside a character are of the class of its first
        inside = data & 0xC0 == 0x80
        first = np.maximum.accumulate(np.where(inside, 0, np.arange(len(data))))
        classes = classes[first]
        np.logical_and(classes == _SIGN, ~inside, out=begins)
    else:
        begins[:] = False
    begins[1:] |= classes[1:] != classes[:-1]
    begins[:1] = True
    begins &= classes != _SPACE
    at = np.flatnonzero(begins)
    lengths = np.array([len(text) + 1 for text in texts])
    owners = np.repeat(np.arange(len(texts)), np.diff(np.searchsorted(at, np.cumsum(lengths)), prepend=0))
    if not len(at):
        return owners, np.empty(0, np.uint64)
    # sum_j word(byte_j) M^j of the bytes of a word: the powers of its place in the batch, less those before it.
    long = len(data) > len(_POWERS)
    powers = _powers(_M, len(data)) if long else _POWERS[: len(data)]
    inverses = _powers(pow(_M, -1, 2**64), len(data)) if long else _INVERSES
    return owners, _mixed(np.add.reduceat(_BYTE_WORDS[data] * powers, at) * inverses[at])
