"""What every benchmark gets: the roofs measured in the same run, and a place to put its numbers."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from ghostgram import _C
from ghostgram.testing import roofline

RESULTS = Path(__file__).parent / "results"
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
    device = roofline.processor()
    path = RESULTS / (re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json")
    found = json.loads(path.read_text()) if path.exists() else {}
    found[request.path.stem.removeprefix("bench_")] = {
        "device": device,
        "isa": _C.isa(),
        "threads": _C.num_threads(),
        "versions": {name: version(name) for name in ("ghostgram", "numpy", "torch")},
        "roofs": dataclasses.asdict(roofs),
        "rows": rows,
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Shows the recorded rows after pytest-benchmark's table."""
    for line in config.stash.get(LINES, []):
        terminalreporter.write_line(line)
