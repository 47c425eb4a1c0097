"""in_run_shapley: the whole run as one call, for those who have no loop of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ghostgram.algorithms.in_run_shapley.engine import InRunShapley
from ghostgram.algorithms.in_run_shapley.validation import Validation


@dataclass(frozen=True)
class ShapleyResult:
    """What a run found; every table is a pyarrow.Table."""

    values: Any
    """id, set, value (positive = the sample lowered the set's loss), steps."""
    ledger: Any
    """Per step and set: predicted and measured change of the validation loss."""
    step_log: Any
    """Per step and sample: the raw phi of every set (value = -phi)."""
    losses: list[float]
    """The training loss of every step."""


def in_run_shapley(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Any],
    validation: Validation | Mapping[str, Validation],
    loss: Callable[[nn.Module, Any], Tensor],
    *,
    ids: Callable[[Any], Tensor | Sequence[int]] = lambda batch: batch["id"],
    shares: Callable[[nn.Module, Any], Tensor] | None = None,
    order: int = 1,
    max_norm: float | None = None,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    log: str | Path | None = None,
    on_step: Callable[[int, float], None] | None = None,
    **options: Any,
) -> ShapleyResult:
    """Trains a model on batches and values every sample of every batch on the way.

    One pass over `batches`: for each, a scored backward, clipping if asked for, the optimizer's and the scheduler's
    step. See `InRunShapley` for the formula, the sign, the costs and the errors.

    Args:
        model: The model to train.
        optimizer: torch.optim.SGD, Adam or AdamW over its parameters.
        batches: The batches, in order; repeat them for more epochs (a sample's value adds up).
        validation: A callable model -> scalar loss, or a dict of them.
        loss: (model, batch) -> scalar training loss.
        ids: batch -> (B,) integer sample ids; by default the batch's "id".
        shares: (model, batch) -> (B,) every sample's share of that loss, whose sum it is; needed for late="forward",
            fallback="jvp" and audits.
        order: 1 or 2.
        max_norm: Clip the global gradient norm to this before each step.
        scheduler: Stepped after the optimizer.
        log: Folder for the Parquet log.
        on_step: Called with the step's number and training loss; for progress bars.
        **options: Passed to `InRunShapley`.

    Returns:
        A `ShapleyResult`.
    """
    shapley = InRunShapley(model, optimizer, validation, order, log, **options)
    losses, again = [], shares or loss
    for number, batch in enumerate(batches):
        with shapley.step(ids=ids(batch), losses=partial(again, model, batch)):
            value = loss(model, batch)
            value.backward()  # type: ignore[no-untyped-call]
        if max_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
        losses.append(float(value.detach()))
        if on_step is not None:
            on_step(number, losses[-1])
    result = ShapleyResult(shapley.values(), shapley.ledger(), shapley.step_log(), losses)
    shapley.close()
    return result
