"""An optimizer's step as `Delta = h - P * G` with P and h frozen: what one sample's gradient does, and what none does.

`P` (elementwise) is how far the step moves per unit of gradient, `h` what it does without any sample of the batch:
momentum and weight decay. With P and h frozen the step is a sum over samples, and Shapley values are inner products.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ghostgram.taps.sharding import local
from ghostgram.training.gathered import gathered

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


def local_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Mapping[str, Any]:
    """An optimizer's state of a parameter, of sharded tensors the parts that this process holds."""
    return {n: local(v) if isinstance(v, Tensor) else v for n, v in optimizer.state.get(parameter, {}).items()}


def linearize(
    optimizer: torch.optim.Optimizer,
    group: Mapping[str, Any],
    parameters: Sequence[Tensor],
    grads: Sequence[Tensor] | None = None,
) -> list[Linearised]:
    """P and h of some parameters of one group, on one device, for the optimizer's next step.

    Args:
        optimizer: SGD, Adam or AdamW, with its state as before the step.
        group: The parameters' param_group.
        parameters: The parameters, before the step; of sharded ones the parts that this process holds are linearised.
        grads: None for Adam's second moment as it was before the batch (`v_state="pre"`), with P = 0 where that is 0;
            the gradients that the optimizer will read for the moment after it (`v_state="post"`): `h - P * grad` is
            then the exact step.

    Returns:
        `Linearised(P, h)` of each parameter, such that the optimizer moves it by `h - P * G`, G being what it reads in
        `.grad`.

    Source:
        Adam's frozen-state linearisation and the treatment of momentum as history: the derivation is in
        docs/algorithms/in_run_shapley.md.
    """
    states = [local_state(optimizer, parameter) for parameter in parameters]
    weights = [local(parameter) for parameter in parameters]
    with torch.no_grad():
        if isinstance(optimizer, torch.optim.SGD):
            return [_sgd(group, *each) for each in zip(weights, states, strict=True)]
        decoupled = isinstance(optimizer, torch.optim.AdamW) or bool(group.get("decoupled_weight_decay"))
        return _adam(group, weights, states, None if grads is None else list(map(local, grads)), decoupled)


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
    group: Mapping[str, Any],
    ws: list[Tensor],
    states: list[Mapping[str, Any]],
    grads: list[Tensor] | None,
    decoupled: bool,
) -> list[Linearised]:
    lr, decay, eps = float(group["lr"]), float(group["weight_decay"]), float(group["eps"])
    beta1, beta2 = (float(beta) for beta in group["betas"])
    sign = -1.0 if group["maximize"] else 1.0

    def held(name: str) -> list[Tensor]:
        return [state[name] if state else torch.zeros_like(w) for state, w in zip(states, ws, strict=True)]

    steps = gathered(torch.as_tensor(state["step"] if state else 0.0) for state in states).tolist()
    corrections1 = [1.0 - beta1 ** (done + 1) for done in steps]
    if grads is None:
        second = held("exp_avg_sq")
        corrections2 = [1.0 - beta2**done for done in steps]
    else:
        read = torch._foreach_mul(grads, sign)
        if decay and not decoupled:
            torch._foreach_add_(read, ws, alpha=decay)
        second = list(torch._foreach_mul(held("exp_avg_sq"), beta2))
        torch._foreach_addcmul_(second, read, read, value=1.0 - beta2)
        corrections2 = [1.0 - beta2 ** (done + 1) for done in steps]
    if group["amsgrad"]:
        second = list(torch._foreach_maximum(second, held("max_exp_avg_sq")))
    scales = torch._foreach_div(second, corrections2)
    torch._foreach_sqrt_(scales)
    torch._foreach_add_(scales, eps)
    torch._foreach_reciprocal_(scales)
    if (
        grads is None
    ):  # no P where there is no moment yet: of a row of a table that no batch has read, P would be lr / eps
        torch._foreach_mul_(scales, torch._foreach_sign(second))
    Ps = torch._foreach_mul(scales, [lr * (1.0 - beta1) / c for c in corrections1])
    if not decay and not any(states):
        return [Linearised(P * sign, None) for P in Ps]
    histories = scales  # which nothing else needs
    torch._foreach_mul_(histories, held("exp_avg"))
    torch._foreach_mul_(histories, [-lr * beta1 / c for c in corrections1])
    if decay and decoupled:
        torch._foreach_add_(histories, ws, alpha=-lr * decay)
    elif decay:
        torch._foreach_addcmul_(histories, Ps, ws, value=-decay)
    if sign < 0:
        torch._foreach_neg_(Ps)
    return [Linearised(*each) for each in zip(Ps, histories, strict=True)]
