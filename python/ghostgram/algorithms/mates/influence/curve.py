"""The learning curve: what more labels would buy, and whether to stop asking for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ghostgram.algorithms.mates.influence.ngram import EmbeddingRidge, HashedNgramRidge, Ridge
from ghostgram.algorithms.mates.influence.targets import places, prepare, rank_agreement
from ghostgram.algorithms.mates.stats import bootstrap_interval, codes_of, spearman_of_codes

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

_SLOWEST, _FASTEST, _LEAST_GAIN = 0.1, 1.5, 0.01


class Embeds(Protocol):
    """An encoder that has to be trained, with an embedding that has not."""

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(n, d)."""


class Law(NamedTuple):
    """`rho(n) = limit - scale * n^-power`, the held-out Spearman of a model fitted on n labels."""

    limit: float
    scale: float
    power: float

    def at(self, n: float) -> float:
        """rho(n)."""
        return self.limit - self.scale * float(n**-self.power)

    def gain(self, n: float) -> float:
        """Of doubling: `rho(2 n) - rho(n)`."""
        return self.scale * float(n**-self.power) * (1 - float(2**-self.power))

    def enough(self, gain: float) -> float:
        """The n from which on doubling gains less than so much; 0 if it never gains anything."""
        return float((self.scale * (1 - 2**-self.power) / gain) ** (1 / self.power))


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


@dataclass(frozen=True)
class Curve:
    """Points, the law through them, and what follows from both."""

    points: tuple[Point, ...]
    law: Law
    std: tuple[float, ...]
    """Of the labels of each reference, in nats."""

    @property
    def least_gain(self) -> float:
        """The gain of a doubling that is worth asking for: .01, or half the width of the last point's interval."""
        return max(_LEAST_GAIN, (self.points[-1].high - self.points[-1].low) / 2)

    @property
    def stop(self) -> bool:
        """Whether a doubling of the labels would gain less than `least_gain`."""
        return self.law.gain(self.points[-1].labels) < self.least_gain

    @property
    def enough(self) -> int:
        """The number of labels from which on a doubling gains less than `least_gain`."""
        return math.ceil(self.law.enough(self.least_gain))

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
        return self.law.gain(labels) * intensity(share) * float(np.mean(self.std)) / (labels * flops_per_label)


def intensity(share: float) -> float:
    """The mean of the largest `share` of a standard normal: `pdf(t) / share` above its quantile t."""
    if not 0 < share < 1:
        raise ValueError(f"share: expected a number in (0, 1), got {share}")
    normal = NormalDist()
    return normal.pdf(normal.inv_cdf(1 - share)) / share


def fit_law(labels: ArrayLike, spearmans: ArrayLike) -> Law:
    """Least squares of `rho_i ~ limit - scale n_i^-power` with limit <= 1, scale >= 0 and .1 <= power <= 1.5.

    For one power the best limit and scale are in closed form, on whichever bound they meet; the power is found on a
    grid, then by golden section around its best place. Nothing is random.

    Args:
        labels: (m,) the n_i, of at least three sizes.
        spearmans: (m,) the rho_i.

    Raises:
        ValueError: Different lengths, fewer than three sizes, or values that are not finite.
    """
    n, rho = np.asarray(labels, np.float64), np.asarray(spearmans, np.float64)
    if n.shape != rho.shape or n.ndim != 1 or len(np.unique(n)) < 3:
        raise ValueError(f"labels: expected at least three sizes, one for each Spearman, got {n.tolist()}")
    if not (np.isfinite(rho).all() and (n > 0).all()):
        raise ValueError(f"spearmans: expected finite numbers of positive sizes, got {rho.tolist()}")

    def best(power: float) -> tuple[float, Law]:
        x = -((n / n.max()) ** -power)  # at most a few thousand, whatever n is
        spread = x - x.mean()
        scale = max(0.0, float((spread * rho).sum() / (spread * spread).sum()))
        limit = float(rho.mean() - scale * x.mean())
        if limit > 1:
            limit, scale = 1.0, max(0.0, float(((rho - 1) * x).sum() / (x * x).sum()))
        error = float(((limit + scale * x - rho) ** 2).sum())
        return error, Law(limit, scale * float(n.max()) ** power, power)

    grid = np.linspace(_SLOWEST, _FASTEST, 141).tolist()
    around = min(range(len(grid)), key=lambda k: best(grid[k])[0])
    low, high = grid[max(around - 1, 0)], grid[min(around + 1, len(grid) - 1)]
    golden = (math.sqrt(5) - 1) / 2
    while high - low > 1e-9:
        inner, outer = high - golden * (high - low), low + golden * (high - low)
        if best(inner)[0] <= best(outer)[0]:
            high = outer
        else:
            low = inner
    return min(best(low), best(high), best(grid[around]))[1]


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
        seed: Of the subsets.
        progress: Called with the fits done and their number.

    Raises:
        ValueError: As `targets.prepare`; fewer than 16 * 32 labels to learn; no subsets.

    Cost:
        `subsets` times as much as one fit, and one more.
    """
    if subsets < 1:
        raise ValueError(f"subsets: expected at least 1, got {subsets}")
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
    total, points = (len(sizes) - 1) * subsets + 1, list[Point]()
    done = 0
    for size in sizes:
        predictions = []
        for order in orders if size < whole else orders[:1]:
            rows = np.sort(order[:size])
            fitted = ridge.fit_rows(train[rows], targets[rows], beside, truth)
            predictions.append(fitted.predict_rows(beside).astype(np.float64))
            done += 1
            progress(done, total)
        points.append(_point(size, np.stack(predictions, 1), truth))
    flat = [(point.labels, rho) for point in points for rho in point.subsets]
    return Curve(tuple(points), fit_law(*zip(*flat, strict=True)), tuple(labelled.std.tolist()))


def _cheap(encoder: Ridge | Embeds | Literal["auto"]) -> Ridge:
    if isinstance(encoder, str):
        return HashedNgramRidge()
    if isinstance(encoder, Ridge):
        return encoder
    return EmbeddingRidge(embed=encoder.embed)


def _point(size: int, predictions: F64, truth: F64) -> Point:
    """Of (held out, subsets, R) predictions."""
    count = predictions.shape[1]
    agreement = [rank_agreement(predictions[:, j], truth) for j in range(count)]

    def mean(ours: I64, theirs: I64) -> float:
        seen = theirs >= 0
        pairs = ((ours[seen[:, r], j, r], theirs[seen[:, r], r]) for r in range(seen.shape[1]) for j in range(count))
        return float(np.mean([spearman_of_codes(*pair) for pair in pairs]))

    interval = bootstrap_interval(np.apply_along_axis(codes_of, 0, predictions), _known_codes(truth), mean)
    return Point(size, float(np.mean(agreement)), *interval, tuple(float(rho.mean()) for rho in agreement))


def _known_codes(truth: F64) -> I64:
    """`codes_of` each column, -1 where it has no label."""
    codes = np.full(truth.shape, -1, np.int64)
    for r, known in enumerate(np.isfinite(truth).T):
        codes[known, r] = codes_of(truth[known, r])
    return codes
