"""How hard each training image is: scores with their labels, their order in each class, and their file."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ghostgram._files import whole_file

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Scores:
    """A score for every image; higher is harder.

    Args:
        values: (n,) float64, finite.
        labels: (n,) int64, the class of each image: 0, 1, ..., without a gap. Classes may differ in size.
        meta: What the scores are of, for readers: of what JSON has a form for.

    Raises:
        ValueError: A value is not finite, a class below the largest has no image, or shapes differ.
    """

    values: F64
    labels: I64
    meta: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.values.ndim != 1 or not len(self.values):
            raise ValueError(f"values: expected shape (n,) with n >= 1, got {self.values.shape}")
        if self.labels.shape != self.values.shape:
            raise ValueError(f"labels: expected shape {self.values.shape} like values, got {self.labels.shape}")
        finite = np.isfinite(self.values)
        if not finite.all():
            row = int(np.argmin(finite))
            raise ValueError(f"values: expected finite scores, got {self.values[row]} at image {row}")
        if self.labels.min() < 0:
            raise ValueError(f"labels: expected at least 0, got {self.labels.min()}")
        counts = np.bincount(self.labels)
        if not counts.all():
            raise ValueError(
                f"labels: expected images of every class to {len(counts) - 1}, got none of {counts.argmin()}"
            )

    @property
    def classes(self) -> int:
        """C, how many classes there are."""
        return len(self._orders)

    def order(self, c: int) -> I64:
        """(n_c,) the images of class c, easiest first; of equal scores, the smaller index first."""
        return self._orders[c]

    @cached_property
    def _orders(self) -> list[I64]:
        by_score = np.argsort(self.values, kind="stable")
        return [by_score[self.labels[by_score] == c] for c in range(int(self.labels.max()) + 1)]

    def save(self, path: str | Path) -> None:
        """Writes an .npz without pickles, whole or not at all."""
        with whole_file(Path(path)) as temporary, temporary.open("wb") as file:
            np.savez(file, values=self.values, labels=self.labels, meta=json.dumps(dict(self.meta), sort_keys=True))

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Reads what `save` wrote.

        Raises:
            ValueError: The file is damaged, or is something else; the message names it.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                return cls(file["values"], file["labels"], json.loads(str(file["meta"])))
        except (KeyError, ValueError, EOFError, zipfile.BadZipFile) as why:
            raise ValueError(f"{path}: expected saved Scores, got a file that does not read as such ({why})") from why

    @classmethod
    def of_order(cls, order: I64) -> Scores:
        """Scores that have an order given class by class, as published files do: ranks within the class.

        Args:
            order: (C, n / C) integers; row c holds the indices of class c's images, easiest first.

        Raises:
            TypeError: order holds no integers.
            ValueError: It has another shape, as a flat list of indices or scores has, or is no permutation of 0, ...,
                n - 1.
        """
        if order.dtype.kind not in "iu":
            raise TypeError(f"order: expected integers, got {order.dtype}")
        if order.ndim != 2 or not order.size:
            raise ValueError(f"order: expected shape (C, n / C), a row of indices for each class, got {order.shape}")
        if not np.array_equal(np.sort(order, None), np.arange(order.size)):
            raise ValueError(f"order: expected each of 0 to {order.size - 1} once, got something else")
        values, labels = np.empty(order.size), np.empty(order.size, np.int64)
        values[order] = np.arange(order.shape[1])
        labels[order] = np.arange(len(order))[:, None]
        return cls(values, labels, {"kind": "order"})
