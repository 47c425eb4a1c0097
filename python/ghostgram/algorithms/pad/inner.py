"""The inner loop: N steps of SGD on the synthetic set, from one set of weights to another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ghostgram.algorithms.pad.flat import Flat
from ghostgram.algorithms.pad.mask import Mask

Batches = Callable[[int], Tensor]
Augment = Callable[[int, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """What one iteration of distillation matches: an expert's stretch, and N steps of a student along it.

    Args:
        flat: The student's layout.
        start: (P,) the expert's weights that the student starts from, float32 or float64.
        target: (P,) the later ones that it should reach.
        mask: Which scalars of them count.
        steps: N, at least 1.
        batches: Step i -> (B,) int64 indices of the synthetic images of its batch, an image any number of times.
        augment: (step, (n, ...) images, (n,) their indices) -> (n, ...) augmented images. Differentiable, and the same
            whenever it is called again for the same step and index, whatever else is in the batch: it is replayed.
        momentum: mu of the inner steps; 0 in all published settings.

    Raises:
        ValueError: Shapes or dtypes do not fit, there is no step, or momentum is not in [0, 1).
    """

    flat: Flat
    start: Tensor
    target: Tensor
    mask: Mask
    steps: int
    batches: Batches
    augment: Augment
    momentum: float = 0.0

    def __post_init__(self) -> None:
        if self.start.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"start: expected float32 or float64, got {self.start.dtype}")
        for name, theta in (("start", self.start), ("target", self.target)):
            if theta.shape != (self.flat.P,) or theta.dtype != self.start.dtype:
                raise ValueError(
                    f"{name}: expected ({self.flat.P},) {self.start.dtype}, got {tuple(theta.shape)} {theta.dtype}"
                )
        if self.steps < 1:
            raise ValueError(f"steps: expected at least 1, got {self.steps}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum: expected 0 <= momentum < 1, got {self.momentum}")


class State(NamedTuple):
    """Where the student is before a step."""

    theta: Tensor
    """(P,)"""
    v: Tensor | None
    """(P,) the momentum buffer; None without momentum."""


class Piece(NamedTuple):
    """A part of a step's batch, small enough for memory."""

    indices: Tensor
    """(n,) of its images in the set."""
    share: float
    """n / B: what it weighs in the step's loss."""


@dataclass(frozen=True)
class Inner:
    """The student's steps on a synthetic set.

    Step i takes theta -> theta - beta_i g_i, with g_i the gradient of l(theta; A_i(X_b), Y_b), b the batch of step i;
    with momentum v -> mu v + g_i, theta -> theta - beta_i v.

    Args:
        problem: Where from, and how.
        images: (n, ...) X.
        labels: (n, classes) logits of soft labels Y, or (n,) int64 classes.
        beta: (N,) step sizes.
        chunk: At most so many images pass through the student at once.
    """

    problem: Problem
    images: Tensor
    labels: Tensor
    beta: Tensor
    chunk: int | None

    def pieces(self, step: int) -> list[Piece]:
        """The batch of a step, cut into pieces."""
        batch = self.problem.batches(step)
        if batch.ndim != 1 or not len(batch) or batch.dtype != torch.int64:
            raise ValueError(f"batches: expected (B,) int64 for step {step}, got {tuple(batch.shape)} {batch.dtype}")
        return [Piece(part, len(part) / len(batch)) for part in torch.split(batch, self.chunk or len(batch))]

    @property
    def soft(self) -> bool:
        """Whether labels are logits of soft ones."""
        return self.labels.is_floating_point()

    @property
    def learned(self) -> dict[str, Tensor]:
        """What of the set has a gradient: "images", and "labels" where they are soft."""
        return {"images": self.images} | ({"labels": self.labels} if self.soft else {})

    def logits(self, theta: Tensor, step: int, piece: Piece, images: Tensor) -> Tensor:
        """(n, classes) of a piece's images, given as they are before augmentation."""
        return self.problem.flat.logits(theta, self.problem.augment(step, images, piece.indices))

    def loss(self, theta: Tensor, step: int, piece: Piece, images: Tensor, labels: Tensor) -> Tensor:
        """What a piece adds to the step's mean cross-entropy."""
        targets = labels.softmax(1) if self.soft else labels
        return piece.share * functional.cross_entropy(self.logits(theta, step, piece, images), targets)

    def slope(self, logits: Tensor, along: Tensor, piece: Piece, labels: Tensor) -> Tensor:
        """What `loss` gains per unit of movement of the logits along a direction: (softmax - targets) . along."""
        targets = labels.softmax(1) if self.soft else functional.one_hot(labels, logits.shape[1])
        return piece.share * ((logits.softmax(1) - targets) * along).sum(1).mean()

    def gradient(self, theta: Tensor, step: int) -> Tensor:
        """(P,) g_i; with a graph where theta is in one."""
        graph = theta.requires_grad
        weights, total = theta if graph else theta.detach().requires_grad_(), torch.zeros_like(theta)
        for piece in self.pieces(step):
            loss = self.loss(weights, step, piece, self.images[piece.indices], self.labels[piece.indices])
            total = total + torch.autograd.grad(loss, weights, create_graph=graph)[0]
        return total

    def step(self, state: State, step: int, gradient: Tensor) -> State:
        """The state after a step of this gradient."""
        mu, v = self.problem.momentum, state.v
        v = gradient if v is None else mu * v + gradient
        return State(state.theta - self.beta[step] * v, v if mu else None)

    def start(self) -> State:
        """The state before the first step."""
        theta = self.problem.start.detach()
        return State(theta, torch.zeros_like(theta) if self.problem.momentum else None)

    def run(self, state: State, first: int, last: int) -> Iterator[State]:
        """The states after the steps first, ..., last - 1."""
        for step in range(first, last):
            state = self.step(state, step, self.gradient(state.theta, step))
            yield state
