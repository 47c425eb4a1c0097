"""What a log says by sample, by source and over time: tables of a size that does not grow with the number of steps.

Everything here speaks in values, `value = -phi`: positive means that the sample lowered the loss of that set. Sums are
taken in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ghostgram.algorithms.in_run_shapley.reading import Log, LogError, grouped

UNKNOWN = "unknown"
BINS = 200
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def by_sample(log: Log, sources: str | Path | None = None) -> Any:
    """The table of values: one row per sample, all its steps and epochs added up.

    For validation set k and sample i, over the log's rows t of that sample:

        value_k = -sum_t phi_ikt                           in nats, float64
        value_per_lr_k = -sum_t phi_ikt / lr_t             lr is that of the first parameter group; lr = 0 gives 0
        value_share_k = value_k / sum_j |value_jk|         the shares' sizes add up to 1

    Raw values concentrate in the steps where the learning rate times the gradient is large; `value_per_lr` takes the
    learning rate out again.

    Args:
        log: What `open_log` found.
        sources: A Parquet, CSV or TSV file with the columns `sample_id` (or `id`) and `source` (or `domain`).

    Returns:
        A pyarrow.Table, sorted by sample_id: sample_id int64, source string (null without `sources`; "unknown" for a
        sample that the file does not name), times_seen int64 (rows of steps that were taken; twice in a batch counts
        twice), first_step and last_step int32, and for every set value_<set>, value_per_lr_<set> and value_share_<set>,
        float64.

    Raises:
        LogError: The file of sources cannot be read, lacks a column, or names a sample twice.

    Cost:
        One read of four columns and K; memory for the result.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    field, wide = pc.field, pa.float64()
    lr = field("lr").cast(wide)
    columns = {"step": field("step"), "taken": pc.invert(field("skipped")).cast(pa.int64())}
    measures: list[tuple[str, str, Any]] = [("step", "min", None), ("step", "max", None), ("taken", "sum", None)]
    for k, name in enumerate(log.sets):
        value = pc.negate(field(f"phi_{name}").cast(wide))
        columns |= {f"v{k}": value, f"w{k}": pc.if_else(pc.greater(lr, 0.0), pc.divide(value, lr), 0.0)}
        measures += [(f"v{k}", "sum", None), (f"w{k}", "sum", None)]
    read = ["step", "sample_id", "lr", "skipped", *(f"phi_{name}" for name in log.sets)]
    sums = grouped(log.steps, {"sample_id": field("sample_id")}, columns, measures, read=read)
    ids = sums["sample_id"]
    table = {
        "sample_id": ids,
        "source": pa.nulls(len(ids), pa.string()) if sources is None else _sources_of(ids, Path(sources)),
        "times_seen": sums["taken_sum"],
        "first_step": sums["step_min"],
        "last_step": sums["step_max"],
    }
    for k, name in enumerate(log.sets):
        value = sums[f"v{k}_sum"]
        moved = pc.sum(pc.abs(value)).as_py()
        share = pc.divide(value, moved) if moved else pc.multiply(value, 0.0)
        table |= {f"value_{name}": value, f"value_per_lr_{name}": sums[f"w{k}_sum"], f"value_share_{name}": share}
    return pa.table(table)


def _sources_of(ids: Any, path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.csv as csv
    import pyarrow.dataset as ds

    kinds = {".parquet": ds.ParquetFileFormat(), ".csv": ds.CsvFileFormat(),
             ".tsv": ds.CsvFileFormat(csv.ParseOptions(delimiter="\t"))}  # fmt: skip
    if path.suffix not in kinds:
        raise LogError(f"{path}: expected a file of sources ending in {', '.join(kinds)}")
    try:
        file = ds.dataset(str(path), format=kinds[path.suffix])
        names = [_one_of(file.schema.names, pair, path) for pair in (("sample_id", "id"), ("source", "domain"))]
        known, source = file.to_table(columns=names).columns
        known, source = known.cast(pa.int64()), source.cast(pa.string())
    except (pa.ArrowInvalid, OSError) as why:
        raise LogError(f"{path}: cannot be read as a file of sources: {why}") from why
    if len(pc.unique(known)) != len(known):
        counts = pc.value_counts(known)
        twice = counts.filter(pc.greater(counts.field("counts"), 1))[0]["values"]
        raise LogError(f"{path}: sample {twice} is named more than once")
    return pc.fill_null(source.take(pc.index_in(ids, known)), UNKNOWN)


def _one_of(names: Sequence[str], wanted: tuple[str, str], path: Path) -> str:
    for name in wanted:
        if name in names:
            return name
    raise LogError(f"{path}: expected a column {' or '.join(wanted)}, got {', '.join(names)}")


def by_source(samples: Any, sets: Sequence[str]) -> Any:
    """The table of values by source: one row per source of `by_sample`'s table, the most valuable first.

    Returns:
        A pyarrow.Table: source, samples, times_seen, and for every set value_<set> (the sum), mean_value_<set> (per
        sample), value_per_lr_<set>, value_share_<set> and negative_<set> (the share of its samples that harmed).
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    harmed = {f"harmed_{name}": pc.less(samples[f"value_{name}"], 0).cast(pa.float64()) for name in sets}
    table = pa.table({**dict(zip(samples.column_names, samples.columns, strict=True)), **harmed})
    summed = [f"{kind}_{name}" for name in sets for kind in ("value", "value_per_lr", "value_share")]
    means = [f"{kind}_{name}" for name in sets for kind in ("value", "harmed")]
    found = table.group_by("source").aggregate(
        [([], "count_all"), ("times_seen", "sum"), *((name, "sum") for name in summed), *((n, "mean") for n in means)]
    )
    columns = {"source": found["source"], "samples": found["count_all"], "times_seen": found["times_seen_sum"]}
    for name in sets:
        columns |= {
            f"value_{name}": found[f"value_{name}_sum"],
            f"mean_value_{name}": found[f"value_{name}_mean"],
            f"value_per_lr_{name}": found[f"value_per_lr_{name}_sum"],
            f"value_share_{name}": found[f"value_share_{name}_sum"],
            f"negative_{name}": found[f"harmed_{name}_mean"],
        }
    return pa.table(columns).sort_by([(f"value_{sets[0]}", "descending"), ("source", "ascending")])


@dataclass(frozen=True)
class Spread:
    """How the values of one set are spread over its samples; all but `unvalued` over those that have a finite value."""

    samples: int
    unvalued: int
    """Samples whose value is missing or not finite."""
    total: float
    mean: float
    negative: float
    """The share of samples with a value below 0."""
    gini: float
    """Gini coefficient of |value|: 0 when all are alike, towards 1 when a few have it all."""
    top_percent: float
    """The share of all |value| that lies with the hundredth of the samples (at least one) where it is largest."""
    quantiles: dict[str, float]


def spread(samples: Any, name: str) -> Spread:
    """Describes the column value_<name> of `by_sample`'s table."""
    every = values_of(samples, name)
    value = every[np.isfinite(every)]
    if not len(value):
        nan = float("nan")
        return Spread(0, len(every), nan, nan, nan, nan, nan, {})
    size = np.sort(np.abs(value))
    total, count = float(size.sum()), len(size)
    gini = float(2 * (np.arange(1, count + 1) @ size) / (count * total) - (count + 1) / count) if total else 0.0
    top = float(size[-max(1, count // 100) :].sum() / total) if total else 0.0
    at = {f"{q:g}": float(v) for q, v in zip(QUANTILES, np.quantile(value, QUANTILES), strict=True)}
    return Spread(count, len(every) - count, float(value.sum()), float(value.mean()), float((value < 0).mean()),
                  gini, top, at)  # fmt: skip


def extremes(samples: Any, name: str, count: int) -> tuple[Any, Any]:
    """The rows of `by_sample`'s table with the highest and with the lowest values of a set, each the extreme one first.

    Of equal values the smaller sample_id comes first; rows without a finite value are left out.
    """
    value = values_of(samples, name)
    ids = samples["sample_id"].to_numpy()
    finite = np.flatnonzero(np.isfinite(value))
    best = finite[np.lexsort((ids[finite], -value[finite]))[:count]]
    worst = finite[np.lexsort((ids[finite], value[finite]))[:count]]
    return samples.take(best), samples.take(worst)


@dataclass(frozen=True)
class OrderGap:
    """First-order against second-order phi of every row of a log that holds both."""

    correlation: float
    relative_norm: float
    """|phi2 - phi1| / |phi2|, over all rows."""


def order_gap(log: Log, name: str) -> OrderGap | None:
    """What the second order changed, for one set; None where the run did not log both (`compare_orders`)."""
    import pyarrow as pa
    import pyarrow.compute as pc

    both = [f"phi_{name}", f"phi1_{name}"]
    if both[1] not in log.steps.schema.names:
        return None
    second, first = (pc.field(column).cast(pa.float64()) for column in both)
    gap = pc.subtract(second, first)
    columns = {"x": second, "y": first, "xx": pc.multiply(second, second), "yy": pc.multiply(first, first),
               "xy": pc.multiply(second, first), "gg": pc.multiply(gap, gap)}  # fmt: skip
    measures = [(column, "mean", None) for column in columns]
    row = grouped(log.steps, {}, columns, measures, read=[*both, "skipped"], where=~pc.field("skipped")).to_pylist()[0]
    x, y, xx, yy, xy, gg = (row[f"{column}_mean"] or 0.0 for column in columns)
    varied, moved = (xx - x * x) * (yy - y * y), xx > 0
    return OrderGap((xy - x * y) / varied**0.5 if varied > 0 else math.nan, (gg / xx) ** 0.5 if moved else math.nan)


def values_of(samples: Any, name: str) -> NDArray[np.float64]:
    """value_<name> as an array; missing values are NaN."""
    return np.asarray(samples[f"value_{name}"].to_numpy(), np.float64)
