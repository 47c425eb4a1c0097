"""The influence model: it learns from labels what a document would do to the references, and tells it of any text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ghostgram._files import whole_folder
from ghostgram.algorithms.mates.influence.heldout import HeldOut, Report, measured
from ghostgram.algorithms.mates.influence.ngram import HashedNgramRidge
from ghostgram.algorithms.mates.influence.targets import Job, Labelled, places, prepare, rank_agreement

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

_HOMES = {"ngram": "ngram:HashedNgramRidge", "embedding": "ngram:EmbeddingRidge", "hf": "encoder:HFEncoder"}
_TRIED = 0.2  # the share of labels by which "best of" decides


class Encoder(Protocol):
    """What turns texts into z-scores: its settings before `fit`, and what it has learnt after it."""

    @property
    def kind(self) -> str:
        """What `load` knows it by."""

    @property
    def notes(self) -> dict[str, Any]:
        """What it has to say of its fit, as JSON has it."""

    def fit(self, job: Job, start: Any = None) -> Any:
        """A fitted one, from its beginnings or from `start`, which is a fitted and re-based one of its kind."""

    def predict(self, texts: Sequence[str]) -> F32:
        """(n, R) z-scores, once fitted."""

    def rebased(self, heads: Sequence[int | None], scale: F64, offset: F64) -> Any:
        """With head r predicting `scale_r * (old head heads[r]) + offset_r`; a new head where that is None."""

    def settings(self) -> dict[str, Any]:
        """What it was built with, as JSON has it."""

    def digest(self) -> bytes:
        """Of all that its predictions depend on."""

    def save(self, folder: Path) -> None:
        """Writes what `load(folder, settings)` of its class reads."""


@dataclass(frozen=True, eq=False)
class InfluenceModel:
    """A fitted encoder, and what turns its z-scores back into nats."""

    encoder: Encoder
    references: tuple[str, ...]
    mean: F64
    """(R,) of the labels it was trained on, in nats."""
    std: F64
    report: Report = field(repr=False)

    def score(self, texts: Sequence[str]) -> F32:
        """(n, R) predicted z-scores; higher is better."""
        return self.encoder.predict(texts)

    def influence(self, texts: Sequence[str]) -> F64:
        """(n, R) predicted influences in nats per reference token, `mean + std * z`."""
        return self.mean + self.std * self.score(texts)

    @property
    def digest(self) -> str:
        """Of all that scores and influences depend on."""
        known = {"kind": self.encoder.kind, "settings": self.encoder.settings(), "references": self.references}
        parts = [json.dumps(known, sort_keys=True).encode(), self.mean.tobytes(), self.std.tobytes()]
        return blake2b(b"".join([*parts, self.encoder.digest()]), digest_size=16).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Writes the model into a folder that appears whole or not at all.

        Raises:
            FileExistsError: The folder holds anything but this very model.
        """
        folder = Path(folder)
        held = folder / "model.json"
        if held.exists() and json.loads(held.read_text())["digest"] == self.digest:
            return
        if folder.exists() and any(folder.iterdir()):
            raise FileExistsError(f"{folder}: expected no folder, an empty one or this model, got another one's files")
        with whole_folder(folder) as temporary:
            self.encoder.save(temporary)
            about = {
                "kind": self.encoder.kind,
                "settings": self.encoder.settings(),
                "references": self.references,
                "mean": self.mean.tolist(),
                "std": self.std.tolist(),
                "report": asdict(self.report) | {"heads": [head._asdict() for head in self.report.heads]},
                "digest": self.digest,
            }
            (temporary / "model.json").write_text(json.dumps(about, indent=1))

    def rebased(self, labelled: Labelled) -> Encoder:
        """The encoder, with heads that predict the same nats in the z-scores of other labels."""
        heads = [self.references.index(name) if name in self.references else None for name in labelled.references]
        picks = [head or 0 for head in heads]
        scale, offset = self.std[picks] / labelled.std, (self.mean[picks] - labelled.mean) / labelled.std
        rebased: Encoder = self.encoder.rebased(heads, scale, offset)
        return rebased


def kind_of(name: str) -> Any:
    """The class of encoders that is known by a name: "ngram", "embedding" or "hf".

    Raises:
        ValueError: There is none.
    """
    if name not in _HOMES:
        raise ValueError(f"encoder: expected one of {', '.join(_HOMES)}, got {name!r}")
    module, kind = _HOMES[name].split(":")
    return getattr(import_module(f"ghostgram.algorithms.mates.influence.{module}"), kind)


def load(folder: str | Path) -> InfluenceModel:
    """Reads a model that `InfluenceModel.save` wrote.

    Raises:
        ValueError: The files are not those that were saved.
    """
    folder = Path(folder)
    about = json.loads((folder / "model.json").read_text())
    encoder = kind_of(about["kind"]).load(folder, about["settings"])
    report = about["report"] | {"heads": tuple(HeldOut(**head) for head in about["report"]["heads"])}
    report["floor"] = report["floor"] and tuple(report["floor"])
    mean, std = np.array(about["mean"]), np.array(about["std"])
    model = InfluenceModel(encoder, tuple(about["references"]), mean, std, Report(**report))
    if model.digest != about["digest"]:
        raise ValueError(f"{folder}: expected an influence model of digest {about['digest']}, got {model.digest}")
    return model


def fit(
    texts: Sequence[str],
    labels: ArrayLike,
    ids: Sequence[bytes],
    references: Sequence[str],
    *,
    encoder: Encoder | Literal["auto"] = "auto",
    warm_start: InfluenceModel | None = None,
    best_of: bool = False,
    clusters: Sequence[object] | None = None,
    held_out: float = 0.1,
    reliability: float | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    progress: bool = False,
) -> InfluenceModel:
    """Fits an influence model, `min_f mean ((y - mean) / std - f(x))^2` over documents and references.

    `mean` and `std` are of the training split, for each reference. The model that ranks the held-out documents best is
    kept; what the report says of it is therefore a little too good, see docs/algorithms/mates_influence.md.

    Args:
        texts: n texts: the spans that were probed.
        labels: (n, R) influences in nats, higher = better; nan where a reference has no label.
        ids: n ids of documents.
        references: R names.
        encoder: A `HashedNgramRidge`, `EmbeddingRidge` or `HFEncoder`. "auto": what `warm_start` is, or else
            `HashedNgramRidge()`.
        warm_start: The model of an earlier stage to start from; of its heads those of the same name are taken over.
        best_of: Starts warm only if that is better than cold on 20 % of the labels.
        clusters: See `targets.prepare`.
        held_out: See `targets.prepare`.
        reliability: Of the labels, as the audit measures it.
        seed: Of whatever is random in the encoder's training.
        folder: Where an `HFEncoder` keeps what it needs to go on, exactly, after it was killed. To be removed by the
            caller once the model is saved.
        progress: Shows a bar.

    Returns:
        The model. With `HashedNgramRidge` it depends on neither threads nor the order of rows, to the bit.

    Raises:
        ValueError: As `targets.prepare`; a `warm_start` of another kind than `encoder`; a reliability outside (0, 1].

    Cost:
        Twice that of the encoder with `best_of`, at most; and a `HashedNgramRidge`, as the floor to beat.

    Source:
        arXiv 2406.06046, Section 3.2 (its influence model starts cold at every stage).
    """
    if reliability is not None and not 0 < reliability <= 1:
        raise ValueError(f"reliability: expected a number in (0, 1], got {reliability}")
    chosen = _chosen(encoder, warm_start)
    if best_of and not warm_start:
        raise ValueError("best_of: expected a warm_start to compare with, got None")
    labelled = prepare(texts, labels, ids, references, clusters, held_out)
    start = warm_start.rebased(labelled) if warm_start else None
    with _shown(progress) as show:
        job = Job(labelled.train, labelled.held_out, seed, Path(folder) if folder else None, show)
        tried = _tried(chosen, start, job, labelled) if best_of else {}
        warm = start is not None and tried.get("warm", 1.0) >= tried.get("cold", 0.0)
        fitted: Encoder = chosen.fit(job, start if warm else None)
        floor = None if chosen.kind == "ngram" else HashedNgramRidge().fit(replace(job, folder=None))
    predicted = fitted.predict(labelled.held_out.texts)
    report = Report(
        heads=tuple(measured(labelled, predicted, reliability)),
        start="warm" if warm else "cold",
        tried=tried,
        floor=None if floor is None else _agreement(floor, job),
        notes=fitted.notes,
    )
    return InfluenceModel(fitted, labelled.references, labelled.mean, labelled.std, report)


def _chosen(encoder: Encoder | Literal["auto"], warm_start: InfluenceModel | None) -> Encoder:
    if isinstance(encoder, str):
        return warm_start.encoder if warm_start else HashedNgramRidge()
    if warm_start and warm_start.encoder.kind != encoder.kind:
        raise ValueError(f"warm_start: expected a model of kind {encoder.kind!r}, got {warm_start.encoder.kind!r}")
    return encoder


def _agreement(fitted: Encoder, job: Job) -> tuple[float, ...]:
    predicted = fitted.predict(job.held_out.texts)
    return tuple(rank_agreement(predicted, job.held_out.targets).tolist())


def _tried(encoder: Encoder, start: Encoder | None, job: Job, labelled: Labelled) -> dict[str, float]:
    few = np.sort(
        np.argsort(places(labelled.train_ids, "best of"), kind="stable")[: round(_TRIED * len(job.train.texts))]
    )
    found = {}
    for name, begin in (("warm", start), ("cold", None)):
        folder = job.folder / f"tried-{name}" if job.folder else None
        fitted = encoder.fit(replace(job, train=job.train.rows(few), folder=folder), begin)
        found[name] = float(np.mean(_agreement(fitted, job)))
    return found


@contextmanager
def _shown(wanted: bool) -> Iterator[Any]:
    """A bar that follows a fit, or nothing."""
    if not wanted:
        yield lambda done, total: None
        return
    from rich.progress import Progress

    with Progress() as bar:
        task = bar.add_task("influence model")
        yield lambda done, total: bar.update(task, completed=done, total=total)


def distil(model: InfluenceModel, texts: Sequence[str], ids: Sequence[bytes], **options: Any) -> InfluenceModel:
    """Fits a `HashedNgramRidge` to what a slower model says of texts, which need no labels.

    Args:
        model: The slower model.
        texts: n texts, any number of them.
        ids: n ids of documents.
        options: Of `fit`.

    Returns:
        The faster model. Its report says how well it ranks as the slower one does, its nats are that one's predictions.
    """
    return fit(texts, model.influence(texts), ids, model.references, **options)
