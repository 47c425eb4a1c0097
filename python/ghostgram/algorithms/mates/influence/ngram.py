"""Influence from linear features: hashed word n-grams, or any frozen embedding. Deterministic, and NumPy alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ghostgram.algorithms.mates.influence.hashing import ngrams
from ghostgram.algorithms.mates.influence.ridge import DenseRows, SparseRows
from ghostgram.algorithms.mates.influence.targets import Job
from ghostgram.algorithms.mates.stats import spearman

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Rows = SparseRows | DenseRows
AnyRidge = TypeVar("AnyRidge", bound="Ridge")

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3)


@dataclass(frozen=True, eq=False)
class Ridge(ABC):
    """Ridge regression of z-scores on features of a text, one strength for each reference.

    Of all `strengths` the one with the best held-out Spearman is kept, of equals the strongest. Started from an earlier
    model, the penalty is on the distance to its weights: labels that say little leave it as it was.

    Attributes:
        strengths: The lambdas to try, positive and ascending.
        iterations: Of conjugate gradients, at most.
        tolerance: Of their residual.
        weights: (columns, R), once fitted.
        intercepts: (R,), once fitted.
        notes: The strength chosen for each reference, iterations and residual.
    """

    kind: ClassVar[str]

    strengths: tuple[float, ...] = STRENGTHS
    iterations: int = 100
    tolerance: float = 1e-6
    weights: F32 | None = field(default=None, repr=False)
    intercepts: F64 | None = field(default=None, repr=False)
    notes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.strengths or self.strengths[0] <= 0 or list(self.strengths) != sorted(set(self.strengths)):
            raise ValueError(f"strengths: expected positive ascending numbers, got {self.strengths}")

    @abstractmethod
    def features(self, texts: Sequence[str]) -> Rows:
        """One row for each text."""

    def fit(self: AnyRidge, job: Job, start: Ridge | None = None) -> AnyRidge:
        """Fits the training split, strengths by the held-out one."""
        train, held_out = self.features(job.train.texts), self.features(job.held_out.texts)
        return self.fit_rows(train, job.train.targets, held_out, job.held_out.targets, start, job.progress)

    def fit_rows(
        self: AnyRidge,
        train: Rows,
        targets: F64,
        held_out: Rows,
        held_out_targets: F64,
        start: Ridge | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> AnyRidge:
        """`fit` of features that are there already."""
        heads = targets.shape[1]
        weights, intercepts = np.zeros((train.width, heads), np.float32), np.zeros(heads)
        notes: dict[str, list[float]] = {"strength": [], "iterations": [], "residual": []}
        for r in range(heads):
            known, seen = np.isfinite(targets[:, r]), np.isfinite(held_out_targets[:, r])
            rows = train if known.all() else train[np.flatnonzero(known)]
            beside = held_out if seen.all() else held_out[np.flatnonzero(seen)]
            prior, constant = np.zeros(train.width, np.float32), 0.0
            if start is not None:
                prior, constant = np.ascontiguousarray(start._fitted()[0][:, r]), float(start._fitted()[1][r])
            before = rows.dot(prior) + constant
            found = rows.ridge(targets[known, r] - before, self.strengths, self.iterations, self.tolerance)
            candidates = (found.weights + prior).astype(np.float32)
            scores = [spearman(beside.dot(ours), held_out_targets[seen, r]) for ours in candidates]
            best = max(range(len(scores)), key=lambda k: (np.nan_to_num(scores[k], nan=-2.0), k))
            weights[:, r], intercepts[r] = candidates[best], found.intercepts[best] + constant
            for name, value in zip(notes, (self.strengths[best], found.iterations, found.residual), strict=True):
                notes[name].append(value)
            progress(r + 1, heads)
        return replace(self, weights=weights, intercepts=intercepts, notes=notes)

    def predict(self, texts: Sequence[str]) -> F32:
        """(n, R) predicted z-scores."""
        return self.predict_rows(self.features(texts))

    def predict_rows(self, rows: Rows) -> F32:
        """`predict` of features that are there already."""
        weights, intercepts = self._fitted()
        columns = [rows.dot(np.ascontiguousarray(ours)) + c for ours, c in zip(weights.T, intercepts, strict=True)]
        return np.stack(columns, 1).astype(np.float32)

    def rebased(self: AnyRidge, heads: Sequence[int | None], scale: F64, offset: F64) -> AnyRidge:
        """With head r predicting `scale_r * (old head heads[r]) + offset_r`; 0 where there is no old head."""
        weights, intercepts = self._fitted()
        some = np.array([head is not None for head in heads])
        picks = [head or 0 for head in heads]
        return replace(
            self,
            weights=(weights[:, picks] * (some * scale)).astype(np.float32),
            intercepts=some * (intercepts[picks] * scale + offset),
        )

    def settings(self) -> dict[str, Any]:
        """What the model was built with, as JSON has it."""
        return {"strengths": list(self.strengths), "iterations": self.iterations, "tolerance": self.tolerance}

    def digest(self) -> bytes:
        """Of the fitted numbers."""
        weights, intercepts = self._fitted()
        return blake2b(np.ascontiguousarray(weights).tobytes() + intercepts.tobytes(), digest_size=16).digest()

    def save(self, folder: Path) -> None:
        """Writes the fitted numbers."""
        weights, intercepts = self._fitted()
        np.save(folder / "weights.npy", weights)
        np.save(folder / "intercepts.npy", intercepts)

    @classmethod
    def load(cls: type[AnyRidge], folder: Path, settings: dict[str, Any]) -> AnyRidge:
        """Reads what `save` wrote."""
        numbers = {name: np.load(folder / f"{name}.npy") for name in ("weights", "intercepts")}
        return cls(**settings | {"strengths": tuple(settings["strengths"])}, **numbers)

    def _fitted(self) -> tuple[F32, F64]:
        if self.weights is None or self.intercepts is None:
            raise ValueError(f"{type(self).__name__}: expected a fitted model, got one that was not")
        return self.weights, self.intercepts


@dataclass(frozen=True, eq=False)
class HashedNgramRidge(Ridge):
    """Ridge on hashed word 1-grams and 2-grams and the length of the text (`hashing.ngrams`): no torch, no download.

    Its bits depend on texts and labels alone: not on threads, batches, or the order of documents.

    Attributes:
        bits: Of the hash: 2^bits columns.

    Cost:
        Fit: `SparseRows.ridge`. Score: the hashing, about 100 ns a byte, and 2 R FLOPs a distinct n-gram.
    """

    kind: ClassVar[str] = "ngram"

    bits: int = 18

    def features(self, texts: Sequence[str]) -> SparseRows:
        """Hashed n-grams."""
        return ngrams(texts, self.bits)

    def settings(self) -> dict[str, Any]:
        """What the model was built with, as JSON has it."""
        return {**super().settings(), "bits": self.bits}


@dataclass(frozen=True, eq=False)
class EmbeddingRidge(Ridge):
    """Ridge on a frozen embedding, in closed form from sums over rows: for fits that take a second.

    Attributes:
        embed: Texts -> (n, d) finite numbers, n rows for n texts. To be saved, a function that can be imported by name.

    Cost:
        Fit: 2 n d^2 + 10 d^3 FLOPs for each reference, and 4 n d bytes.
    """

    kind: ClassVar[str] = "embedding"

    embed: Callable[[Sequence[str]], ArrayLike] = field(kw_only=True)

    def features(self, texts: Sequence[str]) -> DenseRows:
        """The embedding."""
        values = np.asarray(self.embed(texts), np.float32)
        if values.ndim != 2 or len(values) != len(texts) or not np.isfinite(values).all():
            raise ValueError(f"embed: expected ({len(texts)}, d) finite numbers, got shape {values.shape}")
        return DenseRows(values)

    def settings(self) -> dict[str, Any]:
        """What the model was built with, as JSON has it."""
        module, name = getattr(self.embed, "__module__", None), getattr(self.embed, "__qualname__", "")
        if module is None or getattr(import_module(module), name, None) is not self.embed:
            raise ValueError(f"embed: expected a function that can be imported by name, got {self.embed!r}")
        return {**super().settings(), "embed": f"{module}:{name}"}

    @classmethod
    def load(cls, folder: Path, settings: dict[str, Any]) -> EmbeddingRidge:
        """Reads what `save` wrote, and imports the embedding."""
        module, name = settings["embed"].split(":")
        return super().load(folder, settings | {"embed": getattr(import_module(module), name)})
