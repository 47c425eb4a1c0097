"""Trains a model for a few epochs and asks it how hard it finds each image."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ghostgram import _arrays
from ghostgram.algorithms.pad import keyed
from ghostgram.algorithms.pad.convnet import initialised
from ghostgram.algorithms.pad.hardness import MEASURES, forgotten
from ghostgram.algorithms.pad.identity import digest_of

FORGETTING = "forgetting"
"""The kind that looks at a model after every epoch, not at the last one alone."""


@dataclass(frozen=True)
class Training:
    """How models that score are trained: SGD on the mean cross-entropy of each batch, without augmentation."""

    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch: int = 128


@dataclass(frozen=True, eq=False)
class Scorer:
    """The scores of single models; see `scores.score` for what they are.

    Raises:
        TypeError: images are no floating point, or labels no int64.
        ValueError: An argument is out of its range; the message names it.
    """

    make_model: Callable[[], nn.Module]
    images: Tensor
    labels: Tensor
    kind: str
    epoch: int
    seed: int
    training: Training
    at_once: int

    def __post_init__(self) -> None:
        _arrays.floating(self.images, "images")
        if self.kind not in (*MEASURES, FORGETTING):
            raise ValueError(f"kind: expected one of {', '.join(MEASURES)}, {FORGETTING}, got {self.kind!r}")
        if self.images.ndim != 4 or not len(self.images):
            raise ValueError(f"images: expected shape (n, C, H, W) with n >= 1, got {tuple(self.images.shape)}")
        if self.labels.dtype != torch.int64:
            raise TypeError(f"labels: expected int64, got {self.labels.dtype}")
        if self.labels.shape != self.images.shape[:1] or self.labels.device != self.images.device:
            expected = f"({len(self.images)},) on {self.images.device}, as images"
            raise ValueError(f"labels: expected {expected}, got {tuple(self.labels.shape)} on {self.labels.device}")
        least = 2 if self.kind == FORGETTING else 0  # nothing is forgotten before the second
        if self.epoch < least:
            raise ValueError(f"epoch: expected at least {least}, got {self.epoch}")
        for name, value in (("at_once", self.at_once), ("batch", self.training.batch)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")

    @cached_property
    def meta(self) -> dict[str, Any]:
        """What scores depend on, up to rounding."""
        return {
            "kind": self.kind,
            "model": repr(self._model(0)),
            "epoch": self.epoch,
            "seed": self.seed,
            "dataset": digest_of(self.images, self.labels),
            **asdict(self.training),
        }

    def values(self, run: int) -> NDArray[np.float64]:
        """(n,) the scores of one model; which one decides its weights, orders and noise."""
        images, labels, how = self.images, self.labels, self.training
        with _fixed(images.device, self.seed, run):
            model = self._model(run).to(images.device, images.dtype)
            sgd = torch.optim.SGD(model.parameters(), how.lr, momentum=how.momentum, weight_decay=how.weight_decay)
            parts = [*zip(torch.split(images, self.at_once), torch.split(labels, self.at_once), strict=True)]
            correct = []
            for epoch in range(self.epoch):
                order = torch.from_numpy(keyed.permutation(self.seed, "score order", (run, epoch), len(images)))
                _train(model.train(), sgd, images, labels, torch.split(order.to(images.device), how.batch))
                if self.kind == FORGETTING:
                    correct.append(_correct(model.eval(), parts))
            if self.kind == FORGETTING:
                found = forgotten(torch.stack(correct))
            else:
                measure = MEASURES[self.kind](model.eval())
                found = torch.cat([measure(x, y) for x, y in parts])
        values: NDArray[np.float64] = found.double().cpu().numpy()
        return values

    def _model(self, run: int) -> nn.Module:
        return initialised(self.make_model, self.seed, "score model", (run,))


def _train(model: nn.Module, sgd: torch.optim.SGD, images: Tensor, labels: Tensor, batches: Sequence[Tensor]) -> None:
    for batch in batches:
        sgd.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()  # type: ignore[no-untyped-call]
        sgd.step()


@torch.no_grad()
def _correct(model: nn.Module, parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    return torch.cat([model(x).argmax(1) == y for x, y in parts])


@contextmanager
def _fixed(device: torch.device, seed: int, run: int) -> Iterator[None]:
    """Kernels of convolutions that give the same bits again, without TF32, and noise (as dropout's) by key."""
    devices = [device] if device.type == "cuda" else []
    kernels = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    with torch.random.fork_rng(devices=devices), kernels:
        torch.manual_seed(keyed.integer(seed, "score noise", (run,), 0, 2**53))
        yield
