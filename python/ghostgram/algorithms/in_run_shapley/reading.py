"""A log folder read back, whichever ranks wrote it, without ever holding more of it than a few batches of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ghostgram.algorithms.in_run_shapley.log import SIGN, require_pyarrow


class LogError(ValueError):
    """What was to be read is not a log, or not a whole one; the message names the file."""


@dataclass(frozen=True)
class Log:
    """A log folder that has been looked over: every part is whole, of one schema, and of the right sign."""

    folder: Path
    sets: tuple[str, ...]
    """The validation sets."""
    metadata: dict[str, str]
    """What the run wrote beside the rows of its last part: sign, reduction, optimizer, excluded, fallback, ..."""
    steps: Any
    """pyarrow Dataset: one row per scored sample and step, of all ranks."""
    ledger: Any
    """pyarrow Dataset: one row per step and set; None where no part has been written yet."""


def open_log(folder: str | Path) -> Log:
    """Looks a log folder over: `steps/*.parquet`, `steps/rank-*/*.parquet` and `ledger/*.parquet`.

    Only the parts' footers are read. Other files are left alone: a part that was being written when the run was killed
    is a `.tmp`.

    Raises:
        LogError: There is no such folder, it holds no step log, a part is torn, or parts disagree in schema or sign.
        ImportError: pyarrow is missing.
    """
    require_pyarrow()
    folder = Path(folder)
    if not folder.is_dir():
        raise LogError(f"{folder}: no such folder")
    steps = _dataset(folder / "steps")
    if steps is None:
        raise LogError(f"{folder}: not a log: it has no steps/*.parquet and no steps/rank-*/*.parquet")
    sets = tuple(name.removeprefix("phi_") for name in steps.schema.names if name.startswith("phi_"))
    if not sets:
        raise LogError(f"{folder / 'steps'}: not a step log: no column phi_<set> among {', '.join(steps.schema.names)}")
    metadata = {key.decode(): text.decode() for key, text in steps.schema.metadata.items()}
    return Log(folder, sets, metadata, steps, _dataset(folder / "ledger"))


def _dataset(folder: Path) -> Any:
    """The parts below a folder as one pyarrow Dataset; None where there are none."""
    import pyarrow as pa
    import pyarrow.dataset as ds
    import pyarrow.parquet as pq

    paths = sorted(folder.glob("*.parquet")) + sorted(folder.glob("rank-*/*.parquet"))
    schema = None
    for path in paths:
        try:
            found = pq.read_schema(path)
        except (pa.ArrowInvalid, OSError) as why:
            raise LogError(f"{path}: not a whole Parquet file: {why}") from why
        sign = (found.metadata or {}).get(b"sign", b"").decode()
        if sign != SIGN:
            raise LogError(f"{path}: expected the metadata sign = {SIGN!r}, got {sign!r}")
        if schema is not None and not found.equals(schema):
            raise LogError(
                f"{path}: its columns are {_columns(found)}, but those of {paths[0]} are {_columns(schema)}: "
                "parts of two runs in one folder?"
            )
        schema = found  # and at last the metadata of the last part, when most is known
    return ds.dataset([str(path) for path in paths], schema=schema, format="parquet") if paths else None


def _columns(schema: Any) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema)


def grouped(
    dataset: Any,
    keys: Mapping[str, Any],
    columns: Mapping[str, Any],
    measures: Sequence[tuple[str, str, Any]],
    *,
    read: Sequence[str],
    where: Any = None,
    join: tuple[str, Any] | None = None,
) -> Any:
    """Groups the rows of a dataset as they stream by: memory is that of the groups and of a few batches.

    The rows come in the order of the parts, on one thread: the sums have the same bits every time.

    Args:
        dataset: What `open_log` found.
        keys: Name -> expression, to group by; none makes one group of all rows.
        columns: Name -> expression, to be measured.
        measures: (column, function, options) of every result, in pyarrow's words; the result is `<column>_<function>`.
        read: The dataset's columns that the expressions read.
        where: A row that does not fulfil this expression is left out.
        join: (column, table): the expressions also see the table's other columns, from the row with the same number in
            `column`, which each number has once. Rows of the dataset without one are left out.

    Returns:
        A pyarrow.Table of keys and measures, sorted by the keys.
    """
    import pyarrow.acero as acero

    scan = acero.ScanNodeOptions(dataset, columns=list(read), filter=where, require_sequenced_output=True)
    rows = acero.Declaration("scan", scan)
    if where is not None:  # the scan skips whole row groups only
        rows = acero.Declaration("filter", acero.FilterNodeOptions(where), [rows])
    if join is not None:
        on, table = join
        others = [name for name in table.column_names if name != on]
        options = acero.HashJoinNodeOptions("inner", [on], [on], list(read), others)
        beside = acero.Declaration("table_source", acero.TableSourceNodeOptions(table))
        rows = acero.Declaration("hashjoin", options, [rows, beside])
    made = {**keys, **columns}
    rows = acero.Declaration("project", acero.ProjectNodeOptions(list(made.values()), list(made)), [rows])
    by = "hash_" if keys else ""
    results = [(name, by + how, options, f"{name}_{how}") for name, how, options in measures]
    rows = acero.Declaration("aggregate", acero.AggregateNodeOptions(results, keys=list(keys) or None), [rows])
    table = rows.to_table(use_threads=False)
    return table.sort_by([(key, "ascending") for key in keys]) if keys else table
