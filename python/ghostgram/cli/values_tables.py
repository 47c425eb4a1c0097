"""How the findings of `ghostgram values` are drawn."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ghostgram.algorithms.in_run_shapley.ledger import LedgerTotals
from ghostgram.cli.values import Findings

MILLI = 1e3  # values of single samples are read in thousandths of a nat
SOURCES_SHOWN = 20


def draw(found: Findings, console: Console) -> None:
    """Prints the tables."""
    log = found.log
    facts = Table.grid(padding=(0, 2))
    facts.add_row("log", escape(str(log.folder)))
    facts.add_row("optimizer", escape(log.metadata.get("optimizer", "[dim]not said[/]")))
    facts.add_row("rows", f"{found.rows:,}: {len(found.samples):,} samples in {found.steps:,} steps")
    facts.add_row("sign", "a positive value means that the sample lowered the set's loss")
    console.print(facts)
    for name, spread in found.spreads.items():
        if spread.unvalued:
            console.print(f"[yellow]{spread.unvalued:,} samples have no finite value for {escape(name)}[/]")
    if found.unknown:
        console.print(f"[yellow]{found.unknown:,} samples are not named in the file of sources: source unknown[/]")
    console.print(_spreads(found))
    for name in log.sets if found.sources is not None else ():
        console.print(_sources(found, name))
    for name in log.sets:
        console.print(_extremes(found, name))
    if found.ledger is None:
        console.print("[yellow]no part of the ledger has been written yet[/]")
    else:
        console.print(_ledger(found))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    return table


def _by_set(title: str, found: Findings, rows: dict[str, dict[str, str]]) -> Table:
    """One column per validation set: a few numbers of many sets fit a narrow terminal."""
    table = _table(title, "", *map(escape, found.log.sets))
    for name, cells in rows.items():
        table.add_row(name, *(cells[each] for each in found.log.sets))
    return table


def _spreads(found: Findings) -> Table:
    spreads = found.spreads.items()
    quantiles = {
        f"{label}, millinats": {name: _milli(spread.quantiles.get(key)) for name, spread in spreads}
        for label, key in (("lowest 5 % below", "0.05"), ("median", "0.5"), ("highest 5 % above", "0.95"))
    }
    gaps = {
        "order 1 against 2, correlation": {name: f"{gap.correlation:.4f}" for name, gap in found.gaps.items() if gap},
        "|phi2 - phi1| / |phi2|": {name: f"{gap.relative_norm:.1%}" for name, gap in found.gaps.items() if gap},
    }
    return _by_set("Values", found, {
        "total, nats": {name: f"{spread.total:+.4g}" for name, spread in spreads},
        "mean of a sample, millinats": {name: _milli(spread.mean) for name, spread in spreads},
        **quantiles,
        "samples below 0": {name: f"{spread.negative:.1%}" for name, spread in spreads},
        "Gini of |value|": {name: f"{spread.gini:.3f}" for name, spread in spreads},
        "of all |value|, the top 1 % hold": {name: f"{spread.top_percent:.1%}" for name, spread in spreads},
        **{label: cells for label, cells in gaps.items() if cells},
    })  # fmt: skip


def _sources(found: Findings, name: str) -> Table:
    title = f"Sources, judged by {escape(name)}"
    table = _table(title, "source", "samples", "seen", "value (nats)", "a sample (millinats)", "share", "below 0")
    for row in found.sources.slice(0, SOURCES_SHOWN).to_pylist():
        table.add_row(
            escape(row["source"]),
            f"{row['samples']:,}",
            f"{row['times_seen']:,}",
            f"{row[f'value_{name}']:+.4g}",
            _milli(row[f"mean_value_{name}"]),
            f"{row[f'value_share_{name}']:+.1%}",
            f"{row[f'negative_{name}']:.1%}",
        )
    if len(found.sources) > SOURCES_SHOWN:
        table.caption = f"and {len(found.sources) - SOURCES_SHOWN:,} more sources"
    return table


def _extremes(found: Findings, name: str) -> Table:
    with_sources = found.sources is not None
    heads = ("sample", *(["source"] if with_sources else []), "value", "seen")
    table = _table(f"Most helpful and most harmful samples, judged by {escape(name)} (millinats)", "", *heads, *heads)
    pairs = zip(found.best[name].to_pylist(), found.worst[name].to_pylist(), strict=True)
    for rank, pair in enumerate(pairs, 1):
        table.add_row(str(rank), *(cell for row in pair for cell in _sample(row, name, with_sources)))
    return table


def _sample(row: dict[str, Any], name: str, with_source: bool) -> list[str]:
    source = [escape(row["source"])] if with_source else []
    return [str(row["sample_id"]), *source, _milli(row[f"value_{name}"]), f"{row['times_seen']:,}"]


def _ledger(found: Findings) -> Table:
    totals = found.totals.items()
    shown = {"measured": "measured change", "predicted": "predicted", "sum_phi": "  sum of phi", "history": "  history",
             "uncovered": "  uncovered", "residual": "residual, cumulative"}  # fmt: skip
    sums = {label: {name: f"{getattr(total, key):+.4g}" for name, total in totals} for key, label in shown.items()}
    return _by_set("Ledger (change of the validation loss, nats)", found, {
        **sums,
        "RMS of residual / of measured": {name: f"{total.relative_residual:.1%}" for name, total in totals},
        "measurements": {name: f"{total.measurements:,} of {total.steps:,} steps" for name, total in totals},
        "steps skipped": {name: f"{total.skipped:,}" for name, total in totals},
        "worst audit": {name: _audit(total) for name, total in totals},
    })  # fmt: skip


def _audit(total: LedgerTotals) -> str:
    return "none" if total.worst_audit is None else f"{total.worst_audit:.1e} of {total.audits:,}"


def _milli(value: float | None) -> str:
    return "-" if value is None else f"{MILLI * value:+.4g}"
