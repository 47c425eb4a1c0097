"""Tables that grow with a run, on disk as Parquet parts, each written whole: a killed run leaves a readable table."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class PartedTable:
    """An append-only table: rows in memory, and, with a folder, Parquet parts of whole steps.

    A part is written to a temporary file and renamed: a torn part cannot exist, and what was flushed survives a kill.
    Reading concatenates the parts in the order of their first step.

    Args:
        schema: The pyarrow schema, which has a column "step".
        folder: Where parts go; None keeps everything in memory.
        resume: Continue a log that already has parts. Without it, finding parts is an error.
    """

    def __init__(self, schema: Any, folder: Path | None, resume: bool) -> None:
        self._schema = schema
        self._folder = folder
        self._rows: dict[str, list[Any]] = {name: [] for name in schema.names}
        self._memory: list[Any] = []
        if folder is None:
            return
        if self._parts() and not resume:
            raise FileExistsError(f"log: {folder} already holds a run; give another folder, or resume=True to append")
        folder.mkdir(parents=True, exist_ok=True)
        for torn in folder.glob("part-*.tmp"):
            torn.unlink()

    def append(self, columns: Mapping[str, Any]) -> None:
        """Adds rows: equally long columns by name."""
        for name, values in self._rows.items():
            values.extend(columns[name])

    def note(self, name: str, text: str) -> None:
        """Sets an entry of the metadata, in parts written from now on."""
        self._schema = self._schema.with_metadata({**self._schema.metadata, name.encode(): text.encode()})

    def flush(self) -> None:
        """Writes the rows appended since the last flush as one part."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        steps = self._rows["step"]
        if not steps:
            return
        part = pa.table(self._rows, schema=self._schema)
        if self._folder is None:
            self._memory.append(part)
        else:
            path = self._folder / f"part-{min(steps):010d}-{max(steps):010d}.parquet"
            temporary = path.with_suffix(".tmp")
            pq.write_table(part, temporary)
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.replace(path)
        self._rows = {name: [] for name in self._schema.names}

    def read(self) -> Any:
        """Every row so far, as a pyarrow.Table with the metadata of the last part."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.flush()
        parts = self._memory if self._folder is None else [pq.read_table(path) for path in self._parts()]
        if not parts:
            return self._schema.empty_table()
        return pa.concat_tables(parts).replace_schema_metadata(parts[-1].schema.metadata)

    def next_step(self) -> int:
        """The step after the last one flushed."""
        if self._folder is None or not self._parts():
            return 0
        return _span(self._parts()[-1])[1] + 1

    def last_part(self) -> Any:
        """The part on disk with the latest steps, as a pyarrow.Table; empty where there is none."""
        import pyarrow.parquet as pq

        parts = self._parts()
        return pq.read_table(parts[-1]) if parts else self._schema.empty_table()

    def rewind(self, step: int) -> None:
        """Drops the parts of `step` and later ones, the last one first: a kill in between leaves no gap."""
        spans = {part: _span(part) for part in self._parts()}
        for part, (first, last) in spans.items():
            if first < step <= last:
                raise ValueError(f"log: {part} runs from step {first} to {last}: it was not cut at checkpoint {step}")
        for part, (first, _) in reversed(spans.items()):
            if first >= step:
                part.unlink()

    @property
    def on_disk(self) -> bool:
        """Whether parts go to a folder."""
        return self._folder is not None

    def _parts(self) -> list[Path]:
        return sorted(self._folder.glob("part-*.parquet")) if self._folder else []


def _span(part: Path) -> tuple[int, int]:
    """The first and last step of a part."""
    _, first, last = part.stem.split("-")
    return int(first), int(last)
