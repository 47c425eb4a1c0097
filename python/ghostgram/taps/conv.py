"""Taps of convolutions and transposed convolutions of any stride, padding, dilation and number of groups."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ghostgram.ops import _torch
from ghostgram.ops.grad_norms import grad_norms
from ghostgram.taps.linear import cast
from ghostgram.taps.session import autocast_dtype, keep, save_scoring, saved, scores, tap_of
from ghostgram.taps.uses import DenseUse, Use, sums

PIECE = 16 << 20
"""Bytes of windows unfolded at once: 4 MiB cost up to 25 % more than this on 2 cores of a Zen 4, 64 MiB up to 40 %."""

UNFOLDING = 100
"""Rows of weight for which unfolding and packing windows costs as much as torch's weight gradient; see `unfolds`."""


class Geometry(NamedTuple):
    """The last arguments of torch.convolution."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int


class _Convolution(torch.autograd.Function):
    """A convolution or its transpose by torch's own kernels; saves what autograd saves: x and W.

    The weight gradient of either is the product of one tensor's windows with what lies opposite them in another: of
    x's windows with the gradient at the output, or, of a transpose, of that gradient's windows with x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, *scoring: Any) -> Tensor:
        save_scoring(ctx, scoring, x, weight)
        ctx.geometry = geometry
        return torch.convolution(x, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, D_weight, D_bias, _ = saved(ctx)
        geometry = ctx.geometry
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        signal, opposite = (grad, x) if geometry.transposed else (x, grad)
        unfolded = D_weight is not None and unfolds(D_weight, geometry.groups, wants_weight)
        by_torch = [wants_x, wants_weight and not unfolded, False]
        grad_x = grad_weight = grad_bias = dots_weight = dots_bias = None
        if any(by_torch):
            grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(grad, x, weight, None, *geometry, by_torch)
        if unfolded:
            grad_weight, dots_weight = _unfolded(signal, opposite, geometry, D_weight, wants_weight)
        elif D_weight is not None:
            dots_weight = _projected(signal, opposite, geometry, D_weight)
        if wants_bias or D_bias is not None:
            grad_bias, dots_bias = _bias(grad, D_bias)
        shape = tuple(weight.shape)
        keep(
            ctx,
            partial(ConvolutionUse, signal, opposite, geometry, shape, len(x)),
            lambda: DenseUse(sums(grad).flatten(2).sum(2)),
        )
        return grad_x, cast(grad_weight, weight), cast(grad_bias, weight), None, *scores(dots_weight, dots_bias)


def unfolds(D: Tensor, groups: int, gradient: bool) -> bool:
    """Whether the dots with D (K, p, c, *kernel) are cheaper by unfolding windows than by K more convolutions.

    In units of torch's own weight gradient, a pass of grad_stats over unfolded windows costs 1 + UNFOLDING / rows for
    rows = p / groups, the gradient in it and any number of directions; by projection each direction costs 1, beside the
    gradient. Gradient and dots on 2 cores of a Zen 4, float32, K = 1 (`benchmarks/taps/bench_conv.py`): 3x3 of 64, 128,
    256 and 512 rows 2.2, 2.06, 1.5 and 1.2 unfolded, 1.6, 2.04, 1.7 and 1.8 projected; patches of 16x16 to 768 1.2 and
    2.0; depthwise 3x3 198 and 3.4. With K = 4, 64 rows 3.4 and 5.7.
    """
    directions, rows = D.shape[0], D.shape[1] // groups
    return 1 + UNFOLDING / rows < gradient + directions


@dataclass(frozen=True)
class ConvolutionUse(Use):
    """One use of a convolution's weight."""

    signal: Tensor
    """What windows are taken of."""
    opposite: Tensor
    """What lies opposite them."""
    geometry: Geometry
    shape: tuple[int, ...]
    """Of the weight."""
    rows: int

    def dots(self, D: Tensor) -> Tensor:
        """By the cheaper of two ways."""
        if unfolds(D, self.geometry.groups, gradient=False):
            return _unfolded(self.signal, self.opposite, self.geometry, D, False)[1]
        return _projected(self.signal, self.opposite, self.geometry, D)

    def squares(self) -> Tensor | None:
        """(rows,) squared norms, of unfolded windows by the cheaper way of `grad_norms`.

        None where one gradient after another is as good: where `PIECE` bytes do not hold the windows of a sample, and
        of grouped convolutions, whose matrices are small.
        """
        if self.geometry.groups > 1:
            return None
        positions, found = math.prod(self.opposite.shape[2:]), []
        for _, a, b in _pieces(self.signal, self.opposite, self.shape[2:], self.geometry):
            if a.shape[1] < positions:
                return None
            found.append(grad_norms(a.flatten(-2), b).square())
        return torch.cat(found)

    def gradient(self, weights: Tensor) -> Tensor:
        """By torch's own weight gradient over the samples that count."""
        chosen = weights.nonzero()[:, 0].to(self.signal.device)
        signal, opposite = (x.index_select(0, chosen) for x in (self.signal, self.opposite))
        opposite = opposite * weights.to(opposite)[chosen].view(-1, *(1,) * (opposite.dim() - 1))
        grad, x = (signal, opposite) if self.geometry.transposed else (opposite, signal)
        weight = x.new_empty(self.shape)
        gradient: Tensor = torch.ops.aten.convolution_backward(
            grad, x, weight, None, *self.geometry, [False, True, False]
        )[1]
        return sums(gradient)


def _bias(grad: Tensor, D: Tensor | None) -> tuple[Tensor, Tensor | None]:
    stats = _torch.call("affine_stats", grad.flatten(2), None, None, None, None, D, True, False, "auto")
    return stats[1], None if D is None else stats[5]


def _projected(signal: Tensor, opposite: Tensor, geometry: Geometry, D: Tensor) -> Tensor:
    """<opposite, convolution(signal; D_k)>: one temporary of the size of `opposite` at a time."""
    signal, axes = signal.to(D.dtype), tuple(range(1, signal.dim()))
    plain = geometry._replace(transposed=False, output_padding=(0,) * len(geometry.stride))
    dots = []
    for D_k in D:
        y = torch.convolution(signal, D_k, None, *plain)
        for axis in axes[1:]:  # a transpose's output padding may make room for more
            y = y.narrow(axis, 0, opposite.shape[axis])
        dots.append((y * opposite).sum(axes))
    return torch.stack(dots, 1)


def _unfolded(
    signal: Tensor, opposite: Tensor, geometry: Geometry, D: Tensor, gradient: bool
) -> tuple[Tensor | None, Tensor]:
    """The weight gradient, or None if not wanted, and the dots, from one pass over unfolded windows."""
    kernel, groups, width, rows = D.shape[3:], geometry.groups, D.shape[2], D.shape[1] // geometry.groups
    D = D.movedim(2, -1).flatten(2)  # windows are copied fastest with channels last
    grad = D.new_zeros(D.shape[1:]) if gradient else None
    dots = D.new_zeros(signal.shape[0], D.shape[0])
    for samples, a, b in _pieces(signal, opposite, kernel, geometry):
        for group in range(groups):
            of_rows = slice(group * rows, (group + 1) * rows)
            left = a[..., group * width : (group + 1) * width].flatten(-2)
            stats = _torch.call("grad_stats", left, b[..., of_rows], D[:, of_rows], gradient, False, "auto")
            dots[samples] += stats[2]
            if grad is not None:
                grad[of_rows] += stats[0]
    return None if grad is None else grad.view(-1, *kernel, width).movedim(-1, 1), dots


def _pieces(
    signal: Tensor, opposite: Tensor, kernel: tuple[int, ...], geometry: Geometry
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Windows (n, T, taps, C) of some samples, and what lies opposite, (n, T, P): what PIECE bytes can hold at a time.

    A sample too large for them comes in several pieces, by its lines: T is linear in sums over it.
    """
    lines, taps = opposite.shape[2], math.prod(kernel)
    line = math.prod(opposite.shape[3:]) * taps * signal.shape[1] * signal.element_size()
    at_once = max(1, PIECE // max(1, line))
    of_samples, of_lines = max(1, at_once // max(1, lines)), min(lines, at_once)
    for first in range(0, signal.shape[0], of_samples):
        samples = slice(first, first + of_samples)
        windows = _windows(signal[samples], opposite.shape[2:], kernel, geometry)
        beside = opposite[samples].movedim(1, -1)
        for top in range(0, lines, max(1, of_lines)):
            a, b = windows[:, top : top + of_lines], beside[:, top : top + of_lines]
            yield samples, a.reshape(a.shape[0], -1, taps, a.shape[-1]), b.reshape(b.shape[0], -1, b.shape[-1])


def _windows(x: Tensor, positions: tuple[int, ...], kernel: tuple[int, ...], geometry: Geometry) -> Tensor:
    """x (n, C, *space) as (n, *positions, *kernel, C): a view of its padded, channels-last copy."""
    x = x.movedim(1, -1)
    if any(geometry.padding):
        x = F.pad(x, [0, 0, *(p for p in reversed(geometry.padding) for _ in range(2))])
    x = x.contiguous()
    for axis, (count, size, step, spread) in enumerate(
        zip(positions, kernel, geometry.stride, geometry.dilation, strict=True), 1
    ):
        x = x.unfold(axis, spread * (size - 1) + 1, step)[..., ::spread].narrow(axis, 0, count)
    return x.movedim(len(kernel) + 1, -1)


def _convolve(module: Any, x: Tensor, geometry: Geometry) -> Tensor:
    tap, weight, bias = tap_of(module), module.weight, module.bias
    if dtype := autocast_dtype(x):
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    tap.note_dtype(x.dtype)
    scoring = tap.scoring(tap.slot("weight"), tap.slot("bias"))
    return _Convolution.apply(x, tap.trained(weight), tap.trained(bias), geometry, *scoring)  # type: ignore[no-any-return, no-untyped-call]


def _check(module: Any, x: Tensor) -> None:
    tap, name = tap_of(module), type(module).__name__
    if tap.segments is not None:
        raise ValueError(f"{name}: mixes positions, so that packed documents share its windows: exclude it")
    if x.dim() != len(module.kernel_size) + 2:
        raise ValueError(f"{name}: expected an input with a sample axis, (B, C, ...), got {tuple(x.shape)}")
    tap.check_samples(x, name)


def conv_forward(module: Any, x: Tensor) -> Tensor:
    """nn.Conv1d's, 2d's and 3d's forward, tapped."""
    _check(module, x)
    none = (0,) * len(module.kernel_size)
    padding, both_sides = module.padding, module._reversed_padding_repeated_twice
    if module.padding_mode != "zeros":
        x, padding = F.pad(x, both_sides, mode=module.padding_mode), none
    elif padding == "valid":
        padding = none
    elif padding == "same" and both_sides[::2] == both_sides[1::2]:
        padding = tuple(reversed(both_sides[::2]))
    elif padding == "same":
        x, padding = F.pad(x, both_sides), none
    return _convolve(module, x, Geometry(module.stride, padding, module.dilation, False, none, module.groups))


def conv_transpose_forward(module: Any, x: Tensor, output_size: list[int] | None = None) -> Tensor:
    """nn.ConvTranspose1d's, 2d's and 3d's forward, tapped."""
    _check(module, x)
    axes = len(module.kernel_size)
    output_padding = module._output_padding(
        x, output_size, module.stride, module.padding, module.kernel_size, axes, module.dilation
    )
    geometry = Geometry(module.stride, module.padding, module.dilation, True, tuple(output_padding), module.groups)
    return _convolve(module, x, geometry)
