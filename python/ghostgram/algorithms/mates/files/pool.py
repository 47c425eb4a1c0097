"""The pool: documents in Parquet or JSON-lines shards, streamed with their identities."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from glob import glob
from pathlib import Path
from typing import Any, Protocol

from ghostgram.algorithms.mates.files import formats
from ghostgram.algorithms.mates.files.formats import PoolError
from ghostgram.algorithms.mates.files.identity import content_key, digest_of_file
from ghostgram.algorithms.mates.files.places import opened, plain, remote
from ghostgram.algorithms.mates.files.sampling import BottomN

__all__ = ["Pool", "PoolError", "Shard", "TokenCounter"]


class TokenCounter(Protocol):
    """Counts the tokens of documents whose pool does not say how many they have. Pickled into worker processes."""

    digest: str
    """What the counts depend on, such as the tokenizer's files."""

    def __call__(self, texts: Sequence[str], /) -> Sequence[int]:
        """One count for each text."""
        ...


@dataclass(frozen=True)
class Shard:
    """A file of the pool, as it was when the pool was listed."""

    path: str
    size: int
    digest: str
    """BLAKE2b-256 of its bytes."""


class Pool:
    """Documents in files: `.parquet`, `.jsonl`, `.jsonl.gz` or `.jsonl.zst`.

    Shards are the files found, each once, sorted by path. What a pool is called (`digest`) follows from the bytes of
    its shards, their order and the columns read, not from where the files lie.

    Args:
        paths: Files and glob patterns (`**` included): local, or URIs that fsspec knows.
        text: Column (or JSON key) of the text.
        id: Column of the owner's ids, strings or integers, one for each document. None: documents are named by text.
        domain: Column of what quotas count, such as the source. None: documents have no domain.
        cluster: Column of near-duplicate clusters, strings or integers, null for a document on its own.
        n_tokens: Column of token counts, or what counts them. None: token counts are null, and a budget of tokens
            cannot be set.

    Raises:
        PoolError: A pattern finds no file, or a file's name ends in something else.
        ImportError: pyarrow, or fsspec for a URI, is missing.

    Cost:
        Reads every byte once, for the digests: bound by the disk, hashing 1 GB/s a core.
    """

    def __init__(
        self,
        paths: str | Path | Sequence[str | Path],
        text: str = "text",
        id: str | None = None,
        domain: str | None = None,
        cluster: str | None = None,
        n_tokens: str | TokenCounter | None = None,
    ) -> None:
        self.text, self.id, self.domain, self.cluster, self.n_tokens = text, id, domain, cluster, n_tokens
        patterns = [paths] if isinstance(paths, (str, Path)) else paths
        found = sorted({path for pattern in patterns for path in _matching(plain(pattern))})
        if not found:
            raise PoolError("paths: expected files or patterns, got none")
        for path in found:
            formats.check_name(path)
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            self.shards: tuple[Shard, ...] = tuple(threads.map(_shard, found))

    @property
    def digest(self) -> str:
        """The pool's name by contents."""
        columns = {"text": self.text, "id": self.id, "domain": self.domain, "cluster": self.cluster}
        counted = self.n_tokens if isinstance(self.n_tokens, str) or self.n_tokens is None else self.n_tokens.digest
        contents = [{name: value for name, value in asdict(shard).items() if name != "path"} for shard in self.shards]
        return content_key("pool", {**columns, "n_tokens": counted, "shards": contents}, {})

    def documents(self, shard: Shard) -> Iterator[Any]:
        """The documents of a shard in their order, at most 1,024 at a time.

        Yields:
            pyarrow.Tables of doc_id fixed_size_binary(16), text large_string, domain string, cluster_id string and
            n_tokens int32. The cuts depend on the file alone.

        Raises:
            PoolError: The file is damaged or has changed, lacks a column, or a document has no text, no id, or
                something of another type; the message names the file and the row or line.
        """
        roles = {"text": self.text, "id": self.id, "domain": self.domain, "cluster_id": self.cluster}
        if isinstance(self.n_tokens, str):
            roles["n_tokens"] = self.n_tokens
        wanted = {role: column for role, column in roles.items() if column is not None}
        with opened(shard.path) as file:
            if (size := file.seek(0, os.SEEK_END)) != shard.size:
                raise PoolError(f"{shard.path}: changed since the pool was listed: {shard.size} bytes then, {size} now")
            file.seek(0)
            for batch in formats.batches(shard.path, file, wanted):
                yield self._table(shard, batch)

    def sample(self, n: int, seed: int = 0) -> Any:
        """n documents drawn uniformly: those with the smallest keyed hash of their id, in that order.

        Which they are does not depend on shards or their order, and a smaller sample is the beginning of a larger one.
        Documents of equal id count once.

        Args:
            n: How many; all documents if there are fewer.
            seed: From 0 to 2^64 - 1.

        Returns:
            A pyarrow.Table as from `documents`.

        Cost:
            One pass over the pool; memory for 2 n documents.
        """
        smallest = BottomN(n, seed)
        smallest.update(documents_schema().empty_table())
        for shard in self.shards:
            for table in self.documents(shard):
                smallest.update(table)
        return smallest.table()

    def _table(self, shard: Shard, columns: dict[str, Any]) -> Any:
        """The documents of one batch, identities and token counts added."""
        import pyarrow as pa

        text, schema = columns["text"], documents_schema()
        rows, counter = len(text), self.n_tokens
        ids = b"".join(map(_id_of, formats.utf8(columns.get("id", text))))
        found = {"doc_id": pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), rows, [None, pa.py_buffer(ids)])}
        if counter is not None and not isinstance(counter, str):
            counts = list(counter(text.to_pylist()))
            if len(counts) != rows or any(count < 0 for count in counts):
                raise PoolError(f"{shard.path}: n_tokens: expected {rows} counts, each at least 0, got {counts}")
            found["n_tokens"] = pa.array(counts, pa.int32())
        found = {**columns, **found}
        return pa.table([found.get(name, pa.nulls(rows, schema.field(name).type)) for name in schema.names], schema)


def documents_schema() -> Any:
    """The pyarrow schema of `Pool.documents`."""
    import pyarrow as pa

    return pa.schema(
        [
            pa.field("doc_id", pa.binary(16), nullable=False), pa.field("text", pa.large_string(), nullable=False),
            ("domain", pa.string()), ("cluster_id", pa.string()), ("n_tokens", pa.int32()),
        ]
    )  # fmt: skip


def _id_of(name: memoryview) -> bytes:
    """`doc_id` of a string that is there as UTF-8 already."""
    return hashlib.blake2b(name, digest_size=16).digest()


def _matching(pattern: str) -> list[str]:
    """The files that a path or pattern names."""
    where = remote(pattern)
    if where is None:
        named = [pattern] if os.path.isfile(pattern) else glob(pattern, recursive=True)  # brackets may be meant
        found = [path for path in named if os.path.isfile(path)]
    else:
        filesystem, inside = where
        found = [filesystem.unstrip_protocol(path) for path in filesystem.glob(inside) if filesystem.isfile(path)]
    if not found:
        raise PoolError(f"paths: {pattern}: expected a file or a pattern that finds files, found none")
    return found


def _shard(path: str) -> Shard:
    with opened(path) as file:
        digest = digest_of_file(file)
        return Shard(path, file.tell(), digest)
