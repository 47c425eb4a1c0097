"""How the stages of a run of MATES are shown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ghostgram.cli.mates import KINDS, StageFacts

_MOST = 4  # domains named in a row


def draw(found: Sequence[StageFacts], console: Console) -> None:
    """One table of how far it is and what was found, one of what was chosen."""
    stages = Table("stage", *KINDS, "labels by", "audit rho", "held-out Spearman", "drift", title="Stages")
    for facts in found:
        label, fit = facts.manifests.get("label", {}), facts.manifests.get("fit", {})
        held_out = ", ".join(f"{name} {rho:.3f}" for name, rho in fit.get("spearman", {}).items() if rho is not None)
        stages.add_row(
            str(facts.number), *(_coloured(facts.state[kind]) for kind in KINDS), label.get("chosen", "-"),
            _audited(facts), held_out or "-", ", ".join(f"{n} {rho:.3f}" for n, rho in facts.drift.items()) or "-",
        )  # fmt: skip
    console.print(stages)
    chosen = Table("stage", "documents", "tokens", "mean z", "best scores among them", "domains", title="Chosen")
    for facts in found:
        if (report := facts.manifests.get("select", {}).get("report")) is None:
            continue
        domains = sorted(report["domains"].items(), key=lambda item: -item[1]["documents"])
        named = ", ".join(f"{name or '(none)'} {each['documents']}" for name, each in domains[:_MOST])
        chosen.add_row(
            str(facts.number), *(str(report[name]) for name in ("documents", "token_count")), f"{report['mean_z']:.3f}",
            f"{report['overlap_with_best']:.0%}", named + (", ..." if len(domains) > _MOST else ""),
        )  # fmt: skip
    console.print(chosen)


def figures(found: Sequence[StageFacts], out: Path) -> list[Path]:
    """Predicted against measured influence of every stage and reference, what was chosen, and drift."""
    from ghostgram.report import mates as plots

    out.mkdir(parents=True, exist_ok=True)
    written = []
    for facts in found:
        for name in facts.predicted:
            written.append(out / f"predicted-{facts.number}-{name}.png")
            plots.predicted(written[-1], facts.predicted[name], facts.measured[name], f"Stage {facts.number}: {name}")
    stages = [
        {"stage": facts.number, "domains": {n or "(none)": d["documents"] for n, d in report["domains"].items()}}
        for facts in found
        if (report := facts.manifests.get("select", {}).get("report"))
    ]
    if stages:
        written.append(out / "domains.png")
        plots.domains(written[-1], stages)
    if drifts := [(facts.number, facts.drift) for facts in found if facts.drift]:
        written.append(out / "drift.png")
        plots.drift(written[-1], drifts)
    return written


def _audited(facts: StageFacts) -> str:
    """The rank correlation by which the backend was chosen, by reference."""
    label = facts.manifests.get("label", {})
    rows = (label.get("audit") or {}).get("comparisons", [])
    mine = [f"{row['reference']} {row['rho']:.3f}" for row in rows if row["backend"] == label.get("chosen")]
    return ", ".join(mine) or "-"


def _coloured(state: str) -> str:
    return {"complete": "[green]complete[/]", "open": "[yellow]open[/]"}.get(state, f"[dim]{state}[/]")
