"""adam_dots in Triton: the weight-gradient GEMM, each sample's tile made its change of AdamW's step in registers.

A program owns one tile of the (p, d) gradient and loops over samples, and over tokens inside, as grad_stats does. What
AdamW's state makes of an element is written beforehand by a kernel of its own. What bounds it: tensor cores and L2, and
for short samples the step. See docs/gpu/adam_dots.md.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

ROW_TILES_PER_GROUP = tl.constexpr(8)  # programs that run together share rows of b and columns of a in L2
EXPONENT = tl.constexpr(0x7F800000)
SMALLEST = tl.constexpr(2.0**-118)  # as in core/adam_step.h: below this, 0 or not is one


@triton.jit
def adam_states(m, v, states, d, elements, m_row, v_row, root_factor, momentum, eps, BLOCK: tl.constexpr):
    """r0 and, `elements` behind it, pull of every element of the weight; see core/adam_step.h."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < elements
    row, col = at // d, at % d
    root = root_factor * tl.sqrt(tl.load(v + row * v_row + col, mask=live, other=0.0).to(tl.float32))
    root = tl.maximum(root, SMALLEST)
    tl.store(states + at, root, mask=live)
    pull = momentum * tl.load(m + row * m_row + col, mask=live, other=0.0).to(tl.float32) / (root + eps)
    tl.store(states + elements + at, pull, mask=live)


@triton.jit
def step_change(x, root, pull, eps):
    """The change of step over `unit`, for a gradient of root (1 - beta2) / bc2 times x; see core/adam_step.h."""
    longest = tl.maximum(tl.abs(x), root)
    power = (~longest.to(tl.int32, bitcast=True) & EXPONENT).to(tl.float32, bitcast=True)
    scaled = x * power
    root0 = root * power
    square = scaled * scaled
    new_root = tl.sqrt(root0 * root0 + square)
    roots = new_root + root0
    return (pull * square - scaled * roots) / ((new_root + eps * power) * roots)


@triton.jit
def adam_dots_tiles(
    a, b, clip, states, D, partials,
    samples, samples_per_span, tokens, d, p, directions,
    a_sample, a_token, b_sample, b_token, D_direction, D_row, scale, eps,
    ROWS: tl.constexpr, COLS: tl.constexpr, TOKENS: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile's shares of the dots of one span of samples, over `unit`, to partials[tile, sample]."""
    tile, span = tl.program_id(0), tl.program_id(1)
    row_tiles, col_tiles = tl.cdiv(p, ROWS), tl.cdiv(d, COLS)
    row_tile, col_tile = tl.swizzle2d(tile // col_tiles, tile % col_tiles, row_tiles, col_tiles, ROW_TILES_PER_GROUP)
    row, col = row_tile * ROWS, col_tile * COLS
    rows, cols, steps = tl.arange(0, ROWS), tl.arange(0, COLS), tl.arange(0, TOKENS)
    row_live, col_live = row + rows < p, col + cols < d
    live = row_live[:, None] & col_live[None, :]
    D_tile = D + row.to(tl.int64) * D_row + col + rows[:, None] * D_row + cols[None, :]
    states += row.to(tl.int64) * d + col + rows[:, None] * d + cols[None, :]

    first = span * samples_per_span
    for i in tl.range(first, tl.minimum(first + samples_per_span, samples)):
        a_at = a + tl.cast(i, tl.int64) * a_sample + col
        b_at = b + tl.cast(i, tl.int64) * b_sample + row
        gradient = tl.zeros((ROWS, COLS), tl.float32)
        for t in tl.range(0, tokens, TOKENS):
            step_live = t + steps < tokens
            x = tl.load(
                a_at + steps[:, None] * a_token + cols[None, :], mask=step_live[:, None] & col_live[None, :], other=0.0
            )
            # Read as (ROWS, TOKENS): a transpose after the load would keep it out of the asynchronous pipeline.
            y = tl.load(
                b_at + rows[:, None] + steps[None, :] * b_token, mask=row_live[:, None] & step_live[None, :], other=0.0
            )
            if UPCAST:
                x, y = x.to(tl.float32), y.to(tl.float32)
            gradient = tl.dot(y, x, gradient, input_precision=PRECISION)
            a_at += TOKENS * a_token
            b_at += TOKENS * b_token
        root = tl.load(states, mask=live, other=1.0)
        pull = tl.load(states + tl.cast(p, tl.int64) * d, mask=live, other=0.0)
        change = step_change(gradient * (scale * tl.load(clip + i)), root, pull, eps)
        sums = partials + (tile.to(tl.int64) * samples + i) * directions
        D_at = D_tile
        for k in range(directions):
            tl.store(sums + k, tl.sum(change * tl.load(D_at, mask=live, other=0.0).to(tl.float32)))
            D_at += D_direction


@triton.jit
def sum_tiles(partials, out, tiles, numbers, unit, TILES: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums partials (tiles, numbers) over tiles in float64, in an order that shapes alone decide; times `unit`."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros((TILES, COLUMNS), tl.float64)
    for first in range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)
        live = (tile < tiles)[:, None] & (column < numbers)[None, :]
        sums += tl.load(partials + tile.to(tl.int64)[:, None] * numbers + column[None, :], mask=live, other=0.0)
    tl.store(out + column, (tl.sum(sums, axis=0) * unit).to(tl.float32), mask=column < numbers)


# ----------------------------------------------------------------------------------------------------------------------

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SUM_TILES, SUM_COLUMNS, STATE_BLOCK = 128, 16, 1024


class LaunchShape(NamedTuple):
    """Tile of the gradient, tokens per step, warps and pipeline stages, and how float32 products are made."""

    rows: int
    cols: int
    tokens: int
    warps: int
    stages: int
    precision: str


def launch_shape(backend: str, arch: int | str, itemsize: int, aligned: bool) -> LaunchShape:
    """The largest tile that spills nothing: r0, pull, a direction and the step's numbers lie beside the gradient.

    Rows that are not `aligned` come through registers, one element at a time, each by its own address.
    """
    if backend == "interpreter":
        return LaunchShape(32, 32, 16, 1, 1, "ieee")
    if backend == "hip":
        return LaunchShape(64, 64, 16 if itemsize == 4 else 32, 4, 2, "ieee")  # float32 has matrix instructions
    if int(arch) < 80:
        raise ValueError(f"adam_dots: Triton kernels need compute capability 8.0 or later, got {int(arch) / 10}")
    if itemsize == 4:
        # Three TF32 products make a float32 one: worth it where TF32 is far more than three times faster.
        precision = "tf32x3" if arch in (80, 90, 100, 103) else "ieee"
        return LaunchShape(64, 64 if aligned else 32, 16, 4 if aligned else 8, 3, precision)
    return LaunchShape(64, 64, 64, 4, 3, "ieee") if aligned else LaunchShape(64, 32, 32, 8, 3, "ieee")


def sample_spans(tiles: int, samples: int, multiprocessors: int) -> int:
    """Into how many spans of samples to cut the work so that the last wave of programs is not nearly empty."""
    resident = 2 * multiprocessors
    best = min(range(1, min(samples, 64) + 1), key=lambda n: triton.cdiv(tiles * n, resident) * triton.cdiv(samples, n))
    return triton.cdiv(samples, triton.cdiv(samples, best))


def _machine(device: torch.device) -> tuple[str, int | str, int]:
    """Backend, architecture and number of multiprocessors; an invented small machine for the interpreter."""
    if not isinstance(adam_dots_tiles, triton.JITFunction):
        return "interpreter", 0, 3
    target = triton.runtime.driver.active.get_current_target()
    return target.backend, target.arch, torch.cuda.get_device_properties(device).multi_processor_count


def run(
    a: torch.Tensor, b: torch.Tensor, clip: torch.Tensor, m: torch.Tensor, v: torch.Tensor, D: torch.Tensor,
    out: torch.Tensor, eta: float, beta1: float, beta2: float, eps: float, bc1: float, bc2: float,
) -> None:  # fmt: skip
    """Fills out (B,R) from a (B,T,d), b (B,T,p), clip (B,), m and v (p,d) and D (R,p,d); see adam_dots.h."""
    if a.dtype not in DTYPES:
        raise ValueError(f"adam_dots: Triton takes float32, bfloat16 or float16, got {a.dtype} (backend 'cpu' has it)")
    (samples, tokens, d), p, directions = a.shape, b.shape[-1], D.shape[0]
    if a.numel() * p * directions == 0:
        out.zero_()
        return
    x_of_g = math.sqrt((1 - beta2) / bc2)
    with torch.cuda.device_of(a):
        backend, arch, multiprocessors = _machine(a.device)
        aligned = all(n % 16 == 0 for x in (a, b, D) for n in (x.data_ptr(), x.shape[-1], *x.stride()[:2]))
        shape = launch_shape(backend, arch, a.element_size(), aligned)
        tiles = triton.cdiv(p, shape.rows) * triton.cdiv(d, shape.cols)
        spans = sample_spans(tiles, samples, multiprocessors)
        states = a.new_empty((2, p, d), dtype=torch.float32)
        partials = a.new_empty((tiles, samples, directions), dtype=torch.float32)
        adam_states[(triton.cdiv(p * d, STATE_BLOCK),)](
            m, v, states, d, p * d, m.stride(0), v.stride(0),
            math.sqrt(beta2 / bc2), beta1 / (1 - beta1) * x_of_g, eps, BLOCK=STATE_BLOCK, num_warps=4,
        )  # fmt: skip
        adam_dots_tiles[tiles, spans](
            a, b, clip, states, D, partials,
            samples, triton.cdiv(samples, spans), tokens, d, p, directions,
            *a.stride()[:2], *b.stride()[:2], *D.stride()[:2], x_of_g, eps,
            ROWS=shape.rows, COLS=shape.cols, TOKENS=shape.tokens,
            UPCAST=backend == "interpreter" and a.dtype == torch.bfloat16, PRECISION=shape.precision,
            num_warps=shape.warps, num_stages=shape.stages,
        )  # fmt: skip
        sum_tiles[(triton.cdiv(samples * directions, SUM_COLUMNS),)](
            partials, out, tiles, samples * directions, eta * (1 - beta1) / bc1 / x_of_g,
            TILES=SUM_TILES, COLUMNS=SUM_COLUMNS, num_warps=4,
        )  # fmt: skip
