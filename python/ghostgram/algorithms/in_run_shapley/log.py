"""The step log and the ledger on disk: Parquet parts, each written whole: a killed run leaves a readable log."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SIGN = "value = -phi, positive = helped"


def require_pyarrow() -> None:
    """Raises an ImportError that names the extra to install when pyarrow is missing."""
    if importlib.util.find_spec("pyarrow") is None:
        raise ImportError("the values, the ledger and the log are Parquet tables: pip install 'ghostgram[report]'")


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

    def append(self, columns: Mapping[str, Any]) -> None:
        """Adds rows: equally long columns by name."""
        for name, values in self._rows.items():
            values.extend(columns[name])

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
        """Every row so far, as a pyarrow.Table."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.flush()
        parts = self._memory if self._folder is None else [pq.read_table(path) for path in self._parts()]
        return pa.concat_tables(parts) if parts else self._schema.empty_table()

    def last_part(self) -> Any:
        """The part on disk with the latest steps, as a pyarrow.Table; empty where there is none."""
        import pyarrow.parquet as pq

        parts = self._parts()
        return pq.read_table(parts[-1]) if parts else self._schema.empty_table()

    def next_step(self) -> int:
        """The step after the last one flushed."""
        if self._folder is None or not self._parts():
            return 0
        return int(self._parts()[-1].stem.rpartition("-")[2]) + 1

    def _parts(self) -> list[Path]:
        return sorted(self._folder.glob("part-*.parquet")) if self._folder else []


def step_schema(sets: list[str], metadata: Mapping[str, str]) -> Any:
    """Columns of the step log: one row per scored sample and step, one phi per validation set."""
    import pyarrow as pa

    fields = [
        ("step", pa.int32()), ("sample_id", pa.int64()), ("microbatch", pa.int16()), ("lr", pa.float32()),
        ("clip", pa.float32()), ("order", pa.int8()), ("v_state", pa.string()), ("skipped", pa.bool_()),
    ]  # fmt: skip
    return pa.schema(fields + [(f"phi_{name}", pa.float32()) for name in sets], metadata={"sign": SIGN, **metadata})


def ledger_schema(metadata: Mapping[str, str]) -> Any:
    """Columns of the ledger: one row per step and validation set."""
    import pyarrow as pa

    numbers = (
        "l_before", "l_after", "measured", "sum_phi", "history", "uncovered", "predicted", "residual",
        "cumulative_residual", "lr", "clip",
    )  # fmt: skip
    fields = [("step", pa.int32()), ("set", pa.string())] + [(name, pa.float64()) for name in numbers]
    fields += [("g_val_age", pa.int16()), ("order", pa.int8()), ("v_state", pa.string()), ("skipped", pa.bool_())]
    return pa.schema(fields, metadata={"sign": SIGN, **metadata})


def aggregate(steps: Any, sets: list[str]) -> Any:
    """The table of values: id, set, value = -(sum of phi, in float64), steps = in how many steps it was seen."""
    import pyarrow as pa
    import pyarrow.compute as pc

    tables = []
    for name in sets:
        phi = pa.table(
            {"id": steps["sample_id"], "step": steps["step"], "phi": steps[f"phi_{name}"].cast(pa.float64())}
        )
        grouped = phi.group_by("id").aggregate([("phi", "sum"), ("step", "count_distinct")]).sort_by("id")
        tables.append(
            pa.table(
                {
                    "id": grouped["id"],
                    "set": pa.array([name] * len(grouped), pa.string()),
                    "value": pc.negate(grouped["phi_sum"]),
                    "steps": grouped["step_count_distinct"],
                }
            )
        )
    return pa.concat_tables(tables)
