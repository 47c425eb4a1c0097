"""The stages after the labels, each done once for what it is made from: `mates` and the command line have them here."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ghostgram.algorithms.mates.files.identity import content_key, digest_of_documents
from ghostgram.algorithms.mates.files.store import Stage
from ghostgram.algorithms.mates.influence import model as influence
from ghostgram.algorithms.mates.influence.model import Encoder, InfluenceModel
from ghostgram.algorithms.mates.labels.table import Labels
from ghostgram.algorithms.mates.selection.ledger import Ledger
from ghostgram.algorithms.mates.selection.plan import Plan
from ghostgram.algorithms.mates.selection.select import select

if TYPE_CHECKING:
    import pyarrow as pa

PLAN = "plan"
"""The unit of a "select" stage."""


def fit_labels(
    run: Path,
    number: int,
    labels: Labels,
    documents: pa.Table,
    encoder: Encoder | Literal["auto"],
    previous: InfluenceModel | None,
    seed: int,
    progress: bool,
) -> tuple[Stage, InfluenceModel]:
    """The "fit" stage: a model saved whole, from labels named by their digest.

    Raises:
        ValueError: `documents` are not those that were labelled.
    """
    ids, texts = documents["doc_id"].to_pylist(), documents["text"].to_pylist()
    if labels.manifest["inputs"]["documents"] != digest_of_documents(ids, texts):
        raise ValueError("documents: expected those that were labelled, in their order, got others")
    chosen = encoder if isinstance(encoder, str) else {"kind": encoder.kind, **encoder.settings()}
    made_from = {"labels": labels.manifest["logical"], "previous": previous.digest if previous else ""}
    made = Stage(run, number, "fit", content_key("fit", {"encoder": chosen, "seed": seed}, made_from))
    home = Path(made.folder, "model")
    if not made.is_complete:
        made.begin(**made_from)
        order = np.argsort(np.array([i.hex() for i in labels.ids]))
        by_id = {i: place for place, i in enumerate(ids)}
        rows = documents.take([by_id[labels.ids[i]] for i in order])
        model = influence.fit(
            rows["text"].to_pylist(), labels.influence[order], rows["doc_id"].to_pylist(), labels.references,
            encoder=encoder, warm_start=previous, seed=seed, progress=progress, folder=Path(made.folder, "unfinished"),
            clusters=rows["cluster_id"].to_pylist() if "cluster_id" in rows.column_names else None,
            reliability=_reliability(labels.manifest.get("audit")),
        )  # fmt: skip
        model.save(home)
        scale = {name: [float(model.mean[r]), float(model.std[r])] for r, name in enumerate(model.references)}
        agreement = {
            head.reference: head.spearman if math.isfinite(head.spearman) else None for head in model.report.heads
        }
        shutil.rmtree(Path(made.folder, "unfinished"), ignore_errors=True)  # what it needed to go on
        made.complete(digest=model.digest, spearman=agreement, scale=scale)
    model = influence.load(home)
    made.require(**made_from, digest=model.digest)
    return made, model


def _reliability(audit: dict[str, Any] | None) -> float | None:
    """What an audit found the labels to be worth, on the reference that they say least about."""
    found = [row["reliability"] for row in audit["worth"]] if audit else []
    return min(found) if found and min(found) > 0 else None


def select_scored(run: Path, number: int, scored: Stage, ledger: Ledger, draw: dict[str, Any]) -> tuple[Stage, Plan]:
    """The "select" stage: one part, the plan, which the ledger hears of."""
    config = {**draw, "reuse": ledger.reuse, "consumed": [ledger.consumed(before) for before in range(number)]}
    made = Stage(run, number, "select", content_key("select", config, {"scores": scored.require()["logical"]}))
    if not made.is_complete:
        made.begin(scores=scored.key)
        plan = select(scored.paths(), **draw, stage=number, ledger=ledger)
        made.commit(PLAN, plan.table)
        made.complete(report=plan.report)
    plan = Plan(made.read(), made.require()["report"])
    ledger.plan(plan, number)
    return made, plan
