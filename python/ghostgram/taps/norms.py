"""Taps of LayerNorm and RMSNorm: the affine part's gradient and dots in one read (affine_stats)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghostgram.ops import _torch
from ghostgram.taps.session import Taps, autocast_dtype, taps_of


class _LayerNorm(torch.autograd.Function):
    """Layer normalisation; saves what autograd saves: x, mean and rstd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, owner: nn.LayerNorm, taps: Taps) -> Tensor:
        y, mean, rstd = torch.native_layer_norm(x, owner.normalized_shape, weight, bias, owner.eps)
        ctx.save_for_backward(x, mean, rstd, weight, *([] if bias is None else [bias]))
        ctx.owner, ctx.taps = owner, taps
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, mean, rstd, weight, *bias = ctx.saved_tensors
        owner, taps = ctx.owner, ctx.taps
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.aten.native_layer_norm_backward(
                grad, x, owner.normalized_shape, mean, rstd, weight, bias[0] if bias else None, [True, False, False]
            )[0]
        features = weight.numel()
        inputs = (_tokens(grad, features), _tokens(x, features), _statistic(mean, x), _statistic(rstd, x))
        D_weight = taps.directions(owner.weight) if ctx.needs_input_grad[1] else None
        D_bias = taps.directions(owner.bias) if ctx.needs_input_grad[2] else None
        stats = _affine(*inputs, D_weight, D_bias)
        grad_weight = grad_bias = None
        if ctx.needs_input_grad[1]:
            grad_weight = stats[0].view_as(weight).to(weight.dtype)
            taps.add(owner.weight, grad, None if D_weight is None else stats[4], partial(_weight_dots, *inputs))
        if ctx.needs_input_grad[2]:
            grad_bias = stats[1].view_as(weight).to(weight.dtype)
            taps.add(owner.bias, grad, None if D_bias is None else stats[5], partial(_bias_dots, inputs[0]))
        return grad_x, grad_weight, grad_bias, None, None


class _Scale(torch.autograd.Function):
    """y = scale * xhat, where scale is the weight or 1 + weight; both have the same gradient."""

    @staticmethod
    def forward(ctx: Any, normalised: Tensor, weight: Tensor, offset: float, owner: nn.Module, taps: Taps) -> Tensor:
        ctx.save_for_backward(normalised, weight)
        ctx.offset, ctx.owner, ctx.taps = offset, owner, taps
        return normalised * (weight + offset if offset else weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        normalised, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad * (weight + ctx.offset if ctx.offset else weight)).to(normalised.dtype)
        if ctx.needs_input_grad[1]:
            features = weight.numel()
            inputs = (_tokens(grad.to(normalised.dtype), features), _tokens(normalised, features), None, None)
            D = ctx.taps.directions(ctx.owner.weight)
            stats = _affine(*inputs, D, None)
            grad_weight = stats[0].view_as(weight).to(weight.dtype)
            ctx.taps.add(ctx.owner.weight, grad, None if D is None else stats[4], partial(_weight_dots, *inputs))
        return grad_x, grad_weight, None, None, None


def _tokens(x: Tensor, features: int) -> Tensor:
    """(B, ..., *normalized shape) as (B, T, F)."""
    return x.reshape(x.shape[0], -1, features)


def _statistic(s: Tensor, x: Tensor) -> Tensor:
    """A saved mean or rstd as (B, T) in the dtype of sums over x."""
    return s.reshape(x.shape[0], -1).to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def _affine(
    b: Tensor,
    x: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    D_weight: Tensor | None,
    D_bias: Tensor | None,
) -> tuple[Tensor, ...]:
    D_weight, D_bias = (None if D is None else D.flatten(1) for D in (D_weight, D_bias))
    stats: tuple[Tensor, ...] = _torch.call("affine_stats", b, x, mean, rstd, D_weight, D_bias, False, "auto")
    return stats


def _weight_dots(b: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor | None, D: Tensor) -> Tensor:
    return _affine(b, x, mean, rstd, D, None)[4]


def _bias_dots(b: Tensor, D: Tensor) -> Tensor:
    return _affine(b, None, None, None, None, D)[5]


def layer_norm_forward(module: nn.LayerNorm, x: Tensor) -> Tensor:
    """nn.LayerNorm.forward, tapped."""
    taps = taps_of(module)
    taps.check_samples(x, "LayerNorm")
    if autocast_dtype(x) and x.device.type == "cuda":  # autocast runs layer_norm in float32 there, not on the CPU
        x = x.float()
    return _LayerNorm.apply(x, module.weight, module.bias, module, taps)  # type: ignore[no-any-return, no-untyped-call]


def rms_norm_forward(module: nn.RMSNorm, x: Tensor) -> Tensor:
    """nn.RMSNorm.forward, tapped."""
    taps = taps_of(module)
    taps.check_samples(x, "RMSNorm")
    normalised = F.rms_norm(x, module.normalized_shape, None, module.eps)
    return _Scale.apply(normalised, module.weight, 0.0, module, taps)  # type: ignore[no-any-return, no-untyped-call]


def llama_norm_forward(module: Any, x: Tensor) -> Tensor:
    """The RMSNorm of transformers' Llama and of the models that copied it, tapped."""
    return _written_out_norm(module, x, 0.0)


def gemma_norm_forward(module: Any, x: Tensor) -> Tensor:
    """The RMSNorm of transformers' Gemma, which scales by 1 + weight in float32, tapped."""
    return _written_out_norm(module, x, 1.0)


def _written_out_norm(module: Any, x: Tensor, offset: float) -> Tensor:
    taps = taps_of(module)
    taps.check_samples(x, type(module).__name__)
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    wide = x.float() if x.dtype != torch.float64 else x
    normalised = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if offset:
        y: Tensor = _Scale.apply(normalised, module.weight, offset, module, taps)  # type: ignore[no-untyped-call]
        return y.type_as(x)
    return _Scale.apply(normalised.to(x.dtype), module.weight, 0.0, module, taps)  # type: ignore[no-any-return, no-untyped-call]
