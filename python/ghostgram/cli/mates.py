"""What the folder of a run of MATES says of its stages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ghostgram.algorithms.mates.files.store import Stage
from ghostgram.algorithms.mates.stats import spearman

KINDS = ("label", "fit", "score", "select")


@dataclass(frozen=True)
class StageFacts:
    """One stage, as far as it has come."""

    number: int
    state: dict[str, str]
    """By kind: "complete", "open" or "absent"."""
    manifests: dict[str, dict[str, Any]]
    predicted: dict[str, NDArray[np.float64]]
    """Of documents with exact labels: what the stage's influence model says, in nats, by reference."""
    measured: dict[str, NDArray[np.float64]]
    """Their exact labels."""
    drift: dict[str, float]
    """Spearman of the previous stage's scores with this stage's exact labels, by reference."""


def examine(run: Path) -> list[StageFacts]:
    """The stages of a run, from 0.

    Raises:
        ValueError: The folder holds no stage, or a file is damaged; the message names it.
    """
    numbers = sorted(int(path.name.removeprefix("stage-")) for path in run.glob("stage-*") if path.is_dir())
    if not numbers:
        raise ValueError(f"{run}: expected a folder with stage-<number>, as `mates` writes it, got none")
    found: list[StageFacts] = []
    before: Any = None
    for number in numbers:
        stages = {kind: newest for kind in KINDS if (newest := _newest(run, number, kind)) is not None}
        state = {kind: "absent" if kind not in stages else _state(stages[kind]) for kind in KINDS}
        manifests = {kind: stage.manifest or {} for kind, stage in stages.items()}
        exact = _exact(stages["label"]) if state["label"] == "complete" else None
        scores = stages["score"].read() if state["score"] == "complete" else None
        predicted, measured = _pairs(exact, scores, manifests.get("fit", {}))
        drift = {}
        if exact is not None and before is not None:
            said, truth = _joined(exact, before)
            drift = {name: spearman(said[name], truth[name]) for name in said if len(said[name]) > 1}
        found.append(StageFacts(number, state, manifests, predicted, measured, drift))
        before = scores if scores is not None else before
    return found


def as_json(facts: StageFacts) -> dict[str, Any]:
    """Everything but the documents."""
    agreement = {name: spearman(facts.predicted[name], facts.measured[name]) for name in facts.predicted}
    return {
        "stage": facts.number, "state": facts.state, "drift": facts.drift, "agreement": agreement,
        **{kind: facts.manifests[kind] for kind in facts.manifests},
    }  # fmt: skip


def _newest(run: Path, number: int, kind: str) -> Stage | None:
    """The work of one kind that was done last: there are several where settings were tried."""
    made = [path for path in (run / f"stage-{number}" / kind).glob("*") if (path / "manifest.json").exists()]
    if not made:
        return None
    return Stage(run, number, kind, max(made, key=lambda path: (path / "manifest.json").stat().st_mtime_ns).name)


def _state(stage: Stage) -> str:
    return "complete" if stage.is_complete else "open"


def _exact(stage: Stage) -> Any:
    """The rows of exact labels."""
    table = stage.read()
    return table.filter(np.array(table["backend"].to_pylist()) == "exact")


def _joined(exact: Any, scores: Any) -> tuple[dict[str, NDArray[np.float64]], dict[str, NDArray[np.float64]]]:
    """z-scores and exact labels of the documents that have both, by reference."""
    names = [name.removeprefix("z_") for name in scores.column_names if name.startswith("z_")]
    shared = [name for name in names if f"influence_{name}" in exact.column_names]
    wanted = dict(zip(exact["doc_id"].to_pylist(), range(len(exact)), strict=True))
    pairs = {wanted[i]: row for row, i in enumerate(scores["doc_id"].to_pylist()) if i in wanted}
    of_exact, of_scores = np.array(list(pairs), np.int64), np.array(list(pairs.values()), np.int64)
    said = {name: scores[f"z_{name}"].to_numpy()[of_scores].astype(np.float64) for name in shared}
    truth = {name: exact[f"influence_{name}"].to_numpy()[of_exact].astype(np.float64) for name in shared}
    return said, truth


def _pairs(exact: Any, scores: Any, fit: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Predicted and measured influence in nats."""
    if exact is None or scores is None or "scale" not in fit:
        return {}, {}
    said, truth = _joined(exact, scores)
    scaled = {name: fit["scale"][name][0] + fit["scale"][name][1] * z for name, z in said.items()}
    return scaled, truth
