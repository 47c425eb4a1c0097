"""Names that depend on contents alone: of a document, a file, a folder, a piece of work and a table of rows.

All are BLAKE2b, except the key of a piece of work, which is SHA-256. None depends on where a file lies, on the order of
rows or on the version of a library.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

SCHEMA = 1
"""The version of every file that MATES writes; part of each key, so files of another version are never mixed in."""

_READ = 1 << 20
_ROWS = 1 << 16  # rows whose bytes are laid out at a time


def doc_id(text: str | None = None, user_id: str | None = None) -> bytes:
    """The identity of a document: BLAKE2b-128 of the user's id where there is one, else of the text, as UTF-8.

    Documents of equal text are one document; so are documents of equal user ids. Among N documents, two different ones
    share an id with probability about N^2 / 2^129: 1e-25 at N = 1e7.

    Args:
        text: The raw text, as it stands in the pool.
        user_id: The id that the pool's owner gave it.

    Returns:
        16 bytes.

    Raises:
        ValueError: Neither is given, or the string has no UTF-8 form (a lone surrogate).
    """
    named = text if user_id is None else user_id
    if named is None:
        raise ValueError("doc_id: expected a text or a user_id, got neither")
    return hashlib.blake2b(named.encode(), digest_size=16).digest()


def digest_of_bytes(data: bytes) -> str:
    """BLAKE2b-256, as 64 hexadecimal digits."""
    return hashlib.blake2b(data, digest_size=32).hexdigest()


def digest_of_documents(ids: Sequence[bytes], texts: Sequence[str]) -> str:
    """BLAKE2b-256 of documents one after another: each one's id, the length of its text, and the text."""
    running = hashlib.blake2b(digest_size=32)
    for doc, text in zip(ids, texts, strict=True):
        data = text.encode()
        running.update(doc + len(data).to_bytes(8, "little") + data)
    return running.hexdigest()


def digest_of_file(file: str | Path | BinaryIO) -> str:
    """`digest_of_bytes` of a local file or of an open one from where it stands, read in pieces of 1 MiB."""
    if isinstance(file, (str, Path)):
        with open(file, "rb") as opened:
            return digest_of_file(opened)
    running = hashlib.blake2b(digest_size=32)
    while piece := file.read(_READ):
        running.update(piece)
    return running.hexdigest()


def canonical(value: Any) -> str:
    """The one JSON text of a value: keys sorted, no spaces, no NaN or infinity.

    Raises:
        TypeError: The value holds something that JSON has no form for, such as a NumPy scalar.
        ValueError: It holds NaN or infinity.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def content_key(kind: str, config: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """The name of a piece of work: equal for equal work, whenever and wherever it is asked for.

    Args:
        kind: What is done: "label", "fit", "score" or "select".
        config: Every setting that the result depends on, of what JSON has a form for.
        inputs: The digest of everything that is read, by its role.

    Returns:
        SHA-256 of the canonical JSON of all this and of `SCHEMA`, as 64 hexadecimal digits.
    """
    named = {"kind": kind, "schema": SCHEMA, "config": config, "inputs": inputs}
    return hashlib.sha256(canonical(named).encode()).hexdigest()


def logical_digest(table: Any) -> int:
    """What the rows of a table are, whatever their order: the sum modulo 2^128 of BLAKE2b-128 of every row.

    Digests of parts add up (modulo 2^128) to the digest of the whole. A row's hash covers the names and types of its
    columns, in the order of names, and its values to the bit: 0.0 and -0.0 differ.

    Args:
        table: A pyarrow.Table of integers, floats, booleans, strings and binary values, nulls allowed.

    Raises:
        TypeError: A column is of another type.

    Cost:
        One to three microseconds a row, and memory for 65,536 rows at a time.
    """
    names = sorted(table.column_names)
    header = canonical([[name, str(table.schema.field(name).type)] for name in names]).encode()
    empty = hashlib.blake2b(digest_size=16, person=hashlib.blake2b(header, digest_size=16).digest())
    total = 0
    for start in range(0, table.num_rows, _ROWS):
        piece = table.slice(start, _ROWS)
        rows = np.hstack([_bytes_of(piece[name].combine_chunks(), name) for name in names])
        width, flat = rows.shape[1], memoryview(rows.tobytes())
        hashes = b"".join(_hash(empty.copy(), flat[at : at + width]) for at in range(0, len(flat), width))
        words = np.frombuffer(hashes, "<u4").reshape(-1, 4).sum(axis=0, dtype=np.uint64)  # 2^16 rows: no overflow
        total += sum(int(word) << 32 * place for place, word in enumerate(words))
    return total % (1 << 128)


def _hash(running: Any, row: memoryview) -> bytes:
    running.update(row)
    digest: bytes = running.digest()
    return digest


def _bytes_of(column: Any, name: str) -> NDArray[np.uint8]:
    """The values of a column as an (n, w) matrix: whether it is null, then its bytes, or the hash of a longer value."""
    import pyarrow as pa

    if isinstance(column, pa.ChunkedArray):  # what combine_chunks gives for no rows depends on pyarrow's version
        column = pa.concat_arrays(column.chunks) if column.chunks else pa.array([], column.type)
    kind, rows = column.type, len(column)
    valid = column.is_valid().to_numpy(zero_copy_only=False)
    if pa.types.is_fixed_size_binary(kind):
        values = np.frombuffer(column.buffers()[1], np.uint8).reshape(-1, kind.byte_width)
        values = np.where(valid[:, None], values[column.offset : column.offset + rows], np.uint8(0))
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        numbers = np.ascontiguousarray(column.fill_null(False if pa.types.is_boolean(kind) else 0).to_numpy(False))
        values = numbers.astype(numbers.dtype.newbyteorder("<"), copy=False).view(np.uint8).reshape(rows, -1)
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind):
        coded = column.cast(pa.large_binary()).dictionary_encode()  # a domain is hashed once, not once a document
        hashed = [hashlib.blake2b(value.as_buffer(), digest_size=16).digest() for value in coded.dictionary]
        known = np.frombuffer(b"".join([*hashed, bytes(16)]), np.uint8).reshape(-1, 16)
        values = known[coded.indices.fill_null(len(hashed)).to_numpy(False)]
    else:
        raise TypeError(f"{name}: expected numbers, booleans, strings or binary values, got {kind}")
    return np.hstack([valid[:, None].view(np.uint8), values])
