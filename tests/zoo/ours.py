"""What this library says of a model of the zoo under a condition, beside what is right."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import ghostgram as gg
from zoo.conditions import Condition, checkpoint
from zoo.entry import SAMPLES, Batch, Entry, losses
from zoo.truth import DIRECTIONS, Truth


@dataclass(frozen=True)
class Found:
    """What came out of one model under one condition.

    Attributes:
        error: Of the dots, see `Truth.error`.
        gradient_error: Of the .grad that the scored backward left, see `Truth.gradient_error`.
        trainable: Elements of the trainable parameters.
        covered: Elements of the parameters in the coverage table.
        tapped: Those of them that taps score; forward mode scores the others.
    """

    error: float
    gradient_error: float
    trainable: int
    covered: int
    tapped: int


class Setting:
    """A model and its batch under a condition; `model()` makes it anew, checkpoints and all."""

    def __init__(self, entry: Entry, condition: Condition) -> None:
        self.entry, self.condition = entry, condition
        self.why_not = entry.refuses.get(condition.name) or condition.why_not(entry, entry.build())
        if not self.why_not:
            self.batch: Batch = condition.batch(entry, entry.batch())

    def model(self, checkpointed: bool = True) -> nn.Module:
        model = self.entry.build()
        self.condition.change(model)
        if checkpointed and self.condition.recompute is not None:
            checkpoint(model, self.condition.recompute)
        return model

    def truth(self) -> Truth:
        """From a model without checkpoints."""
        return Truth(self.model(checkpointed=False), self.batch, self.condition.context)


def linear(model: nn.Module, directions: list[Tensor]) -> Tensor:
    """A validation loss whose gradient is `directions`, at any weights."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.stack([(p * d).sum() for p, d in zip(trained, directions, strict=True)]).sum()


def shapley_dots(setting: Setting, truth: Truth) -> Found:
    """The dots <g_i, D_k> of InRunShapley: with SGD and a learning rate of 1, phi = -<g_i, gradient of validation>."""
    model, condition = setting.model(), setting.condition
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1.0)
    validation = {str(k): partial(linear, directions=[d[k] for d in truth.directions]) for k in range(DIRECTIONS)}
    late = {"v_state": "post", "late": condition.late} if condition.late else {}
    shapley = gg.InRunShapley(model, optimizer, validation, fallback="jvp", **late)
    size = SAMPLES // condition.microbatches
    with shapley.step():
        for first in range(0, SAMPLES, size):
            rows = setting.batch.rows(first, first + size)

            def shares(rows: Batch = rows) -> Tensor:
                with condition.context():
                    return losses(model, rows)

            with shapley.samples(list(range(first, first + size)), losses=shares):
                shares().sum().backward()
    gradient = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).double().flatten() for p in trained])
    optimizer.step()
    log = shapley.step_log()
    dots = -torch.tensor([log[f"phi_{k}"].to_pylist() for k in range(DIRECTIONS)], dtype=torch.float64).T
    coverage = shapley.coverage()
    return Found(
        truth.error(dots),
        truth.gradient_error(gradient),
        trainable=sum(p.numel() for p in trained),
        covered=sum(row.numel for row in coverage.rows),
        tapped=sum(p.numel() for p in coverage.scored.values()),
    )
