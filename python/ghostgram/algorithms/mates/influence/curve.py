"""The learning curve: what more labels would buy, and whether to stop asking for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ghostgram.algorithms.mates.influence.law import Law, fit_law, gains
from ghostgram.algorithms.mates.influence.ngram import EmbeddingRidge, HashedNgramRidge, Ridge
from ghostgram.algorithms.mates.influence.targets import places, prepare, rank_agreement
from ghostgram.algorithms.mates.stats import codes_of, resample, spearman_of_codes

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

LEAST = 1024
"""Labels to learn before which they are never said to be enough: a law through fits of 64 and fewer tells little of
thousands."""
RESAMPLES = 2000


class Embeds(Protocol):
    """An encoder that has to be trained, with an embedding that has not."""

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(n, d)."""


class Point(NamedTuple):
    """Fits on so many labels."""

    labels: int
    spearman: float
    """The mean over subsets and references."""
    low: float
    high: float
    """The 95 % bootstrap interval of `spearman`, over held-out documents."""
    subsets: tuple[float, ...]
    """The mean over references of each subset."""


class Gain(NamedTuple):
    """What doubling the labels adds to the held-out Spearman."""

    value: float
    """By the law."""
    low: float
    high: float
    """Its 95 % bootstrap interval: the law is fitted anew for each resample of held-out documents and of subsets."""


@dataclass(frozen=True)
class Curve:
    """Points, the law through them, and what follows from both."""

    points: tuple[Point, ...]
    law: Law
    gain: Gain
    """Of doubling the labels of the last point."""
    std: tuple[float, ...]
    """Of the labels of each reference, in nats."""
    worth: float
    """The gain of a doubling that is worth asking for."""

    @property
    def verdict(self) -> Literal["more", "enough", "open"]:
        """Whether a doubling of the labels gains what it is worth: only what the whole interval of the gain says.

        "more": at least `worth`. "enough": less, and there are `LEAST` labels or more. "open": it cannot be told; more
        held-out documents narrow the interval.
        """
        if self.gain.low >= self.worth:
            return "more"
        return "enough" if self.gain.high < self.worth and self.points[-1].labels >= LEAST else "open"

    @property
    def enough(self) -> int:
        """The number of labels from which on a doubling gains less than `worth` by the law, `LEAST` at least."""
        return max(LEAST, math.ceil(self.law.enough(self.worth)))

    def value(self, flops_per_label: float, share: float = 0.2) -> float:
        """What doubling the labels buys: nats per reference token and selected document, for each FLOP spent on labels.

        A selection of the top `share` by a score of rank correlation rho has a mean influence of about
        `rho * i(share) * std` above the pool's, for normal labels, with `i(.2) = 1.40`. Of several references the mean.

        Args:
            flops_per_label: What one label costs.
            share: Which share of the pool will be selected.

        Raises:
            ValueError: No positive cost, or a share outside (0, 1).
        """
        if not flops_per_label > 0:
            raise ValueError(f"flops_per_label: expected a positive number, got {flops_per_label}")
        labels = self.points[-1].labels
        return self.gain.value * intensity(share) * float(np.mean(self.std)) / (labels * flops_per_label)


def intensity(share: float) -> float:
    """The mean of the largest `share` of a standard normal: `pdf(t) / share` above its quantile t."""
    if not 0 < share < 1:
        raise ValueError(f"share: expected a number in (0, 1), got {share}")
    normal = NormalDist()
    return normal.pdf(normal.inv_cdf(1 - share)) / share


def learning_curve(
    texts: Sequence[str],
    labels: ArrayLike,
    ids: Sequence[bytes],
    references: Sequence[str],
    *,
    encoder: Ridge | Embeds | Literal["auto"] = "auto",
    clusters: Sequence[object] | None = None,
    held_out: float = 0.1,
    subsets: int = 3,
    worth: float = 0.01,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Curve:
    """Fits on n/16, n/8, n/4, n/2 and all n labels of the training split, each size on several subsets of it.

    Subsets are those of `subsets` orders of the documents, by hash, so that the smaller are within the larger; all are
    measured by the same held-out documents as `fit` has. A ridge is fitted on features that are made once. For an
    encoder that would have to be trained, a ridge on its frozen embedding stands in: the curve is that ridge's, and its
    limit what the embedding holds without training.

    Args:
        texts: As of `fit`, and so are `labels`, `ids`, `references`, `clusters` and `held_out`.
        labels: See above.
        ids: See above.
        references: See above.
        encoder: A ridge, or an `HFEncoder`. "auto": `HashedNgramRidge()`.
        clusters: See above.
        held_out: See above.
        subsets: Of each size but the last.
        worth: The gain in Spearman for which one would double the labels.
        seed: Of the subsets.
        progress: Called with the fits done and their number.

    Raises:
        ValueError: As `targets.prepare`; fewer than 16 * 32 labels to learn; no subsets; a `worth` that is not
            positive.

    Cost:
        `subsets` times as much as one fit, and one more.
    """
    if subsets < 1:
        raise ValueError(f"subsets: expected at least 1, got {subsets}")
    if not worth > 0:
        raise ValueError(f"worth: expected a positive gain, got {worth}")
    labelled = prepare(texts, labels, ids, references, clusters, held_out)
    known = int(np.isfinite(labelled.train.targets).sum(0).min())
    if known < 16 * 32:
        raise ValueError(f"labels: expected at least {16 * 32} to learn of each reference, got {known}")
    ridge = _cheap(encoder)
    train, beside = ridge.features(labelled.train.texts), ridge.features(labelled.held_out.texts)
    targets, truth = labelled.train.targets, labelled.held_out.targets
    orders = [np.argsort(places(labelled.train_ids, f"curve {seed} {j}"), kind="stable") for j in range(subsets)]
    whole = len(labelled.train_ids)
    sizes = [whole // 16, whole // 8, whole // 4, whole // 2, whole]
    fits = [(size, order) for size in sizes for order in (orders if size < whole else orders[:1])]
    predictions = []
    for done, (size, order) in enumerate(fits, 1):
        rows = np.sort(order[:size])
        fitted = ridge.fit_rows(train[rows], targets[rows], beside, truth)
        predictions.append(fitted.predict_rows(beside).astype(np.float64))
        progress(done, len(fits))
    points, law, gain = judged([size for size, _ in fits], np.stack(predictions, 1), truth)
    return Curve(points, law, gain, tuple(labelled.std.tolist()), worth)


def judged(sizes: Sequence[int], predictions: F64, truth: F64) -> tuple[tuple[Point, ...], Law, Gain]:
    """The points, the law and the gain of doubling the largest size.

    Args:
        sizes: (F,) the labels of each fit, ascending.
        predictions: (held out, F, R) what each says of held-out documents.
        truth: (held out, R) their labels, nan where there is none.
    """
    n = np.array(sizes)
    found = np.array([rank_agreement(predictions[:, j], truth).mean() for j in range(len(n))])
    drawn = _drawn(np.apply_along_axis(codes_of, 0, predictions), _known_codes(truth))
    points, redrawn = list[Point](), drawn.copy()
    for size in np.unique(n):
        (fits,) = np.nonzero(n == size)
        low, high = np.quantile(drawn[:, fits].mean(1), [0.025, 0.975]).tolist()
        points.append(Point(int(size), float(found[fits].mean()), low, high, tuple(found[fits].tolist())))
        for row, numbers in enumerate(redrawn):
            numbers[fits] = drawn[row, fits[resample(len(fits), row, int(size))]]
    law = fit_law(n, found)
    at = float(n.max())
    low, high = np.quantile(gains(n.astype(float), redrawn, at), [0.025, 0.975]).tolist()
    return tuple(points), law, Gain(law.gain(at), low, high)


def _cheap(encoder: Ridge | Embeds | Literal["auto"]) -> Ridge:
    if isinstance(encoder, str):
        return HashedNgramRidge()
    if isinstance(encoder, Ridge):
        return encoder
    return EmbeddingRidge(embed=encoder.embed)


def _drawn(ours: I64, theirs: I64) -> F64:
    """(resamples, F) Spearmans of (held out, F, R) codes, the mean over references: all fits by the same documents."""
    found = []
    for number in range(RESAMPLES):
        rows = resample(len(theirs), number, 0)
        each = []
        for predicted, known in zip(ours[rows].transpose(2, 1, 0), theirs[rows].T, strict=True):
            seen = known >= 0
            each.append([spearman_of_codes(fit[seen], known[seen]) for fit in predicted])
        found.append(np.mean(each, 0))
    drawn: F64 = np.array(found)
    varied: F64 = drawn[~np.isnan(drawn).any(1)]
    return varied


def _known_codes(truth: F64) -> I64:
    """`codes_of` each column, -1 where it has no label."""
    codes = np.full(truth.shape, -1, np.int64)
    for r, known in enumerate(np.isfinite(truth).T):
        codes[known, r] = codes_of(truth[known, r])
    return codes
