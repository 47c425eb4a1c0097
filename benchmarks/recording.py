"""Where a benchmark's numbers are kept: results/<device>.json, one entry per benchmark file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ghostgram import _C
from ghostgram.testing import roofline

RESULTS = Path(__file__).parent / "results"


def device_stem() -> str:
    """The processor's name as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", roofline.processor().lower()).strip("-")


def save(
    entry: str,
    rows: list[dict[str, Any]],
    keep: Callable[[dict[str, Any]], bool] = lambda row: False,
) -> dict[str, Any]:
    """Writes rows under a benchmark's name, after those of its earlier rows that `keep` keeps; returns the entry."""
    path = RESULTS / f"{device_stem()}.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    kept = [row for row in found.get(entry, {}).get("rows", []) if keep(row)]
    found[entry] = {
        "device": roofline.processor(),
        "isa": _C.isa(),
        "threads": _C.num_threads(),
        "versions": {name: version(name) for name in ("ghostgram", "numpy", "torch")},
        "rows": kept + rows,
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n")
    return found[entry]
