"""The ledger of a run summed up: what was predicted of the validation losses, what was measured, and the difference.

A measurement covers the steps since the one before it: one step, or as many as a validation gradient has served for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ghostgram.algorithms.in_run_shapley.aggregate import BINS
from ghostgram.algorithms.in_run_shapley.reading import Log
from ghostgram.algorithms.in_run_shapley.timeline import ends

Floats = NDArray[np.float64]
PARTS = ("predicted", "sum_phi", "history", "uncovered")


def ledger_over_time(log: Log, steps: int, bins: int = BINS) -> Any:
    """The ledger's sums over every stretch of the run (`timeline` says what a stretch is).

    The ledger, a row per step and set, is read whole: 80 bytes a row.

    Args:
        log: What `open_log` found; its ledger is not None.
        steps: The number of steps of the run.
        bins: The largest number of stretches.

    Returns:
        A pyarrow.Table: set, first_step, last_step; rows, skipped (steps that the optimizer did not take); sums of
        predicted, sum_phi, history and uncovered; of the measurements that end in the stretch measurements (their
        number), measured, residual = measured - predicted, measured_squares, residual_squares; audits (their number)
        and worst_audit (null without any).
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    columns = ["step", "set", "l_before", "cumulative_residual", "skipped", "audit", *PARTS]
    everything = log.ledger.to_table(columns=columns)
    tables = []
    for name in log.sets:
        rows = everything.filter(pc.equal(everything["set"], name))
        count = min(bins, steps)
        stretch = rows["step"].to_numpy().astype(np.int64) * count // steps
        closing, measured, residual = _measurements(rows)

        def summed(values: Any, at: NDArray[np.int64] = stretch, count: int = count) -> NDArray[Any]:
            return np.bincount(at, weights=values, minlength=count)

        at = stretch[closing]
        audit = _floats(rows, "audit")
        worst = np.full(count, -np.inf)
        np.maximum.at(worst, stretch, np.where(np.isnan(audit), -np.inf, audit))
        tables.append(
            pa.table(
                {
                    "set": pa.array([name] * count, pa.string()),
                    **ends(np.arange(count), steps, bins),
                    "rows": summed(None),
                    "skipped": summed(_floats(rows, "skipped")).astype(np.int64),
                    **{part: summed(np.nan_to_num(_floats(rows, part))) for part in PARTS},
                    "measurements": summed(None, at),
                    "measured": summed(measured, at),
                    "residual": summed(residual, at),
                    "measured_squares": summed(measured**2, at),
                    "residual_squares": summed(residual**2, at),
                    "audits": summed(~np.isnan(audit)).astype(np.int64),
                    "worst_audit": pa.array(worst, mask=np.isinf(worst)),
                }
            )
        )
    return pa.concat_tables(tables)


def _measurements(rows: Any) -> tuple[NDArray[np.int64], Floats, Floats]:
    """Of one set's rows: those that end with a measurement, and the measured change and residual of each."""
    predicted, cumulative = _floats(rows, "predicted"), _floats(rows, "cumulative_residual")
    closing = np.flatnonzero(~np.isnan(cumulative))
    number = np.arange(len(rows))
    opening = np.maximum.accumulate(np.where(np.isnan(_floats(rows, "l_before")), 0, number))[closing]
    total = np.concatenate([[0.0], np.cumsum(predicted)])
    residual = np.diff(cumulative[closing], prepend=0.0)
    return closing, total[closing + 1] - total[opening] + residual, residual


@dataclass(frozen=True)
class LedgerTotals:
    """One validation set's ledger over the whole run, in nats."""

    steps: int
    skipped: int
    """Steps that the optimizer did not take (a GradScaler's)."""
    measurements: int
    measured: float
    predicted: float
    sum_phi: float
    history: float
    uncovered: float
    residual: float
    """Cumulative drift: what was measured less what was predicted of it, added up."""
    relative_residual: float
    """RMS of the measurements' residuals over RMS of the measured changes: the error bar of the values. NaN if nothing
    was measured."""
    audits: int
    worst_audit: float | None
    """The largest error of an audited dot over the size of its terms; None if no step was audited."""


def ledger_totals(table: Any, name: str) -> LedgerTotals:
    """Adds up the rows of `ledger_over_time`'s table that belong to one set."""
    import pyarrow.compute as pc

    mine = table.filter(pc.equal(table["set"], name))
    total = {column: pc.sum(mine[column], min_count=0).as_py() for column in mine.column_names if column != "set"}
    squares = total["measured_squares"]
    return LedgerTotals(
        steps=total["rows"],
        skipped=total["skipped"],
        measurements=total["measurements"],
        measured=total["measured"],
        residual=total["residual"],
        **{part: total[part] for part in PARTS},
        relative_residual=math.sqrt(total["residual_squares"] / squares) if squares else math.nan,
        audits=total["audits"],
        worst_audit=pc.max(mine["worst_audit"]).as_py(),
    )


def _floats(table: Any, column: str) -> Floats:
    return np.asarray(table[column].to_numpy(), np.float64)  # nulls become NaN
