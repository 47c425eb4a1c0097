"""Taps of normalisations: the affine part's gradient and dots in one read (affine_stats)."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghostgram.ops import _torch
from ghostgram.taps.session import autocast_dtype, keep, save_scoring, saved, scores, tap_of
from ghostgram.taps.uses import DenseUse, by_row, sums


class _LayerNorm(torch.autograd.Function):
    """Layer normalisation; saves what autograd saves: x, mean and rstd."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, shape: tuple[int, ...], eps: float, *scoring: Any
    ) -> Tensor:
        y, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        save_scoring(ctx, scoring, x, mean, rstd, weight, bias)
        ctx.shape = shape
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, mean, rstd, weight, bias, *scored = saved(ctx)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.aten.native_layer_norm_backward(
                grad, x, ctx.shape, mean, rstd, weight, bias, [True, False, False]
            )[0]
        features = weight.numel()
        mean, rstd = (sums(s.reshape(x.shape[0], -1)) for s in (mean, rstd))
        layer = _Layer(_tokens(grad, features), _tokens(x, features), mean, rstd)
        grads, dots = _gradients(ctx, weight, layer, *scored)
        return grad_x, *grads, None, None, *dots


class _GroupNorm(torch.autograd.Function):
    """Normalisation of groups of channels; saves what autograd saves: x, mean and rstd."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, eps: float, *scoring: Any
    ) -> Tensor:
        x = x.contiguous()
        ctx.sizes = samples, channels, space, _ = (x.shape[0], x.shape[1], math.prod(x.shape[2:]), groups)
        y, mean, rstd = torch.native_group_norm(x, weight, bias, samples, channels, space, groups, eps)
        save_scoring(ctx, scoring, x, mean, rstd, weight)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, mean, rstd, weight, *scored = saved(ctx)
        grad, grad_x = grad.contiguous(), None
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.aten.native_group_norm_backward(
                grad, x, mean, rstd, weight, *ctx.sizes, [True, False, False]
            )[0]
        layer = _Layer(_channels(grad), _channels(x), sums(mean), sums(rstd), True)
        grads, dots = _gradients(ctx, weight, layer, *scored)
        return grad_x, *grads, None, None, *dots


class _ChannelScale(torch.autograd.Function):
    """y = weight * xhat + bias by channel, of an xhat that is normalised already."""

    @staticmethod
    def forward(ctx: Any, xhat: Tensor, weight: Tensor, bias: Tensor | None, *scoring: Any) -> Tensor:
        save_scoring(ctx, scoring, xhat, weight)
        y = xhat * _along_channels(weight, xhat)
        return (y if bias is None else y + _along_channels(bias, xhat)).to(xhat.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        xhat, weight, *scored = saved(ctx)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad * _along_channels(weight, xhat)).to(xhat.dtype)
        layer = _Layer(_channels(grad.to(xhat.dtype)), _channels(xhat), None, None, True)
        grads, dots = _gradients(ctx, weight, layer, *scored)
        return grad_x, *grads, *dots


class _Scale(torch.autograd.Function):
    """y = scale * xhat, where scale is the weight or 1 + weight; both have the same gradient."""

    @staticmethod
    def forward(ctx: Any, normalised: Tensor, weight: Tensor, _no_bias: None, offset: float, *scoring: Any) -> Tensor:
        save_scoring(ctx, scoring, normalised, weight)
        ctx.offset = offset
        return normalised * (weight + offset if offset else weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        normalised, weight, *scored = saved(ctx)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad * (weight + ctx.offset if ctx.offset else weight)).to(normalised.dtype)
        features = weight.numel()
        layer = _Layer(_tokens(grad.to(normalised.dtype), features), _tokens(normalised, features))
        grads, dots = _gradients(ctx, weight, layer, *scored)
        return grad_x, *grads, None, *dots


class _Layer(NamedTuple):
    """What affine_stats reads of one use of a layer."""

    b: Tensor
    x: Tensor | None
    mean: Tensor | None = None
    rstd: Tensor | None = None
    channels_first: bool = False

    def by_position(self) -> _Layer:
        """Every position as a sample of its own."""
        b = self.b.reshape(-1, 1, self.b.shape[-1])
        mean, rstd = (None if y is None else y.reshape(-1, 1) for y in (self.mean, self.rstd))
        return _Layer(b, None if self.x is None else self.x.reshape(b.shape), mean, rstd)

    def use(self, of_weight: bool, shape: torch.Size, segments: Tensor | None, rows: int) -> DenseUse:
        """The gradients of the weight, sums over positions of b * xhat, or of the bias, those of b."""
        products = sums(self.b)
        if of_weight:
            assert self.x is not None
            xhat = sums(self.x)
            if self.mean is not None:
                xhat = xhat - self._along(self.mean)
            if self.rstd is not None:
                xhat = xhat * self._along(self.rstd)
            products = products * xhat
        return DenseUse(by_row(products.sum(2 if self.channels_first else 1), segments, rows).view(-1, *shape))

    def _along(self, statistic: Tensor) -> Tensor:
        """A mean or rstd in a shape that x broadcasts with."""
        if self.channels_first:
            return statistic.repeat_interleave(self.b.shape[1] // statistic.shape[1], 1).unsqueeze(2)
        return statistic.unsqueeze(2)


def _gradients(
    ctx: Any, weight: Tensor, layer: _Layer, D_weight: Tensor | None, D_bias: Tensor | None, segments: Tensor | None
) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
    """The gradients of weight and bias, arguments 1 and 2 of the function of ctx, and those of its scoring."""
    wants_weight, wants_bias = ctx.needs_input_grad[1:3]
    if segments is not None:
        layer = layer.by_position()
    grad_weight = grad_bias = dots_weight = dots_bias = None
    if wants_weight or wants_bias or D_weight is not None or D_bias is not None:
        stats = _affine(layer, D_weight, D_bias)
        grad_weight = stats[0].view_as(weight).to(weight.dtype) if wants_weight else None
        grad_bias = stats[1].view_as(weight).to(weight.dtype) if wants_bias else None
        dots_weight = None if D_weight is None else by_row(stats[4], segments, ctx.rows)
        dots_bias = None if D_bias is None else by_row(stats[5], segments, ctx.rows)
    uses = (partial(layer.use, of_weight, weight.shape, segments, ctx.rows) for of_weight in (True, False))
    keep(ctx, *uses)
    return (grad_weight, grad_bias), scores(dots_weight, dots_bias)


def _tokens(x: Tensor, features: int) -> Tensor:
    """(B, ..., *normalized shape) as (B, T, F)."""
    return x.reshape(x.shape[0], -1, features)


def _channels(x: Tensor) -> Tensor:
    """(B, C, ...) as (B, C, S)."""
    return x.unsqueeze(2) if x.dim() == 2 else x.flatten(2)


def _along_channels(parameter: Tensor, x: Tensor) -> Tensor:
    """A (C,) parameter in a shape that x (B, C, ...) broadcasts with."""
    return parameter.view(-1, *(1,) * (x.dim() - 2))


def _affine(layer: _Layer, D_weight: Tensor | None, D_bias: Tensor | None) -> tuple[Tensor, ...]:
    b, x, mean, rstd, channels_first = layer
    D_weight, D_bias = (None if D is None else D.flatten(1) for D in (D_weight, D_bias))
    options = (channels_first, False, "auto")
    stats: tuple[Tensor, ...] = _torch.call("affine_stats", b, x, mean, rstd, D_weight, D_bias, *options)
    return stats


def _apply(function: Any, module: Any, x: Tensor, *options: Any, bias: bool = True) -> Tensor:
    """One of the functions above, with the module's parameters and what scores them."""
    tap = tap_of(module)
    tap.note_dtype(x.dtype)
    shift = module.bias if bias else None
    scoring = tap.scoring(tap.slot("weight"), tap.slot("bias"))
    return function.apply(x, tap.trained(module.weight), tap.trained(shift), *options, *scoring)  # type: ignore[no-any-return]


def layer_norm_forward(module: nn.LayerNorm, x: Tensor) -> Tensor:
    """nn.LayerNorm.forward, tapped."""
    tap_of(module).check_samples(x, "LayerNorm")
    if autocast_dtype(x) and x.device.type == "cuda":  # autocast runs layer_norm in float32 there, not on the CPU
        x = x.float()
    return _apply(_LayerNorm, module, x, module.normalized_shape, module.eps)


def group_norm_forward(module: nn.GroupNorm, x: Tensor) -> Tensor:
    """nn.GroupNorm.forward, tapped."""
    _check_channels(module, x)
    if autocast_dtype(x) and x.device.type == "cuda":  # autocast runs group_norm in float32 there, not on the CPU
        x = x.float()
    return _apply(_GroupNorm, module, x, module.num_groups, module.eps)


def instance_norm_forward(module: Any, x: Tensor) -> Tensor:
    """nn.InstanceNorm1d's, 2d's and 3d's forward, tapped; running statistics are read and written by torch itself."""
    _check_channels(module, x)
    module._check_input_dim(x)
    if x.dim() == module._get_no_batch_dim():
        raise ValueError(
            f"{type(module).__name__}: expected an input with a sample axis, (B, C, ...), got {tuple(x.shape)}"
        )
    # In float32: of 16-bit inputs torch's group norm has gradients 4 % off where its instance norm's are 0.7 %.
    dtype, x = x.dtype, x.float() if x.dtype.itemsize == 2 else x
    if not module.track_running_stats and math.prod(x.shape[2:]) != 1:  # torch refuses a space of one below
        return _apply(_GroupNorm, module, x, module.num_features, module.eps).to(dtype)
    of_input = module.training or not module.track_running_stats
    running = (module.running_mean, module.running_var)
    xhat = F.instance_norm(x, *running, None, None, of_input, module.momentum or 0.0, module.eps)
    return _apply(_ChannelScale, module, xhat).to(dtype)


def _check_channels(module: nn.Module, x: Tensor) -> None:
    tap, name = tap_of(module), type(module).__name__
    if tap.segments is not None:
        raise ValueError(f"{name}: normalises over positions, so packed documents share its statistics: exclude it")
    tap.check_samples(x, name)


def rms_norm_forward(module: nn.RMSNorm, x: Tensor) -> Tensor:
    """nn.RMSNorm.forward, tapped."""
    tap_of(module).check_samples(x, "RMSNorm")
    normalised = F.rms_norm(x, module.normalized_shape, None, module.eps)
    return _apply(_Scale, module, normalised, 0.0, bias=False)


def llama_norm_forward(module: Any, x: Tensor) -> Tensor:
    """The RMSNorm of transformers' Llama and of the models that copied it, tapped."""
    return _written_out_norm(module, x, 0.0)


def gemma_norm_forward(module: Any, x: Tensor) -> Tensor:
    """The RMSNorm of transformers' Gemma, which scales by 1 + weight in float32, tapped."""
    return _written_out_norm(module, x, 1.0)


def written_out_eps(module: Any) -> Any:
    """The epsilon of an RMSNorm of somebody's own, under either of its two names; None where it has neither."""
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def root_mean_square_normalised(x: Tensor, eps: float) -> Tensor:
    """x over the root of its mean square along the last axis."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def _written_out_norm(module: Any, x: Tensor, offset: float) -> Tensor:
    tap_of(module).check_samples(x, type(module).__name__)
    normalised = root_mean_square_normalised(sums(x), written_out_eps(module))
    if offset:
        return _apply(_Scale, module, normalised, offset, bias=False).type_as(x)
    return _apply(_Scale, module, normalised.to(x.dtype), 0.0, bias=False)
