"""The log of a mixture, read back as arrays."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ghostgram.algorithms.velocitune.record import NUMBERS, require_pyarrow
from ghostgram.algorithms.velocitune.simplex import F64


@dataclass(frozen=True)
class Course:
    """What a run's log says, update by update."""

    domains: tuple[str, ...]
    step: F64
    """(U,) batches trained on at each update."""
    tokens: F64
    """(U,)."""
    columns: Mapping[str, F64]
    """By name, (U, K); nan where an update has no such number. `docs/algorithms/velocitune.md` says what they are."""
    guards: tuple[tuple[str, ...], ...]
    """(U, K) names of the guards that changed something, with commas between them."""
    alarms: tuple[tuple[str, ...], ...]
    """(U, K) names of the alarms raised."""
    rule: str
    """The rule, its preset and everything that was set."""

    def __getitem__(self, column: str) -> F64:
        return self.columns[column]

    @property
    def weights(self) -> F64:
        """(U + 1, K) from w_0 on."""
        return np.concatenate([self["w_before"][:1], self["w_after"]])


def read(log: str | Path) -> Course:
    """Reads a log folder, of a run that goes on as well.

    Raises:
        ImportError: pyarrow is missing.
        ValueError: The folder holds no rows, or not those of a mixture; the message names the file.
    """
    require_pyarrow()
    import pyarrow as pa
    import pyarrow.parquet as pq

    parts = sorted(Path(log).glob("part-*.parquet"))
    if not parts:
        raise ValueError(f"{log}: expected the folder of a mixture's log, with part-*.parquet, got none")
    tables: list[Any] = []
    for part in parts:
        try:
            tables.append(pq.read_table(part))
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{part}: expected a Parquet file, got {error}") from error
        if missing := {"update", "domain", *NUMBERS} - set(tables[-1].column_names):
            raise ValueError(f"{part}: expected rows of a mixture, got none of the columns {sorted(missing)}")
    metadata = tables[0].schema.metadata
    domains = tuple(json.loads(metadata[b"domains"]))
    rows = pa.concat_tables([table.replace_schema_metadata(None) for table in tables])
    if rows["domain"].to_pylist() != list(domains) * (len(rows) // len(domains)):
        raise ValueError(f"{log}: expected a row of each of {list(domains)} for every update, got others")

    def grid(name: str) -> Any:
        return rows[name].to_numpy().reshape(-1, len(domains))

    def texts(name: str) -> tuple[tuple[str, ...], ...]:
        return tuple(map(tuple, grid(name).tolist()))

    return Course(
        domains,
        grid("step")[:, 0].astype(np.float64),
        grid("tokens")[:, 0].astype(np.float64),
        {name: grid(name).astype(np.float64) for name in NUMBERS},
        texts("guards"),
        texts("alarms"),
        metadata[b"rule"].decode(),
    )
