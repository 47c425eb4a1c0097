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
class Initial:
    """Images and label logits before the first iteration."""

    chosen: Tensor
    """(ipc classes,) int64, which training images, class by class."""
    images: Tensor
    labels: Tensor
    """(ipc classes,) int64 classes."""
    label_logits: Tensor
    """(ipc classes, classes)"""
    notes: list[str]
    """What could not be done as asked, in words."""


@torch.no_grad()
def initial(
    flat: Flat,
    store: Store,
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
    expert 1's does, and so on. Their label logits are the mean over the experts that are right,

        Y_i = mean_{e: argmax z_i^(e) = y_i} z_i^(e)

    or, where none is, the mean over all experts. init="real": any images, with expert 0's logits.

    Args:
        flat: Of the experts' model.
        store: The experts.
        images: (n, C, H, W) the experts' training images.
        labels: (n,) int64 their classes, 0 <= y < classes.
        classes: How many classes there are.
        ipc: Images per class.
        init: "correct" or "real".
        seed: Of the draw.

    Returns:
        Images and logits, class by class. `notes` says, and a warning repeats, of which classes no expert classifies
        enough images correctly, so that others were taken, and of how many images no expert is right.

    Raises:
        ValueError: A class has fewer than ipc images.

    Cost:
        "correct": a forward pass of expert 0 over all images, of further experts only while images are missing, and of
        every expert over the chosen ones. "real": one of expert 0 over the chosen ones.

    Source:
        DATM (arXiv 2310.05773); where no expert is right its release divides 0 by 0.
    """
    own = labels.cpu().numpy()
    orders = [
        np.flatnonzero(own == c)[permutation(seed, "initial images", (c,), int((own == c).sum()))]
        for c in range(classes)
    ]
    for c, order in enumerate(orders):
        if len(order) < ipc:
            raise ValueError(f"ipc: expected at most {len(order)}, the images of class {c}, got {ipc}")

    def logits(expert: int, of: Tensor) -> Tensor:
        theta = torch.as_tensor(store[expert, store.epochs[-1]]).to(images)
        return torch.cat([flat.logits(theta, part) for part in of.split(_AT_ONCE)])

    notes = []
    if init == "correct":
        rows, short = _correct(orders, ipc, store.experts, lambda e: logits(e, images).argmax(1).cpu().numpy() == own)
        if short:
            notes.append(
                f"no expert classifies {ipc} images of class {', '.join(map(str, short))}: others were taken too"
            )
    else:
        rows = [order[:ipc] for order in orders]
    chosen = torch.from_numpy(np.concatenate(rows)).to(images.device)
    began, truth = images[chosen].clone(), labels[chosen]
    said = torch.stack([logits(e, began) for e in range(store.experts if init == "correct" else 1)])
    if init == "correct":
        right = said.argmax(2) == truth
        if never := int((~right.any(0)).sum()):
            notes.append(
                f"no expert is right on {never} initial images: their label logits are the mean over all experts"
            )
        weights = torch.where(right.any(0), right, True).to(said)
        said = said * (weights / weights.sum(0))[:, :, None]
    for note in notes:
        warnings.warn(f"initial: {note}", stacklevel=2)
    return Initial(chosen, began, truth, said.sum(0), notes)


def _correct(
    orders: Sequence[NDArray[np.int64]], ipc: int, experts: int, is_right: Callable[[int], NDArray[np.bool_]]
) -> tuple[list[NDArray[np.int64]], list[int]]:
    """Of each class the first images that expert 0, then 1, ... is right on; and the classes that had too few."""
    rows = [order[:0] for order in orders]
    for e in range(experts):
        if all(len(row) == ipc for row in rows):
            break
        right = is_right(e)
        rows = [_filled(row, order[right[order]], ipc) for row, order in zip(rows, orders, strict=True)]
    short = [c for c, row in enumerate(rows) if len(row) < ipc]
    return [_filled(row, order, ipc) for row, order in zip(rows, orders, strict=True)], short


def _filled(row: NDArray[np.int64], order: NDArray[np.int64], ipc: int) -> NDArray[np.int64]:
    """A row continued by the first of an order that are not in it, to at most ipc."""
    return np.concatenate([row, order[~np.isin(order, row)][: ipc - len(row)]])
