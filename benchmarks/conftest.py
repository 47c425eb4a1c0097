"""What every benchmark gets: the roofs measured in the same run, and a place to put its numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from recording import save

from ghostgram.testing import roofline

LINES = pytest.StashKey[list[str]]()


@pytest.fixture
def roofs(request: pytest.FixtureRequest) -> roofline.Roofs:
    """This machine's roofs for the benchmark's `dtype` (float32 if it has none), measured right before it runs."""
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    return roofline.measure(0.2, params.get("dtype", "float32"))


@pytest.fixture(scope="module")
def rows(request: pytest.FixtureRequest) -> Iterator[list[dict[str, Any]]]:
    """What the benchmarks of a file have recorded; when the file is through, it is written to results/<device>.json."""
    rows: list[dict[str, Any]] = []
    yield rows
    save(request.path.stem.removeprefix("bench_"), rows)


@pytest.fixture
def record(note: Callable[..., None], roofs: roofline.Roofs) -> Callable[..., None]:
    """A function that shows a row and keeps it, together with the roofs it was measured under."""
    return partial(note, **{f"{name}_roof": rate / 1e9 for name, rate in dataclasses.asdict(roofs).items()})


@pytest.fixture
def note(request: pytest.FixtureRequest, rows: list[dict[str, Any]]) -> Callable[..., None]:
    """A function that shows a row and keeps it."""

    def add(**row: Any) -> None:
        rows.append(row)
        cells = (f"{name} {value:.4g}" if isinstance(value, float) else str(value) for name, value in row.items())
        request.config.stash.setdefault(LINES, []).append("  ".join(cells))

    return add


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Shows the recorded rows after pytest-benchmark's table."""
    for line in config.stash.get(LINES, []):
        terminalreporter.write_line(line)
