"""The files of a stage: parts that exist only once they are committed, and a manifest that turns complete last.

    <run>/stage-<number>/<kind>/<key>/part-<unit>.parquet
                                      commits/<unit>.json
                                      manifest.json

A unit of work is committed in two steps, each of which is whole or not there: its part, then a commit that holds the
part's digest. So a process may be killed at any moment, several may do the same unit, and no lock is taken: what is
committed is done, the rest is done again. Derivation and order of steps: docs/algorithms/mates_files.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ghostgram.algorithms.mates.files.identity import SCHEMA, canonical, digest_of_bytes, logical_digest
from ghostgram.algorithms.mates.files.places import Place, plain

SIGN = "influence, higher is better"
"""What every number in every file means; a file that says anything else is refused."""

MANIFEST = "manifest.json"
_PINNED = ("units", "rows", "logical")
_OURS = {"schema", "sign", "state", "stage", "kind", "key", "version", *_PINNED}
_ROW_GROUP = 1 << 17


class StoreError(ValueError):
    """A file of a stage is missing, damaged, or not what its reader expects; the message names it."""


@dataclass(frozen=True)
class Commit:
    """What is known of a committed unit."""

    unit: str
    input: str | None
    """Digest of what the unit was made from."""
    rows: int
    size: int
    """Bytes of its part."""
    digest: str
    """Of its part's bytes."""
    logical: str
    """`logical_digest` of its rows, 32 hexadecimal digits."""
    sums: dict[str, Any]
    """Exact sums over its rows, as whoever committed it wants them."""


class Stage:
    """One kind of work of one stage: a folder named by what it is made from.

    Args:
        run: The folder of the run: a local path, or a URI that fsspec knows.
        number: The stage, from 1.
        kind: "label", "fit", "score" or "select".
        key: `content_key` of the work.

    Raises:
        ValueError: `kind` or `key` is no name for a folder.
        ImportError: pyarrow is missing.
    """

    def __init__(self, run: str | Path, number: int, kind: str, key: str) -> None:
        try:
            import pyarrow  # noqa: F401
        except ImportError as why:
            raise ImportError("stages are Parquet files: pip install 'ghostgram[report]'") from why
        self.number, self.kind, self.key = number, _name("kind", kind), _name("key", key)
        self._place = Place(f"{plain(run).rstrip('/')}/stage-{number}/{kind}/{key}")

    @property
    def folder(self) -> str:
        """Where its files lie."""
        return self._place.folder

    def begin(self, **facts: Any) -> None:
        """Writes a manifest that says what is under way; one that is there already has to say the same.

        Args:
            facts: What the manifest holds besides what every manifest holds, of what JSON has a form for.

        Raises:
            ValueError: One of `facts` has a name that every manifest has.
            StoreError: The manifest that is there is damaged or says something else.
        """
        if (found := self.manifest) is None:
            self._write_manifest("open", facts, {})
        else:
            self._check(found, facts)

    def commit(
        self, unit: str, table: Any, sums: Mapping[str, Any] | None = None, *, input: str | None = None
    ) -> Commit:
        """Writes the rows of a unit; when this returns they are on the disk, and a kill before loses only them.

        A unit committed before is replaced. Equal tables give equal bytes (of one version of pyarrow), so two processes
        that commit the same unit do not disturb each other.

        Args:
            unit: Its name; `read` orders parts by it.
            table: A pyarrow.Table, of columns that `logical_digest` knows.
            sums: Exact sums over the rows; integers of any size are kept exactly.
            input: Digest of what the unit was made from; `committed` can be asked to insist on it.

        Raises:
            ValueError: `unit` is no name for a file, or `sums` holds NaN or infinity.
            TypeError: `sums` or a column holds something that cannot be stored.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        _name("unit", unit)
        logical = f"{logical_digest(table):032x}"
        sink = pa.BufferOutputStream()
        text = [field.name for field in table.schema if pa.types.is_string(field.type)]
        meaning = {"ghostgram.kind": self.kind, "ghostgram.sign": SIGN}
        whole = table.combine_chunks().replace_schema_metadata(meaning)  # how it was chunked must not show in the bytes
        pq.write_table(whole, sink, compression="zstd", use_dictionary=text, row_group_size=_ROW_GROUP)
        part = sink.getvalue().to_pybytes()
        done = Commit(unit, input, table.num_rows, len(part), digest_of_bytes(part), logical, dict(sums or {}))
        record = _sealed(asdict(done))
        self._place.write(_part(unit), part)
        self._place.write(_commit(unit), record)
        return done

    def names(self) -> list[str]:
        """The units that have a commit, sorted; `committed` also looks whether it holds."""
        return self._place.names("commits", ".json")

    def has(self, unit: str, input: str | None = None) -> bool:
        """Whether a unit is among `committed`; with `input`, whether it was made from that."""
        return self._sound(unit, None if input is None else {unit: input}) is not None

    def committed(self, inputs: Mapping[str, str] | None = None) -> dict[str, Commit]:
        """The units that are done, by name, sorted.

        A commit does not count if it is damaged, if its part is missing or differs in size or digest, or if it was made
        from something else than `inputs` says: that unit is to be done again.

        Args:
            inputs: Digest of what each unit is made from. Units that it does not name are left out.

        Cost:
            Reads every part.
        """
        return {unit: found[0] for unit in self.names() if (found := self._sound(unit, inputs))}

    def paths(self) -> list[str]:
        """Where the committed parts lie, units in the order of names."""
        return [self._place / _part(unit) for unit in self.committed()]

    def parts(self, columns: list[str] | None = None) -> Iterator[tuple[Commit, Any]]:
        """Every committed unit and its pyarrow.Table, in the order of names, one in memory at a time."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        for done, part in filter(None, (self._sound(unit, None) for unit in self.names())):
            table = pq.read_table(pa.BufferReader(part), columns=columns)
            if (sign := (table.schema.metadata or {}).get(b"ghostgram.sign", b"").decode()) != SIGN:
                raise StoreError(f"{self._place / _part(done.unit)}: expected sign {SIGN!r}, got {sign!r}")
            yield done, table

    def read(self, columns: list[str] | None = None) -> Any:
        """All committed rows as one pyarrow.Table: units in the order of names, rows in their order.

        Raises:
            StoreError: Nothing is committed, or a part has another sign.
        """
        import pyarrow as pa

        tables = [table for _, table in self.parts(columns)]
        if not tables:
            raise StoreError(f"{self.folder}: holds no committed part")
        return pa.concat_tables(tables)

    def complete(self, **facts: Any) -> dict[str, Any]:
        """Writes the manifest that says the work is whole, adding to the facts of `begin`; returns it.

        It pins what is committed now: the number of units and rows, and the sum of their logical digests. Only one
        process may call it, when none commits any more; what killed ones left is deleted.

        Raises:
            ValueError: One of `facts` has a name that every manifest has.
            StoreError: It was complete before, with other rows.
        """
        found = self.manifest or {}
        pinned = _pinned(self.committed().values())
        if found.get("state") == "complete":
            _same(self._place / MANIFEST, {name: found[name] for name in _PINNED}, pinned)
        began = {name: value for name, value in found.items() if name not in _OURS}
        self._place.sweep()
        return self._write_manifest("complete", {**began, **facts}, pinned)

    @property
    def manifest(self) -> dict[str, Any] | None:
        """The manifest as it stands; None before `begin`.

        Raises:
            StoreError: It is damaged.
        """
        data = self._place.read(MANIFEST)
        if data is None:
            return None
        found = _unsealed(data)
        if found is None:
            raise StoreError(f"{self._place / MANIFEST}: damaged: its contents do not match its seal")
        return found

    @property
    def is_complete(self) -> bool:
        """Whether there is nothing left to do here."""
        return (self.manifest or {}).get("state") == "complete"

    def require(self, **facts: Any) -> dict[str, Any]:
        """What a reader of finished work asks first; returns the manifest.

        Args:
            facts: What else the manifest has to say, as far as the reader cares.

        Raises:
            StoreError: The manifest is missing, damaged or open; its schema, sign, kind, key or one of `facts` differs;
                or the committed parts are not those it was written for.
        """
        where, found = self._place / MANIFEST, self.manifest
        if found is None:
            raise StoreError(f"{where}: does not exist")
        self._check(found, {"state": "complete", **facts})
        _same(where, {name: found[name] for name in _PINNED}, _pinned(self.committed().values()))
        return found

    def _check(self, found: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        ours = {"schema": SCHEMA, "sign": SIGN, "kind": self.kind, "key": self.key}
        _same(self._place / MANIFEST, {**ours, **json.loads(canonical(facts))}, found)

    def _sound(self, unit: str, inputs: Mapping[str, str] | None) -> tuple[Commit, bytes] | None:
        """A unit's commit and part, if the commit holds."""
        record = _unsealed(self._place.read(_commit(unit)) or b"")
        if record is None or (inputs is not None and (unit not in inputs or record["input"] != inputs[unit])):
            return None
        done, part = Commit(**record), self._place.read(_part(unit))
        return (done, part) if done.unit == unit and part is not None and digest_of_bytes(part) == done.digest else None

    def _write_manifest(self, state: str, facts: Mapping[str, Any], pinned: Mapping[str, Any]) -> dict[str, Any]:
        if taken := sorted(_OURS & facts.keys()):
            raise ValueError(f"manifest: {', '.join(taken)} is said by the store itself")
        manifest = {
            "schema": SCHEMA, "sign": SIGN, "state": state, "stage": self.number, "kind": self.kind, "key": self.key,
            "version": version("ghostgram"), **pinned, **facts,
        }  # fmt: skip
        self._place.write(MANIFEST, _sealed(manifest))
        return manifest


def _name(what: str, name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):
        raise ValueError(
            f"{what}: expected letters, digits, '.', '_' and '-', not beginning with '.' or '-', got {name!r}"
        )
    return name


def _part(unit: str) -> str:
    return f"part-{unit}.parquet"


def _commit(unit: str) -> str:
    return f"commits/{unit}.json"


def _pinned(done: Iterable[Commit]) -> dict[str, Any]:
    """What a manifest says of all parts together."""
    every = list(done)
    logical = sum(int(each.logical, 16) for each in every) % (1 << 128)
    return {"units": len(every), "rows": sum(each.rows for each in every), "logical": f"{logical:032x}"}


def _sealed(record: Mapping[str, Any]) -> bytes:
    """JSON with a digest of itself: what was cut or edited is recognised."""
    seal = digest_of_bytes(canonical(record).encode())
    return (json.dumps({**record, "seal": seal}, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _unsealed(data: bytes) -> dict[str, Any] | None:
    """What was sealed; None if it is no longer that."""
    try:
        record = json.loads(data)
        seal = record.pop("seal")
        return record if seal == digest_of_bytes(canonical(record).encode()) else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _same(where: str, expected: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    for name, value in expected.items():
        if found.get(name) != value:
            raise StoreError(f"{where}: {name}: expected {value!r}, got {found.get(name)!r}")
