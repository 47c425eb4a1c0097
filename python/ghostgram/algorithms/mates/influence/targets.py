"""Labels made ready to be learnt: checked, put in order, split by document hash and z-scored on the training split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ghostgram.algorithms.mates.stats import spearman

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

LEAST_TRAINED_ON, LEAST_HELD_OUT = 32, 8
"""Labels of a reference below which nothing is fitted."""


class Split(NamedTuple):
    """Documents of one side of the split."""

    texts: list[str]
    targets: F64
    """(n, R) z-scores, nan where a reference has no label."""

    def rows(self, numbers: I64) -> Split:
        """Some of its documents."""
        return Split([self.texts[i] for i in numbers], self.targets[numbers])


def _nowhere(done: int, total: int) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True)
class Job:
    """All that an encoder gets to be fitted."""

    train: Split
    held_out: Split
    seed: int = 0
    folder: Path | None = None
    """Where a long fit keeps what it needs to go on after it was killed."""
    progress: Callable[[int, int], None] = field(default=_nowhere)
    """Called with the units of work done and their total."""


@dataclass(frozen=True)
class Labelled:
    """Labels, split and standardised."""

    train: Split
    held_out: Split
    train_ids: list[bytes]
    references: tuple[str, ...]
    mean: F64
    """(R,) of the training split, in nats."""
    std: F64
    """(R,) of the training split, in nats, ddof 0."""


def places(keys: Sequence[bytes], purpose: str) -> NDArray[np.uint64]:
    """A uniform 64-bit word for each key, independent between purposes: the order or the side a document falls on."""
    person = blake2b(purpose.encode(), digest_size=16).digest()
    words = b"".join(blake2b(key, digest_size=8, person=person).digest() for key in keys)
    return np.frombuffer(words, "<u8").astype(np.uint64)


def prepare(
    texts: Sequence[str],
    labels: ArrayLike,
    ids: Sequence[bytes],
    references: Sequence[str],
    clusters: Sequence[object] | None = None,
    held_out: float = 0.1,
) -> Labelled:
    """Checks labels, orders them by id, splits them and z-scores them.

    The side of a document is a function of its id, or of its near-duplicate cluster, and of nothing else, no seed
    either: a model warm-started at a later stage was never trained on what it is measured by.

    Args:
        texts: n texts.
        labels: (n, R) influences in nats, nan where a reference has no label.
        ids: n ids of documents.
        references: R names.
        clusters: For each document its near-duplicate cluster, or None for a document that is its own.
        held_out: The share of documents, or clusters, to measure by.

    Returns:
        The two splits; which row came first does not matter.

    Raises:
        ValueError: Lengths or shapes that do not fit, repeated names, infinite labels, a reference with fewer than
            32 labels to learn or 8 held out, or whose labels do not vary.
    """
    values = np.asarray(labels, np.float64)
    names = tuple(references)
    if not names or len(set(names)) < len(names) or {"sum", "min"} & {*names}:
        raise ValueError(f"references: expected distinct names other than 'sum' and 'min', got {list(names)}")
    if values.ndim != 2 or values.shape != (len(texts), len(names)):
        raise ValueError(f"labels: expected shape ({len(texts)}, {len(names)}), got {values.shape}")
    for name, given in (("ids", ids), ("clusters", clusters)):
        if given is not None and len(given) != len(texts):
            raise ValueError(f"{name}: expected {len(texts)}, one for each text, got {len(given)}")
    if not 0 < held_out < 1:
        raise ValueError(f"held_out: expected a share in (0, 1), got {held_out}")
    if infinite := np.argwhere(np.isinf(values)).tolist():
        row, column = infinite[0]
        where = f"document {ids[row].hex()}, reference {names[column]!r}"
        raise ValueError(f"labels: expected finite values or nan, got {len(infinite)} infinite, first of {where}")

    groups = [_group(id, cluster) for id, cluster in zip(ids, clusters or [None] * len(ids), strict=True)]
    apart = places(groups, "held out") < np.uint64(int(held_out * 2**64))
    order = np.array(sorted(range(len(ids)), key=lambda row: (ids[row], texts[row])), np.int64)
    sides = order[~apart[order]], order[apart[order]]
    for least, side, what in zip((LEAST_TRAINED_ON, LEAST_HELD_OUT), sides, ("to learn", "held out"), strict=True):
        for name, count in zip(names, np.isfinite(values[side]).sum(0), strict=True):
            if count < least:
                raise ValueError(f"labels: expected at least {least} of reference {name!r} {what}, got {count}")
    mean, std = np.nanmean(values[sides[0]], 0), np.nanstd(values[sides[0]], 0)
    for name, column in zip(names, values[sides[0]].T, strict=True):
        if np.nanmin(column) == np.nanmax(column):
            raise ValueError(f"labels: expected values that vary, got only {np.nanmin(column)} of reference {name!r}")
    train, held = (Split([texts[i] for i in side], (values[side] - mean) / std) for side in sides)
    return Labelled(train, held, [ids[i] for i in sides[0]], names, mean, std)


def _group(id: bytes, cluster: object) -> bytes:
    if cluster is None:
        return b"document " + id
    return b"cluster " + (cluster if isinstance(cluster, bytes) else str(cluster).encode())


def rank_agreement(predicted: NDArray[np.floating], targets: F64) -> F64:
    """(R,) Spearman of predictions with targets, each over the documents that the reference has a label of."""
    known = np.isfinite(targets)
    columns = zip(predicted.T, targets.T, known.T, strict=True)
    return np.array([spearman(ours[seen], theirs[seen]) for ours, theirs, seen in columns])
