"""How a command says that it cannot do what it was asked."""

from __future__ import annotations

from typing import NoReturn

import typer


def refuse(why: str, command: str) -> NoReturn:
    """One line on the error stream, and exit code 2."""
    typer.echo(f"ghostgram {command}: {why}", err=True)
    raise typer.Exit(2)
