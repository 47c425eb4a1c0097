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


def device_stem(device: str | None = None) -> str:
    """The name of a device as a file name; of the processor with its instruction set, for "AMD EPYC" names many."""
    named = device or f"{roofline.processor()} {_C.isa()}"
    return re.sub(r"[^a-z0-9]+", "-", named.lower()).strip("-")


def save(
    entry: str,
    rows: list[dict[str, Any]],
    keep: Callable[[dict[str, Any]], bool] = lambda row: False,
    *,
    device: str | None = None,
    folder: Path = RESULTS,
) -> dict[str, Any]:
    """Writes rows under a benchmark's name, after those of its earlier rows that `keep` keeps; returns the entry.

    The device is the processor unless it is named.
    """
    path = folder / f"{device_stem(device)}.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    kept = [row for row in found.get(entry, {}).get("rows", []) if keep(row)]
    ours = {"isa": _C.isa(), "threads": _C.num_threads()} if device is None else {}
    found[entry] = {
        "device": device or roofline.processor(),
        **ours,
        "versions": {name: version(name) for name in ("ghostgram", "numpy", "torch")},
        "rows": kept + rows,
    }
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".new")
    unfinished.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n")
    unfinished.rename(path)  # whole or not at all
    return found[entry]
