"""What `ghostgram values` finds in a log: its samples, its sources, its course and its ledger."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ghostgram._files import whole_file
from ghostgram.algorithms.in_run_shapley import aggregate, ledger, timeline
from ghostgram.algorithms.in_run_shapley.reading import Log, open_log


@dataclass(frozen=True)
class Findings:
    """All findings; every table is a pyarrow.Table, described where it is made."""

    log: Log
    steps: int
    rows: int
    samples: Any
    unknown: int
    """Samples that the file of sources does not name; 0 without such a file."""
    spreads: dict[str, aggregate.Spread]
    gaps: dict[str, aggregate.OrderGap | None]
    """None where the run did not log both orders."""
    best: dict[str, Any]
    worst: dict[str, Any]
    course: Any
    ledger: Any
    """None where no part of the ledger has been written yet, and so are its totals empty."""
    totals: dict[str, ledger.LedgerTotals]
    sources: Any
    """None without a file of sources, and so is `growth`."""
    growth: Any

    def as_json(self) -> dict[str, Any]:
        """The findings less the long tables, of plain types; what is not a finite number is null."""
        found: dict[str, Any] = {
            "log": str(self.log.folder),
            "metadata": self.log.metadata,
            "steps": self.steps,
            "rows": self.rows,
            "samples": len(self.samples),
            "unknown_source": self.unknown,
            "sources": None if self.sources is None else self.sources.to_pylist(),
            "sets": {
                name: {
                    **dataclasses.asdict(self.spreads[name]),
                    "orders": None if (gap := self.gaps[name]) is None else dataclasses.asdict(gap),
                    "best": self.best[name].to_pylist(),
                    "worst": self.worst[name].to_pylist(),
                    "ledger": dataclasses.asdict(self.totals[name]) if self.totals else None,
                }
                for name in self.log.sets
            },
        }
        plain = _finite(found)
        assert isinstance(plain, dict)
        return plain


def examine(folder: Path, sources: Path | None, top: int) -> Findings:
    """Reads a log folder; see `aggregate` and `timeline` for every number, and `open_log` for the errors."""
    log = open_log(folder)
    samples = aggregate.by_sample(log, sources)
    steps = max(samples["last_step"].to_pylist(), default=-1) + 1
    ends = {name: aggregate.extremes(samples, name, top) for name in log.sets}
    course = None if log.ledger is None else ledger.ledger_over_time(log, steps)
    by_source = None if sources is None else aggregate.by_source(samples, log.sets)
    return Findings(
        log=log,
        steps=steps,
        rows=log.steps.count_rows(),
        samples=samples,
        unknown=samples["source"].to_pylist().count(aggregate.UNKNOWN),
        spreads={name: aggregate.spread(samples, name) for name in log.sets},
        gaps={name: aggregate.order_gap(log, name) for name in log.sets},
        best={name: best for name, (best, _) in ends.items()},
        worst={name: worst for name, (_, worst) in ends.items()},
        course=timeline.values_over_time(log, steps),
        ledger=course,
        totals={} if course is None else {name: ledger.ledger_totals(course, name) for name in log.sets},
        sources=by_source,
        growth=None if sources is None else timeline.sources_over_time(log, samples, steps),
    )


def write(found: Findings, folder: Path, kind: str) -> list[Path]:
    """Writes the tables (the samples as Parquet, the others as CSV) and the figures (as `kind`: svg or png).

    Returns:
        The files, each of which appeared whole.
    """
    import pyarrow.csv as csv
    import pyarrow.parquet as pq

    from ghostgram.report import values as figures

    sets = found.log.sets
    written = [folder / "samples.parquet"]
    with whole_file(written[0]) as temporary:
        pq.write_table(found.samples, temporary)
    tables = {"over_time": found.course, "ledger": found.ledger, "sources": found.sources, "growth": found.growth}
    for name, table in tables.items():
        if table is not None:
            written.append(folder / f"{name}.csv")
            with whole_file(written[-1]) as temporary:
                csv.write_csv(table, temporary)
    drawn: list[tuple[str, Any, tuple[Any, ...]]] = [("spread", figures.spread, (found.samples,)),
                                                     ("over_time", figures.over_time, (found.course,))]  # fmt: skip
    if found.ledger is not None:
        drawn.append(("ledger", figures.ledger, (found.ledger,)))
    if found.sources is not None:
        drawn.append(("sources", figures.sources, (found.sources, found.growth)))
    for name, draw, shown in drawn:
        written.append(folder / f"{name}.{kind}")
        draw(written[-1], *shown, sets)
    return written


def _finite(found: Any) -> Any:
    if isinstance(found, dict):
        return {name: _finite(each) for name, each in found.items()}
    if isinstance(found, list):
        return [_finite(each) for each in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found
