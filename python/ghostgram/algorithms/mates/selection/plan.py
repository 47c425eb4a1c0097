"""The plan of a stage: which documents are trained on, in which order."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ghostgram._files import whole_file

_REPORT = b"ghostgram.mates.plan"


@dataclass(frozen=True)
class Plan:
    """Documents in training order, and how they were chosen.

    Attributes:
        table: A pyarrow.Table with a row for each document: order int64 (0, 1, ...), doc_id fixed_size_binary(16),
            domain string (null for none), n_tokens int64 (null if unknown), key float64, and where its scores are:
            shard int32 (its position in what `select` was given) and row int64.
        report: What `select` says of it, of numbers, strings, lists and dicts of these.
    """

    table: Any
    report: dict[str, Any]

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def tokens(self) -> int:
        """Of all documents, as far as they are known."""
        return int(self.table["n_tokens"].fill_null(0).to_numpy().sum())

    def kept(self, rows: NDArray[np.integer]) -> Plan:
        """The plan of some of its documents, in the order of this plan; `report` becomes `{"kept_of": report}`.

        Args:
            rows: Positions in this plan, each once, in any order: what a re-ranking chose (`selection.group`).

        Raises:
            ValueError: A position is out of range or comes twice.
        """
        import pyarrow as pa

        rows = np.sort(np.asarray(rows))
        if len(rows) and (rows[0] < 0 or rows[-1] >= len(self) or not np.diff(rows).all()):
            raise ValueError(f"rows: expected distinct positions from 0 to {len(self) - 1}, got others")
        table = self.table.take(pa.array(rows, pa.int64()))
        table = table.set_column(0, "order", pa.array(np.arange(len(rows))))
        return Plan(table.combine_chunks(), {"kept_of": self.report})

    def write(self, path: str | Path) -> None:
        """Writes one parquet file, whole or not at all; equal plans give equal bytes with one version of pyarrow."""
        import pyarrow.parquet as pq

        report = json.dumps(self.report, sort_keys=True, allow_nan=False).encode()
        with whole_file(Path(path)) as temporary:
            pq.write_table(self.table.replace_schema_metadata({_REPORT: report}), temporary)

    @classmethod
    def read(cls, path: str | Path) -> Plan:
        """Reads what `write` wrote.

        Raises:
            ValueError: The file is no plan.
        """
        import pyarrow.parquet as pq

        table = pq.read_table(path)
        report = (table.schema.metadata or {}).get(_REPORT)
        if report is None:
            raise ValueError(f"path: expected a plan of MATES, got {path} with the columns {table.column_names}")
        return cls(table.replace_schema_metadata(), json.loads(report))
