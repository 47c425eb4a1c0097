"""`ghostgram pad`: a run of PAD from a file of settings, part by part or whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ghostgram.cli.refusal import need, refuse

if TYPE_CHECKING:
    from ghostgram.algorithms.pad import Run

app = typer.Typer(no_args_is_help=True, help="Dataset distillation by PAD; killed runs go on where they were.")

Config = Annotated[Path, typer.Argument(help="A YAML file: run, preset, data, settings; see docs/algorithms/pad.md.")]
Changes = Annotated[
    list[str] | None, typer.Option("--allow-change", help="A setting that may be other than when the run was begun.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no bars.")]


@app.command()
def run(config: Config, allow_change: Changes = None, quiet: Quiet = False) -> None:
    """All parts, and the report."""
    need("pad run", "matplotlib")
    with _begun(config, allow_change, quiet, "run") as job:
        job.finish()
        _report(job.folder, None, as_json=False)


@app.command()
def score(config: Config, allow_change: Changes = None, quiet: Quiet = False) -> None:
    """How hard each training image is."""
    with _begun(config, allow_change, quiet, "score") as job:
        found = job.scores
        typer.echo(f"{len(found.values)} images, {found.meta['kind']}: {found.values.mean():.4f} on average")


@app.command()
def experts(config: Config, allow_change: Changes = None, quiet: Quiet = False) -> None:
    """The experts' trajectories."""
    with _begun(config, allow_change, quiet, "experts") as job:
        store = job.store
        typer.echo(f"{store.folder}: {store.experts} experts, epochs {', '.join(map(str, store.epochs))}")


@app.command()
def distill(config: Config, allow_change: Changes = None, quiet: Quiet = False) -> None:
    """The distilled set, not yet judged."""
    with _begun(config, allow_change, quiet, "distill") as job:
        state = job.state
        typer.echo(f"{job.folder}: {state.iteration} iterations, {state.skipped} of {state.tried} matches left out")


@app.command()
def evaluate(config: Config, allow_change: Changes = None, quiet: Quiet = False) -> None:
    """What nets learn from it, beside controls."""
    with _begun(config, allow_change, quiet, "evaluate") as job:
        results = job.finish().results
        typer.echo(json.dumps(results, indent=2))


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.", metavar="RUN")],
    out: Annotated[
        Path | None, typer.Option(help="A folder for the figures and the page; by default the run's.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Images, curves and results of a run, on one page.

    Exits with 2 when the run cannot be read.
    """
    need("pad report", "matplotlib")
    try:
        _report(run, out, as_json)
    except ValueError as why:
        refuse(str(why), "pad report")


@contextmanager
def _begun(config: Path, allow_change: list[str] | None, quiet: bool, command: str) -> Iterator[Run]:
    """The run that a file describes; what is wrong with either is one line, and exit status 2."""
    need(f"pad {command}", "torch", "yaml", extras="torch,report")
    from ghostgram.algorithms.pad.distill import DistillationStopped
    from ghostgram.cli.pad import Job
    from ghostgram.data import DomainUnavailable

    try:
        yield Job.read(config).begin(allow_changes=tuple(allow_change or ()), progress=not quiet)
    except (ValueError, TypeError, DomainUnavailable, DistillationStopped) as why:
        refuse(str(why), f"pad {command}")


def _report(run: Path, out: Path | None, as_json: bool) -> None:
    from ghostgram.cli.pad_tables import as_plain, draw
    from ghostgram.report import pad

    written = pad.write(run, out)
    found = pad.read(run)
    if as_json:
        typer.echo(json.dumps(as_plain(found), indent=2))
        return
    draw(found, Console())
    typer.echo(f"{out or run}: {', '.join(path.name for path in written)}")
