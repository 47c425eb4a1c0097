"""grad_stats in Triton: the weight-gradient GEMM, each sample's tile in registers when its norm and dots are taken.

A program owns one tile of the (p, d) gradient and loops over samples, and over tokens inside: a grid as large as the
batch would leave most multiprocessors idle. What bounds it: tensor cores and L2, as any GEMM. See
docs/gpu/grad_stats.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

ROW_TILES_PER_GROUP = tl.constexpr(8)  # programs that run together share rows of b and columns of a in L2


@triton.jit
def grad_stats_tiles(
    a, b, D, weight_grad, partials,
    samples, samples_per_span, tokens, d, p, directions,
    a_sample, a_token, b_sample, b_token, D_direction, D_row, weight_grad_span, weight_grad_row,
    ROWS: tl.constexpr, COLS: tl.constexpr, TOKENS: tl.constexpr,
    ACCUMULATE: tl.constexpr, KEEP_DIRECTION: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of weight_grad over one span of samples; its shares of norms2 and dots go to partials[tile, sample]."""
    tile, span = tl.program_id(0), tl.program_id(1)
    row_tiles, col_tiles = tl.cdiv(p, ROWS), tl.cdiv(d, COLS)
    row_tile, col_tile = tl.swizzle2d(tile // col_tiles, tile % col_tiles, row_tiles, col_tiles, ROW_TILES_PER_GROUP)
    row, col = row_tile * ROWS, col_tile * COLS
    rows, cols, steps = tl.arange(0, ROWS), tl.arange(0, COLS), tl.arange(0, TOKENS)
    row_live, col_live = row + rows < p, col + cols < d
    live = row_live[:, None] & col_live[None, :]

    if D is not None:
        D_tile = D + row.to(tl.int64) * D_row + col + rows[:, None] * D_row + cols[None, :]
    if KEEP_DIRECTION:
        direction = tl.load(D_tile, mask=live, other=0.0).to(tl.float32)
    if weight_grad is not None:
        total = tl.zeros((ROWS, COLS), tl.float32)
    first = span * samples_per_span
    # Flattened, both loops are one: the next sample's first tokens are in flight while this sample's sums are taken.
    for i in tl.range(first, tl.minimum(first + samples_per_span, samples), flatten=True):
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
        if weight_grad is not None:
            total += gradient
        sums = partials + (tile.to(tl.int64) * samples + i) * (1 + directions)
        tl.store(sums, tl.sum(gradient * gradient))
        if KEEP_DIRECTION:
            tl.store(sums + 1, tl.sum(gradient * direction))
        elif D is not None:
            D_at = D_tile
            for k in range(directions):
                tl.store(sums + 1 + k, tl.sum(gradient * tl.load(D_at, mask=live, other=0.0).to(tl.float32)))
                D_at += D_direction

    if weight_grad is not None:
        to = weight_grad + span.to(tl.int64) * weight_grad_span + row.to(tl.int64) * weight_grad_row + col
        to += rows[:, None] * weight_grad_row + cols[None, :]
        if ACCUMULATE:
            total += tl.load(to, mask=live, other=0.0)
        tl.store(to, total, mask=live)


@triton.jit
def sum_tiles(
    partials, norms2, dots, tiles, samples, directions, TILES: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Sums partials (tiles, samples, 1 + directions) over tiles in float64, in an order that shapes alone decide."""
    columns = samples * (1 + directions)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros((TILES, COLUMNS), tl.float64)
    for first in range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)
        live = (tile < tiles)[:, None] & (column < columns)[None, :]
        sums += tl.load(partials + tile.to(tl.int64)[:, None] * columns + column[None, :], mask=live, other=0.0)
    total = tl.sum(sums, axis=0).to(tl.float32)
    sample, quantity = column // (1 + directions), column % (1 + directions)
    if norms2 is not None:
        tl.store(norms2 + sample, total, mask=(column < columns) & (quantity == 0))
    if dots is not None:
        tl.store(dots + sample * directions + quantity - 1, total, mask=(column < columns) & (quantity > 0))


# ----------------------------------------------------------------------------------------------------------------------

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SUM_TILES, SUM_COLUMNS = 128, 16


class LaunchShape(NamedTuple):
    """Tile of the gradient, tokens per step, warps and pipeline stages, and how float32 products are made."""

    rows: int
    cols: int
    tokens: int
    warps: int
    stages: int
    precision: str


def launch_shape(backend: str, arch: int | str, itemsize: int, directions: int, aligned: bool) -> LaunchShape:
    """The largest tile that spills nothing, by what must stay in registers beside the pipeline.

    Two accumulators do, and the tile of D when there is one direction; more directions are read again per sample, into
    registers that must then be free. Hopper and data-centre Blackwell read operands from shared memory and have room
    for 128 columns of all three; other NVIDIA generations hold fragments as well. Rows that are not `aligned` come
    through registers, one element at a time.
    """
    if backend == "interpreter":
        return LaunchShape(32, 32, 16, 1, 1, "ieee")
    if backend == "hip":
        if itemsize == 4:
            return LaunchShape(128, 64, 16, 4, 2, "ieee")  # there are matrix instructions for float32
        # gfx950 reads transposed fragments from LDS whatever the warps' tile is; gfx942 reads halves one by one when
        # that tile is narrow, so its warps are few and their tiles large.
        tokens = 64 if aligned and arch == "gfx950" else 32
        return LaunchShape(128, 128, tokens, 8 if arch == "gfx950" else 4, 2, "ieee")
    if int(arch) < 80:
        raise ValueError(f"grad_stats: Triton kernels need compute capability 8.0 or later, got {int(arch) / 10}")
    operands_in_shared = aligned and int(arch) // 10 in (9, 10)
    if itemsize == 4 and arch in (80, 90, 100, 103):
        # Three TF32 products make a float32 one: worth it where TF32 is far more than three times faster.
        tokens, stages = (32, 3) if operands_in_shared else (16, 4)
        return LaunchShape(128, 64 if aligned else 32, tokens, 8, stages, "tf32x3")
    if itemsize == 4:
        return LaunchShape(64, 64 if aligned else 32, 16, 4, 3, "ieee")
    cols = 128 if aligned and directions <= int(operands_in_shared) else 64
    return LaunchShape(128, cols, 64 if aligned else 32, 8, 4 if operands_in_shared else 3, "ieee")


def sample_spans(tiles: int, samples: int, tokens: int, multiprocessors: int, weight_grad: bool) -> int:
    """Into how many spans of samples to cut the work so that the last wave of programs is not nearly empty.

    A span costs a partial weight_grad: written, read and added, worth about 512 tokens of the same tile's products.
    """

    def time(spans: int) -> int:
        waves = triton.cdiv(tiles * spans, multiprocessors)
        return waves * (triton.cdiv(samples, spans) * tokens + (512 if weight_grad and spans > 1 else 0))

    best = min(range(1, min(samples, 8) + 1), key=time)
    return triton.cdiv(samples, triton.cdiv(samples, best))


def _machine(device: torch.device) -> tuple[str, int | str, int]:
    """Backend, architecture and number of multiprocessors; an invented small machine for the interpreter."""
    if not isinstance(grad_stats_tiles, triton.JITFunction):
        return "interpreter", 0, 6
    target = triton.runtime.driver.active.get_current_target()
    return target.backend, target.arch, torch.cuda.get_device_properties(device).multi_processor_count


def run(
    a: torch.Tensor,
    b: torch.Tensor,
    D: torch.Tensor | None,
    weight_grad: torch.Tensor | None,
    norms2: torch.Tensor | None,
    dots: torch.Tensor | None,
    accumulate: bool = False,
) -> None:
    """Fills weight_grad (p,d), norms2 (B,) and dots (B,K) from a (B,T,d), b (B,T,p) and D (K,p,d); see grad_stats.h."""
    if a.dtype not in DTYPES:
        raise ValueError(f"grad_stats: Triton takes float32, bfloat16 or float16, got {a.dtype} (backend 'cpu' has it)")
    (samples, tokens, d), p = a.shape, b.shape[-1]
    directions = 0 if D is None else D.shape[0]
    if a.numel() * p == 0:
        for out in (None if accumulate else weight_grad, norms2, dots):
            if out is not None:
                out.zero_()
        return
    if directions == 0:
        D = dots = None
    with torch.cuda.device_of(a):
        backend, arch, multiprocessors = _machine(a.device)
        aligned = all(n % 16 == 0 for x in (a, b) for n in (x.data_ptr(), x.shape[-1], *x.stride()[:2]))
        shape = launch_shape(backend, arch, a.element_size(), directions, aligned)
        tiles = triton.cdiv(p, shape.rows) * triton.cdiv(d, shape.cols)
        spans = sample_spans(tiles, samples, tokens, multiprocessors, weight_grad is not None)
        partials = a.new_empty((tiles, samples, 1 + directions), dtype=torch.float32)
        cut = weight_grad is not None and spans > 1
        shares = a.new_empty((spans, p, d), dtype=torch.float32) if cut else weight_grad
        grad_stats_tiles[tiles, spans](
            a, b, D, shares, partials,
            samples, triton.cdiv(samples, spans), tokens, d, p, directions,
            *a.stride()[:2], *b.stride()[:2], *(D.stride()[:2] if D is not None else (0, 0)),
            p * d, d if cut or weight_grad is None else weight_grad.stride(0),
            ROWS=shape.rows, COLS=shape.cols, TOKENS=shape.tokens,
            ACCUMULATE=accumulate and not cut, KEEP_DIRECTION=directions == 1,
            UPCAST=backend == "interpreter" and a.dtype == torch.bfloat16, PRECISION=shape.precision,
            num_warps=shape.warps, num_stages=shape.stages,
        )  # fmt: skip
        if cut:
            total = shares.sum(0)
            weight_grad.copy_(weight_grad + total if accumulate else total)
        if norms2 is not None or dots is not None:
            grid = (triton.cdiv(samples * (1 + directions), SUM_COLUMNS),)
            sum_tiles[grid](
                partials, norms2, dots, tiles, samples, directions, TILES=SUM_TILES, COLUMNS=SUM_COLUMNS, num_warps=4
            )
