"""What a distilled set is compared with: chosen real images. And the split that keeps test data out of every choice."""

from __future__ import annotations

import hashlib
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ghostgram.algorithms.pad import keyed

I64 = NDArray[np.int64]


class Split(NamedTuple):
    """Two parts of a set, as ascending indices."""

    train: I64
    held_out: I64
    digest: str
    """BLAKE2b-128 of the held-out indices as little-endian int64, as 32 hexadecimal digits."""


def split(labels: ArrayLike, fraction: float | str, seed: int) -> Split:
    """Holds out a share of every class, drawn by key.

    Of a class of n images, `floor(fraction n + 1/2)` are held out, the fraction taken as the decimal number it is
    written as.

    Args:
        labels: (n,) integers.
        fraction: Above 0 and below 1, such as 0.1 or "0.1".
        seed: Any integer.

    Raises:
        TypeError: labels are no integers.
        ValueError: The fraction is out of its range, or leaves a class without an image on one side.
    """
    own, share = _labels(labels), Fraction(str(fraction))
    if not 0 < share < 1:
        raise ValueError(f"fraction: expected above 0 and below 1, got {fraction}")
    held_out = []
    for label in np.unique(own):
        members = np.flatnonzero(own == label)
        count = int(share * len(members) + Fraction(1, 2))
        if not 0 < count < len(members):
            raise ValueError(f"fraction: {fraction} of the {len(members)} images of class {label} is {count}")
        held_out.append(members[keyed.permutation(seed, "split", (int(label),), len(members))[:count]])
    held = np.sort(np.concatenate(held_out))
    digest = hashlib.blake2b(held.astype("<i8").tobytes(), digest_size=16).hexdigest()
    return Split(np.setdiff1d(np.arange(len(own)), held), held, digest)


def random_real(labels: ArrayLike, ipc: int, seed: int) -> I64:
    """Real images drawn by key, the same number of every class.

    Args:
        labels: (n,) integers.
        ipc: Images of a class.
        seed: Any integer.

    Returns:
        (classes * ipc,) indices, classes ascending. A larger ipc keeps those of a smaller one.

    Raises:
        TypeError: labels are no integers.
        ValueError: ipc is below 1, or a class has fewer images.
    """
    own = _labels(labels)
    members = _members(own, ipc)
    chosen = [ids[keyed.permutation(seed, "random real", (label,), len(ids))[:ipc]] for label, ids in members.items()]
    return np.concatenate(chosen)


def k_centre(features: ArrayLike, labels: ArrayLike, ipc: int) -> I64:
    """Real images that cover their class: greedy k-centre in a space of features.

    Of every class the image nearest to the class's mean comes first; each next one is the farthest from those chosen,
    by Euclidean distance, the first of equals.

    Args:
        features: (n, d), such as flattened images or a network's penultimate layer.
        labels: (n,) integers.
        ipc: Images of a class.

    Returns:
        (classes * ipc,) indices, classes ascending, each in the order of choice.

    Raises:
        TypeError: labels are no integers.
        ValueError: ipc is below 1, a class has fewer images, or features are not (n, d).

    Cost:
        3 n d operations for each of ipc choices, and a copy of the features of one class in float64.

    Source:
        Gonzalez, "Clustering to minimize the maximum intercluster distance" (1985), as Sener and Savarese use it
        (arXiv 1708.00489).
    """
    own, given = _labels(labels), np.asarray(features)
    if given.ndim != 2 or len(given) != len(own):
        raise ValueError(f"features: expected shape ({len(own)}, d), got {given.shape}")
    chosen = []
    for ids in _members(own, ipc).values():
        points = given[ids].astype(np.float64)
        picked = [int(np.square(points - points.mean(0)).sum(1).argmin())]
        nearest = np.square(points - points[picked[0]]).sum(1)
        while len(picked) < ipc:
            nearest[picked] = -1  # so that of copies of one image each is chosen once
            picked.append(int(nearest.argmax()))
            nearest = np.minimum(nearest, np.square(points - points[picked[-1]]).sum(1))
        chosen.append(ids[picked])
    return np.concatenate(chosen)


def _labels(labels: ArrayLike) -> I64:
    own = np.asarray(labels)
    if own.dtype.kind not in "iu":
        raise TypeError(f"labels: expected integers, got {own.dtype}")
    if own.ndim != 1 or not len(own):
        raise ValueError(f"labels: expected shape (n,) with n at least 1, got {own.shape}")
    return own.astype(np.int64)


def _members(labels: I64, ipc: int) -> dict[int, I64]:
    """The indices of each class, which has to have `ipc` of them."""
    if ipc < 1:
        raise ValueError(f"ipc: expected at least 1, got {ipc}")
    members = {int(label): np.flatnonzero(labels == label) for label in np.unique(labels)}
    for label, ids in members.items():
        if len(ids) < ipc:
            raise ValueError(f"ipc: expected at most {len(ids)}, the images of class {label}, got {ipc}")
    return members
