"""The scored pool as a stream: tables or parquet files, read a batch and only the wanted columns at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ghostgram.algorithms.mates.selection import ids as id_sets

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
I32 = NDArray[np.int32]
U64 = NDArray[np.uint64]
Bool = NDArray[np.bool_]

ROWS = 2**18  # in a batch: its columns are some MiB
UNKNOWN = -1
"""The number of tokens of a document whose n_tokens is null."""

PREFIX = "z_"
"""What the names of columns of scores begin with; the name of the reference follows."""


@dataclass(frozen=True)
class Batch:
    """Documents of one shard; a column that was not asked for is empty, a number of tokens may be `UNKNOWN`."""

    shard: int
    rows: I64  # in the shard
    ids: U64  # (n, 2) words
    scores: F64
    tokens: I64
    domains: I32
    clusters: Any  # pyarrow array


class Scores:
    """Score shards with the columns doc_id, n_tokens, domain, z_<reference> and, if asked for, one of clusters.

    Args:
        shards: Tables or record batches of pyarrow, or paths or URIs of parquet files.
        combine: How several references become one score, see `select`.
        one_per: The name of the column of clusters, if any.
        spent: Documents to pass over. Those without a token are passed over too: there is nothing to train on.
        counted: Whether every document must have its number of tokens.

    Raises:
        ValueError: Columns are missing or of another type than expected, differ between shards, or a file comes twice.
    """

    def __init__(
        self,
        shards: Iterable[Any] | str | Path,
        combine: str | Mapping[str, float],
        one_per: str | None,
        spent: id_sets.IdSet | None,
        counted: bool,
    ):
        self._shards: list[Any] = [shards] if isinstance(shards, (str, Path)) else list(shards)
        self._one_per, self._spent, self._counted = one_per, spent, counted
        self._codes: dict[str, int] = {}
        self._columns: list[str] = []
        self._empty = False  # whether documents without tokens were met, so that every pass must look for them
        seen: dict[str, int] = {}
        for number, shard in enumerate(self._shards):
            if isinstance(shard, (str, Path)) and (first := seen.setdefault(str(shard), number)) != number:
                raise ValueError(f"scores: expected every file once, got {shard} as shards {first} and {number}")
            self._check(number)
        self._weights, self._least = _combination(self._columns, combine)

    @property
    def domains(self) -> list[str]:
        """The names of domains met so far, by their numbers; documents without one are of domain ""."""
        return list(self._codes)

    def sort_domains(self) -> I64:
        """Numbers the domains met so far anew, by name; returns the old number of each new one."""
        old = sorted(self._codes)
        before = np.array([self._codes[name] for name in old], np.int64)
        self._codes = {name: number for number, name in enumerate(old)}
        return before

    def batches(self, *wanted: str) -> Iterator[Batch]:
        """Eligible documents, in the order of shards and rows, with the `wanted` fields of `Batch`.

        Raises:
            ValueError: A score is not finite, or an id or a needed number of tokens is missing, or one is negative.
        """
        for number in range(len(self._shards)):
            start = 0
            for records in self._read(number, wanted):
                yield self._batch(number, start, records, wanted)
                start += len(records)

    def name(self, shard: int) -> str:
        """What messages call a shard."""
        held = self._shards[shard]
        return str(held) if isinstance(held, (str, Path)) else f"shard {shard}"

    def _check(self, number: int) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        shard = self._shards[number]
        if not isinstance(shard, (str, Path, pa.Table, pa.RecordBatch)):
            raise TypeError(f"scores: expected paths or tables of pyarrow, got {type(shard).__name__} at {number}")
        if isinstance(shard, (str, Path)):
            with _opened(shard) as source:
                schema = pq.read_schema(source)
        else:
            schema = shard.schema
        where = self.name(number)
        for column in ("doc_id", "n_tokens", *([self._one_per] if self._one_per else [])):
            if column not in schema.names:
                raise ValueError(f"scores: expected the column {column!r}, got {schema.names} in {where}")
        if schema.field("doc_id").type != pa.binary(id_sets.WIDTH):
            raise ValueError(f"doc_id: expected fixed_size_binary(16), got {schema.field('doc_id').type} in {where}")
        if "domain" in schema.names and not _is_text(schema.field("domain").type):
            raise ValueError(f"domain: expected strings, got {schema.field('domain').type} in {where}")
        columns = sorted(name for name in schema.names if name.startswith(PREFIX))
        for column in columns:
            if not pa.types.is_floating(schema.field(column).type):
                raise ValueError(f"{column}: expected floating point, got {schema.field(column).type} in {where}")
        if not columns or (number and columns != self._columns):
            expected = self._columns or "columns z_<reference>"
            raise ValueError(f"scores: expected {expected}, got {columns or schema.names} in {where}")
        self._columns = columns

    def _read(self, number: int, wanted: Sequence[str]) -> Iterator[Any]:
        """Record batches of what the wanted fields need."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        needed = {
            "ids": ["doc_id"],
            "scores": list(self._weights),
            "tokens": ["n_tokens"],
            "domains": ["domain"],
            "clusters": [self._one_per] if self._one_per else [],
        }
        columns = {column for field in wanted for column in needed[field]}
        columns |= ({"doc_id"} if self._spent else set()) | ({"n_tokens"} if self._empty else set())
        shard = self._shards[number]
        if isinstance(shard, (str, Path)):
            with _opened(shard) as source:
                file = pq.ParquetFile(source, read_dictionary=["domain"])
                held = [name for name in file.schema_arrow.names if name in columns]
                yield from file.iter_batches(ROWS, columns=held)
        else:
            table = pa.Table.from_batches([shard]) if isinstance(shard, pa.RecordBatch) else shard
            yield from table.select([name for name in table.column_names if name in columns]).to_batches(ROWS)

    def _batch(self, number: int, start: int, records: Any, wanted: Sequence[str]) -> Batch:
        names, rows = records.schema.names, np.arange(start, start + len(records))
        ids = id_sets.words(records["doc_id"]) if "doc_id" in names else np.empty((0, 2), np.uint64)
        tokens = self._tokens(number, start, records) if "n_tokens" in names else np.empty(0, np.int64)
        scores = self._combined(number, start, records) if "scores" in wanted else np.empty(0)
        domains = self._encode(records) if "domains" in wanted else np.empty(0, np.int32)
        clusters = records[self._one_per] if "clusters" in wanted and self._one_per else None
        keep = tokens != 0 if self._empty else np.ones(len(records), bool)
        if self._spent:
            keep &= ~self._spent.has(ids)
        if not keep.all():
            rows, clusters = rows[keep], clusters.filter(_arrow(keep)) if clusters is not None else None
            ids, tokens = _where(keep, ids), _where(keep, tokens)
            scores, domains = _where(keep, scores), _where(keep, domains)
        return Batch(number, rows, ids, scores, tokens, domains, clusters)

    def _combined(self, number: int, start: int, records: Any) -> F64:
        """One finite score for each document."""
        total: F64 | None = None
        for column, weight in self._weights.items():
            held = records[column]
            values = held.to_numpy(zero_copy_only=False).astype(np.float64)
            finite = np.isfinite(values)
            if not finite.all():
                row = start + int(np.argmin(finite))
                wrong = values[row - start]
                raise ValueError(f"{column}: expected finite scores, got {wrong} at row {row} of {self.name(number)}")
            values *= weight
            total = values if total is None else np.minimum(total, values) if self._least else total + values
        assert total is not None  # there is a column at least
        return total

    def _tokens(self, number: int, start: int, records: Any) -> I64:
        held = records["n_tokens"]
        if held.null_count and self._counted:
            raise ValueError(f"n_tokens: expected numbers, got {held.null_count} nulls in {self.name(number)}")
        tokens: I64 = held.fill_null(1).to_numpy(zero_copy_only=False).astype(np.int64)
        least = int(tokens.min(initial=1))
        if least < 0:
            row = start + int(np.argmin(tokens))
            raise ValueError(f"n_tokens: expected at least 0, got {least} at row {row} of {self.name(number)}")
        self._empty |= least == 0
        if held.null_count:
            tokens = np.where(held.is_null().to_numpy(zero_copy_only=False), UNKNOWN, tokens)
        return tokens

    def _encode(self, records: Any) -> I32:
        """The number of every document's domain."""
        import pyarrow as pa

        if "domain" not in records.schema.names:
            return np.full(len(records), self._codes.setdefault("", len(self._codes)), np.int32)
        column = records["domain"]
        column = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
        names = [*(name or "" for name in column.dictionary.to_pylist()), ""]  # the last is that of nulls
        indices = column.indices.fill_null(len(names) - 1).to_numpy(zero_copy_only=False)
        used = np.flatnonzero(np.bincount(indices, minlength=len(names))).tolist()
        codes = np.zeros(len(names), np.int32)
        codes[used] = [self._codes.setdefault(names[index], len(self._codes)) for index in used]
        of_rows: I32 = codes[indices]
        return of_rows


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind))


def _opened(shard: str | Path) -> AbstractContextManager[Any]:
    """A file that pyarrow reads from, column by column."""
    if "://" in str(shard):
        import fsspec

        opened: AbstractContextManager[Any] = fsspec.open(str(shard), "rb")
        return opened
    import pyarrow as pa

    local: AbstractContextManager[Any] = pa.OSFile(str(shard))
    return local


def _where(mask: Bool, held: NDArray[Any]) -> NDArray[Any]:
    """The rows of a column that was read."""
    return held[mask] if len(held) else held


def _arrow(mask: Bool) -> Any:
    import pyarrow as pa

    return pa.array(mask)


def _combination(columns: Sequence[str], combine: str | Mapping[str, float]) -> tuple[dict[str, float], bool]:
    """The weight of every column that is read, and whether the least of them counts instead of their sum."""
    if combine in ("sum", "min"):
        return dict.fromkeys(columns, 1.0), combine == "min"
    chosen = {combine: 1.0} if isinstance(combine, str) else dict(combine)
    references = [column.removeprefix(PREFIX) for column in columns]
    for reference, weight in chosen.items():
        if reference not in references:
            raise ValueError(f'combine: expected "sum", "min" or references of {references}, got {reference!r}')
        if not np.isfinite(weight):
            raise ValueError(f"combine: expected finite weights, got {weight} for {reference!r}")
    if not chosen:
        raise ValueError(f"combine: expected weights of {references}, got none")
    return {PREFIX + reference: chosen[reference] for reference in sorted(chosen)}, False
