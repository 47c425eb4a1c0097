"""What is right: gradients of one sample at a time from plain autograd, their products in float64."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from zoo.entry import Batch, losses

DIRECTIONS = 2


class Truth:
    """The gradients of a model's samples, and random directions to contract them with.

    Attributes:
        names: Of the trainable parameters.
        gradients: (B, N) float64, sample by sample over all trainable parameters, in the order of `names`.
        plain: (N,) float64, the gradient of the whole batch's loss from one ordinary backward.
        directions: One (K, *shape) float32 per parameter. Each is scaled to its parameter's gradient, so that no
            parameter's dots drown in another's.
        norms: (P,) the samples' sum of |g_i|, by parameter. Below a tenth of the largest it counts as that much: it may
            be nothing but rounding (the bias of attention's keys has gradient 0).
    """

    def __init__(self, model: nn.Module, batch: Batch, context: Callable[[], AbstractContextManager]) -> None:
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.names = list(self._parameters)
        self._sizes = [p.numel() for p in self._parameters.values()]
        samples = len(batch.labels)
        with context():
            self.plain = self._gradient(losses(model, batch).sum())
            rows = [self._gradient(losses(model, batch.rows(i, i + 1)).sum()) for i in range(samples)]
        self.gradients = torch.stack(rows)
        norms = torch.stack([part.norm(dim=1).sum() for part in self.gradients.split(self._sizes, 1)])
        self.norms = norms.clamp(min=0.1 * norms.max())
        generator = torch.Generator().manual_seed(2)
        self.directions = [
            torch.randn(DIRECTIONS, *p.shape, generator=generator) / norm
            for p, norm in zip(self._parameters.values(), self.norms.tolist(), strict=True)
        ]

    def _gradient(self, loss: Tensor) -> Tensor:
        parameters = list(self._parameters.values())
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        pairs = zip(found, parameters, strict=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).double().flatten() for g, p in pairs])

    def terms(self) -> Tensor:
        """(P, B, K): the dots of every parameter, by parameter, sample and direction."""
        parts = zip(self.gradients.split(self._sizes, 1), self.directions, strict=True)
        return torch.stack([g @ d.flatten(1).double().T for g, d in parts])

    def error(self, dots: Tensor) -> float:
        """max |dots - right| over samples and directions, over the largest sum of a sample's absolute terms."""
        terms = self.terms()
        return float((dots.double() - terms.sum(0)).abs().max() / terms.abs().sum(0).max())

    def additive(self) -> float:
        """How far the samples' gradients are from summing to the batch's, parameter by parameter, relative."""
        return self.gradient_error(self.gradients.sum(0))

    def gradient_error(self, gradient: Tensor) -> float:
        """The largest distance |g - plain| of one parameter over its samples' sum of |g_i|."""
        differences = (gradient - self.plain).split(self._sizes)
        return float((torch.stack([d.norm() for d in differences]) / self.norms).max())
