"""The page and the figures of a mixture whose weights move."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from .._files import write_atomically
from .canvas import canvas, save, svg
from .page import document, figure, table
from .palette import series
from .velocitune import FIGURES, Course

COLUMNS = {
    "w_before": "w<sub>0</sub>", "w_after": "w", "w_mean": "mean w", "loss": "loss", "target": "target", "V": "V",
    "epochs": "epochs", "requested": "asked for", "realised": "drawn",
}  # fmt: skip
"""Numbers of a domain, and the heads of their columns."""


def write(out: Path, course: Course, found: Mapping[str, Any], suffix: str = "svg") -> list[Path]:
    """Writes every figure as a file of its own, and report.html, which holds them all.

    Args:
        out: The folder to write into.
        course: The log.
        found: Its findings, as `ghostgram velocitune report --json` prints them.
        suffix: Of the figures: svg or png.

    Returns:
        What was written, the page last.
    """
    drawn, written = [], []
    for name, each in FIGURES.items():
        with canvas(*each.size(course)) as drawing:
            each.draw(drawing, course)
            drawn.append(figure(svg(drawing, name), each.says))
            written.append(out / f"{name}.{suffix}")
            save(drawing, written[-1])
    page = out / "report.html"
    settings = [map(escape, line.strip().split(" = ", 1)) for line in found["rule"].splitlines()[1:]]
    body = [*_opening(found), *drawn, *_told(found), "<h2>Settings</h2>", table((), map(list, settings), "settings")]
    write_atomically(page, document("A mixture whose weights move", body))
    return [*written, page]


def _opening(found: Mapping[str, Any]) -> list[str]:
    """What the run was, and where each domain ended."""
    rule = found["rule"].splitlines()[0]
    flops = "" if found["flops"] is None else f", {found['flops']:.3g} FLOPs"
    lead = (
        f"<p class='lead'><strong>{escape(rule)}</strong> changed the weights of"
        f" <strong>{len(found['domains'])}</strong> domains <strong>{found['updates']:,}</strong> times in"
        f" {found['steps']:,} steps on {found['tokens']:,} tokens{flops}. Evaluations took"
        f" {found['eval_seconds']:.1f} s; weights moved by {found['moved']:.3f} in all.</p>"
    )
    rows = []
    for k, (name, one) in enumerate(found["domains"].items()):
        numbers = ("&ndash;" if one[column] is None else f"{one[column]:.3f}" for column in COLUMNS)
        rows.append((f"<span class='dot' style='background:var(--{series(k)})'></span>{escape(name)}", *numbers))
    return ["<h1>A mixture whose weights move</h1>", lead, table(("", *COLUMNS.values()), rows)]


def _told(found: Mapping[str, Any]) -> list[str]:
    """Guards that changed something and alarms, by the number of updates."""
    body = []
    for kind in ("guards", "alarms"):
        told = {name: one[kind] for name, one in found["domains"].items() if one[kind]}
        heads = ("", *dict.fromkeys(what for counts in told.values() for what in counts))
        rows = [(escape(name), *(str(counts.get(what, 0)) for what in heads[1:])) for name, counts in told.items()]
        body.append(f"<h2>{kind.capitalize()}</h2>")
        if told:
            body += ["<p class='note'>By the number of updates.</p>", table([escape(head) for head in heads], rows)]
        else:
            body.append("<p class='note'>None.</p>")
    return body
