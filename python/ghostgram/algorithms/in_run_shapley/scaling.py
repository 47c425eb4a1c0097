"""What happens to gradients between backward and optimizer.step: clipping, unscaling, or something we must not miss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from ghostgram.taps.sharding import local
from ghostgram.training.gathered import gathered

if TYPE_CHECKING:
    from ghostgram.training.ranks import Ranks


class GradientRecord:
    """Two norms of every gradient after backward, to be compared with what the optimizer gets to see.

    Clipping by norm, globally or by groups of parameters, and a GradScaler's unscaling multiply a gradient by one
    number; its 2-norm and its largest element then change by the same factor, which is the scale of every sample's
    share. Anything else (clipping by value, noise, another backward) changes them differently and is refused.
    A tensor's version counter would be cheaper to look at, but torch's unscaling does not advance it.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], ranks: Ranks) -> None:
        self._ranks = ranks
        present = [p for p in parameters if p.grad is not None]
        self._before = dict(zip(present, _norms(present, ranks), strict=True))

    def norm(self, parameter: nn.Parameter) -> float:
        """The 2-norm of a parameter's gradient as backward left it; 0 where it has none."""
        return self._before[parameter].norm if parameter in self._before else 0.0

    def scales(self, names: Mapping[nn.Parameter, str]) -> dict[nn.Parameter, float]:
        """parameter -> the factor between the gradient that the optimizer reads and that of backward."""
        scales = dict.fromkeys(self._before, 1.0)
        present = [p for p in self._before if p.grad is not None]
        scales.update({p: 0.0 for p in self._before if p.grad is None})
        for parameter, after in zip(present, _norms(present, self._ranks), strict=True):
            before = self._before[parameter]
            if before == after:
                continue
            scale = after.norm / before.norm if before.norm else float("inf")
            if not abs(after.largest - scale * before.largest) <= 1e-3 * after.largest:
                raise RuntimeError(
                    f"{names[parameter]}: its gradient changed between backward and optimizer.step() by more than a "
                    "factor (clipping by value? a backward outside shapley.step()?): its samples' shares are unknown"
                )
            scales[parameter] = scale
        return scales


class _Norms(NamedTuple):
    norm: float
    largest: float


def _norms(parameters: list[nn.Parameter], ranks: Ranks) -> list[_Norms]:
    grads = [local(p.grad.detach()) for p in parameters if p.grad is not None]
    if not grads:
        return []
    norms = gathered(torch._foreach_norm(grads, 2.0))
    if ranks.sharded:
        norms = ranks.over_elements(norms.square()).sqrt()
    # aminmax takes a twentieth of the time of torch's norm of infinite order; a part of a gradient may be empty.
    ends = gathered(end for grad in grads for end in torch.aminmax(grad if grad.numel() else grad.new_zeros(1)))
    largest = ranks.largest_element(ends.view(-1, 2).abs().amax(1))
    return [_Norms(*pair) for pair in zip(norms.tolist(), largest.tolist(), strict=True)]
