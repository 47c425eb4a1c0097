"""A log over time: how values are spread in every stretch of the run, and which sources earned them.

A run is cut into stretches of equally many steps, at most `bins` of them: the tables stay small however long it was.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ghostgram.algorithms.in_run_shapley.aggregate import BINS, QUANTILES
from ghostgram.algorithms.in_run_shapley.reading import Log, grouped


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
                    **ends(found["bin"], steps, bins),
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
                **ends(found["bin"], steps, bins),
                "rows": found[f"v{k}_count"],
                "value": found[f"v{k}_sum"],
            }
        )
        for k, name in enumerate(log.sets)
    )


def _bin(steps: int, bins: int) -> Any:
    import pyarrow as pa
    import pyarrow.compute as pc

    return pc.divide(pc.multiply(pc.field("step").cast(pa.int64()), min(bins, steps)), steps)


def ends(bin_: Any, steps: int, bins: int) -> dict[str, Any]:
    """first_step and last_step of the stretches of these numbers."""
    bins, number = min(bins, steps), np.asarray(bin_)
    return {"first_step": -(-number * steps // bins), "last_step": -(-(number + 1) * steps // bins) - 1}
