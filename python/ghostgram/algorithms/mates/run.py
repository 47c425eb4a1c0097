"""One stage of MATES, whole: label a sample of the pool, learn the labels, score the pool, select the next data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from ghostgram.algorithms.mates.files.pool import Pool
from ghostgram.algorithms.mates.influence import model as influence
from ghostgram.algorithms.mates.influence.model import Encoder, InfluenceModel
from ghostgram.algorithms.mates.labels.table import Labels
from ghostgram.algorithms.mates.scoring.score import score
from ghostgram.algorithms.mates.selection import streams
from ghostgram.algorithms.mates.selection.ledger import Ledger
from ghostgram.algorithms.mates.selection.plan import Plan
from ghostgram.algorithms.mates.stages import fit_labels, select_scored
from ghostgram.algorithms.mates.stats import spearman

if TYPE_CHECKING:
    import pyarrow as pa
    import torch
    from torch import nn

    from ghostgram.algorithms.mates.labels.reference import Reference
    from ghostgram.algorithms.mates.labels.task import Task
    from ghostgram.algorithms.mates.selection.quotas import Quotas


@dataclass(frozen=True)
class Selection:
    """What a stage has chosen, and by what."""

    number: int
    """The number of the stage, from 1."""
    plan: Plan
    """Which documents are next; `plan.table` has them in training order."""
    scorer: InfluenceModel
    """The influence model that scored the pool."""
    labels: Labels
    """The labels of the stage's sample of the pool."""
    drift: dict[str, float]
    """Spearman of the previous stage's influence model with this stage's exact labels, by reference; empty at first."""
    folders: dict[str, str]
    """Where the files of "label", "fit" (unless the last model was kept), "score" and "select" lie."""


def mates(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    pool: Pool,
    references: Reference | Sequence[Reference],
    task: Task,
    run: str | Path,
    *,
    stage: int = 1,
    tokens: int | None = None,
    docs: int | None = None,
    ratio: float | None = None,
    labels: int = 20_000,
    backend: str = "auto",
    clip: float | None = None,
    lrs: Sequence[float] | None = None,
    audit: int = 256,
    accept_rho: float | None = None,
    encoder: Encoder | Literal["auto"] = "auto",
    previous: InfluenceModel | None = None,
    keep_above: float = 0.9,
    engine: str = "local",
    workers: int | None = None,
    gpus: int = 0,
    temperature: float = 1.0,
    quotas: Quotas | None = None,
    one_per: str | None = None,
    reuse: int = 1,
    seed: int = 0,
    progress: bool = True,
) -> Selection:
    """Chooses the data that the model being trained should see next: label, fit, score, select (MATES).

        label   y_r(x) = L_r(theta) - L_r(theta_x)      theta_x: the optimizer's next step on document x alone
        fit     f      = argmin mean ((y - mean) / std - f(x))^2
        score   s(x)   = f(x)                           of every document of the pool
        select  the largest (s - mu) / (sigma temperature) + Gumbel noise, within the budget

    Higher is better everywhere; labels are in nats per reference token. Training is left as it was found, to the bit.
    Every part is committed to `run` as it is done and named by what it was made from: called again with the same model,
    pool and settings, after a kill at any moment, this goes on where it was, and what is complete is read, not redone.

    Args:
        model: The model as it is trained, wrapper included. Of several processes all call this alike: they share the
            labels, and the first one fits, scores and selects while the others wait.
        optimizer: Its optimizer, with the state of its last step.
        pool: The documents to choose from.
        references: What the model shall get better at.
        task: What a document is to the model.
        run: The folder of the run, on a file system that all processes see.
        stage: Its number, from 1; each has labels, noise and a plan of its own.
        tokens: The budget of the plan, or
        docs: as many documents, or
        ratio: this share of those not used up.
        labels: Documents to label, drawn from the pool by a hash of their ids and the stage.
        backend: How, see `label`.
        clip: The largest norm of a gradient in training, None where it is not clipped.
        lrs: The learning rate of the next update by parameter group; None for what the groups hold.
        audit: Documents to begin the audit with, see `label`.
        accept_rho: A lower bar for the audit, see `label`.
        encoder: The influence model's, see `influence.fit`.
        previous: The influence model of the stage before, to start from.
        keep_above: If `previous` ranks the new exact labels better than this Spearman, for every reference, it is kept
            and nothing is fitted; its scores of this pool are read, if they are there.
        engine: "local" or "ray", see `score`.
        workers: Processes that score, see `score`.
        gpus: GPUs that they share.
        temperature: Of the draw, see `select`.
        quotas: Shares of the budget by domain, see `select`.
        one_per: A column of near-duplicate clusters, see `select`.
        reuse: In how many stages a document may be trained on.
        seed: Of everything that is drawn.
        progress: Whether bars show how far it is.

    Returns:
        The selection. Its plan is entered into the ledger, `<run>/ledger`, as planned; `Ledger.consume` says how far
        training has come, and later stages pass over that.

    Raises:
        ValueError: An argument is not as described.
        AuditError: No backend agrees with the exact labels; the message holds the table.
        StoreError: Files of the run are damaged or were made from something else.
        EngineError: A document could not be scored; the message names it.

    Cost:
        By part, in docs/algorithms/mates.md; `flops.Flops` adds them up.

    Source:
        arXiv 2406.06046.
    """
    from ghostgram.algorithms.mates.labels.label import label
    from ghostgram.algorithms.mates.labels.reference import Reference
    from ghostgram.training.ranks import led

    run = Path(run)
    wanted = [references] if isinstance(references, Reference) else list(references)
    documents = pool.sample(labels, streams.stream(seed, stage, "label"))
    told = label(
        model, optimizer, documents, wanted, task, run, stage=stage, backend=backend, clip=clip, lrs=lrs, audit=audit,
        accept_rho=accept_rho, progress=progress,
    )  # fmt: skip

    drift = drift_of(previous, told, documents) if previous else {}
    kept = len(drift) == len(wanted) and all(rho > keep_above for rho in drift.values())
    if previous is not None and kept:
        fitted, scorer = [], previous
    else:
        made, scorer = led(lambda: fit_labels(run, stage, told, documents, encoder, previous, seed, progress))
        fitted = [made]

    scored = led(
        lambda: score(pool, scorer, run, influence.load, stage=stage, engine=engine, workers=workers, gpus=gpus)
    )
    draw = {"tokens": tokens, "docs": docs, "ratio": ratio, "temperature": temperature, "quotas": quotas,
            "one_per": one_per, "combine": {r.name: r.weight for r in wanted}, "seed": seed}  # fmt: skip
    chosen, plan = led(lambda: select_scored(run, stage, scored, Ledger(run / "ledger", reuse), draw))
    folders = {"label": str(told.folder)} | {made.kind: made.folder for made in (*fitted, scored, chosen)}
    return Selection(stage, plan, scorer, told, drift, folders)


def drift_of(previous: InfluenceModel, labels: Labels, documents: pa.Table) -> dict[str, float]:
    """Spearman of an influence model with exact labels that it has not seen, by reference that it knows.

    The exact labels are those of audited documents; without an audit, those of all documents if they are exact.
    """
    exact = np.array(labels.table["backend"].to_pylist()) == "exact"
    by_id = dict(zip(documents["doc_id"].to_pylist(), documents["text"].to_pylist(), strict=True))
    texts = [by_id[i] for i, is_exact in zip(labels.ids, exact, strict=True) if is_exact]
    shared = [name for name in labels.references if name in previous.references]
    if len(texts) < 2 or not shared:
        return {}
    predicted, measured = previous.score(texts), labels.influence[exact]
    return {
        name: spearman(predicted[:, previous.references.index(name)], measured[:, labels.references.index(name)])
        for name in shared
    }
