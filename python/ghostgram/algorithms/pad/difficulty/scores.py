"""How hard each training image is: scores with their labels and their file, and how they are computed."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from ghostgram._files import write_arrays
from ghostgram.algorithms.pad.difficulty.scorer import Scorer, Training

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
        meta = json.dumps(dict(self.meta), sort_keys=True)
        write_arrays(Path(path), values=self.values, labels=self.labels, meta=meta)

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


def score(
    make_model: Callable[[], nn.Module],
    images: Tensor,
    labels: Tensor,
    kind: str = "el2n",
    *,
    runs: int = 10,
    epoch: int = 20,
    seed: int = 0,
    training: Training | None = None,
    at_once: int = 128,
    folder: str | Path | None = None,
) -> Scores:
    """How hard each image is: the mean over several models, each trained for a few epochs from weights of its own.

    With logits z and p = softmax(z) of a model in eval mode, an image's score by one model is

    | kind | score |
    |---|---|
    | el2n | `|| p - onehot(y) ||_2` |
    | grand | `|| g ||_2`, g the gradient of its own cross-entropy by all trainable parameters |
    | grand_last | by the last layer's alone: `|| p - onehot(y) ||_2 sqrt(|| h ||^2 + 1)`, h its input, 1 for its bias |
    | loss | cross-entropy, in nats |
    | margin | `max_{c != y} z_c - z_y` |
    | entropy | of p, in nats |
    | forgetting | how often it went from right to wrong between epochs; the number of epochs if it never was right |

    It is the mean of norms, not the norm of a mean. Each is of the image alone: of no batch's mean, so neither its size
    nor a smaller last one matters. The paper fixes neither model nor epochs nor runs: these are this library's.

    Args:
        make_model: Makes a model on the CPU, such as the student of the distillation.
        images: (n, C, H, W) floating point, as the experts will see them: whitened if they are. Models go to their
            device.
        labels: (n,) int64.
        kind: Of the table.
        runs: How many models.
        epoch: After how many epochs a model scores; 0 is at its first weights.
        seed: Of all weights and orders.
        training: By default `Training()`.
        at_once: Images that are scored at a time.
        folder: Where the scores of each finished model are kept. Called again, models that are there are not trained
            again; without it a run that is killed begins anew.

    Returns:
        `Scores`, whose meta has all of these, the model's text and the data's digest.

    Raises:
        TypeError: images are no floating point, or labels no int64.
        ValueError: An argument is out of its range, a score is not finite, or folder has models of other scores.

    Cost:
        runs n (3 epoch + 1) forwards, 2 more for grand; forgetting has one for each epoch, not the last alone.

    Source:
        Paul, Ganguli and Dziugaite (arXiv 2107.07075) for EL2N and GraNd; Toneva et al. (arXiv 1812.05159) for
        forgetting, where what was never learned counts as hardest too.
    """
    scorer = Scorer(make_model, images, labels, kind, epoch, seed, training or Training(), at_once)
    if runs < 1:
        raise ValueError(f"runs: expected at least 1, got {runs}")
    numbers = labels.cpu().numpy()

    def values_of(run: int) -> F64:
        if folder is None:
            return scorer.values(run)
        path, meta = Path(folder) / f"run-{run}.npz", {**scorer.meta, "run": run}
        if not path.exists():
            Scores(scorer.values(run), numbers, meta).save(path)
        found = Scores.load(path)
        if other := {name: found.meta.get(name) for name in meta if found.meta.get(name) != meta[name]}:
            expected = {name: meta[name] for name in other}
            raise ValueError(f"folder: expected scores of {expected}, got those of {other} in {path}")
        return found.values

    values = np.mean([values_of(run) for run in range(runs)], axis=0)
    return Scores(values, numbers, {**scorer.meta, "runs": runs})
