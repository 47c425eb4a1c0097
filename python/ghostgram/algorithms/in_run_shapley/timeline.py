"""A log over time: how values are spread in every stretch of the run, and whether the ledger adds up there.

A run is cut into stretches of equally many steps, at most `bins` of them: the tables stay small however long it was.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ghostgram.algorithms.in_run_shapley.aggregate import BINS, QUANTILES
from ghostgram.algorithms.in_run_shapley.reading import Log, grouped

LEDGER_SUMS = ("measured", "predicted", "sum_phi", "history", "uncovered", "residual")


def values_over_time(log: Log, steps: int, bins: int = BINS) -> Any:
    """How the values of single rows of the log (one sample in one step) are spread, stretch by stretch.

    Skipped steps are left out. Quantiles are t-digest's: exact at the ends, within a percentile or so between.

    Args:
        log: What `open_log` found.
        steps: The number of steps of the run: its last step + 1.
        bins: The largest number of stretches.

    Returns:
        A pyarrow.Table: set, first_step, last_step, rows, value (the sum), negative (the share of rows below 0), and
        q05, q25, q50, q75, q95.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    field, wide = pc.field, pa.float64()
    columns: dict[str, Any] = {}
    measures: list[tuple[str, str, Any]] = []
    for k, name in enumerate(log.sets):
        value = pc.negate(field(f"phi_{name}").cast(wide))
        columns |= {f"v{k}": value, f"n{k}": pc.less(value, 0.0).cast(wide)}
        measures += [(f"v{k}", "sum", None), (f"v{k}", "count", None), (f"n{k}", "mean", None),
                     (f"v{k}", "tdigest", pc.TDigestOptions(list(QUANTILES)))]  # fmt: skip
    read = ["step", "skipped", *(f"phi_{name}" for name in log.sets)]
    found = grouped(log.steps, {"bin": _bin(steps, bins)}, columns, measures, read=read, where=~field("skipped"))
    tables = []
    for k, name in enumerate(log.sets):
        quantiles = pc.list_flatten(found[f"v{k}_tdigest"]).to_numpy().reshape(-1, len(QUANTILES))
        tables.append(
            pa.table(
                {
                    "set": pa.array([name] * len(found), pa.string()),
                    **_ends(found["bin"], steps, bins),
                    "rows": found[f"v{k}_count"],
                    "value": found[f"v{k}_sum"],
                    "negative": found[f"n{k}_mean"],
                    **{f"q{100 * q:02.0f}": quantiles[:, i] for i, q in enumerate(QUANTILES)},
                }
            )
        )
    return pa.concat_tables(tables)


def sources_over_time(log: Log, samples: Any, steps: int, bins: int = BINS) -> Any:
    """The value that every source earned in every stretch of the run.

    Args:
        log: What `open_log` found.
        samples: `by_sample`'s table, with sources.
        steps: The number of steps of the run.
        bins: The largest number of stretches.

    Returns:
        A pyarrow.Table: set, source, first_step, last_step, rows, value.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    columns = {f"v{k}": pc.negate(pc.field(f"phi_{name}").cast(pa.float64())) for k, name in enumerate(log.sets)}
    measures = [(column, how, None) for column in columns for how in ("sum", "count")]
    read = ["step", "sample_id", *(f"phi_{name}" for name in log.sets)]
    keys = {"source": pc.field("source"), "bin": _bin(steps, bins)}
    join = ("sample_id", samples.select(["sample_id", "source"]))
    found = grouped(log.steps, keys, columns, measures, read=read, join=join)
    return pa.concat_tables(
        pa.table(
            {
                "set": pa.array([name] * len(found), pa.string()),
                "source": found["source"],
                **_ends(found["bin"], steps, bins),
                "rows": found[f"v{k}_count"],
                "value": found[f"v{k}_sum"],
            }
        )
        for k, name in enumerate(log.sets)
    )


def ledger_over_time(log: Log, steps: int, bins: int = BINS) -> Any:
    """The ledger's sums over every stretch of the run.

    Returns:
        A pyarrow.Table: set, first_step, last_step, rows, skipped (how many), measured_rows (how many have a
        measurement: none between two refreshes of the validation gradient), the sums of measured, predicted, sum_phi,
        history, uncovered and residual (0 where none is known), and measured_squares and residual_squares.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    wide = pa.float64()
    columns = {name: pc.field(name) for name in LEDGER_SUMS}
    columns |= {f"{name}2": pc.multiply(pc.field(name), pc.field(name)) for name in ("measured", "residual")}
    columns |= {"skipped": pc.field("skipped").cast(pa.int64()), "step": pc.field("step")}
    none_is_0 = pc.ScalarAggregateOptions(min_count=0)
    measures = [(name, "sum", none_is_0) for name in columns if name != "step"]
    measures += [("step", "count", None), ("measured", "count", None)]
    read = ["step", "set", "skipped", *LEDGER_SUMS]
    keys = {"set": pc.field("set"), "bin": _bin(steps, bins)}
    found = grouped(log.ledger, keys, columns, measures, read=read)
    return pa.table(
        {
            "set": found["set"],
            **_ends(found["bin"], steps, bins),
            "rows": found["step_count"],
            "skipped": found["skipped_sum"],
            "measured_rows": found["measured_count"],
            **{name: found[f"{name}_sum"].cast(wide) for name in LEDGER_SUMS},
            "measured_squares": found["measured2_sum"],
            "residual_squares": found["residual2_sum"],
        }
    )


@dataclass(frozen=True)
class LedgerTotals:
    """One validation set's ledger over the whole run, in nats."""

    steps: int
    skipped: int
    """Steps that the optimizer did not take (a GradScaler's)."""
    measured_steps: int
    measured: float
    predicted: float
    sum_phi: float
    history: float
    uncovered: float
    residual: float
    """Cumulative drift: what was measured less what was predicted, added up."""
    relative_residual: float
    """RMS of the residual over RMS of the measured change: the error bar of the values. NaN if nothing was measured."""


def ledger_totals(table: Any, name: str) -> LedgerTotals:
    """Adds up the rows of `ledger_over_time`'s table that belong to one set."""
    import pyarrow.compute as pc

    mine = table.filter(pc.equal(table["set"], name))
    total = {column: pc.sum(mine[column], min_count=0).as_py() for column in mine.column_names if column != "set"}
    squares = total["measured_squares"]
    return LedgerTotals(
        steps=total["rows"],
        skipped=total["skipped"],
        measured_steps=total["measured_rows"],
        **{column: float(total[column]) for column in LEDGER_SUMS},
        relative_residual=math.sqrt(total["residual_squares"] / squares) if squares else math.nan,
    )


def _bin(steps: int, bins: int) -> Any:
    import pyarrow as pa
    import pyarrow.compute as pc

    return pc.divide(pc.multiply(pc.field("step").cast(pa.int64()), min(bins, steps)), steps)


def _ends(bin_: Any, steps: int, bins: int) -> dict[str, Any]:
    """first_step and last_step of every stretch."""
    bins = min(bins, steps)
    number = bin_.to_numpy()
    return {"first_step": -(-number * steps // bins), "last_step": -(-(number + 1) * steps // bins) - 1}
