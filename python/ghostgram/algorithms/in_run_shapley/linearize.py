"""An optimizer's step as `Delta = h - P * G` with P and h frozen: what one sample's gradient does, and what none does.

`P` (elementwise) is how far the step moves per unit of gradient, `h` what it does without any sample of the batch:
momentum and weight decay. With P and h frozen the step is a sum over samples, and Shapley values are inner products.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

SUPPORTED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)


class Linearised(NamedTuple):
    """A parameter's step `h - P * G`."""

    P: Tensor
    """Of the parameter's shape, or a scalar tensor."""
    h: Tensor | None
    """None where it is zero."""


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raises unless the optimizer's step has the form `h - P * G` with frozen state."""
    if type(optimizer) not in SUPPORTED:
        names = ", ".join(kind.__name__ for kind in SUPPORTED)
        raise TypeError(
            f"optimizer: expected one of {names}, got {type(optimizer).__name__}: its step is not known to be linear in"
            " the gradient for frozen state"
        )


def state_is_ready(optimizer: torch.optim.Optimizer, parameter: Tensor) -> bool:
    """Whether P is known before the batch: Adam's first step has no second moment yet (0/0), SGD always is."""
    return isinstance(optimizer, torch.optim.SGD) or "exp_avg_sq" in optimizer.state.get(parameter, {})


def linearize(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], parameter: Tensor, grad: Tensor | None = None
) -> Linearised:
    """P and h of one parameter for the optimizer's next step.

    Args:
        optimizer: SGD, Adam or AdamW, with its state as before the step.
        group: The parameter's param_group.
        parameter: The parameter, before the step.
        grad: None for Adam's second moment as it was before the batch (`v_state="pre"`); the gradient that the
            optimizer will read for the moment after it (`v_state="post"`): `h - P * grad` is then the exact step.

    Returns:
        `Linearised(P, h)` such that the optimizer moves the parameter by `h - P * G`, G being what it reads in `.grad`.

    Source:
        Adam's frozen-state linearisation and the treatment of momentum as history: the derivation is in
        docs/algorithms/in_run_shapley.md.
    """
    with torch.no_grad():
        state = optimizer.state.get(parameter, {})
        if isinstance(optimizer, torch.optim.SGD):
            step = _sgd(group, parameter, state)
        else:
            step = _adam(group, parameter, state, grad, decoupled=isinstance(optimizer, torch.optim.AdamW))
    return step


def _sgd(group: Mapping[str, Any], w: Tensor, state: Mapping[str, Any]) -> Linearised:
    lr, decay, mu = float(group["lr"]), float(group["weight_decay"]), float(group["momentum"])
    buffer = state.get("momentum_buffer")
    fresh = 1.0 if buffer is None else 1.0 - float(group["dampening"])  # torch skips dampening on the first step
    share = lr * (fresh if mu else 1.0)
    if mu and group["nesterov"]:
        share = lr * (1.0 + mu * fresh)
    history = None
    if decay:
        history = -share * decay * w
    if mu and buffer is not None:
        carried = -lr * (mu * mu if group["nesterov"] else mu) * buffer
        history = carried if history is None else history + carried
    sign = -1.0 if group["maximize"] else 1.0
    return Linearised(torch.full((), sign * share, dtype=w.dtype, device=w.device), history)


def _adam(
    group: Mapping[str, Any], w: Tensor, state: Mapping[str, Any], grad: Tensor | None, decoupled: bool
) -> Linearised:
    lr, decay, eps = float(group["lr"]), float(group["weight_decay"]), float(group["eps"])
    beta1, beta2 = (float(beta) for beta in group["betas"])
    sign = -1.0 if group["maximize"] else 1.0
    decoupled = decoupled or bool(group.get("decoupled_weight_decay"))
    done = float(state["step"]) if state else 0.0
    correction1 = 1.0 - beta1 ** (done + 1)
    if grad is None:
        second, correction2 = state["exp_avg_sq"], 1.0 - beta2**done
    else:
        read = sign * grad if decoupled or not decay else sign * grad + decay * w
        before = state["exp_avg_sq"] if state else torch.zeros_like(w)
        second, correction2 = beta2 * before + (1.0 - beta2) * read * read, 1.0 - beta2 ** (done + 1)
    if group["amsgrad"] and state:
        second = torch.maximum(second, state["max_exp_avg_sq"])
    scale = (second / correction2).sqrt_().add_(eps).reciprocal_()
    P = scale * (lr * (1.0 - beta1) / correction1)
    history = scale.mul_(state["exp_avg"]).mul_(-lr * beta1 / correction1) if state else None
    if decay:
        pulled = -lr * decay * w if decoupled else -decay * P * w
        history = pulled if history is None else history.add_(pulled)
    return Linearised(P * sign if sign < 0 else P, history)
