"""What the label backends have in common: their face, what they return, and the constant between their expansions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ghostgram.algorithms.mates.labels.optimizer_state import OptimizerView
from ghostgram.algorithms.mates.labels.reference import Reference
from ghostgram.algorithms.mates.labels.task import Task


class Influence(NamedTuple):
    """What one update on each of n documents alone would do, all on the CPU in float64."""

    values: Tensor
    """(n, R) influence on every reference, -(L_r(theta_x) - L_r(theta)), nats per reference token; higher is better."""
    norms: Tensor
    """(n,) norm of the document's gradient over all trainable parameters, before clipping; nan where none is taken."""
    clip: Tensor
    """(n,) the factor that clipping gives it, c_x; nan where no norm is taken."""
    own_loss: Tensor
    """(n,) the document's own loss at theta, nats per token."""


class LabelBackend(Protocol):
    """One way to tell the influence of documents; constructed as `Backend(model, view, references, task)`."""

    name: str

    def why_not(self) -> str | None:
        """The reason why this backend cannot run here, or None."""

    def prepare(self) -> None:
        """What is needed once a stage: reference losses and gradients, the snapshot."""

    def influence(self, ids: Tensor, mask: Tensor) -> Influence:
        """The influence of documents (n, T), each as if it were the only one."""

    def flops(self, tokens: int) -> float:
        """What the influence of one document of so many tokens costs."""


def levels(view: OptimizerView, references: Sequence[Reference], task: Task) -> tuple[Tensor, Tensor]:
    """Base losses and null gains, (R,) float64 each: L_r(theta), and L_r(theta) - L_r(theta_null).

    A first-order backend sees only what comes on top of the step that momentum and weight decay make by themselves;
    with the null gain added all backends report the same quantity.
    """
    base = torch.tensor([each.loss(view.model, task) for each in references], dtype=torch.float64)
    with view.at_null():
        null = torch.tensor([each.loss(view.model, task) for each in references], dtype=torch.float64)
    return base, base - null
