"""What a run of PAD made and how: images, curves and results, from the files of its folder, on one page."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._files import whole_file, write_atomically
from .canvas import canvas, save, svg
from .pad_figures import curves, grid
from .page import document, figure, table

SETS = {"distilled": "Distilled", "initial": "Where it began", "last": "After the last iteration"}


@dataclass(frozen=True)
class PadRun:
    """What the folder of a run says."""

    facts: dict[str, Any]
    """Of run.json: settings, what the run was made from, environment, notes, experts, seconds."""
    sets: dict[str, dict[str, NDArray[Any]]]
    """The distilled set, the initial one and the last one, as far as they are there: pixels and labels."""
    classes: list[str]
    curve: dict[str, NDArray[Any]]
    """By iteration; nan where there is nothing."""
    accuracies: dict[str, list[float]]
    """Of each net, by what it was trained on: counted anew from the predictions on the test images."""


def read(run: Path) -> PadRun:
    """Reads the folder of a run.

    Raises:
        ValueError: It is not one; the message names what is missing.
    """
    if missing := [name for name in ("run.json", "log.jsonl", "distilled.npz") if not (run / name).exists()]:
        raise ValueError(f"{run}: expected the folder of a finished run of PAD, without {', '.join(missing)}")
    facts = json.loads((run / "run.json").read_text("utf-8"))
    sets = {name: _arrays(run / f"{name}.npz") for name in SETS if (run / f"{name}.npz").exists()}
    classes = json.loads(str(sets["distilled"]["facts"]))["classes"]
    lines = (run / "log.jsonl").read_text("utf-8").split("\n")[:-1]  # what a torn line says is not there
    found = _arrays(run / "evaluation.npz") if (run / "evaluation.npz").exists() else {}
    truth, _ = found.pop("labels", np.zeros(0)), found.pop("of", None)
    accuracies = {name: [float((row == truth).mean()) for row in said] for name, said in found.items()}
    return PadRun(facts, sets, classes, curve([json.loads(line) for line in lines]), accuracies)


def curve(rows: list[dict[str, Any]]) -> dict[str, NDArray[Any]]:
    """The rows of a log as columns, one entry for each iteration."""
    steps = [row for row in rows if row["kind"] == "step"]
    losses = [[loss for loss in row["losses"] if loss is not None] for row in steps]
    columns: dict[str, list[Any]] = {
        "iteration": [row["iteration"] for row in steps],
        "loss": [float(np.mean(each)) if each else np.nan for each in losses],
        "kept": [row["kept"] for row in steps],
        "matches": [len(row["losses"]) for row in steps],
        "start": [row["starts"][0] for row in steps],
        **{name: [row[name] for row in steps] for name in ("bound", "beta", "entropy", "displacement", "seconds")},
        **{f"norm_{n}": [row["norms"].get(n, np.nan) for row in steps] for n in ("images", "label_logits", "beta")},
    }
    validated = {row["iteration"] - 1: row["accuracies"] for row in rows if row["kind"] == "validation"}
    judged = [validated.get(i, [np.nan]) for i in columns["iteration"]]
    columns["validation"] = [float(np.mean(each)) for each in judged]
    columns["validation_std"] = [float(np.std(each, ddof=1)) if len(each) > 1 else np.nan for each in judged]
    return {name: np.array(values) for name, values in columns.items()}


def write(run: Path, out: Path | None = None) -> list[Path]:
    """Writes grids, curves (as a table and as a figure) and the page of a run.

    Args:
        run: The folder of a finished run.
        out: Where to; the folder itself by default.

    Returns:
        What was written: grid.png, initial.png, difference.png, curves.parquet (curves.csv where pyarrow is not
        installed), curves.png, and report.html.

    Raises:
        ValueError: It is no such folder.
    """
    found, out = read(run), out or run
    out.mkdir(parents=True, exist_ok=True)
    distilled, initial = (found.sets[name]["pixels"] for name in ("distilled", "initial"))
    grid(out / "grid.png", distilled, found.classes, "Distilled")
    grid(out / "initial.png", initial, found.classes, "Where they began")
    grid(out / "difference.png", distilled - initial, found.classes, "Difference", signed=True)
    columns = _write_curve(out, found.curve)
    with canvas(10.5, 8.4) as drawing:
        curves(drawing, found.curve, found.facts["experts"])
        drawn = svg(drawing, "curves")
        save(drawing, out / "curves.png")
    write_atomically(out / "report.html", _page(found, out, drawn))
    return [out / name for name in ("grid.png", "initial.png", "difference.png", columns, "curves.png", "report.html")]


def _write_curve(out: Path, columns: Mapping[str, NDArray[Any]]) -> str:
    """The name of the file that the curve is in."""
    if find_spec("pyarrow") is None:
        lines = [",".join(columns), *(",".join(map(str, row)) for row in zip(*columns.values(), strict=True))]
        write_atomically(out / "curves.csv", "\n".join(lines) + "\n")
        return "curves.csv"
    import pyarrow as pa
    import pyarrow.parquet as pq

    with whole_file(out / "curves.parquet") as temporary:
        pq.write_table(pa.table(dict(columns)), temporary)
    return "curves.parquet"


def _page(found: PadRun, out: Path, drawn: str) -> str:
    settings, made = found.facts["settings"], found.curve
    n, classes = len(found.sets["distilled"]["pixels"]), len(found.classes)
    lead = (
        f"<p class='lead'><strong>{n:,}</strong> synthetic images of <strong>{classes}</strong> classes,"
        f" {settings['ipc']} each, learned by matching trajectories of <strong>{settings['experts']}</strong> experts"
        f" over <strong>{len(made['iteration']):,}</strong> iterations.</p>"
    )
    body = ["<h1>Distilled by PAD</h1>", lead, *_results(found), *_notes(found), "<h2>The images</h2>", _contrast()]
    for name, title in (("grid", "Distilled"), ("initial", "Where they began"), ("difference", "Difference")):
        body.append(figure(_inline(out / f"{name}.png"), f"{title}: {n} images, a row for each class."))
    body.append("<h2>How it went</h2>")
    kept, tried = int(made["kept"].sum()), int(made["matches"].sum())
    body.append(figure(drawn, f"Curves over {len(made['iteration'])} iterations; {kept} of {tried} matches kept."))
    seconds = {**found.facts["seconds"], "iterations, all together": float(made["seconds"].sum())}
    body += ["<h2>Time</h2>", table(("", "seconds"), [(part, f"{s:,.1f}") for part, s in seconds.items()])]
    for heading in ("settings", "made_from", "environment"):
        rows = [(escape(str(k)), escape(str(v))) for k, v in found.facts[heading].items()]
        body += [f"<h2>{heading.replace('_', ' ').capitalize()}</h2>", table((), rows, kind="settings")]
    return document("Distilled by PAD", body)


def _results(found: PadRun) -> list[str]:
    """Accuracy on the test images, beside the controls."""
    if not found.accuracies:
        return ["<p class='note'>No test images were given, so nothing is said of what nets learn from these.</p>"]
    rows = []
    for name, each in found.accuracies.items():
        spread = f"{100 * np.std(each, ddof=1):.2f}" if len(each) > 1 else "&ndash;"
        values = " ".join(f"{100 * a:.2f}" for a in each)
        rows.append((escape(name), f"{100 * np.mean(each):.2f}", spread, str(len(each)), values))
    if found.facts["settings"]["protocol"] == "release":
        chosen = "The best iterate was <strong>selected on test</strong>, as the published code does: that is too good."
    else:
        chosen = "Iterates were compared by held-out training images; test images were looked at once, at the end."
    return [
        "<h2>What nets learn from them</h2>",
        f"<p class='note'>Accuracy on test images, in %, counted from stored predictions. {chosen}</p>",
        table(("trained on", "mean", "deviation over nets", "nets", "each"), rows),
    ]


def _notes(found: PadRun) -> list[str]:
    notes = [note for part in found.facts["notes"].values() for note in part]
    return ["<h2>Notes</h2>", *(f"<p>{escape(note)}</p>" for note in notes)] if notes else []


def _contrast() -> str:
    return (
        "<p class='note'>As training images are before whitening; each grid under one contrast, its mean &plusmn; 2.5"
        " standard deviations, the difference around 0 (red: brighter than at first).</p>"
    )


def _inline(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f"<img alt='' style='max-width:100%' src='data:image/png;base64,{data}'>"


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}
