"""How a command says that it cannot."""

from importlib.util import find_spec
from typing import NoReturn

import typer


def refuse(why: str, command: str) -> NoReturn:
    """One line to the standard error, and exit status 2."""
    typer.echo(f"ghostgram {command}: {why}", err=True)
    raise typer.Exit(2)


def need(command: str, *packages: str, extras: str = "report") -> None:
    """Refuses unless the packages are there, and says which of ghostgram's extras bring them."""
    if missing := [name for name in packages if find_spec(name) is None]:
        refuse(f"needs {' and '.join(missing)}: pip install ghostgram[{extras}]", command)
