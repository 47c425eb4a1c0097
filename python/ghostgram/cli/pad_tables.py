"""How a run of PAD is shown."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ghostgram.report.pad import PadRun


def as_plain(found: PadRun) -> dict[str, Any]:
    """Facts and results."""
    curve = found.curve
    return {
        **found.facts, "accuracies": found.accuracies, "iterations": len(curve["iteration"]),
        "matches": int(curve["matches"].sum()), "kept": int(curve["kept"].sum()), "beta": float(curve["beta"][-1]),
    }  # fmt: skip


def draw(found: PadRun, console: Console) -> None:
    """What nets learn, then how the distillation went."""
    if found.accuracies:
        learned = Table("trained on", "% right", "std", "nets", title="Test images", title_justify="left")
        for name, each in found.accuracies.items():
            spread = f"{100 * statistics.stdev(each):.2f}" if len(each) > 1 else ""
            learned.add_row(escape(name), f"{100 * statistics.fmean(each):.2f}", spread, str(len(each)))
        console.print(learned)
    curve = found.curve
    ends = [slice(None, 50), slice(-50, None)]
    loss = [float(np.nanmean(curve["loss"][end])) for end in ends]
    facts = Table.grid(padding=(0, 2))
    facts.add_row("iterations", str(len(curve["iteration"])))
    facts.add_row("loss", f"{loss[0]:.3f} in the first 50, {loss[1]:.3f} in the last")
    facts.add_row(
        "left out", f"{int((curve['matches'] - curve['kept']).sum())} of {int(curve['matches'].sum())} matches"
    )
    facts.add_row("beta", f"{curve['beta'][0]:.5f} to {curve['beta'][-1]:.5f}")
    facts.add_row("seconds", ", ".join(f"{name} {took:,.1f}" for name, took in found.facts["seconds"].items()))
    console.print(facts)
    for part, notes in found.facts["notes"].items():
        for note in notes:
            console.print(f"[yellow]{escape(part)}:[/] {escape(note)}")
