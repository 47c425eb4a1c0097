"""What happens to gradients between backward and optimizer.step: clipping, unscaling, or something we must not miss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class _Before:
    grad: Tensor
    version: int
    norm: float
    largest: float


class GradientRecord:
    """Two norms of every gradient after backward, to be compared with what the optimizer gets to see.

    Clipping by norm, globally or by groups of parameters, and a GradScaler's unscaling multiply a gradient by one
    number; its 2-norm and its largest element then change by the same factor, which is the scale of every sample's
    share. Anything else (clipping by value, noise, another backward) changes them differently and is refused.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        present = [p for p in parameters if p.grad is not None]
        self._before: dict[nn.Parameter, _Before] = {}
        for parameter, norm, largest in zip(present, *_norms([p.grad for p in present]), strict=True):
            assert parameter.grad is not None
            self._before[parameter] = _Before(parameter.grad, parameter.grad._version, norm, largest)

    def scales(self, names: Mapping[nn.Parameter, str]) -> dict[nn.Parameter, float]:
        """parameter -> the factor between the gradient that the optimizer reads and that of backward."""
        scales = {p: 1.0 for p in self._before}
        changed = []
        for parameter, before in self._before.items():
            if parameter.grad is None:
                scales[parameter] = 0.0
            elif parameter.grad is not before.grad or parameter.grad._version != before.version:
                changed.append(parameter)
        for parameter, norm, largest in zip(changed, *_norms([p.grad for p in changed]), strict=True):
            before = self._before[parameter]
            if before.norm == 0.0 and norm == 0.0:
                continue
            scale = norm / before.norm if before.norm else float("inf")
            if not abs(largest - scale * before.largest) <= 1e-3 * largest:
                raise RuntimeError(
                    f"{names[parameter]}: its gradient changed between backward and optimizer.step() by more than a "
                    "factor (clipping by value? a backward outside shapley.step()?): its samples' shares are unknown"
                )
            scales[parameter] = scale
        return scales


def _norms(grads: list[Tensor | None]) -> tuple[list[float], list[float]]:
    tensors = [g.detach() for g in grads if g is not None]
    if not tensors:
        return [], []
    return tuple(  # type: ignore[return-value]
        [float(n) for n in torch._foreach_norm(tensors, order)] for order in (2.0, float("inf"))
    )
