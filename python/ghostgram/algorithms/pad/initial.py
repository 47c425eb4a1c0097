"""Where a distillation starts: real training images of each class, and what the experts say of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ghostgram.algorithms.pad.flat import Flat
from ghostgram.algorithms.pad.keyed import permutation
from ghostgram.algorithms.pad.store import Store

_AT_ONCE = 1024  # images of a forward pass


@dataclass(frozen=True)
class Panel:
    """The experts as they are after their last epoch."""

    flat: Flat
    store: Store

    @torch.no_grad()
    def logits(self, expert: int, images: Tensor) -> Tensor:
        """(n, classes) of an expert."""
        theta = torch.tensor(self.store[expert, self.store.epochs[-1]]).to(images)
        return torch.cat([self.flat.logits(theta, part) for part in torch.split(images, _AT_ONCE)])

    def labels(self, images: Tensor, truth: Tensor) -> tuple[Tensor, int]:
        """Label logits of images, and of how many no expert is right.

            Y_i = mean_{e: argmax z_i^(e) = y_i} z_i^(e);    where no expert is right, the mean over all

        Args:
            images: (n, C, H, W)
            truth: (n,) int64 classes.
        """
        said = torch.stack([self.logits(e, images) for e in range(self.store.experts)])
        right = said.argmax(2) == truth
        weights = torch.where(right.any(0), right, True).to(said)
        return (said * (weights / weights.sum(0))[:, :, None]).sum(0), int((~right.any(0)).sum())


@dataclass(frozen=True)
class Initial:
    """Images and labels before the first iteration."""

    images: Tensor
    """(ipc classes, C, H, W), class by class."""
    labels: Tensor
    """(ipc classes,) int64 classes."""
    label_logits: Tensor
    """(ipc classes, classes)"""
    notes: list[str]
    """What could not be done as asked, in words."""


def initial(
    panel: Panel,
    images: Tensor,
    labels: Tensor,
    *,
    classes: int,
    ipc: int,
    init: Literal["correct", "real"] = "correct",
    seed: int = 0,
) -> Initial:
    """Draws the images that a distillation starts from, and their label logits.

    init="correct": of each class, random images that expert 0's last snapshot classifies correctly, then ones that
    expert 1's does, and so on; their logits are `Panel.labels`. init="real": any images, with expert 0's logits.

    Args:
        panel: The experts.
        images: (n, C, H, W) the experts' training images.
        labels: (n,) int64 their classes, 0 <= y < classes.
        classes: How many classes there are.
        ipc: Images per class.
        init: "correct" or "real".
        seed: Of the draw.

    Returns:
        Images and labels. `notes` says, and a warning repeats, of which classes no expert classifies enough images
        correctly, so that others were taken, and of how many images no expert is right.

    Raises:
        ValueError: A class has fewer than ipc images.

    Cost:
        "correct": a forward pass of expert 0 over all images, of further experts only while images are missing, and of
        every expert over the chosen ones. "real": one of expert 0 over the chosen ones.

    Source:
        DATM (arXiv 2310.05773); where no expert is right its release divides 0 by 0.
    """
    own = labels.cpu().numpy()
    members = [np.flatnonzero(own == c) for c in range(classes)]
    for c, ids in enumerate(members):
        if len(ids) < ipc:
            raise ValueError(f"ipc: expected at most {len(ids)}, the images of class {c}, got {ipc}")
    orders = [ids[permutation(seed, "initial images", (c,), len(ids))] for c, ids in enumerate(members)]
    notes = []
    if init == "correct":
        orders, short = _correct_first(
            orders, ipc, panel.store.experts, lambda e: panel.logits(e, images).argmax(1).cpu().numpy() == own
        )
        if short:
            named = ", ".join(map(str, short))
            notes.append(f"no expert classifies {ipc} images of class {named} correctly: others were taken too")
    chosen = torch.from_numpy(np.concatenate([order[:ipc] for order in orders])).to(images.device)
    began, truth = images[chosen], labels[chosen]
    if init == "correct":
        logits, never = panel.labels(began, truth)
        if never:
            notes.append(f"no expert is right on {never} initial images: their labels are the mean over all experts")
    else:
        logits = panel.logits(0, began)
    for note in notes:
        warnings.warn(f"initial: {note}", stacklevel=2)
    return Initial(began, truth, logits, notes)


def _correct_first(
    orders: Sequence[NDArray[np.int64]], ipc: int, experts: int, is_right: Callable[[int], NDArray[np.bool_]]
) -> tuple[list[NDArray[np.int64]], list[int]]:
    """Orders in which those that expert 0, then 1, ... is right on come first; and the classes with fewer than ipc."""
    rows = [order[:0] for order in orders]
    for e in range(experts):
        if all(len(row) >= ipc for row in rows):
            break
        right = is_right(e)
        rows = [_continued(row, order[right[order]]) for row, order in zip(rows, orders, strict=True)]
    short = [c for c, row in enumerate(rows) if len(row) < ipc]
    return [_continued(row, order) for row, order in zip(rows, orders, strict=True)], short


def _continued(row: NDArray[np.int64], order: NDArray[np.int64]) -> NDArray[np.int64]:
    """A row, and then those of an order that are not in it."""
    return np.concatenate([row, order[~np.isin(order, row)]])
