"""Taps of layers linear in a matrix: nn.Linear, and the Conv1D of Hugging Face's GPT-2 with its (d, p) weight."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghostgram.ops import _torch
from ghostgram.taps.session import Taps, autocast_dtype, taps_of


class _Linear(torch.autograd.Function):
    """y = x W^T + beta (or x W + beta), whose backward takes dW and the per-sample dots from one pass (grad_stats).

    Saves what autograd saves for a linear layer: x and W.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, owner: nn.Module, transposed: bool, taps: Taps
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.owner, ctx.transposed, ctx.taps = owner, transposed, taps
        if not transposed:
            return F.linear(x, weight, bias)
        flat = x.reshape(-1, x.shape[-1])
        y = flat @ weight if bias is None else torch.addmm(bias, flat, weight)
        return y.view(*x.shape[:-1], weight.shape[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        owner, taps = ctx.owner, ctx.taps
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ (weight.T if ctx.transposed else weight)
        if ctx.needs_input_grad[1]:
            rows, cols = (x, grad) if ctx.transposed else (grad, x)  # of the weight
            rows, cols = _tokens(rows), _tokens(cols)
            grad_weight, dots = _matrix_stats(cols, rows, taps.directions(owner.weight))
            taps.add(owner.weight, grad, dots, partial(_matrix_dots, cols, rows))
            grad_weight = grad_weight.to(weight.dtype)
        if ctx.needs_input_grad[2]:
            tokens = _tokens(grad)
            grad_bias, dots = _bias_stats(tokens, taps.directions(owner.bias))
            taps.add(owner.bias, grad, dots, partial(_bias_dots, tokens))
            grad_bias = grad_bias.to(weight.dtype)
        return grad_x, grad_weight, grad_bias, None, None, None


def _tokens(x: Tensor) -> Tensor:
    """(B, ..., features) as (B, T, features)."""
    return x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)


def _matrix_stats(a: Tensor, b: Tensor, directions: Tensor | None) -> tuple[Tensor, Tensor | None]:
    grad, _, dots = _torch.call("grad_stats", a, b, directions, True, False, "auto")
    return grad, None if directions is None else dots


def _matrix_dots(a: Tensor, b: Tensor, directions: Tensor) -> Tensor:
    dots: Tensor = _torch.call("grad_stats", a, b, directions, False, False, "auto")[2]
    return dots


def _bias_stats(b: Tensor, directions: Tensor | None) -> tuple[Tensor, Tensor | None]:
    stats = _torch.call("affine_stats", b, None, None, None, None, directions, False, False, "auto")
    return stats[1], None if directions is None else stats[5]


def _bias_dots(b: Tensor, directions: Tensor) -> Tensor:
    dots = _bias_stats(b, directions)[1]
    assert dots is not None
    return dots


def _tapped(module: Any, x: Tensor, transposed: bool) -> Tensor:
    taps = taps_of(module)
    taps.check_samples(x, type(module).__name__)
    weight, bias = module.weight, module.bias
    if dtype := autocast_dtype(x):
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return _Linear.apply(x, weight, bias, module, transposed, taps)  # type: ignore[no-any-return, no-untyped-call]


def linear_forward(module: nn.Linear, x: Tensor) -> Tensor:
    """nn.Linear.forward, tapped."""
    return _tapped(module, x, transposed=False)


def conv1d_forward(module: nn.Module, x: Tensor) -> Tensor:
    """transformers' Conv1D.forward, tapped."""
    return _tapped(module, x, transposed=True)
