"""Taps of layers linear in a matrix: nn.Linear, and the Conv1D of Hugging Face's GPT-2 with its (d, p) weight."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghostgram.ops import _torch
from ghostgram.taps.session import Slot, Tap, autocast_dtype, keep, save_scoring, saved, scores, tap_of
from ghostgram.taps.uses import DenseUse, MatrixUse, by_row, sums


class _Linear(torch.autograd.Function):
    """y = x W^T + beta (or x W + beta), whose backward takes dW and the per-sample dots from one pass (grad_stats).

    Saves what autograd saves for a linear layer: x and W.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        transposed: bool,
        *scoring: Any,
    ) -> Tensor:
        save_scoring(ctx, scoring, x, weight)
        ctx.transposed = transposed
        if not transposed:
            return F.linear(x, weight, bias)
        flat = x.reshape(-1, x.shape[-1])
        y = flat @ weight if bias is None else torch.addmm(bias, flat, weight)
        return y.view(*x.shape[:-1], weight.shape[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, D_weight, D_bias, segments = saved(ctx)
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_x = grad_weight = grad_bias = dots_weight = dots_bias = None
        if wants_x:
            grad_x = grad @ (weight.T if ctx.transposed else weight)
        b, a = as_tokens(grad), as_tokens(x)
        left, right = (a, b) if ctx.transposed else (b, a)  # rows and columns of the weight
        if wants_weight or D_weight is not None:
            grad_weight, dots_weight = matrix_stats(right, left, D_weight, wants_weight, segments, ctx.rows)
        if wants_bias or D_bias is not None:
            grad_bias, dots_bias = bias_stats(b, D_bias, wants_bias, segments, ctx.rows)
        keep(ctx, partial(MatrixUse, right, left, segments, ctx.rows), partial(bias_use, b, segments, ctx.rows))
        return grad_x, cast(grad_weight, weight), cast(grad_bias, weight), None, *scores(dots_weight, dots_bias)


def as_tokens(x: Tensor) -> Tensor:
    """(B, ..., features) as (B, T, features)."""
    return x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)


def cast(grad: Tensor | None, parameter: Tensor) -> Tensor | None:
    """A gradient in its parameter's dtype."""
    return None if grad is None else grad.to(parameter.dtype)


def matrix_stats(
    a: Tensor, b: Tensor, D: Tensor | None, gradient: bool, segments: Tensor | None, rows: int
) -> tuple[Tensor | None, Tensor | None]:
    """(sum_i b_i^T a_i, or None if not wanted; (rows, K) dots, or None without directions)."""
    if segments is None:
        grad, _, dots = _torch.call("grad_stats", a, b, D, gradient, False, "auto")
        return grad if gradient else None, None if D is None else dots
    grad = _torch.call("grad_stats", a, b, None, True, False, "auto")[0] if gradient else None
    return grad, None if D is None else MatrixUse(a, b, segments, rows).dots(D)


def bias_stats(
    b: Tensor, D: Tensor | None, gradient: bool, segments: Tensor | None, rows: int
) -> tuple[Tensor | None, Tensor | None]:
    """(sum over samples and positions of b, or None if not wanted; (rows, K) dots, or None without directions)."""
    if segments is None:
        stats = _torch.call("affine_stats", b, None, None, None, None, D, False, False, "auto")
        return stats[1] if gradient else None, None if D is None else stats[5]
    return b.sum((0, 1)) if gradient else None, None if D is None else bias_use(b, segments, rows).dots(D)


def bias_use(b: Tensor, segments: Tensor | None, rows: int) -> DenseUse:
    """The gradients of a bias: sums over positions of b."""
    return DenseUse(sums(b).sum(1) if segments is None else by_row(sums(b).flatten(0, 1), segments, rows))


def apply_linear(
    tap: Tap, x: Tensor, weight: Tensor, bias: Tensor | None, of_weight: Slot, of_bias: Slot, transposed: bool = False
) -> Tensor:
    """x W^T + bias (x W + bias if transposed), scored for the parameters of two slots."""
    if dtype := autocast_dtype(x):
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    tap.note_dtype(x.dtype)
    scoring = tap.scoring(of_weight, of_bias)
    return _Linear.apply(x, tap.trained(weight), tap.trained(bias), transposed, *scoring)  # type: ignore[no-any-return, no-untyped-call]


def _tapped(module: Any, x: Tensor, transposed: bool) -> Tensor:
    tap = tap_of(module)
    tap.check_samples(x, type(module).__name__)
    return apply_linear(tap, x, module.weight, module.bias, tap.slot("weight"), tap.slot("bias"), transposed)


def linear_forward(module: nn.Linear, x: Tensor) -> Tensor:
    """nn.Linear.forward, tapped."""
    return _tapped(module, x, transposed=False)


def conv1d_forward(module: nn.Module, x: Tensor) -> Tensor:
    """transformers' Conv1D.forward, tapped."""
    return _tapped(module, x, transposed=True)
