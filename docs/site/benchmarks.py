"""The page of benchmarks: every table is written from benchmarks/results/*.json, when the site is built."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results"
ELSEWHERE = {"peers"}  # written as pages of their own by the benchmark itself
ROOFS = {"flops_roof": "GFLOP/s", "read_roof": "GB/s read", "copy_roof": "GB/s copied", "triad_roof": "GB/s triad"}
NAMES = {"gflops": "GFLOP/s", "gbytes": "GB/s", "percent_of_roof": "% of roof", "percent_of_read": "% of read"}

INTRODUCTION = """# Benchmarks

Written from the rows that the benchmarks recorded in `benchmarks/results/`, whenever this site is built. What they
time, against what, and how to run them: `benchmarks/README.md`. Peers have pages of their own: {pages}.

Compare numbers of one table only. GFLOP/s and GB/s count what the op needs at least, whatever the kernel did. The roof
is the least time that multiply-adds and memory allow at the rates measured on that machine in the same run, of which
tables name the medians; what fits into the cache may pass the memory's. `ms` is ours, other times say whose they are;
ratios are ours over theirs unless a name says otherwise. Shapes are B x T x d x p, samples of tokens through a layer of
d inputs and p outputs, or name their sizes.
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the page."""
    files.append(File.generated(config, "benchmarks.md", content=page(RESULTS)))
    return files


def page(results: Path) -> str:
    """The whole page, as Markdown."""
    found = [(path, json.loads(path.read_text(encoding="utf-8"))) for path in sorted(results.rglob("*.json"))]
    entries = [
        (name, entry, path)
        for path, entries in found
        for name, entry in entries.items()
        if isinstance(entry, dict) and "rows" in entry and name not in ELSEWHERE
    ]
    ops = [each for each in entries if any("gflops" in row for row in each[1]["rows"])]
    others = [each for each in entries if each not in ops]
    names = [path.name for path in sorted(results.glob("*.md"))]
    pages = ", ".join(f"[{name}](repository/benchmarks/results/{name})" for name in names)
    return "\n".join(
        [
            INTRODUCTION.format(pages=pages),
            *("## Ops\n", *_sections(ops)),
            *("## Taps, training steps and methods\n", *_sections(others)),
        ]
    )


def _sections(entries: Iterable[tuple[str, dict[str, Any], Path]]) -> Iterable[str]:
    last = None
    for name, entry, path in sorted(entries, key=lambda each: (each[0], str(each[2]))):
        if name != last:
            yield f"### {name}\n"
        last = name
        yield section(entry, str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name)


def section(entry: dict[str, Any], source: str) -> str:
    """One entry of a file of results: the machine, its roofs, and a table for each kind of row."""
    about = {name: value for name, value in entry.items() if name not in ("device", "versions", "rows", "roofs")}
    machine = ", ".join([entry["device"], *(f"{name} {value}" for name, value in about.items())])
    versions = ", ".join(f"{name} {value}" for name, value in entry["versions"].items())
    kinds: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in entry["rows"]:
        kinds.setdefault(tuple(name for name in row if name not in ROOFS), []).append(row)
    lines = [f"**{machine}** ({versions}; `{source}`)", *map(_table, kinds.values())]
    if roofs := _roofs(entry):
        lines.insert(1, f"Measured roofs: {roofs}.")
    return "\n\n".join(lines) + "\n"


def _roofs(entry: dict[str, Any]) -> str:
    """The medians of the roofs that the rows were measured under, by dtype where rows have one."""
    if "roofs" in entry:  # of the whole run
        return ", ".join(f"{entry['roofs'][name] / 1e9:.0f} {ROOFS[f'{name}_roof']}" for name in entry["roofs"])
    by_dtype: dict[str, list[dict[str, Any]]] = {}
    for row in entry["rows"]:
        if "flops_roof" in row:
            by_dtype.setdefault(row.get("dtype", ""), []).append(row)
    return "; ".join(
        f"{dtype}: " * bool(dtype)
        + ", ".join(f"{statistics.median(row[name] for row in rows):.0f} {unit}" for name, unit in ROOFS.items())
        for dtype, rows in by_dtype.items()
    )


def _table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of rows with the same cells; what all of them share stands above it."""
    names = [name for name in rows[0] if name not in ROOFS]
    shared = [name for name in names if len(rows) > 1 and all(row[name] == rows[0][name] for row in rows)]
    columns = [name for name in names if name not in shared]
    above = [f"All: {', '.join(f'{_title(name)} {_cell(rows[0][name])}' for name in shared)}."] if shared else []
    numbers = {name for name in columns if all(isinstance(row[name], int | float | None) for row in rows)}
    table = [
        [_title(name) for name in columns],
        ["--:" if name in numbers else "---" for name in columns],
        *([_cell(row[name]) for name in columns] for row in rows),
    ]
    return "\n\n".join([*above, "\n".join(f"| {' | '.join(cells)} |" for cells in table)])


def _title(name: str) -> str:
    return NAMES.get(name, name.replace("_", " "))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    return str(value).replace("|", "\\|")
