"""grad_gram in Triton: tiles of tokens by tokens, whose scores over d and over p are multiplied and summed by samples.

A program owns a tile. Tokens of all samples are numbered through in units of a power of two tokens, the last unit of a
sample padded: so a tile's sums by units are a reshape and two reductions, whatever its samples are. What bounds it:
tensor cores and L2; where T is small and only norms are wanted, memory. See docs/gpu/grad_gram.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl


@triton.jit
def score(
    x, y, x_row, y_row, x_live, y_live, features,
    ROWS: tl.constexpr, COLS: tl.constexpr, FEATURES: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x y^T over all features, for the rows that begin at x + x_row and the columns at y + y_row."""
    steps = tl.arange(0, FEATURES)
    x_at = x + x_row[:, None] + steps[None, :]
    y_at = y + y_row[None, :] + steps[:, None]  # read as (FEATURES, COLS): no transpose after the load
    sums = tl.zeros((ROWS, COLS), tl.float32)
    for f in tl.range(0, features, FEATURES):
        live = f + steps < features
        left = tl.load(x_at, mask=x_live[:, None] & live[None, :], other=0.0)
        right = tl.load(y_at, mask=live[:, None] & y_live[None, :], other=0.0)
        if UPCAST:
            left, right = left.to(tl.float32), right.to(tl.float32)
        sums = tl.dot(left, right, sums, input_precision=PRECISION)
        x_at += FEATURES
        y_at += FEATURES
    return sums


@triton.jit
def grad_gram_tiles(
    a, b, a2, b2, sums,
    samples, samples2, tokens, tokens2, units, units2, d, p, tiles, col_tiles, span, out_row,
    a_sample, a_token, b_sample, b_token, a2_sample, a2_token, b2_sample, b2_token,
    TILE: tl.constexpr, FEATURES: tl.constexpr, UNIT: tl.constexpr, UNIT2: tl.constexpr,
    SYMMETRIC: tl.constexpr, DIAGONAL: tl.constexpr, DIRECT: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile's sums by units, to sums[pair of samples, unit, unit], or out where each sample is one unit."""
    program = tl.program_id(0)
    if DIAGONAL:
        row_tile = program // span
        col_tile = row_tile + program % span
        if col_tile >= tiles:
            return
        last_row = tl.minimum((row_tile + 1) * TILE, samples * units * UNIT) - 1
        if col_tile * TILE // (units * UNIT) > last_row // (units * UNIT):  # no sample has tokens in both
            return
    elif SYMMETRIC:  # a long row of the triangle and the short one that has what it lacks make one of tiles + 1
        row_tile, at = program // (tiles + 1), program % (tiles + 1)
        if row_tile * 2 + 1 == tiles and at >= tiles - row_tile:  # the middle row has no partner
            return
        col_tile = tl.where(at < tiles - row_tile, row_tile + at, at - 1)
        row_tile = tl.where(at < tiles - row_tile, row_tile, tiles - 1 - row_tile)
    else:
        row_tile, col_tile = program // col_tiles, program % col_tiles

    row = row_tile * TILE + tl.arange(0, TILE)
    i, t = row // (units * UNIT), row % (units * UNIT)
    row_live = (i < samples) & (t < tokens)
    col = col_tile * TILE + tl.arange(0, TILE)
    j, u = col // (units2 * UNIT2), col % (units2 * UNIT2)
    col_live = (j < samples2) & (u < tokens2)
    products = score(
        a, a2, i.to(tl.int64) * a_sample + t.to(tl.int64) * a_token,
        j.to(tl.int64) * a2_sample + u.to(tl.int64) * a2_token,
        row_live, col_live, d, TILE, TILE, FEATURES, UPCAST, PRECISION,
    )  # fmt: skip
    products *= score(
        b, b2, i.to(tl.int64) * b_sample + t.to(tl.int64) * b_token,
        j.to(tl.int64) * b2_sample + u.to(tl.int64) * b2_token,
        row_live, col_live, p, TILE, TILE, FEATURES, UPCAST, PRECISION,
    )  # fmt: skip

    by_units = tl.sum(tl.reshape(products, (TILE // UNIT, UNIT, TILE // UNIT2, UNIT2)), axis=3)
    by_units = tl.sum(by_units.to(tl.float64), axis=1)
    row_unit = (row_tile * (TILE // UNIT) + tl.arange(0, TILE // UNIT))[:, None]
    col_unit = (col_tile * (TILE // UNIT2) + tl.arange(0, TILE // UNIT2))[None, :]
    i, j = tl.broadcast(row_unit // units, col_unit // units2)
    live = (i < samples) & (j < samples2)
    if DIAGONAL:
        live &= i == j
    elif SYMMETRIC:
        live &= i <= j
    if SYMMETRIC:  # the tile below the diagonal, which no program takes
        by_units = tl.where((i == j) & (row_tile < col_tile), 2 * by_units, by_units)
    if DIRECT:
        if DIAGONAL:
            tl.store(sums + i, by_units.to(tl.float32), mask=live)
        else:
            tl.store(sums + i.to(tl.int64) * out_row + j, by_units.to(tl.float32), mask=live)
            if SYMMETRIC:
                tl.store(sums + j.to(tl.int64) * out_row + i, by_units.to(tl.float32), mask=live)
    else:
        pair = i.to(tl.int64) if DIAGONAL else i.to(tl.int64) * samples2 + j
        tl.store(sums + (pair * units + row_unit % units) * units2 + col_unit % units2, by_units, mask=live)


@triton.jit
def sum_units(
    sums, out, samples, samples2, units, units2, out_row,
    UNITS_PER_TILE: tl.constexpr, PAIRS: tl.constexpr, SUMS: tl.constexpr,
    SYMMETRIC: tl.constexpr, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """Adds up sums (pairs, units, units2) for each pair of samples in float64, in an order that shapes alone decide."""
    pair = (tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS))[:, None]
    if DIAGONAL:
        i, j = pair, pair
    else:
        i, j = pair // samples2, pair % samples2
    live = i < samples
    if SYMMETRIC:
        live &= i <= j
    total = tl.zeros((PAIRS, SUMS), tl.float64)
    for first in range(0, units * units2, SUMS):
        at = first + tl.arange(0, SUMS)[None, :]
        there = live & (at < units * units2)
        if SYMMETRIC:  # tiles below the diagonal were not taken
            row_tile, col_tile = (
                (i * units + at // units2) // UNITS_PER_TILE,
                (j * units2 + at % units2) // UNITS_PER_TILE,
            )
            there &= row_tile <= col_tile
        total += tl.load(sums + pair * units * units2 + at, mask=there, other=0.0)
    result = tl.sum(total, axis=1, keep_dims=True).to(tl.float32)
    if DIAGONAL:
        tl.store(out + i, result, mask=live)
    else:
        tl.store(out + i * out_row + j, result, mask=live)
        if SYMMETRIC:
            tl.store(out + j * out_row + i, result, mask=live)


# ----------------------------------------------------------------------------------------------------------------------

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PAIRS, SUMS = 32, 32


class LaunchShape(NamedTuple):
    """Tokens of a tile on either side, features per step, warps and pipeline stages, how float32 products are made."""

    tile: int
    features: int
    warps: int
    stages: int
    precision: str


def launch_shape(backend: str, arch: int | str, itemsize: int, aligned: bool) -> LaunchShape:
    """The largest tile that spills nothing beside two accumulators; rows that are not `aligned` come by elements."""
    if backend == "interpreter":
        return LaunchShape(32, 32, 1, 1, "ieee")
    if backend == "hip":
        return LaunchShape(64, 32, 4, 2, "ieee") if itemsize == 4 else LaunchShape(128, 32, 8, 2, "ieee")
    if int(arch) < 80:
        raise ValueError(f"grad_gram: Triton kernels need compute capability 8.0 or later, got {int(arch) / 10}")
    operands_in_shared = aligned and int(arch) // 10 in (9, 10)
    if itemsize == 4:
        # Three TF32 products make a float32 one: worth it where TF32 is far more than three times faster.
        precision = "tf32x3" if arch in (80, 90, 100, 103) else "ieee"
        return LaunchShape(64, 32 if operands_in_shared else 16, 4, 3, precision)
    if not aligned:
        return LaunchShape(64, 32, 4, 3, "ieee")
    return LaunchShape(128, 32 if int(arch) // 10 == 12 else 64, 8, 3, "ieee")


def unit_of(tokens: int, tile: int) -> int:
    """Tokens of a unit: as many as the tile has, or as pad a sample by at most an eighth, but no fewer than 16."""
    unit = triton.next_power_of_2(tokens)
    while unit > tile or (unit > 16 and triton.cdiv(tokens, unit) * unit * 8 > tokens * 9):
        unit //= 2
    return unit


def _machine() -> tuple[str, int | str]:
    if not isinstance(grad_gram_tiles, triton.JITFunction):
        return "interpreter", 0
    target = triton.runtime.driver.active.get_current_target()
    return target.backend, target.arch


def run(a: torch.Tensor, b: torch.Tensor, a2: torch.Tensor | None, b2: torch.Tensor | None, out: torch.Tensor) -> None:
    """Fills out (B,B2), or (B,) for the diagonal, from a (B,T,d), b (B,T,p), a2 (B2,T2,d), b2; see grad_gram.h."""
    if a.dtype not in DTYPES:
        raise ValueError(f"grad_gram: Triton takes float32, bfloat16 or float16, got {a.dtype} (backend 'cpu' has it)")
    symmetric, diagonal = a2 is None, out.ndim == 1
    x, y = (a, b) if a2 is None or b2 is None else (a2, b2)
    if out.numel() == 0:
        return
    if 0 in (a.shape[1], x.shape[1], a.shape[2], b.shape[2]):
        out.zero_()
        return
    with torch.cuda.device_of(a):
        backend, arch = _machine()
        sides = (a, b, x, y)
        aligned = all(n % 16 == 0 for z in sides for n in (z.data_ptr(), z.shape[-1], *z.stride()[:2]))
        shape = launch_shape(backend, arch, a.element_size(), aligned)
        unit, unit2 = unit_of(a.shape[1], shape.tile), unit_of(x.shape[1], shape.tile)
        units, units2 = triton.cdiv(a.shape[1], unit), triton.cdiv(x.shape[1], unit2)
        tiles = triton.cdiv(a.shape[0] * units * unit, shape.tile)
        col_tiles = triton.cdiv(x.shape[0] * units2 * unit2, shape.tile)
        span = triton.cdiv(units * unit - 1, shape.tile) + 1  # tiles that a sample may lie in
        grid = tiles * (span if diagonal else col_tiles)
        if symmetric and not diagonal:
            grid = triton.cdiv(tiles, 2) * (tiles + 1)
        direct = units == units2 == 1
        pairs = a.shape[0] * (1 if diagonal else x.shape[0])
        sums = out if direct else a.new_empty((pairs, units, units2), dtype=torch.float64)
        grad_gram_tiles[(grid,)](
            a, b, x, y, sums,
            a.shape[0], x.shape[0], a.shape[1], x.shape[1], units, units2, a.shape[2], b.shape[2],
            tiles, col_tiles, span, out.stride(0),
            *(n for z in sides for n in z.stride()[:2]),
            TILE=shape.tile, FEATURES=shape.features, UNIT=unit, UNIT2=unit2,
            SYMMETRIC=symmetric, DIAGONAL=diagonal, DIRECT=direct,
            UPCAST=backend == "interpreter" and a.dtype == torch.bfloat16, PRECISION=shape.precision,
            num_warps=shape.warps, num_stages=shape.stages,
        )  # fmt: skip
        if not direct:
            sum_units[(triton.cdiv(pairs, PAIRS),)](
                sums, out, a.shape[0], x.shape[0], units, units2, out.stride(0),
                UNITS_PER_TILE=shape.tile // unit, PAIRS=PAIRS, SUMS=SUMS, SYMMETRIC=symmetric, DIAGONAL=diagonal,
                num_warps=4,
            )  # fmt: skip
