"""`ghostgram bench`: what is refused, examined and shown."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import typer
from rich.console import Console

from ghostgram import _dispatch
from ghostgram.cli import bench, bench_step
from ghostgram.cli.bench_tables import draw, draw_step
from ghostgram.cli.refusal import need, refuse


def step(layers: int, width: int, seconds: float, as_json: bool) -> None:
    """Times a training step with In-Run Data Shapley against the plain one."""
    need("bench step", "torch", extras="torch,report")
    if width % bench_step.HEADS:
        refuse(f"--width: expected a multiple of {bench_step.HEADS}, got {width}", "bench step")
    found = bench_step.examine(layers, width, seconds)
    if as_json:
        typer.echo(json.dumps(found.as_json(), indent=2))
    else:
        draw_step(found, Console())


def ops(what: str, dtype: str, seconds: float, plot: Path | None, as_json: bool) -> None:
    """Validates and times one op, or all of them."""
    if what not in ("all", *_dispatch.OPS):
        refuse(f"expected step, all or one of {', '.join(sorted(_dispatch.OPS))}, got {what}", "bench")
    if dtype == "bfloat16" and find_spec("torch") is None:
        refuse("bfloat16 needs torch, because NumPy has none: pip install ghostgram[torch]", "bench")
    if plot:
        need("bench --plot", "matplotlib")
        if plot.suffix not in (".png", ".svg"):
            refuse(f"--plot: expected a name that ends in .png or .svg, got {plot}", "bench")
    console = Console()
    with Console(stderr=True).status("") as status:
        found = bench.examine(
            _dispatch.OPS if what == "all" else [what], dtype, seconds, lambda note: status.update(f"[dim]{note}[/]")
        )
    if as_json:
        typer.echo(json.dumps(bench.as_json(found), indent=2))
    else:
        draw(found, console)
    if plot:
        _plot(found, plot)
        typer.echo(str(plot), err=as_json)
    raise typer.Exit(0 if found.right else 1)


def _plot(found: bench.Findings, path: Path) -> None:
    from ghostgram.report.roofline import Point, roofline

    points = [
        Point(row.op, row.shape, row.way, row.intensity, row.gflops)
        for row in found.rows
        if row.ours and row.cache == "cold"
    ]
    roofs = found.roofs
    memory = max(roofs.read, roofs.copy, roofs.triad)
    title = f"{found.processor}, {found.dtype}, {found.threads} threads"
    roofline(path, points, roofs.flops / 1e9, memory / 1e9, title)
