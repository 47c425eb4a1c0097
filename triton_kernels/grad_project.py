"""grad_project in Triton: projections of tokens and their products, and tiles of gradients scattered into buckets.

Kronecker: tokens times P^T, features in spans, then one small product per sample. Sparse: a program forms a sample's
tiles of G one after the other and adds each to a table of buckets, by a list of the tile's elements that is sorted by
bucket once and serves all samples. See docs/gpu/grad_project.md.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

NONE = tl.constexpr(0x7FFFFFFF)  # the bucket of elements beyond the edges of G; buckets are fewer
HALF_PI = tl.constexpr(math.pi / 2)


@triton.jit
def random_words(seed, col, row_word, purpose, layer):
    """Four words of Philox4x32-10 for each column."""
    zero = col.to(tl.uint32) * 0
    layer = zero + tl.cast(layer, tl.int64).to(tl.uint32)
    return tl.philox(seed, col.to(tl.uint32), zero + row_word.to(tl.uint32), zero + purpose, layer)


@triton.jit
def normals(w0, w1):
    """Two independent standard normals (Box and Muller), the angle within an eighth of a turn of a quarter, exactly."""
    radius = tl.sqrt(-2 * tl.log((w0.to(tl.float64) + 0.5) / 4294967296.0))
    turns = w1.to(tl.float64) / 1073741824.0
    quarter = (w1.to(tl.int64) + (1 << 29)) >> 30
    x = (turns - quarter.to(tl.float64)) * HALF_PI
    cosine, sine = x * 0 + 1, x * 0 + 1
    for step in tl.static_range(8):
        cosine = 1 - cosine * x * x * (1 / ((16 - 2 * step) * (15 - 2 * step)))
        sine = 1 - sine * x * x * (1 / ((16 - 2 * step) * (17 - 2 * step)))
    sine *= x
    odd = (quarter & 1) != 0  # a quarter turn makes the cosine minus the sine, and the sine the cosine
    c = tl.where(odd, sine, cosine) * tl.where(((quarter + 1) & 2) != 0, -1.0, 1.0)
    s = tl.where(odd, cosine, sine) * tl.where((quarter & 2) != 0, -1.0, 1.0)
    return radius * c, radius * s


@triton.jit
def store_rows(to, value, row, k, col, n, to_row, ROWS: tl.constexpr):
    """Rows of a matrix that are inside it."""
    rows = row + tl.arange(0, ROWS)[:, None]
    live = (rows < k) & (col < n)[None, :]
    tl.store(to + rows.to(tl.int64) * to_row + col[None, :], value.to(to.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["seed", "layer"])
def draw_matrix(to, k, n, to_row, seed, layer, purpose, col_blocks, SIGNS: tl.constexpr, COLS: tl.constexpr):
    """A random (k, n) matrix of signs or of standard normals: the rows of one Philox counter, and some columns."""
    group = tl.program_id(0) // col_blocks
    col = tl.program_id(0) % col_blocks * COLS + tl.arange(0, COLS)
    w0, w1, w2, w3 = random_words(seed, col, group, purpose, layer)
    if SIGNS:
        bits = tl.arange(0, 32).to(tl.uint32)[:, None]
        store_rows(to, 1.0 - 2.0 * (w0[None, :] >> bits & 1).to(tl.float32), group * 128, k, col, n, to_row, 32)
        store_rows(to, 1.0 - 2.0 * (w1[None, :] >> bits & 1).to(tl.float32), group * 128 + 32, k, col, n, to_row, 32)
        store_rows(to, 1.0 - 2.0 * (w2[None, :] >> bits & 1).to(tl.float32), group * 128 + 64, k, col, n, to_row, 32)
        store_rows(to, 1.0 - 2.0 * (w3[None, :] >> bits & 1).to(tl.float32), group * 128 + 96, k, col, n, to_row, 32)
    else:
        first, second = normals(w0, w1)
        third, fourth = normals(w2, w3)
        store_rows(to, first[None, :], group * 4, k, col, n, to_row, 1)
        store_rows(to, second[None, :], group * 4 + 1, k, col, n, to_row, 1)
        store_rows(to, third[None, :], group * 4 + 2, k, col, n, to_row, 1)
        store_rows(to, fourth[None, :], group * 4 + 3, k, col, n, to_row, 1)


@triton.jit
def project_tokens(
    x, matrix, projected,
    rows, tokens, features, k, k_tiles, row_tiles, span, x_sample, x_token, matrix_row, projected_row,
    ROWS: tl.constexpr, COLS: tl.constexpr, FEATURES: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of tokens (of all samples) by a matrix's rows over a span of features, to projected[span, token, row]."""
    program = tl.program_id(0)
    row = program // k_tiles % row_tiles * ROWS + tl.arange(0, ROWS)
    col = program % k_tiles * COLS + tl.arange(0, COLS)
    number = program // k_tiles // row_tiles
    steps = tl.arange(0, FEATURES)
    start = number * span
    x_at = x + (row // tokens).to(tl.int64)[:, None] * x_sample + (row % tokens).to(tl.int64)[:, None] * x_token
    x_at += start + steps[None, :]
    matrix_at = matrix + col.to(tl.int64)[None, :] * matrix_row + start + steps[:, None]
    sums = tl.zeros((ROWS, COLS), tl.float32)
    for f in tl.range(start, tl.minimum(start + span, features), FEATURES):
        live = f + steps < tl.minimum(start + span, features)
        left = tl.load(x_at, mask=(row < rows)[:, None] & live[None, :], other=0.0)
        right = tl.load(matrix_at, mask=live[:, None] & (col < k)[None, :], other=0.0)
        if WIDEN:
            left, right = left.to(tl.float32), right.to(tl.float32)
        sums = tl.dot(left, right, sums, input_precision=PRECISION)
        x_at += FEATURES
        matrix_at += FEATURES
    to = projected + (number.to(tl.int64) * rows + row)[:, None] * projected_row + col[None, :]
    tl.store(to, sums, mask=(row < rows)[:, None] & (col < k)[None, :])


@triton.jit
def outer_products(
    left, right, out, tokens, k_out, k_in, row_tiles, col_tiles, left_row, right_row, scale,
    ROWS: tl.constexpr, COLS: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of one sample's product of projected tokens."""
    program = tl.program_id(0)
    sample = (program // col_tiles // row_tiles).to(tl.int64)
    row = program // col_tiles % row_tiles * ROWS + tl.arange(0, ROWS)
    col = program % col_tiles * COLS + tl.arange(0, COLS)
    steps = tl.arange(0, TOKENS)
    left_at = left + sample * tokens * left_row + row[:, None] + steps[None, :] * left_row
    right_at = right + sample * tokens * right_row + col[None, :] + steps[:, None] * right_row
    sums = tl.zeros((ROWS, COLS), tl.float32)
    for t in tl.range(0, tokens, TOKENS):
        live = t + steps < tokens
        y = tl.load(left_at, mask=(row < k_out)[:, None] & live[None, :], other=0.0)
        x = tl.load(right_at, mask=live[:, None] & (col < k_in)[None, :], other=0.0)
        sums = tl.dot(y, x, sums, input_precision=PRECISION)
        left_at += TOKENS * left_row
        right_at += TOKENS * right_row
    to = out + (sample * k_out + row)[:, None] * k_in + col[None, :]
    tl.store(to, sums * scale, mask=(row < k_out)[:, None] & (col < k_in)[None, :])


@triton.jit(do_not_specialize=["seed", "layer"])
def hash_tiles(
    hashes, p, d, buckets, nonzeros, first_tile, col_tiles, seed, layer,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """hashes[tile, nonzero, element]: the bucket below the sign in bit 31. A program takes four rows of each column."""
    program = tl.program_id(0)
    groups: tl.constexpr = ROWS // 4
    number, group = program // groups, program % groups
    tile, j = first_tile + number // nonzeros, number % nonzeros
    row, col = tile // col_tiles * ROWS + group * 4, tile % col_tiles * COLS + tl.arange(0, COLS)
    first = (j.to(tl.int64) * buckets // nonzeros).to(tl.uint64)
    width = ((j.to(tl.int64) + 1) * buckets // nonzeros).to(tl.uint64) - first
    w0, w1, w2, w3 = random_words(seed, col, row // 4, 2 + j, layer)
    to = hashes + number.to(tl.int64) * ROWS * COLS + group * 4 * COLS + tl.arange(0, COLS)
    store_hashes(to, w0, first, width, (row < p) & (col < d))
    store_hashes(to + COLS, w1, first, width, (row + 1 < p) & (col < d))
    store_hashes(to + 2 * COLS, w2, first, width, (row + 2 < p) & (col < d))
    store_hashes(to + 3 * COLS, w3, first, width, (row + 3 < p) & (col < d))


@triton.jit
def store_hashes(to, word, first, width, inside):
    """From random words to buckets and signs."""
    bucket = (word.to(tl.uint64) * width >> 32) + first
    hash = bucket.to(tl.uint32) | ((word & 1) << 31)
    tl.store(to, tl.where(inside, hash.to(tl.int32, bitcast=True), NONE))


@triton.jit
def add_in_run(x, x_begins, y, y_begins):
    """Sums that begin anew where a bucket's elements begin."""
    return tl.where(y_begins != 0, y, x + y), x_begins | y_begins


@triton.jit
def sketch_tiles(
    a, b, hashes, places, tables,
    samples, slabs, some_tiles, first_tile, col_tiles, tokens, d, p, buckets, nonzeros,
    a_sample, a_token, b_sample, b_token,
    ROWS: tl.constexpr, COLS: tl.constexpr, TOKENS: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One sample's sums over a slab of tiles of G, added to tables[sample, slab]."""
    sample, slab = tl.program_id(0) % samples, tl.program_id(0) // samples
    table = tables + (sample.to(tl.int64) * slabs + slab) * buckets
    rows, cols, steps = tl.arange(0, ROWS), tl.arange(0, COLS), tl.arange(0, TOKENS)
    elements = tl.arange(0, ROWS * COLS)
    for tile in tl.range(some_tiles * slab // slabs, some_tiles * (slab + 1) // slabs):
        row, col = (first_tile + tile) // col_tiles * ROWS, (first_tile + tile) % col_tiles * COLS
        row_live, col_live = row + rows < p, col + cols < d
        a_at = a + sample.to(tl.int64) * a_sample + col + steps[:, None] * a_token + cols[None, :]
        b_at = b + sample.to(tl.int64) * b_sample + row + rows[:, None] + steps[None, :] * b_token
        gradient = tl.zeros((ROWS, COLS), tl.float32)
        for t in tl.range(0, tokens, TOKENS):
            live = t + steps < tokens
            x = tl.load(a_at, mask=live[:, None] & col_live[None, :], other=0.0)
            y = tl.load(b_at, mask=row_live[:, None] & live[None, :], other=0.0)
            if UPCAST:
                x, y = x.to(tl.float32), y.to(tl.float32)
            gradient = tl.dot(y, x, gradient, input_precision=PRECISION)
            a_at += TOKENS * a_token
            b_at += TOKENS * b_token
        flat = tl.reshape(gradient, (ROWS * COLS,))
        for j in tl.range(0, nonzeros):
            at = (tile * nonzeros + j).to(tl.int64) * ROWS * COLS + elements
            hash = tl.load(hashes + at)
            bucket = hash & NONE
            before = tl.load(hashes + at - 1, mask=elements > 0, other=-1) & NONE
            after = tl.load(hashes + at + 1, mask=elements < ROWS * COLS - 1, other=-1) & NONE
            value = tl.gather(flat, tl.load(places + at).to(tl.int32), 0)
            value = tl.where(hash < 0, -value, value)
            begins = ((elements == 0) | (bucket != before)).to(tl.int32)
            sums, _ = tl.associative_scan((value, begins), 0, add_in_run)
            ends = ((elements == ROWS * COLS - 1) | (bucket != after)) & (bucket != NONE)
            tl.store(table + bucket, tl.load(table + bucket, mask=ends) + sums, mask=ends)
        tl.debug_barrier()  # the next tile's elements of a bucket may be other threads'


# ----------------------------------------------------------------------------------------------------------------------

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WANTED_PROGRAMS = 264  # two for each multiprocessor of a nominal card
DRAW_COLS = 128
LIST_ELEMENTS = 1 << 22  # of the lists that exist at a time


class LaunchShape(NamedTuple):
    """A tile's rows and columns, how many of the inner index per step, warps, stages, how float32 is multiplied."""

    rows: int
    cols: int
    inner: int
    warps: int
    stages: int
    precision: str


def precision_of(backend: str, arch: int | str) -> str:
    """Three TF32 products make a float32 one: worth it where TF32 is far more than three times faster."""
    return "tf32x3" if backend == "cuda" and arch in (80, 90, 100, 103) else "ieee"


def project_shape(backend: str, arch: int | str, sizes: tuple[int, int], k: int, aligned: bool) -> LaunchShape:
    """Tokens by rows of a matrix, no more of these than there are; `sizes` are bytes of the elements of both."""
    cols = min(64, max(16, triton.next_power_of_2(k)))
    if backend == "interpreter":
        return LaunchShape(32, min(cols, 32), 32, 1, 1, "ieee")
    if 4 not in sizes:
        return LaunchShape(64, cols, 64 if aligned else 32, 4, 3, "ieee")
    # Where both operands are float32 and come through registers, 32 features of them spill.
    fit = 2 in sizes or backend == "hip" or int(arch) // 10 in (9, 10)
    return LaunchShape(64, cols, 32 if aligned and fit else 16, 4, 3, precision_of(backend, arch))


def outer_shape(k_out: int, k_in: int) -> LaunchShape:
    """Small tiles, because a sample's tokens are never split over programs; so few products can be exact ones."""
    rows, cols = (min(32, max(16, triton.next_power_of_2(k))) for k in (k_out, k_in))
    return LaunchShape(rows, cols, 32, 4, 3, "ieee")


def sketch_shape(backend: str, arch: int | str, itemsize: int, aligned: bool) -> LaunchShape:
    """Tiles of G."""
    if backend == "interpreter":
        return LaunchShape(16, 16, 16, 1, 1, "ieee")
    if itemsize == 4:
        return LaunchShape(64, 64, 16, 8, 3, precision_of(backend, arch))
    return LaunchShape(64, 64, 32, 8, 3, "ieee")


def _machine() -> tuple[str, int | str]:
    if not isinstance(project_tokens, triton.JITFunction):
        return "interpreter", 0
    target = triton.runtime.driver.active.get_current_target()
    if target.backend == "cuda" and target.arch < 80:
        raise ValueError(f"grad_project: Triton kernels need compute capability 8.0 or later, got {target.arch / 10}")
    return target.backend, target.arch


def _aligned(*tensors: torch.Tensor) -> bool:
    return all(n % 16 == 0 for x in tensors for n in (x.data_ptr(), x.shape[-1], *x.stride()[:-1]))


def _matrix(
    x: torch.Tensor, given: torch.Tensor | None, k: int, purpose: int, kind: str, seed: int, layer: int
) -> torch.Tensor:
    """What tokens x are multiplied with: (k, features), as it was given or drawn, without the factor 1 / sqrt(k)."""
    if given is not None:
        return given
    features = x.shape[-1]
    dtype = x.dtype if kind == "rademacher" else torch.float32
    matrix = x.new_empty((k, triton.cdiv(features, 16) * 16), dtype=dtype)[:, :features]
    groups, col_blocks = triton.cdiv(k, 128 if kind == "rademacher" else 4), triton.cdiv(features, DRAW_COLS)
    draw_matrix[(groups * col_blocks,)](
        matrix, k, features, matrix.stride(0), seed, layer, purpose, col_blocks,
        SIGNS=kind == "rademacher", COLS=DRAW_COLS, num_warps=4,
    )  # fmt: skip
    return matrix


def _projected(x: torch.Tensor, matrix: torch.Tensor, span: int) -> torch.Tensor:
    """(samples * tokens, k) products of all tokens with a matrix's rows, in float32."""
    backend, arch = _machine()
    (samples, tokens, features), k = x.shape, matrix.shape[0]
    rows, spans = samples * tokens, triton.cdiv(features, span)
    sizes = x.element_size(), matrix.element_size()
    shape = project_shape(backend, arch, sizes, k, _aligned(x, matrix))
    k_tiles, row_tiles = triton.cdiv(k, shape.cols), triton.cdiv(rows, shape.rows)
    projected = x.new_empty((spans, rows, triton.cdiv(k, 16) * 16), dtype=torch.float32)
    project_tokens[(k_tiles * row_tiles * spans,)](
        x, matrix, projected,
        rows, tokens, features, k, k_tiles, row_tiles, span, *x.stride()[:2], matrix.stride(0), projected.stride(1),
        ROWS=shape.rows, COLS=shape.cols, FEATURES=shape.inner, PRECISION=shape.precision,
        WIDEN=x.dtype != matrix.dtype or (backend == "interpreter" and x.dtype == torch.bfloat16),
        num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip
    return projected.sum(0) if spans > 1 else projected[0]


def _kronecker(
    a: torch.Tensor, b: torch.Tensor, P_out: torch.Tensor | None, P_in: torch.Tensor | None, out: torch.Tensor,
    kind: str, seed: int, layer: int,
) -> None:  # fmt: skip
    samples, k_out, k_in = out.shape
    row_tiles = triton.cdiv(samples * a.shape[1], 64)
    work = row_tiles * (triton.cdiv(k_out, 64) * b.shape[2] + triton.cdiv(k_in, 64) * a.shape[2])
    span = triton.cdiv(max(256, triton.cdiv(work, WANTED_PROGRAMS)), 64) * 64
    left = _projected(b, _matrix(b, P_out, k_out, 0, kind, seed, layer), span)
    right = _projected(a, _matrix(a, P_in, k_in, 1, kind, seed, layer), span)
    shape = outer_shape(k_out, k_in)
    made = (k_out if P_out is None else 1) * (k_in if P_in is None else 1)
    tiles = triton.cdiv(k_out, shape.rows), triton.cdiv(k_in, shape.cols)
    outer_products[(samples * tiles[0] * tiles[1],)](
        left, right, out, a.shape[1], k_out, k_in, *tiles, left.stride(0), right.stride(0), 1 / math.sqrt(made),
        ROWS=shape.rows, COLS=shape.cols, TOKENS=shape.inner, PRECISION=shape.precision,
        num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip


def _sparse(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, nonzeros: int, seed: int, layer: int) -> None:
    backend, arch = _machine()
    (samples, tokens, d), p, buckets = a.shape, b.shape[2], out.shape[1]
    shape = sketch_shape(backend, arch, a.element_size(), _aligned(a, b))
    elements, col_tiles = shape.rows * shape.cols, triton.cdiv(d, shape.cols)
    tiles = triton.cdiv(p, shape.rows) * col_tiles
    chunk = min(tiles, max(1, LIST_ELEMENTS // (elements * nonzeros)))
    slabs = min(chunk, triton.cdiv(WANTED_PROGRAMS, samples), max(1, tiles * elements // buckets))
    tables = a.new_zeros((samples, slabs, buckets), dtype=torch.float32)
    for first in range(0, tiles, chunk):
        some = min(chunk, tiles - first)
        hashes = a.new_empty((some * nonzeros, elements), dtype=torch.int32)
        hash_tiles[(some * nonzeros * (shape.rows // 4),)](
            hashes,
            p,
            d,
            buckets,
            nonzeros,
            first,
            col_tiles,
            seed,
            layer,
            ROWS=shape.rows,
            COLS=shape.cols,
            num_warps=1,
        )
        places = torch.sort(hashes & NONE.value, dim=1, stable=True).indices
        sketch_tiles[(samples * slabs,)](
            a, b, hashes.gather(1, places), places.to(torch.int16), tables,
            samples, slabs, some, first, col_tiles, tokens, d, p, buckets, nonzeros, *a.stride()[:2], *b.stride()[:2],
            ROWS=shape.rows, COLS=shape.cols, TOKENS=shape.inner,
            UPCAST=backend == "interpreter" and a.dtype == torch.bfloat16, PRECISION=shape.precision,
            num_warps=shape.warps, num_stages=shape.stages,
        )  # fmt: skip
    out.copy_(tables.sum(1, dtype=torch.float64) / math.sqrt(nonzeros))


def run(
    a: torch.Tensor, b: torch.Tensor, P_out: torch.Tensor | None, P_in: torch.Tensor | None, out: torch.Tensor,
    kind: str, nonzeros: int, seed: int, layer: int,
) -> None:  # fmt: skip
    """Fills out, (B,k_out,k_in) or (B,k) where sparse, from a (B,T,d), b (B,T,p), P_out, P_in; see grad_project.h."""
    if a.dtype not in DTYPES:
        raise ValueError(
            f"grad_project: Triton takes float32, bfloat16 or float16, got {a.dtype} (backend 'cpu' has it)"
        )
    if out.numel() == 0:
        return
    if a.numel() == 0 or b.numel() == 0:
        out.zero_()
        return
    with torch.cuda.device_of(a):
        if kind == "sparse":
            _sparse(a, b, out, nonzeros, seed, layer)
        else:
            _kronecker(a, b, P_out, P_in, out, kind, seed, layer)
