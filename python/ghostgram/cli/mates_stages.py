"""What `ghostgram mates label`, `fit`, `score` and `select` do: the stages of `mates`, one at a time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ghostgram.algorithms.mates.files.store import Stage
from ghostgram.algorithms.mates.influence import model as influence
from ghostgram.algorithms.mates.labels.table import Labels
from ghostgram.algorithms.mates.run import drift_of
from ghostgram.algorithms.mates.scoring.score import score as score_pool
from ghostgram.algorithms.mates.selection import streams
from ghostgram.algorithms.mates.selection.ledger import Ledger
from ghostgram.algorithms.mates.stages import fit_labels, select_scored
from ghostgram.cli.mates_settings import Settings

if TYPE_CHECKING:
    import pyarrow as pa

LABELS = 20_000
"""Documents to label where the settings do not say."""


def label(settings: Settings, number: int, progress: bool) -> Labels:
    """Labels a sample of the pool; see `ghostgram.algorithms.mates.labels.label.label`."""
    from ghostgram.algorithms.mates.labels.label import label as labelled

    options = {name: value for name, value in settings.tables["label"].items() if name != "labels"}
    documents = _sample(settings, number)
    model, optimizer, references, task = settings.job()
    return labelled(
        model, optimizer, documents, references, task, settings.run, stage=number, progress=progress, **options
    )  # fmt: skip


def fit(settings: Settings, number: int, of: str, progress: bool) -> tuple[Stage, dict[str, float]]:
    """Fits an influence model to the stage's labels; the stage, and the drift of the model that it started from."""
    labels = Labels.read(only(settings.run, number, "label", of))
    documents = _sample(settings, number)
    before = settings.tables["fit"].get("previous")
    previous = influence.load(before) if before else None
    made, _ = fit_labels(
        settings.run, number, labels, documents, settings.encoder(), previous, settings.seed, progress
    )  # fmt: skip
    return made, drift_of(previous, labels, documents) if previous else {}


def score(settings: Settings, number: int, of: str) -> Stage:
    """Scores the pool by the stage's influence model, or by the one that the settings name."""
    options = dict(settings.tables["score"])
    scorer = options.pop("scorer", None) or Path(only(settings.run, number, "fit", of).folder, "model")
    return score_pool(
        settings.pool(), influence.load(scorer), settings.run, influence.load, stage=number, **options
    )  # fmt: skip


def select(settings: Settings, number: int, of: str) -> Stage:
    """Draws the stage's plan from its scores, and enters it into the ledger."""
    options = dict(settings.tables["select"])
    scored = only(settings.run, number, "score", of)
    references = scored.require()["references"]
    quotas = {name: tuple(x) if isinstance(x, list) else x for name, x in options.get("quotas", {}).items()}
    draw = {
        **{name: options.get(name) for name in ("tokens", "docs", "ratio")},
        "temperature": options.get("temperature", 1.0), "quotas": quotas or None, "one_per": options.get("one_per"),
        "combine": {name: 1.0 for name in references} | options.get("weights", {}), "seed": settings.seed,
    }  # fmt: skip
    ledger = Ledger(settings.run / "ledger", options.get("reuse", 1))
    return select_scored(settings.run, number, scored, ledger, draw)[0]


def only(run: Path, number: int, kind: str, of: str) -> Stage:
    """The complete work of one kind whose key begins with `of`.

    Raises:
        ValueError: There is none, or there are several.
    """
    home = run / f"stage-{number}" / kind
    stages = [Stage(run, number, kind, path.name) for path in sorted(home.glob(f"{of}*")) if path.is_dir()]
    complete = [stage for stage in stages if stage.is_complete]
    if len(complete) == 1:
        return complete[0]
    found = ", ".join(f"{stage.key[:12]} ({'' if stage in complete else 'not '}complete)" for stage in stages)
    more = "; --of tells which" if complete else ""
    raise ValueError(f"{home}: expected one complete '{kind}', got {found or 'none'}{more}")


def _sample(settings: Settings, number: int) -> pa.Table:
    """The documents that a stage labels: those of `mates` with these settings."""
    count = settings.tables["label"].get("labels", LABELS)
    return settings.pool().sample(count, streams.stream(settings.seed, number, "label"))
