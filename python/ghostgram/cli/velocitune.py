"""`ghostgram velocitune`: targets of shorter runs, toys to choose an interval by, what a log says, replays."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from ghostgram.cli.refusal import need, refuse

commands = typer.Typer(no_args_is_help=True, help="Weights of domains that follow how fast they are learned.")


@commands.command()
def fit(
    runs: Annotated[Path, typer.Argument(help="The record of proxy runs, with the losses before training under 0.")],
    tokens: Annotated[float, typer.Option(help="Tokens of the whole run, which targets are for.")],
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("targets.json"),
    form: Annotated[str, typer.Option(help="auto, chinchilla, anchored, last_checkpoint or none.")] = "auto",
    use: Annotated[Literal["mean", "lower", "upper"], typer.Option(help="What rules are given.")] = "mean",
    allow: Annotated[list[str], typer.Option(help="A refusal to go on in spite of; may be repeated.")] = [],  # noqa: B006
    figure: Annotated[Path | None, typer.Option(help="A figure of points and targets, .svg or .png.")] = None,
) -> None:
    """Estimates every domain's target loss from shorter runs, and writes it with its interval.

    Exits with 2 when the points do not determine a target.
    """
    from ghostgram.algorithms.velocitune.estimate import estimate_targets
    from ghostgram.cli.velocitune_tables import draw_targets, points_of

    with _refusing("fit"):
        start, points = points_of(runs)
        made = estimate_targets(points, start, tokens, form, use=use, allow=allow)  # type: ignore[arg-type]
    made.save(out)
    draw_targets(made, Console())
    if figure is not None:
        from ghostgram.report.velocitune import fits

        fits(figure, list(made.by_domain.items()), tokens)
    typer.echo(str(out))


@commands.command()
def simulate(
    tau: Annotated[str, typer.Option(help="Tokens of its own in which each domain's gap falls to 1/e: 1,3")],
    total: Annotated[float, typer.Option(help="Tokens of the run, in the same units.")],
    interval: Annotated[str, typer.Option(help="Tokens between updates; several to compare: .05,.1,.5")],
    gap: Annotated[str, typer.Option(help="Nats between each domain's first and last loss; one for all.")] = "1",
    prior: Annotated[str, typer.Option(help="w_0 of each domain; one for all.")] = "1",
    preset: Annotated[str, typer.Option(help="Presets of Velocitune.")] = "paper,robust",
    se: Annotated[float, typer.Option(min=0, help="Standard error of every evaluation, nats.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of that noise.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Runs presets on toy domains whose losses fall exponentially, to choose preset and interval before a real run.

    Exits with 2 when a number is out of range.
    """
    from ghostgram.cli.velocitune_tables import draw_toys, toys

    with _refusing("simulate"):
        found = toys(
            _numbers("tau", tau), _numbers("gap", gap), _numbers("prior", prior), total, _numbers("interval", interval),
            preset.split(","), se, seed,
        )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        draw_toys(found, Console())


@commands.command()
def report(
    log: Annotated[Path, typer.Argument(help="The log folder of a run: velocitune(..., log=...).", metavar="LOG")],
    out: Annotated[Path | None, typer.Option(help="A folder for figures and page.")] = None,
    figures: Annotated[Literal["svg", "png"], typer.Option(help="What they are written as.")] = "svg",
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Shows what became of weights, losses and domains, which guards changed something, and what is alarming.

    With --out it writes the figures, and report.html, which holds them and the tables.

    Exits with 2 when the log cannot be read.
    """
    need("velocitune report", "pyarrow", *(["matplotlib"] if out else []))
    from ghostgram.algorithms.velocitune.reading import read
    from ghostgram.cli.velocitune_tables import draw_course, findings

    with _refusing("report"):
        course = read(log)
    found = findings(course)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        draw_course(found, Console())
    if out is not None:
        from ghostgram.report.velocitune_page import write

        typer.echo(f"{out}: {', '.join(path.name for path in write(out, course, found, figures))}", err=as_json)


@commands.command()
def replay(
    mixture: Annotated[Path, typer.Argument(help="What Mixture.save wrote.", metavar="MIXTURE")],
    kind: Annotated[str, typer.Argument(help="exact, shuffled, reversed, final, average or stretched.")],
    out: Annotated[Path, typer.Option(help="The file to write.")],
    seed: Annotated[int, typer.Option(help="Of the order, for shuffled.")] = 0,
    batches: Annotated[int | None, typer.Option(help="How many, for stretched.")] = None,
) -> None:
    """Writes the schedule of a finished run in another order, or of constant weights, to train on in its place.

    Exits with 2 when the run cannot be replayed so.
    """
    from ghostgram._files import write_atomically
    from ghostgram.algorithms.velocitune.export import Mixture
    from ghostgram.algorithms.velocitune.replay import replay as replayed

    with _refusing("replay"):
        made = replayed(Mixture.load(mixture).run, kind, seed=seed, batches=batches)
    write_atomically(
        out, json.dumps({"batches": made.batches, "schedule": made.schedule.state_dict()}, indent=1) + "\n"
    )
    typer.echo(f"{out}: {made.batches} batches")


@contextmanager
def _refusing(command: str) -> Iterator[None]:
    """Says what a command cannot do in one line."""
    try:
        yield
    except (ValueError, OSError) as why:
        refuse(str(why), f"velocitune {command}")


def _numbers(name: str, text: str) -> list[float]:
    try:
        return [float(each) for each in text.split(",")]
    except ValueError:
        raise ValueError(f"--{name}: expected numbers with commas between them, got {text!r}") from None
