"""How a command says that it cannot."""

from typing import NoReturn

import typer


def refuse(why: str, command: str) -> NoReturn:
    """One line to the standard error, and exit status 2."""
    typer.echo(f"ghostgram {command}: {why}", err=True)
    raise typer.Exit(2)
