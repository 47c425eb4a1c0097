"""The page of a run of In-Run Data Shapley, in one file that needs nothing else."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from .._files import write_atomically
from . import plots
from .canvas import MILLI
from .page import document, figure, table
from .palette import series
from .summary import CORRUPTED, Summary, summarise

_SHOWN = 8  # documents at each end of the ranking


def write_report(
    path: str | Path,
    *,
    title: str,
    values: pa.Table,
    steps: pa.Table,
    ledger: pa.Table,
    documents: Mapping[str, Any],
    corrupted: ArrayLike,
    timings: Mapping[str, Sequence[float]],
    settings: Mapping[str, object],
) -> Summary:
    """Writes one self-contained HTML page about a run: figures inline, no script, nothing fetched.

    Every number follows `value = -phi`: positive means that the document lowered the validation loss.

    Args:
        path: The file to write; it appears whole or not at all.
        title: The page's heading.
        values: One row per document and validation set: id, set, value, steps.
        steps: The step log: step, sample_id, and raw phi_<set> for every set.
        ledger: One row per step and set, with measured and predicted changes of the validation loss.
        documents: Arrays of one length under "id", "domain" and "text" (bytes).
        corrupted: (n,) whether each document was spoiled on purpose.
        timings: Seconds of every timed "plain" and "instrumented" step.
        settings: What the run was, shown as given.

    Returns:
        The numbers on the page.
    """
    summary = summarise(
        values=values, steps=steps, ledger=ledger, documents=documents, corrupted=corrupted, timings=timings
    )
    spoiled = np.asarray(corrupted, np.bool_)
    last_step = max(len(total) for groups in summary.growth.values() for total in groups.values())
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p class='lead'><strong>{len(spoiled):,}</strong> training documents, valued while one run of"
        f" <strong>{last_step:,}</strong> steps trained the model. The value of a document is"
        " <strong>value = &minus;&phi;</strong>, where &phi; is its Shapley share of the change of validation loss, in"
        " nats: <strong>positive means the document lowered the validation loss</strong>.</p>",
        _headlines(summary, spoiled),
        *_growth_section(summary, documents, spoiled),
        *_detection_section(summary, spoiled),
        *_ledger_section(summary),
        *_documents_section(summary, documents, spoiled),
        "<h2>Settings</h2>",
        table((), [(escape(str(name)), escape(str(setting))) for name, setting in settings.items()], kind="settings"),
    ]
    write_atomically(Path(path), document(title, body))
    return summary


def _headlines(summary: Summary, spoiled: NDArray[np.bool_]) -> str:
    median = {kind: 1e3 * float(np.median(seconds)) for kind, seconds in summary.step_seconds.items()}
    cards = (
        (
            "Corrupted found, AUROC",
            f"{summary.detection.auroc:.3f}",
            f"{spoiled.sum():,} corrupted among {len(spoiled):,}, ranked by lowest value;"
            f" {summary.detection_by_stage[-1]:.3f} in the last quarter of the run",
        ),
        (
            "Ledger: predicted / measured",
            f"{summary.predicted / summary.measured:.2f}",
            f"{_signed(summary.predicted)} predicted, {_signed(summary.measured)} nats measured, all sets together",
        ),
        (
            "Step time / plain step time",
            f"{summary.step_time_ratio:.2f}&times;",
            f"medians: {median['instrumented']:.0f} ms with values and validation, {median['plain']:.0f} ms without",
        ),
        (
            "Documents that helped",
            f"{(summary.mean_value > 0).mean():.0%}",
            f"have a positive value; of the corrupted ones {(summary.mean_value[spoiled] > 0).mean():.0%}",
        ),
    )
    return (
        "<dl class='cards'>"
        + "".join(
            f"<div class='card'><dt>{name}</dt><dd class='big'>{number}</dd><dd class='small'>{note}</dd></div>"
            for name, number, note in cards
        )
        + "</dl>"
    )


def _growth_section(summary: Summary, documents: Mapping[str, Any], spoiled: NDArray[np.bool_]) -> Iterable[str]:
    yield "<h2>Which domain taught the model</h2>"
    yield (
        "<p class='note'>Mean value per document, accumulated over the run; one panel per validation set."
        " Corrupted documents, of all domains, are a group of their own.</p>"
    )
    totals = "; ".join(
        f"judged by {name}: " + ", ".join(f"{group} {MILLI * t[-1]:+.2f}" for group, t in groups.items())
        for name, groups in summary.growth.items()
    )
    yield figure(plots.growth(summary), f"Value per document over the run, in millinats at its end: {totals}.")
    domain = np.asarray(documents["domain"], dtype=object)
    rows = []
    for index, group in enumerate(next(iter(summary.growth.values()))):
        colour = "bad" if group == CORRUPTED else series(index)
        mine = spoiled if group == CORRUPTED else (domain == group) & ~spoiled
        means = [_signed(MILLI * float(summary.value[name][mine].mean()), 2) for name in summary.sets]
        helped = f"{(summary.mean_value[mine] > 0).mean():.0%}"
        label = f"<span class='dot' style='background:var(--{colour})'></span>{escape(group)}"
        rows.append((label, f"{mine.sum():,}", *means, helped))
    heads = ("", "documents", *(f"mean value, {escape(name)} (millinats)" for name in summary.sets), "helped")
    yield table(heads, rows)


def _detection_section(summary: Summary, spoiled: NDArray[np.bool_]) -> Iterable[str]:
    yield "<h2>Corrupted documents stand out</h2>"
    stages = ", ".join(f"{auroc:.3f}" for auroc in summary.detection_by_stage)
    yield (
        "<p class='note'>Documents ranked by value, lowest first, against the ones that were spoiled on purpose. By"
        f" the values earned in each quarter of the run alone, the AUROC is {stages}.</p>"
    )
    roc_alt = f"ROC curve of corrupted documents found by low value, AUROC {summary.detection.auroc:.3f}."
    clean, bad = (MILLI * float(np.median(summary.mean_value[mine])) for mine in (~spoiled, spoiled))
    histogram_alt = f"Distributions of value: median {clean:+.2f} millinats for clean, {bad:+.2f} for corrupted ones."
    yield "<div class='pair'>"
    yield figure(plots.detection(summary), roc_alt)
    yield figure(plots.histogram(summary, spoiled), histogram_alt)
    yield "</div>"


def _ledger_section(summary: Summary) -> Iterable[str]:
    yield "<h2>The ledger: do the values add up?</h2>"
    yield (
        "<p class='note'>At each step the values, the optimizer's own momentum and decay (history) and the parameters"
        " left out (uncovered) predict how the validation loss will change; the next step measures it. The residual is"
        " the error bar of the values above; in a run of order 1 it holds the curvature that the prediction leaves out,"
        " and grows with the learning rate.</p>"
    )
    totals = "; ".join(
        f"{name}: predicted {_signed(entries.predicted.sum())}, measured {_signed(entries.measured.sum())} nats"
        for name, entries in summary.ledger.items()
    )
    yield figure(plots.ledger(summary), f"Accumulated change of validation loss. {totals}.")
    rows = [
        (
            escape(name),
            *(
                _signed(float(column.sum()))
                for column in (
                    entries.measured,
                    entries.predicted,
                    entries.sum_phi,
                    entries.history,
                    entries.uncovered,
                    entries.measured - entries.predicted,
                )
            ),
            f"{entries.relative_error:.1%}",
        )
        for name, entries in summary.ledger.items()
    ]
    heads = ("nats", "measured", "predicted", "= Σ φ", "+ history", "+ uncovered", "residual", "RMS residual per step")
    yield table(heads, rows)


def _documents_section(summary: Summary, documents: Mapping[str, Any], spoiled: NDArray[np.bool_]) -> Iterable[str]:
    yield "<h2>Best and worst documents</h2>"
    yield "<p class='note'>By mean value over the validation sets; text as the model read it.</p>"
    order = np.argsort(summary.mean_value, kind="stable")
    yield "<div class='pair'>"
    for heading, chosen in (("Most helpful", order[: -_SHOWN - 1 : -1]), ("Most harmful", order[:_SHOWN])):
        yield f"<section><h3>{heading}</h3><ol class='documents'>"
        for i in chosen:
            value = MILLI * float(summary.mean_value[i])
            source = f"<span>{escape(str(documents['domain'][i]))} · {int(documents['id'][i])}</span>"
            flag = "<span class='flag'>corrupted</span>" if spoiled[i] else ""
            amount = f"<span class='value {'good' if value > 0 else 'bad'}'>{_signed(value, 2)} mnat</span>"
            text = escape(_readable(documents["text"][i]))
            yield f"<li class='card'><header>{source}{flag}{amount}</header><pre>{text}</pre></li>"
        yield "</ol></section>"
    yield "</div>"


def _readable(text: bytes) -> str:
    """Text for a page: bytes that are no UTF-8 and control characters become visible marks."""
    decoded = bytes(text).decode("utf-8", "replace")
    return "".join(c if c.isprintable() or c in "\n\t" else "·" for c in decoded).strip("\n")


def _signed(number: float, digits: int = 3) -> str:
    return f"{number:+.{digits}f}".replace("-", "&minus;")
