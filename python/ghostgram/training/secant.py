"""The secant of an optimizer's step, from no gradient to the batch's: what the samples do to the step, all of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ghostgram.taps.sharding import local
from ghostgram.training.linearize import Linearised, linearize, local_state


def secant(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], parameters: Sequence[Tensor], grads: Sequence[Tensor]
) -> list[Linearised]:
    """P and h of the secant `h - P * G` of the real step f: `h = f(0)` and `P = -(f(G) - f(0)) / G`, elementwise.

    The step that frozen state gives (`linearize` with grads) is the real one too, but not without the batch: its
    history is shortened by a second moment that the batch has made. Without the batch the momentum would go further,
    and the samples that shorten it must answer for that. Here they do: h is the real step on no gradient, and
    `sum_i P * g_i = f(0) - f(G)` is all that the batch changes. For a loss linear in the step, `-<grad l * P, g_i>` is
    the Aumann-Shapley value `int_0^1 <grad l, f'(s G) * g_i> ds` exactly, for f acts on every element by itself:

        P = lr / (1 - b1^t) * [ (1-b1) / A(G) - m_0 / (A(0) A(G)) * (A(G) - A(0)) / G ],    A = sqrt(vhat) + eps,

    m_0 being the first moment on no gradient; `linearize` has the first term alone. For SGD both are the same, and so
    they are in Adam's first step.

    Args:
        optimizer: SGD, Adam or AdamW, with its state as before the step.
        group: The parameters' param_group.
        parameters: The parameters, before the step.
        grads: What the optimizer will read in `.grad`.

    Returns:
        `Linearised(P, h)` of each parameter; where grad is zero, P is the limit.

    Cost:
        About 25 operations an element, two arrays of each parameter's size.

    Source:
        Aumann and Shapley, Values of Non-Atomic Games (1974); derivation and figures:
        docs/algorithms/in_run_shapley_fidelity.md.
    """
    if isinstance(optimizer, torch.optim.SGD):
        return linearize(optimizer, group, parameters, grads)
    decoupled = isinstance(optimizer, torch.optim.AdamW) or bool(group.get("decoupled_weight_decay"))
    with torch.no_grad():
        return [
            _adam(group, local(w), local_state(optimizer, w), local(grad), decoupled)
            for w, grad in zip(parameters, grads, strict=True)
        ]


def _adam(group: Mapping[str, Any], w: Tensor, state: Mapping[str, Any], grad: Tensor, decoupled: bool) -> Linearised:
    lr, decay, eps = float(group["lr"]), float(group["weight_decay"]), float(group["eps"])
    beta1, beta2 = (float(beta) for beta in group["betas"])
    sign = -1.0 if group["maximize"] else 1.0
    steps = float(state["step"]) + 1.0 if state else 1.0
    rate, correction = lr / (1.0 - beta1**steps), 1.0 - beta2**steps

    # What Adam reads is `constant` on no gradient, and `constant + read` on the batch's.
    read, constant = sign * grad, torch.zeros_like(w) if decoupled else decay * w
    first, second = (1.0 - beta1) * constant, (1.0 - beta2) * constant.square()
    if state:
        first += beta1 * state["exp_avg"]
        second += beta2 * state["exp_avg_sq"]
    growth = (1.0 - beta2) * (2.0 * constant + read)  # of the second moment, over read
    grown = second + growth * read
    if group["amsgrad"] and state:
        held = torch.maximum(second, state["max_exp_avg_sq"]), torch.maximum(grown, state["max_exp_avg_sq"])
        quotient = torch.where(read != 0, (held[1] - held[0]) / read, 0.0)
        growth = torch.where((held[0] == second) & (held[1] == grown), growth, quotient)
        second, grown = held
    root, root_grown = (second / correction).sqrt(), (grown / correction).sqrt()
    A, A_grown = root + eps, root_grown + eps
    both = root + root_grown
    lengthening = torch.where(both > 0, growth / (correction * both), 0.0)  # (A_grown - A) / read
    P = rate * ((1.0 - beta1) - first / A * lengthening) / A_grown
    h = -rate * first / A
    if decay and decoupled:
        h -= lr * decay * w
    return Linearised(sign * P, h)
