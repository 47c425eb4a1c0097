"""`ghostgram mates`: the stages of a run, and how far it is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ghostgram.cli.refusal import need, refuse

if TYPE_CHECKING:
    from ghostgram.cli.mates_settings import Settings

app = typer.Typer(
    no_args_is_help=True,
    help="Model-aware data selection, a stage at a time, from a file of settings: docs/algorithms/mates_cli.md.",
)

File = Annotated[Path, typer.Argument(help="A TOML file of settings.", metavar="SETTINGS")]
Number = Annotated[int, typer.Option("--stage", min=1, help="The number of the stage.")]
Of = Annotated[str, typer.Option(help="The beginning of the key of what to start from, where the stage has several.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")]


@app.command()
def label(settings: File, stage: Number = 1, as_json: AsJson = False) -> None:
    """Labels a sample of the pool by what an update on each document would do to the references.

    What is complete is read, what was cut off goes on. Exits with 2 when it cannot be done, and says why.
    """
    with _refusing("label"):
        from ghostgram.cli import mates_stages as stages

        made = stages.label(_read(settings), stage, progress=not as_json)
    told = made.manifest
    rho = [f"{row['reference']} {row['rho']:.3f}" for row in (told["audit"] or {"comparisons": []})["comparisons"]
           if row["backend"] == told["chosen"] and row["rho"] is not None]  # fmt: skip
    audit = f", audited on {told['audited']}" + (f": rho {', '.join(rho)}" if rho else "") if told["audited"] else ""
    _say(made.folder, told, as_json, f"{told['rows']} labels by {told['chosen']}{audit}")


@app.command()
def fit(settings: File, stage: Number = 1, of: Of = "", as_json: AsJson = False) -> None:
    """Fits an influence model to the labels of a stage.

    What is complete is read. Exits with 2 when it cannot be done, and says why.
    """
    with _refusing("fit"):
        from ghostgram.cli import mates_stages as stages

        made, drift = stages.fit(_read(settings), stage, of, progress=not as_json)
        told = made.require()
    held_out = ", ".join(f"{name} {rho:.3f}" for name, rho in told["spearman"].items() if rho is not None)
    before = "".join(f"; the model before {name} {rho:.3f}" for name, rho in drift.items())
    _say(made.folder, told, as_json, f"held-out Spearman {held_out or '-'}{before}")


@app.command()
def score(settings: File, stage: Number = 1, of: Of = "", as_json: AsJson = False) -> None:
    """Scores every document of the pool by the influence model of a stage.

    Shards that are done are not done again. Exits with 2 when it cannot be done, and says why.
    """
    with _refusing("score"):
        from ghostgram.cli import mates_stages as stages

        made = stages.score(_read(settings), stage, of)
        told = made.require()
    _say(made.folder, told, as_json, f"{told['rows']} documents of {told['units']} shards")


@app.command()
def select(settings: File, stage: Number = 1, of: Of = "", as_json: AsJson = False) -> None:
    """Draws the documents that the next stage of training reads, and enters the plan into the run's ledger.

    A plan that is there is read. Exits with 2 when it cannot be done, and says why.
    """
    with _refusing("select"):
        from ghostgram.cli import mates_stages as stages

        made = stages.select(_read(settings), stage, of)
        told = made.require()
    report = told["report"]
    _say(made.folder, told, as_json, f"{report['documents']} documents, mean z {report['mean_z']:.3f}")


@app.command()
def status(
    run: Annotated[Path, typer.Argument(help="The folder of a run: mates(..., run).", metavar="RUN")],
    out: Annotated[Path | None, typer.Option(help="A folder for the figures.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Shows how far the stages of a run of MATES have come, what their audits say, and what was chosen.

    Exits with 2 when the run cannot be read.
    """
    with _refusing("status", *(["matplotlib"] if out else [])):
        from ghostgram.cli import mates as reading
        from ghostgram.cli.mates_tables import draw, figures

        found = reading.examine(run)
    written = figures(found, out) if out else []
    if as_json:
        typer.echo(json.dumps([reading.as_json(facts) for facts in found], indent=2))
        return
    draw(found, Console())
    if written:
        typer.echo(f"{out}: {', '.join(path.name for path in written)}")


def _read(path: Path) -> Settings:
    from ghostgram.cli.mates_settings import Settings

    return Settings.read(path)


def _say(folder: str | None, manifest: dict[str, Any], as_json: bool, found: str) -> None:
    typer.echo(json.dumps(manifest, indent=2) if as_json else f"{folder}: {found}")


@contextmanager
def _refusing(command: str, *needed: str) -> Iterator[None]:
    """Says in one line what cannot be done and why, and exits with 2."""
    need(f"mates {command}", "pyarrow", *needed)
    from ghostgram.algorithms.mates.scoring.engine import EngineError

    try:
        yield
    except (ValueError, ImportError, OSError, EngineError) as why:
        refuse(str(why), f"mates {command}")
    except RuntimeError as why:
        if type(why).__name__ != "AuditError":  # which torch would have to be imported for
            raise
        refuse(str(why), f"mates {command}")
