"""The recorded rows as a page of Markdown tables, one per model size and task."""

from __future__ import annotations

from typing import Any

ASKED = {
    "norms": "Norms of every sample's gradient",
    "gram": "Gram matrix of the samples' gradients",
    "dots": "Inner products of every sample's gradient with one validation gradient",
}


def page(entry: dict[str, Any]) -> str:
    """All rows of the entry in results/<device>.json."""
    lines = [
        f"# Peers on {entry['device']}, {entry['threads']} threads, torch {entry['versions']['torch']}",
        "",
        'Written by `make bench-peers`; how to read it: `benchmarks/README.md`, "Peers".',
    ]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in entry["rows"]:
        groups.setdefault((row["size"], row["task"]), []).append(row)
    for (size, task), rows in sorted(groups.items(), key=lambda item: (len(item[0][0]), item[0][0], item[0][1])):
        plain = next(row for row in rows if row["method"] == "plain")
        lines += [
            "",
            f"## {ASKED[task]}, {size}",
            "",
            f"Plain forward and backward: {plain['seconds']:.2f} s; rounds: {plain['rounds']}.",
            "",
            "| method | what it does | time / plain | peak memory, MiB | largest relative error | not covered |",
            "|---|---|---|---|---|---|",
        ]
        lines += [_line(row) for row in rows]
    return "\n".join(lines) + "\n"


def _line(row: dict[str, Any]) -> str:
    name = f"{row['method']} {row['version']}" if row["version"] else row["method"]
    if "absent" in row:
        return f"| {name} | absent: {row['absent']} | | | | |"
    memory = "not measured" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
    error = "" if row["error"] is None else f"{row['error']:.1e}"
    missed = f"{row['missed']}; error of the whole {row['error_of_whole']:.1e}" if row["missed"] else ""
    return f"| {name} | {row['does']} | {row['ratio']:.2f} | {memory} | {error} | {missed} |"
