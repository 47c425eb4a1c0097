"""What every benchmark gets: the roofs measured in the same run, and a place to put its numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from recording import save

from ghostgram.testing import roofline

LINES = pytest.StashKey[list[str]]()


@pytest.fixture(scope="session")
def roofs() -> roofline.Roofs:
    """This machine's float32 roofs."""
    return roofline.measure()


@pytest.fixture(scope="module")
def record(request: pytest.FixtureRequest, roofs: roofline.Roofs) -> Iterator[Callable[..., None]]:
    """A function that shows a row; when the file is through, all rows are written to results/<device>.json."""
    rows: list[dict[str, Any]] = []
    lines = request.config.stash.setdefault(LINES, [])

    def add(**row: Any) -> None:
        rows.append(row)
        cells = (f"{name} {value:.4g}" if isinstance(value, float) else str(value) for name, value in row.items())
        lines.append("  ".join(cells))

    yield add
    save(request.path.stem.removeprefix("bench_"), rows, roofs)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Shows the recorded rows after pytest-benchmark's table."""
    for line in config.stash.get(LINES, []):
        terminalreporter.write_line(line)
