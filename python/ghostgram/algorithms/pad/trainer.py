"""The training of a group of experts, that goes on exactly where it was killed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ghostgram.algorithms.pad import keyed
from ghostgram.algorithms.pad.augment import Dsa
from ghostgram.algorithms.pad.convnet import initialised
from ghostgram.algorithms.pad.flat import Flat
from ghostgram.algorithms.pad.gradients import Batch, augmented, gradients, predictions, training
from ghostgram.algorithms.pad.gsam import gsam_step
from ghostgram.algorithms.pad.recorder import Recorder
from ghostgram.algorithms.pad.store import DTYPES, ROWS, Line, digest


class DivergedError(RuntimeError):
    """The weights of an expert cannot be kept, as they are not finite; the message names it and the epoch."""


@dataclass(frozen=True)
class Trainer:
    """Everything that the weights of an expert depend on, and where they go."""

    recorder: Recorder
    make_model: Callable[[], nn.Module]
    images: Tensor
    labels: Tensor
    indices: Callable[[int], NDArray[np.int64]]
    """From an epoch, counted from 0, to the images that it is trained on."""
    augment: Dsa | None
    validation: tuple[Tensor, Tensor] | None
    seed: int
    lr: float
    rho: float
    alpha: float
    epochs: int
    batch: int

    def train(self, experts: Sequence[int], wait: bool) -> bool:
        """Brings a group to its last epoch from wherever it is; gives False, without `wait`, if others have it."""
        with self.recorder.taken(experts[0], wait) as ours:
            if ours:
                self._train(experts)
                self.recorder.finish(experts[0])
        return ours

    def _train(self, experts: Sequence[int]) -> None:
        done, weights = self._found(experts)
        if done == self.epochs:
            return
        models = [initialised(self.make_model, self.seed, "expert", (expert,)) for expert in experts]
        flat = Flat(models[0].to(self.images.device))
        if weights is None:
            weights = torch.stack([flat.vector(model).to(self.images.device) for model in models])
            self._record(flat, experts, 0, weights)
        for epoch in range(max(done, 0), self.epochs):
            weights, losses, accuracies = self._epoch(flat, experts, epoch, weights)
            self._record(flat, experts, epoch + 1, weights, losses, accuracies)

    def _found(self, experts: Sequence[int]) -> tuple[int, Tensor | None]:
        """The epochs that are done, and the weights after them; none of both where the seed has to begin."""
        saved = self.recorder.checkpoint(experts[0])
        done = self.epochs if saved is None else saved[0]
        unsound = self.recorder.unsound(experts, done)
        if not unsound:
            return done, None if saved is None else torch.from_numpy(saved[1]).to(self.images.device)
        if lost := [place for place, recorded in unsound.items() if recorded or saved]:
            warnings.warn(
                f"{self.recorder.folder / ROWS}: expert {lost[0][0]}, epoch {lost[0][1]} is not what was recorded: "
                f"experts {experts[0]} to {experts[-1]} are trained again from their seed",
                stacklevel=2,
            )
        return -1, None

    def _epoch(
        self, flat: Flat, experts: Sequence[int], epoch: int, weights: Tensor
    ) -> tuple[Tensor, list[float], list[float]]:
        """The weights (E, P) after an epoch, and its mean loss and accuracy of each expert."""
        kept = self.indices(epoch)
        orders = [kept[keyed.permutation(self.seed, "expert batches", (e, epoch), len(kept))] for e in experts]
        device = self.images.device
        totals = torch.zeros(2, len(experts), dtype=torch.float64, device=device)
        with training(flat, device, self.seed, "expert noise", (experts[0], epoch)):
            for step, rows in enumerate(torch.split(torch.from_numpy(np.stack(orders)), self.batch, dim=1)):
                x = augmented(self.augment, [(e, epoch, step) for e in experts], self.images, rows)
                y = self.labels[rows.to(device)]
                seen: list[Batch] = []

                def gradient(at: Tensor, x: Tensor = x, y: Tensor = y, seen: list[Batch] = seen) -> Tensor:
                    seen.append(gradients(flat, at, x, y))
                    return seen[-1].gradients

                weights = gsam_step(weights, gradient, self.lr, self.rho, self.alpha)
                right = (seen[0].logits.argmax(-1) == y).sum(1)
                totals += torch.stack([seen[0].losses.double() * rows.shape[1], right.double()])
        losses, accuracies = (totals / len(kept)).tolist()
        return weights, losses, accuracies

    def _record(
        self,
        flat: Flat,
        experts: Sequence[int],
        epoch: int,
        weights: Tensor,
        losses: Sequence[float] | None = None,
        accuracies: Sequence[float] | None = None,
    ) -> None:
        trained = weights.to("cpu", copy=True).numpy()
        with np.errstate(over="ignore"):
            rows = trained.astype(DTYPES[self.recorder.header["dtype"]])
        if len(lost := np.flatnonzero(~np.isfinite(rows).all(1))):
            raise DivergedError(
                f"expert {experts[lost[0]]}, epoch {epoch}: expected finite weights in {rows.dtype}: "
                f"lr {self.lr} or rho {self.rho} is too large for this model"
            )
        if self.validation is not None:
            images, labels = self.validation
            accuracies = [float((predictions(flat, w, images) == labels).double().mean()) for w in weights]
        lines = [
            Line(
                expert, epoch, digest(row), losses[i] if losses else None, accuracies[i] if accuracies else None,
                _distance(row, trained[i]),
            )
            for i, (expert, row) in enumerate(zip(experts, rows, strict=True))
        ]  # fmt: skip
        is_kept = epoch in self.recorder.header["kept"]
        self.recorder.write(dict(zip([(e, epoch) for e in experts], rows, strict=True)) if is_kept else {}, lines)
        self.recorder.save(experts[0], epoch, trained)


def _distance(stored: NDArray[Any], trained: NDArray[np.float32]) -> float:
    """||stored - trained|| / ||trained||."""
    exact = trained.astype(np.float64)
    return float(np.linalg.norm(stored - exact) / max(np.linalg.norm(exact), np.finfo(np.float64).tiny))
