"""The directions D_k of a step, and what its history did: phi_ik = -<g_i, D_k>.

First order: D_k = P * grad l_k(w). Second order: D_k = P * [grad l_k(w) + H_k (h + Delta) / 2], by that Hessian-vector
product or, cheaper and nearer to the truth, as P * grad l_k at the middle of the step, w + (h + Delta) / 2, and at more
places of a step on which the loss bends.

Where parameters are sharded, gradients, directions and what is computed here are the parts that this process holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ghostgram.algorithms.in_run_shapley.validation import Gradient, ValidationSets
from ghostgram.taps.sharding import local
from ghostgram.taps.uses import sums
from ghostgram.training.gathered import gathered
from ghostgram.training.linearize import Linearised
from ghostgram.training.ranks import Ranks

BENT, CLOSE = 0.2, 0.02
"""Parts of a step's size in loss: by how much twice the change on the first half of the line may differ from what is
predicted of the whole before the whole is measured, and by how much the prediction may then differ from that."""
PARTS = 27
"""Equal parts that a line is cut into at most."""
RESOLVED = 1e-5
"""Changes smaller than this part of the loss are rounding."""

Groups = Mapping[nn.Parameter, dict[str, Any]]
Directions = dict[nn.Parameter, Tensor]
Linearise = Callable[[Mapping[str, Any], Sequence[Tensor], Sequence[Tensor] | None], list[Linearised]]
"""(param_group, its parameters, what the optimizer will read in their .grad or None) -> P and h of each."""


def first_order(
    linearise: Linearise,
    groups: Groups,
    gradients: list[Gradient],
    scaled: Mapping[nn.Parameter, Tensor] | None,
    ranks: Ranks,
) -> tuple[Directions, Directions]:
    """P * gradient, (K, *shape) for every parameter, and its history <gradient_k, h>; uses up the gradients.

    Args:
        linearise: How the optimizer's step is linearised.
        groups: parameter -> its param_group.
        gradients: One per set.
        scaled: The gradients that the optimizer will read, for P after the batch; None for P before it.
        ranks: The processes that hold parts of the parameters.

    Returns:
        The directions, and of every parameter that has a history (K,) on the CPU.
    """
    directions: Directions = {}
    history: Directions = {}
    for group, parameters in together(groups, scaled):
        steps = linearise(group, parameters, None if scaled is None else [scaled[p] for p in parameters])
        for p, (_, h) in zip(parameters, steps, strict=True):
            if h is not None:
                history[p] = torch.stack([dot(gradient[p], h) for gradient in gradients])
        directions |= _times(parameters, [P for P, _ in steps], gradients)
    return directions, dict(zip(history, ranks.over_elements(gathered(history.values())), strict=True))


def preconditioned(
    linearise: Linearise, groups: Groups, gradients: list[Gradient], scaled: Mapping[nn.Parameter, Tensor]
) -> Directions:
    """The directions of `first_order` alone, for P after the batch."""
    directions: Directions = {}
    for group, parameters in together(groups, scaled):
        steps = linearise(group, parameters, [scaled[p] for p in parameters])
        directions |= _times(parameters, [P for P, _ in steps], gradients)
    return directions


def _times(parameters: Sequence[nn.Parameter], Ps: Sequence[Tensor], gradients: list[Gradient]) -> Directions:
    """P * gradient of some parameters, in the dtype that sums are kept in; a single set's gradient is not copied."""
    directions = {}
    for p in parameters:
        of_sets = [gradient.pop(p).detach() for gradient in gradients]
        directions[p] = sums(of_sets[0].unsqueeze(0) if len(of_sets) == 1 else torch.stack(of_sets))
    for k in range(len(gradients)):
        torch._foreach_mul_([directions[p][k] for p in parameters], list(Ps))
    return directions


class Line:
    """The weights on their way from w to w + h and on to w + Delta; `leave` puts them back to the bit.

    Holds two arrays of each parameter's size, w and P. Every `go_to` rounds the weights once.
    """

    def __init__(self, groups: Groups, scaled: Mapping[nn.Parameter, Tensor]) -> None:
        self._groups, self._scaled, self._share = groups, scaled, 0.0
        self._back = {p: local(p).detach().clone() for p in scaled}
        self._P: list[tuple[list[nn.Parameter], list[Tensor]]] = []

    @torch.no_grad()
    def begin(self, linearise: Linearise) -> bool:
        """Moves the weights to w + h; says whether there is an h."""
        has_history = False
        for group, parameters in together(self._groups, self._scaled):
            steps = linearise(group, parameters, [self._scaled[p] for p in parameters])
            self._P.append((parameters, [P for P, _ in steps]))
            for p, (_, h) in zip(parameters, steps, strict=True):
                if h is not None:
                    local(p).add_(h)
                    has_history = True
        return has_history

    @torch.no_grad()
    def go_to(self, share: float) -> None:
        """Moves the weights to w + h - share P G."""
        for parameters, Ps in self._P:
            for p, P in zip(parameters, Ps, strict=True):
                local(p).addcmul_(P.expand_as(self._scaled[p]), self._scaled[p], value=self._share - share)
        self._share = share

    def times(self, gradients: list[Gradient]) -> Directions:
        """P * gradient; uses up the gradients."""
        directions: Directions = {}
        for parameters, Ps in self._P:
            directions |= _times(parameters, Ps, gradients)
        return directions

    @torch.no_grad()
    def leave(self) -> None:
        """Puts the weights back."""
        for p, w in self._back.items():
            local(p).copy_(w)


def along_the_step(
    linearise: Linearise,
    groups: Groups,
    sets: ValidationSets,
    model: nn.Module,
    scaled: Mapping[nn.Parameter, Tensor],
    before: Tensor,
    ranks: Ranks,
) -> tuple[Directions, Tensor]:
    """Second-order directions by one ordinary validation gradient at w + (h + Delta) / 2, by more where the loss bends.

    What the batch does is the change on the line from w + h to w + Delta, f(s) = l_k(w + h - s P G), whose slope is
    f'(s) = -<P * grad l_k, G>, in the middle as on average if f is quadratic. This differs from the Hessian form by
    O(|Delta|^3) and needs no second derivative, so that any attention kernel will do. Where f is not quadratic, as at a
    cliff, the middles of 3, 9 or 27 equal parts are taken, whose mean tends to the Aumann-Shapley value of f.

    Args:
        linearise: How the optimizer's step is linearised.
        groups: parameter -> its param_group.
        sets: The validation sets.
        model: The model, at w.
        scaled: The gradients that the optimizer will read.
        before: (K,) losses at w.
        ranks: The processes that hold parts of the parameters.

    Returns:
        The directions, and the history l_k(w + h) - l_k(w), (K,).

    Cost:
        One linearisation, a validation loss and a gradient; in steps that bend another loss and 2, 8 or 26 more
        gradients.
    """
    line = Line(groups, scaled)

    def at(share: float) -> tuple[Tensor, Directions]:
        """(K,) losses at w + h - share P G, and P times their gradients."""
        line.go_to(share)
        losses, gradients = sets.gradients(model, list(groups))
        return losses, line.times(gradients)

    def slope() -> Tensor:
        """(K,) -<directions, G>."""
        products = gathered(torch.stack([dot(d, scaled[p]) for d in directions[p]]) for p in scaled)
        return -ranks.over_elements(products.sum(0))

    try:
        start = sets.losses(model) if line.begin(linearise) else before
        middle, directions = at(0.5)
        change = slope()
        size = (start - before).abs() + change.abs() + RESOLVED * before.abs()
        if (2 * (middle - start) - change).abs().gt(BENT * size).any():  # the first half of the line, twice
            line.go_to(1.0)
            end, parts = sets.losses(model), 1
            while (end - start - change).abs().gt(CLOSE * size).any() and parts < PARTS:
                parts *= 3
                for d in directions.values():
                    d /= 3
                for part in range(parts):
                    if part % 3 != 1:  # else it has been there: a part's middle is that of its middle third
                        for p, d in at((part + 0.5) / parts)[1].items():
                            directions[p].add_(d, alpha=1 / parts)
                change = slope()
    finally:
        line.leave()
    return directions, start - before


def by_hessian(
    linearise: Linearise,
    groups: Groups,
    sets: ValidationSets,
    model: nn.Module,
    scaled: Mapping[nn.Parameter, Tensor],
) -> tuple[Directions, Tensor]:
    """Second-order directions by Hessian-vector products along the step: the definition, for those who want U2 itself.

    Returns:
        The directions P * [g_k + H_k (h + Delta) / 2], and the history <g_k, h> + h^T H_k h / 2, (K,).
    """
    h: dict[nn.Parameter, Tensor] = {}
    both: dict[nn.Parameter, Tensor] = {}  # (h + Delta) / 2 = h - P G / 2
    for group, parameters in together(groups, scaled):
        grads = [scaled[p] for p in parameters]
        for p, grad, each in zip(parameters, grads, linearise(group, parameters, grads), strict=True):
            h[p] = torch.zeros_like(p) if each.h is None else each.h
            both[p] = h[p] - 0.5 * each.P * grad
    gradients, curved = sets.curvature(model, list(scaled), (both, h))
    history = torch.zeros(len(gradients), dtype=torch.float64)
    for k, (gradient, (H_both, H_h)) in enumerate(zip(gradients, curved, strict=True)):
        history[k] = gathered(dot(gradient[p] + 0.5 * H_h[p], h[p]) for p in scaled).sum()
        for p in scaled:
            gradient[p] = gradient[p] + H_both[p]
    return preconditioned(linearise, {p: groups[p] for p in scaled}, gradients, scaled), history


def together(
    groups: Groups, present: Mapping[nn.Parameter, Tensor] | None = None
) -> Iterator[tuple[dict[str, Any], list[nn.Parameter]]]:
    """Parameters of one group, device and dtype, as many at a time as make good use of one call.

    On a GPU that is many, for every call has a price; on a CPU what a few take in cache, where they go through a dozen
    calls. Those without a gradient in `present` are left out: the optimizer will not touch them.
    """
    held: list[nn.Parameter] = []
    elements, kind = 0, None
    for parameter, group in groups.items():
        if present is not None and parameter not in present:
            continue
        limit = 1 << (20 if parameter.device.type == "cpu" else 24)
        key = (id(group), parameter.device, parameter.dtype)
        numel = local(parameter).numel()
        if held and (key != kind or elements + numel > limit):
            yield groups[held[0]], held
            held, elements = [], 0
        held.append(parameter)
        elements, kind = elements + numel, key
    if held:
        yield groups[held[0]], held


def dot(x: Tensor, y: Tensor) -> Tensor:
    """<x, y> of tensors of one shape, in y's dtype."""
    return torch.dot(x.flatten().to(y.dtype), y.flatten())
