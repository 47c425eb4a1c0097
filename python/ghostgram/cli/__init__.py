"""The `ghostgram` command."""

from __future__ import annotations

import sys
from importlib.util import find_spec


def main() -> None:
    """Runs the command line; exits with 2 and one line when the packages it is drawn with are missing."""
    if missing := [name for name in ("typer", "rich") if find_spec(name) is None]:
        print(f"ghostgram: needs {' and '.join(missing)}: pip install ghostgram[report]", file=sys.stderr)
        raise SystemExit(2)
    from ghostgram.cli.app import app

    app()
