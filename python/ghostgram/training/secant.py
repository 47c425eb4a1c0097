"""The secant of an optimizer's step, from no gradient to the batch's: what the samples do to the step, all of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ghostgram.taps.sharding import local
from ghostgram.training.linearize import Linearised, is_decoupled, linearize, local_state


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
        About 20 operations an element, five arrays of the parameter's size, of which two remain.

    Source:
        Aumann and Shapley, Values of Non-Atomic Games (1974); derivation and figures:
        docs/algorithms/in_run_shapley_fidelity.md.
    """
    if isinstance(optimizer, torch.optim.SGD):
        return linearize(optimizer, group, parameters, grads)
    with torch.no_grad():
        return [
            adam_secant(group, local(w), local_state(optimizer, w), local(grad), is_decoupled(optimizer, group))
            for w, grad in zip(parameters, grads, strict=True)
        ]


def adam_secant(
    group: Mapping[str, Any], w: Tensor, state: Mapping[str, Any], grad: Tensor, decoupled: bool
) -> Linearised:
    """`secant` of one parameter under Adam: from the tensors of its state, which may be wider than the parameter's."""
    lr, decay, eps = float(group["lr"]), float(group["weight_decay"]), float(group["eps"])
    beta1, beta2 = (float(beta) for beta in group["betas"])
    steps = float(state["step"]) + 1.0 if state else 1.0
    rate, correction = lr / (1.0 - beta1**steps), 1.0 - beta2**steps

    # In place wherever it can be: an array of this size is new pages, which cost more than the operation does. Second
    # moments are divided by their correction from the start.
    read = -grad if group["maximize"] else grad
    first = state["exp_avg"] * beta1 if state else torch.zeros_like(w)
    second = state["exp_avg_sq"] * (beta2 / correction) if state else torch.zeros_like(w)
    growth = read * ((1.0 - beta2) / correction)  # of the second moment, over read
    if decay and not decoupled:  # what Adam reads is decay * w on no gradient, and decay * w + read on the batch's
        first.add_(w, alpha=(1.0 - beta1) * decay)
        second.addcmul_(w, w, value=(1.0 - beta2) / correction * decay**2)
        growth.add_(w, alpha=2.0 * (1.0 - beta2) / correction * decay)
    grown = torch.addcmul(second, growth, read)
    if group["amsgrad"] and state:
        largest = state["max_exp_avg_sq"] / correction
        held, held_grown = torch.maximum(second, largest), torch.maximum(grown, largest)
        quotient = torch.where(read != 0, (held_grown - held) / read, 0.0)
        growth = torch.where((held == second) & (held_grown == grown), growth, quotient)
        second, grown = held, held_grown
    root, root_grown = second.sqrt_(), grown.sqrt_()
    lengthening = growth.div_(root + root_grown).nan_to_num_(0.0, 0.0, 0.0)  # (A(G) - A(0)) / G, 0 where both are 0
    h = first.div_(root.add_(eps))
    P = lengthening.mul_(h).neg_().add_(1.0 - beta1).div_(root_grown.add_(eps))
    P.mul_(-rate if group["maximize"] else rate)
    h.mul_(-rate)
    if decay and decoupled:
        h.add_(w, alpha=-lr * decay)
    return Linearised(P, h)
