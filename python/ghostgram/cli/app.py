"""The commands, and how their findings are drawn."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ghostgram import _dispatch
from ghostgram.cli import doctor as examination
from ghostgram.cli import pad_app
from ghostgram.cli.mates_app import app as mates
from ghostgram.cli.refusal import need, refuse
from ghostgram.cli.velocitune import commands as velocitune

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Per-sample gradient statistics.")
app.add_typer(mates, name="mates")
app.add_typer(pad_app.app, name="pad")
app.add_typer(velocitune, name="velocitune")


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    seconds: Annotated[float, typer.Option(min=0.001, help="How long each roof is measured.")] = 0.5,
) -> None:
    """Shows what is installed, which kernels run here, whether they are right, and the machine's measured roofs.

    Exits with 1 when a self-check fails.
    """
    report = examination.examine(seconds)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(report), indent=2))
    else:
        _draw(report, Console())
    raise typer.Exit(0 if report.healthy else 1)


@app.command()
def bench(
    what: Annotated[str, typer.Argument(help="An op, `step` for a whole training step, or `all` ops.")] = "all",
    seconds: Annotated[float, typer.Option(min=0.001, help="How long each shape is timed, and each roof.")] = 0.5,
    dtype: Annotated[
        Literal["float32", "float64", "bfloat16", "float16"], typer.Option(help="Of the ops' inputs.")
    ] = "float32",
    layers: Annotated[int, typer.Option(min=1, max=4, help="Of the model that `step` trains.")] = 2,
    width: Annotated[int, typer.Option(min=8, help="Of the model that `step` trains; a multiple of 4.")] = 256,
    plot: Annotated[Path | None, typer.Option(help="Draws the ops under the roofs: a .png or .svg to write.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Times every op on every backend here, validated first, beside plain torch or NumPy and the machine's roofs.

    Exits with 1 when a result exceeds its error bound.
    """
    from ghostgram.cli import bench_app

    if what == "step":
        bench_app.step(layers, width, seconds, as_json)
    else:
        bench_app.ops(what, dtype, seconds, plot, as_json)


@app.command()
def values(
    log: Annotated[Path, typer.Argument(help="The log folder of a run: InRunShapley(log=...).", metavar="LOG")],
    sources: Annotated[
        Path | None,
        typer.Option(help="A Parquet, CSV or TSV file: sample_id (or id) and source (or domain)."),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many of the most helpful and most harmful samples.")] = 10,
    out: Annotated[Path | None, typer.Option(help="A folder for the tables and the figures.")] = None,
    figures: Annotated[Literal["svg", "png"], typer.Option(help="What the figures are written as.")] = "svg",
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Shows what a log of In-Run Data Shapley says: by sample, by source, over time, and whether it adds up.

    Exits with 2 when the log or the file of sources cannot be read.
    """
    need("values", "pyarrow", *(["matplotlib"] if out else []))
    from ghostgram.algorithms.in_run_shapley.reading import LogError
    from ghostgram.cli import values as reading
    from ghostgram.cli.values_tables import draw

    try:
        found = reading.examine(log, sources, top)
    except LogError as why:
        refuse(str(why), "values")
    written = reading.write(found, out, figures) if out else []
    if as_json:
        typer.echo(json.dumps(found.as_json(), indent=2))
        return
    draw(found, Console())
    if written:
        typer.echo(f"{out}: {', '.join(path.name for path in written)}")


def _draw(report: examination.Report, console: Console) -> None:
    facts = Table.grid(padding=(0, 2))
    for name, found in report.versions.items():
        facts.add_row(name, found or "[dim]not installed[/]")
    facts.add_row("processor", report.processor)
    facts.add_row("instructions", f"{report.isa} [dim](built: {', '.join(report.isas_built)})[/]")
    facts.add_row("threads", str(report.threads))
    facts.add_row("CUDA", f"{report.cuda}; devices here: {report.cuda_devices}")
    console.print(facts)

    backends = Table("op", *_dispatch.BACKENDS, title="Backends", title_justify="left")
    for op, row in report.backends.items():
        backends.add_row(op, *("[green]ready[/]" if why is None else f"[dim]{escape(why)}[/]" for why in row.values()))
    console.print(backends)

    checks = Table("op", "backend", "cases", "worst error / bound", "", title="Self-check", title_justify="left")
    for check in report.checks:
        verdict = "[green]right[/]" if check.passed else "[red]WRONG[/]"
        checks.add_row(check.op, check.backend, str(check.cases), f"{check.worst:.3f}", verdict)
    console.print(checks)

    roofs = Table(
        "dtype", "GFLOP/s", "read GB/s", "copy GB/s", "triad GB/s", title="Measured roofs", title_justify="left"
    )
    for dtype, roof in report.roofs.items():
        roofs.add_row(dtype, *(f"{rate / 1e9:.1f}" for rate in (roof.flops, roof.read, roof.copy, roof.triad)))
    console.print(roofs)
