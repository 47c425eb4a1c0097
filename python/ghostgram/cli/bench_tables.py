"""How the findings of `ghostgram bench` are drawn."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ghostgram.cli.bench import Findings, Row
from ghostgram.cli.bench_step import StepFindings


def draw(found: Findings, console: Console) -> None:
    """Prints the machine, one table for every op and shape, and what is not here."""
    facts = Table.grid(padding=(0, 2))
    facts.add_row("processor", f"{escape(found.processor)}, {found.isa}, {found.threads} threads")
    roofs = found.roofs
    flops, *rates = (f"{rate / 1e9:.1f}" for rate in (roofs.flops, roofs.read, roofs.copy, roofs.triad))
    facts.add_row("roofs", "{} GFLOP/s; read {}, copy {}, triad {} GB/s".format(flops, *rates))
    facts.add_row("dtype", found.dtype)
    facts.add_row("columns", "times from warm and cold caches; rates, warm; of the roof, both; error / bound")
    console.print(facts)
    for (op, shape), rows in groupby(found.rows, key=lambda row: (row.op, row.shape)):
        console.print(_shape(op, shape, rows))
    reasons: dict[str, dict[str, list[str]]] = {}
    for op, backends in found.absent.items():
        for backend, why in backends.items():
            reasons.setdefault(backend, {}).setdefault(why, []).append(op)
    for backend, by_reason in reasons.items():
        for why, ops in by_reason.items():
            named = "all ops" if len(ops) == len(found.absent) else ", ".join(ops)
            console.print(f"[dim]{backend} is not here for {named}: {escape(why)}[/]")


def _shape(op: str, shape: str, rows: Iterable[Row]) -> Table:
    """One line for every way; rates are those of warm caches."""
    table = Table(title=f"{op} {escape(shape)}", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("way")
    for column in ("warm", "cold", "GFLOP/s", "GB/s", "of the roof", "error"):
        table.add_column(column, justify="right", no_wrap=True)
    by_way: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_way.setdefault(row.way, {})[row.cache] = row
    for way, caches in by_way.items():
        warm, cold = caches["warm"], caches["cold"]
        times = duration(warm.seconds), duration(cold.seconds)
        if warm.ours:
            table.add_row(way, *times, f"{warm.gflops:.1f}", f"{warm.gbytes:.1f}", _share(warm, cold), _verdict(warm))
        else:
            table.add_row(f"[dim]{escape(way)}[/]", *times)
    return table


def _share(warm: Row, cold: Row) -> str:
    if warm.percent_of_roof is None or cold.percent_of_roof is None:
        return "not measured"
    return f"{warm.percent_of_roof:.0f}, {cold.percent_of_roof:.0f} %"


def _verdict(row: Row) -> str:
    error = row.error_over_bound or 0.0
    return f"{error:.3f}" if error <= 1 else f"[red]{error:.3g} WRONG[/]"


def draw_step(found: StepFindings, console: Console) -> None:
    """Prints the table of a training step."""
    console.print(f"{escape(found.processor)}, {found.isa}, {found.threads} threads")
    title = (
        f"A step of a Transformer: {found.layers} layers, width {found.width}, {found.parameters:,} parameters, "
        f"{found.samples} samples of {found.tokens} tokens"
    )
    table = Table("way", title=title, title_justify="left")
    table.add_column("time", justify="right")
    table.add_column("of the plain step", justify="right")
    for way, seconds in found.seconds.items():
        table.add_row(way, duration(seconds), f"{found.over_plain[way]:.2f}")
    console.print(table)


def duration(seconds: float) -> str:
    """Three digits, in the unit they are readable in."""
    unit, name = next((pair for pair in ((1.0, "s"), (1e-3, "ms")) if seconds >= pair[0]), (1e-6, "us"))
    return f"{seconds / unit:.3g} {name}"
