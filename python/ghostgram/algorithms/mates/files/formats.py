"""How documents lie in files: Parquet and JSON lines, read a thousand at a time; what is wrong is named by row."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any, BinaryIO

import numpy as np

ROWS = 1024
"""Documents read at a time."""

_CODECS = {".jsonl": None, ".jsonl.gz": "gzip", ".jsonl.zst": "zstd"}
_MOST_TOKENS = 2**31 - 1

Where = Callable[[int], str]
"""From an index in a batch to the file and row."""


class PoolError(ValueError):
    """The pool cannot be read, or a document is not what it should be; the message names the file and the row."""


def check_name(path: str) -> None:
    """Refuses a file whose name does not say how to read it."""
    if not path.endswith((".parquet", *_CODECS)):
        raise PoolError(f"{path}: expected a file ending in .parquet, {', '.join(_CODECS)}")


def batches(path: str, file: BinaryIO, wanted: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """The documents of a file, at most `ROWS` at a time.

    Args:
        path: Its name, which says how to read it and stands in messages.
        file: The file, open.
        wanted: The column (or key) of each role: text, id, domain, cluster_id, n_tokens.

    Yields:
        pyarrow.Arrays by role, checked: text and id large_string without nulls, domain and cluster_id string, n_tokens
        int32 without nulls.
    """
    read = _parquet if path.endswith(".parquet") else _json_lines
    for columns, where in read(path, file, wanted):
        yield {role: _checked(role, column, where) for role, column in columns.items()}


def _parquet(path: str, file: BinaryIO, wanted: Mapping[str, str]) -> Iterator[tuple[dict[str, Any], Where]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    first = 0
    try:
        source = pq.ParquetFile(file)
        names = source.schema_arrow.names
        if lacking := sorted(set(wanted.values()) - set(names)):
            raise PoolError(f"{path}: expected the columns {', '.join(lacking)}, got {', '.join(names)}")
        for batch in source.iter_batches(ROWS, columns=sorted(set(wanted.values()))):
            start = first
            yield {role: batch[column] for role, column in wanted.items()}, lambda i: f"{path}: row {start + i}"  # noqa: B023
            first += batch.num_rows
    except (pa.ArrowException, OSError) as why:
        raise PoolError(f"{path}: cannot be read after row {first}: {why}") from why


def _json_lines(path: str, file: BinaryIO, wanted: Mapping[str, str]) -> Iterator[tuple[dict[str, Any], Where]]:
    import pyarrow as pa

    codec = next(codec for end, codec in _CODECS.items() if path.endswith(end))
    number = 0
    values: dict[str, list[Any]] = {role: [] for role in wanted}
    numbers: list[int] = []

    def batch() -> tuple[dict[str, Any], Where]:
        nonlocal values, numbers
        lines = numbers
        columns = {
            role: pa.array(column, pa.int64() if role == "n_tokens" else pa.large_string())
            for role, column in values.items()
        }
        values, numbers = {role: [] for role in wanted}, []
        return columns, lambda i: f"{path}: line {lines[i]}"

    try:
        stream = io.BufferedReader(pa.CompressedInputStream(file, codec), 1 << 20) if codec else file
        for number, line in enumerate(stream, 1):
            if line.isspace():
                continue
            for role, value in _record(line, f"{path}: line {number}", wanted):
                values[role].append(value)
            numbers.append(number)
            if len(numbers) == ROWS:
                yield batch()
        if numbers:
            yield batch()
    except (pa.ArrowException, OSError) as why:
        raise PoolError(f"{path}: cannot be read after line {number}: {why}") from why


def _record(line: bytes, where: str, wanted: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    """What a line says for each role, as a string, an integer (n_tokens) or None."""
    try:
        record = json.loads(line)
    except ValueError as why:
        raise PoolError(f"{where}: expected JSON: {why}") from why
    if not isinstance(record, dict):
        raise PoolError(f"{where}: expected a JSON object, got {type(record).__name__}")
    for role, key in wanted.items():
        if key not in record:
            raise PoolError(f"{where}: expected the key {key}, got {', '.join(record)}")
        value = record[key]
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        if role == "n_tokens":
            if not is_integer or not 0 <= value <= _MOST_TOKENS:
                raise PoolError(f"{where}: {key}: expected an integer from 0 to {_MOST_TOKENS}, got {value!r}")
        elif is_integer and role != "text":
            value = str(value)
        elif not (isinstance(value, str) or value is None):
            kinds = "a string" if role == "text" else "a string or an integer"
            raise PoolError(f"{where}: {key}: expected {kinds}, got {type(value).__name__}")
        elif value is not None and not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as why:
                raise PoolError(f"{where}: {key}: no UTF-8 form: {why}") from why
        yield role, value


def _checked(role: str, column: Any, where: Where) -> Any:
    """A column in the type of its role, or an error that names the first document at fault."""
    import pyarrow as pa

    types = pa.types
    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if types.is_null(kind):
        kind, column = pa.string(), column.cast(pa.string())
    is_text = types.is_string(kind) or types.is_large_string(kind)
    counts = role == "n_tokens"
    if not (types.is_integer(kind) if counts else is_text or (types.is_integer(kind) and role != "text")):
        expected = {"n_tokens": "integers", "text": "strings"}.get(role, "strings or integers")
        raise PoolError(f"{where(0)}: {role}: expected {expected}, got {kind}")
    if role in ("text", "id", "n_tokens") and column.null_count:
        null = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        raise PoolError(f"{where(null)}: {role}: expected a value, got null")
    if counts:
        numbers = column.to_numpy(zero_copy_only=False)
        if len(wrong := np.flatnonzero((numbers < 0) | (numbers > _MOST_TOKENS))):
            at = int(wrong[0])
            raise PoolError(f"{where(at)}: n_tokens: expected 0 to {_MOST_TOKENS}, got {numbers[at]}")
        return column.cast(pa.int32())
    try:
        column.validate(full=True)
    except pa.ArrowInvalid as why:
        raise PoolError(f"{where(_not_utf8(column))}: {role}: expected UTF-8: {why}") from why
    return column.cast(pa.large_string() if role in ("text", "id") else pa.string())


def _not_utf8(column: Any) -> int:
    """The first string of a column that is no UTF-8."""
    for at, value in enumerate(column):
        try:
            value.as_py()
        except UnicodeDecodeError:
            return at
    return 0


def utf8(strings: Any) -> Iterator[memoryview]:
    """The bytes of each string of a large_string array without nulls, without a copy."""
    _, offsets, data = strings.buffers()
    ends = np.frombuffer(offsets, np.int64)[strings.offset : strings.offset + len(strings) + 1].tolist()
    every = memoryview(data) if data is not None else memoryview(b"")
    return (every[start:end] for start, end in pairwise(ends))
