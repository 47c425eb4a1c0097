"""Taps of normalisations: the affine part's gradient and dots in one read (affine_stats)."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

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
        owner, grad_x = ctx.owner, None
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.aten.native_layer_norm_backward(
                grad, x, owner.normalized_shape, mean, rstd, weight, bias[0] if bias else None, [True, False, False]
            )[0]
        features = weight.numel()
        mean, rstd = (_statistic(s.reshape(x.shape[0], -1), x) for s in (mean, rstd))
        layer = _Layer(_tokens(grad, features), _tokens(x, features), mean, rstd)
        return grad_x, *_parameter_gradients(ctx, grad, weight, layer), None, None


class _GroupNorm(torch.autograd.Function):
    """Normalisation of groups of channels; saves what autograd saves: x, mean and rstd."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, eps: float, owner: Any, taps: Taps
    ) -> Tensor:
        x = x.contiguous()
        ctx.sizes = samples, channels, space, _ = (*x.shape[:2], math.prod(x.shape[2:]), groups)
        y, mean, rstd = torch.native_group_norm(x, weight, bias, samples, channels, space, groups, eps)
        ctx.save_for_backward(x, mean, rstd, weight)
        ctx.owner, ctx.taps = owner, taps
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, mean, rstd, weight = ctx.saved_tensors
        grad, grad_x = grad.contiguous(), None
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.aten.native_group_norm_backward(
                grad, x, mean, rstd, weight, *ctx.sizes, [True, False, False]
            )[0]
        layer = _Layer(_channels(grad), _channels(x), _statistic(mean, x), _statistic(rstd, x), True)
        return grad_x, *_parameter_gradients(ctx, grad, weight, layer), None, None, None, None


class _ChannelScale(torch.autograd.Function):
    """y = weight * xhat + bias by channel, of an xhat that is normalised already."""

    @staticmethod
    def forward(ctx: Any, xhat: Tensor, weight: Tensor, bias: Tensor | None, owner: nn.Module, taps: Taps) -> Tensor:
        ctx.save_for_backward(xhat, weight)
        ctx.owner, ctx.taps = owner, taps
        y = xhat * _along_channels(weight, xhat)
        return (y if bias is None else y + _along_channels(bias, xhat)).to(xhat.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        xhat, weight = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad * _along_channels(weight, xhat)).to(xhat.dtype)
        layer = _Layer(_channels(grad.to(xhat.dtype)), _channels(xhat), None, None, True)
        return grad_x, *_parameter_gradients(ctx, grad, weight, layer), None, None


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
            layer = _Layer(_tokens(grad.to(normalised.dtype), features), _tokens(normalised, features))
            grad_weight = _parameter_gradients(ctx, grad, weight, layer)[0]
        return grad_x, grad_weight, None, None, None


class _Layer(NamedTuple):
    """What affine_stats reads of one use of a layer."""

    b: Tensor
    x: Tensor | None
    mean: Tensor | None = None
    rstd: Tensor | None = None
    channels_first: bool = False


def _parameter_gradients(ctx: Any, grad: Tensor, weight: Tensor, layer: _Layer) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of weight and bias, arguments 1 and 2 of the function of ctx; books their dots."""
    owner, taps = ctx.owner, ctx.taps
    wants_weight, wants_bias = ctx.needs_input_grad[1], ctx.needs_input_grad[2]
    D_weight = taps.directions(owner.weight) if wants_weight else None
    D_bias = taps.directions(owner.bias) if wants_bias else None
    stats = _affine(layer, D_weight, D_bias)
    grad_weight = grad_bias = None
    if wants_weight:
        grad_weight = stats[0].view_as(weight).to(weight.dtype)
        taps.add(owner.weight, grad, None if D_weight is None else stats[4], partial(_weight_dots, layer))
    if wants_bias:
        grad_bias = stats[1].view_as(weight).to(weight.dtype)
        taps.add(owner.bias, grad, None if D_bias is None else stats[5], partial(_bias_dots, layer))
    return grad_weight, grad_bias


def _tokens(x: Tensor, features: int) -> Tensor:
    """(B, ..., *normalized shape) as (B, T, F)."""
    return x.reshape(x.shape[0], -1, features)


def _channels(x: Tensor) -> Tensor:
    """(B, C, ...) as (B, C, S)."""
    return x.unsqueeze(2) if x.dim() == 2 else x.flatten(2)


def _along_channels(parameter: Tensor, x: Tensor) -> Tensor:
    """A (C,) parameter in a shape that x (B, C, ...) broadcasts with."""
    return parameter.view(-1, *(1,) * (x.dim() - 2))


def _statistic(s: Tensor, x: Tensor) -> Tensor:
    """A saved mean or rstd in the dtype of sums over x."""
    return s.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def _affine(layer: _Layer, D_weight: Tensor | None, D_bias: Tensor | None) -> tuple[Tensor, ...]:
    b, x, mean, rstd, channels_first = layer
    D_weight, D_bias = (None if D is None else D.flatten(1) for D in (D_weight, D_bias))
    options = (channels_first, False, "auto")
    stats: tuple[Tensor, ...] = _torch.call("affine_stats", b, x, mean, rstd, D_weight, D_bias, *options)
    return stats


def _weight_dots(layer: _Layer, D: Tensor) -> Tensor:
    return _affine(layer, D, None)[4]


def _bias_dots(layer: _Layer, D: Tensor) -> Tensor:
    return _affine(_Layer(layer.b, None, channels_first=layer.channels_first), None, D)[5]


def layer_norm_forward(module: nn.LayerNorm, x: Tensor) -> Tensor:
    """nn.LayerNorm.forward, tapped."""
    taps = taps_of(module)
    taps.check_samples(x, "LayerNorm")
    if autocast_dtype(x) and x.device.type == "cuda":  # autocast runs layer_norm in float32 there, not on the CPU
        x = x.float()
    return _LayerNorm.apply(x, module.weight, module.bias, module, taps)  # type: ignore[no-any-return, no-untyped-call]


def group_norm_forward(module: nn.GroupNorm, x: Tensor) -> Tensor:
    """nn.GroupNorm.forward, tapped."""
    taps_of(module).check_samples(x, "GroupNorm")
    if autocast_dtype(x) and x.device.type == "cuda":  # autocast runs group_norm in float32 there, not on the CPU
        x = x.float()
    return _group_norm(module, x, module.num_groups)


def instance_norm_forward(module: Any, x: Tensor) -> Tensor:
    """nn.InstanceNorm1d's, 2d's and 3d's forward, tapped; running statistics are read and written by torch itself."""
    name = type(module).__name__
    taps_of(module).check_samples(x, name)
    module._check_input_dim(x)
    if x.dim() == module._get_no_batch_dim():
        raise ValueError(f"{name}: expected an input with a sample axis, (B, C, ...), got {tuple(x.shape)}")
    if not module.track_running_stats and math.prod(x.shape[2:]) != 1:  # torch refuses a space of one below
        return _group_norm(module, x, module.num_features)
    of_input = module.training or not module.track_running_stats
    running = (module.running_mean, module.running_var)
    xhat = F.instance_norm(x, *running, None, None, of_input, module.momentum or 0.0, module.eps)
    return _ChannelScale.apply(xhat, module.weight, module.bias, module, taps_of(module))  # type: ignore[no-any-return, no-untyped-call]


def _group_norm(module: Any, x: Tensor, groups: int) -> Tensor:
    weight, bias, taps = module.weight, module.bias, taps_of(module)
    return _GroupNorm.apply(x, weight, bias, groups, module.eps, module, taps)  # type: ignore[no-any-return, no-untyped-call]


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
