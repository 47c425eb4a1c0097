"""What the operations of DSA do to images, up to a constant: linear maps `A` of pixels, and their transposes `A^T`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(op: str, x: Tensor, parameters: Tensor, transposed: bool = False) -> Tensor:
    """`A x` or `A^T x`, differentiable any number of times; backward keeps the parameters and no activations.

    Args:
        op: "color", "crop", "cutout", "flip", "scale" or "rotate".
        x: (n, C, s, s).
        parameters: (n, k) as `augment.Drawn` has them.
        transposed: Which of the two.
    """
    return _Linear.apply(x, op, parameters, transposed)  # type: ignore[no-any-return, no-untyped-call]


def for_pixels(each: Tensor, x: Tensor) -> Tensor:
    """(n,) numbers as (n, 1, 1, 1), beside x."""
    return each.to(x)[:, None, None, None]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, op: str, parameters: Tensor, transposed: bool) -> Tensor:
        return _MAPS[op](x, parameters, transposed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, str, Tensor, bool], output: Tensor) -> None:
        _, *ctx.drawn, ctx.transposed = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        op, parameters = ctx.drawn
        return linear(op, gradient, parameters, not ctx.transposed), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        op, parameters = ctx.drawn
        return linear(op, tangent, parameters, ctx.transposed)


# ---------------------------------------------------------------------------------------------------------------------


def _recolored(x: Tensor, parameters: Tensor, transposed: bool) -> Tensor:
    # Both means are projections, and the image's takes in the pixel's: one sum, which is its own transpose.
    v, c = (for_pixels(each, x) for each in parameters[:, 1:].T)
    return c * v * x + c * (1 - v) * x.mean(1, keepdim=True) + (1 - c) * x.mean((1, 2, 3), keepdim=True)


def _shifted(x: Tensor, parameters: Tensor, transposed: bool) -> Tensor:
    size = x.shape[-1]
    shifts = (parameters if transposed else -parameters).to(x.device)
    place = torch.arange(size, device=x.device) + shifts.long().T[..., None]  # (2, n, s): what a pixel looks at
    inside, place = (place >= 0) & (place < size), place.clamp(0, size - 1)
    index = (place[0][:, :, None] * size + place[1][:, None, :]).flatten(1)[:, None].expand(-1, x.shape[1], -1)
    return x.flatten(2).gather(2, index).view_as(x).where(_both(*inside), 0)


def _holed(x: Tensor, parameters: Tensor, transposed: bool) -> Tensor:
    row, column, side = parameters.to(x.device).T[..., None]
    pixels = torch.arange(x.shape[-1], device=x.device)
    hole = _both(*((first <= pixels) & (pixels < first + side) for first in (row, column)))
    return x.masked_fill(hole, 0)


def _both(rows: Tensor, columns: Tensor) -> Tensor:
    """(n, 1, s, s) whether a pixel is in one of the rows (n, s) and in one of the columns (n, s)."""
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def _mirrored(x: Tensor, parameters: Tensor, transposed: bool) -> Tensor:
    return x.flip(3).where(for_pixels(parameters[:, 0], x).bool(), x)


def _rescaled(x: Tensor, parameters: Tensor, transposed: bool) -> Tensor:
    return _resampled(x, parameters.flip(1).diag_embed(), transposed)


def _rotated(x: Tensor, parameters: Tensor, transposed: bool) -> Tensor:
    cos, sin = parameters[:, 0].cos(), parameters[:, 0].sin()
    return _resampled(x, torch.stack([cos, sin, -sin, cos], 1).view(-1, 2, 2), transposed)


def _resampled(x: Tensor, matrix: Tensor, transposed: bool) -> Tensor:
    """Every pixel o looks at the place `matrix (o - centre) + centre`, (row, column), and interpolates linearly.

    The weight of pixel p in pixel o is hat(r) hat(c), where (r, c) is the way from p to the place that o looks at, and
    hat(t) = max(0, 1 - |t|). The transpose gathers, at p, the o that look within a pixel of it: along either axis they
    are less than 1.23 from matrix^-1 (p - centre) + centre, as factors are at most 1.2 and the angle at most 15
    degrees; so they are among the nine around the pixel nearest to that.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)  # bfloat16 could not even say where
    matrix, size, centre = matrix.to(x.device, dtype), x.shape[-1], (x.shape[-1] - 1) / 2
    axis = torch.arange(size, device=x.device, dtype=dtype)
    pixels = torch.stack(torch.meshgrid(axis, axis, indexing="ij")).expand(len(x), 2, size, size)

    def through(matrix: Tensor, places: Tensor) -> Tensor:
        return torch.einsum("nij,nj...->ni...", matrix, places - centre) + centre

    if not transposed:
        grid = (2 * through(matrix, pixels) + 1) / size - 1  # as align_corners=False counts: a side of 1 is no case
        return F.grid_sample(x.to(dtype), grid.flip(1).movedim(1, -1), align_corners=False).to(x.dtype)
    nearest = through(torch.linalg.inv(matrix), pixels).round()
    way = through(matrix, nearest) - pixels
    # So many zeros around that a pixel beyond them, and its neighbours, may be taken for some among them.
    padded, wide = F.pad(x, (3, 3, 3, 3)).flatten(2), size + 6
    rows, columns = (nearest.clamp(-2, size + 1) + 3).long().flatten(2).unbind(1)
    index, total = rows * wide + columns, torch.zeros_like(x, dtype=dtype)
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            step = matrix @ matrix.new_tensor([down, right])
            weights = (1 - (way + step[..., None, None]).abs()).clamp_min(0).prod(1, keepdim=True)
            there = (index + (down * wide + right))[:, None].expand(-1, x.shape[1], -1)
            total += weights * padded.gather(2, there).view_as(x)
    return total.to(x.dtype)


_MAPS: dict[str, Callable[[Tensor, Tensor, bool], Tensor]] = {
    "color": _recolored,
    "crop": _shifted,
    "cutout": _holed,
    "flip": _mirrored,
    "scale": _rescaled,
    "rotate": _rotated,
}
