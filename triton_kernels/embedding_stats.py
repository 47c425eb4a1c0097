"""embedding_stats in Triton: ids are sorted per sample by torch, then rows of b are summed by pieces of that order.

A program sums the rows of a piece of a sample's order, for a slab of columns, and uses a row's sum when its id ends. A
row that goes on in the next piece is left at the edge and joined afterwards, so that programs are equally long whatever
the ids are. What bounds it: reading b, and the rows of D, once. See docs/gpu/embedding_stats.md.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

PADDING = tl.constexpr(2**63 - 1)  # keys that come after all ids: what adds nothing,
OUT_OF_RANGE = tl.constexpr(2**63 - 2)  # and what makes its sample NaN


@triton.jit
def goes_on(keys, at, tokens):
    """Whether the row at a place of the order is the one before it, too."""
    inside = (at > 0) & (at < tokens)
    return inside & (tl.load(keys + at, mask=inside, other=0) == tl.load(keys + at - 1, mask=inside, other=1))


@triton.jit
def use(row, is_complete, key, squares, dots, D, direction, direction_live, D_direction, D_row, cols, col_live):
    """Adds a complete row's squares, and its products with the same row of each direction."""
    squares += tl.where(is_complete, row * row, 0.0)
    if D is not None:
        at = D + direction.to(tl.int64)[:, None] * D_direction + key * D_row + cols[None, :]
        live = is_complete & direction_live[:, None] & col_live[None, :]
        dots += row[None, :] * tl.load(at, mask=live, other=0.0).to(row.dtype)
    return squares, dots


@triton.jit
def sum_pieces(
    keys, order, b, D, edges, shares,
    tokens, features, directions, key_sample, b_sample, b_token, D_direction, D_row,
    PIECE: tl.constexpr, COLS: tl.constexpr, DIRECTIONS: tl.constexpr, UNROLL: tl.constexpr, SUMS: tl.constexpr,
    JOIN: tl.constexpr,
):  # fmt: skip
    """Shares [sample, norm and directions, piece, slab] of one piece of a sample, slab and set of directions.

    JOIN, for a second run, adds the rows that begin in the piece and end in a later one, from the edges that the first
    run has left: edges[sample, piece, begins in an earlier piece or here, columns].
    """
    pieces, slab, slabs = tl.cdiv(tokens, PIECE), tl.program_id(1), tl.num_programs(1)
    sample, piece = (tl.program_id(0) // pieces).to(tl.int64), tl.program_id(0) % pieces
    first, last = piece * PIECE, tl.minimum(piece * PIECE + PIECE, tokens)
    cols, direction = slab * COLS + tl.arange(0, COLS), tl.program_id(2) * DIRECTIONS + tl.arange(0, DIRECTIONS)
    col_live, direction_live = cols < features, direction < directions
    keys += sample * key_sample
    order += sample * key_sample
    edge = edges + (sample * pieces + piece) * 2 * features + cols
    squares, dots = tl.zeros((COLS,), SUMS), tl.zeros((DIRECTIONS, COLS), SUMS)
    last_key = tl.load(keys + last - 1)
    leaves = goes_on(keys, last, tokens) & (last_key < OUT_OF_RANGE)
    enters = goes_on(keys, first, tokens)
    if JOIN:
        is_complete = leaves & ~(enters & (tl.load(keys + first) == last_key))
        row = tl.load(edge + features, mask=is_complete & col_live, other=0.0)
        more, later = is_complete, piece
        while more:
            later += 1
            edge += 2 * features
            row += tl.load(edge, mask=col_live, other=0.0)
            end = later * PIECE + PIECE
            more = tl.load(keys + end, mask=end < tokens, other=-1) == last_key
        squares, dots = use(
            row, is_complete, last_key, squares, dots, D, direction, direction_live, D_direction, D_row, cols, col_live
        )
    else:
        row, head, inherited = tl.zeros((COLS,), SUMS), tl.zeros((COLS,), SUMS), enters
        broken = enters & False
        b_at = b + sample * b_sample + cols
        # Nothing is stored inside, so that loads of one step need not wait for the step before.
        for r in tl.range(first, last, loop_unroll_factor=UNROLL):
            key, token = tl.load(keys + r), tl.load(order + r)
            counts, ends = key < OUT_OF_RANGE, ~goes_on(keys, r + 1, tokens)
            row += tl.load(b_at + token * b_token, mask=col_live & counts, other=0.0).to(SUMS)
            is_complete = counts & ends & ~inherited
            squares, dots = use(
                row, is_complete, key, squares, dots, D, direction, direction_live, D_direction, D_row, cols, col_live
            )
            head = tl.where(ends & inherited, row, head)
            inherited = inherited & ~ends
            row = tl.where(ends, 0.0, row)
            broken = broken | (key == OUT_OF_RANGE)
        tl.store(edge, tl.where(inherited, row, head), mask=enters & col_live)
        tl.store(edge + features, row, mask=leaves & ~inherited & col_live)
    shares += sample * (1 + directions) * pieces * slabs + piece * slabs + slab
    squares_sum, dots_sum = tl.sum(squares, axis=0), tl.sum(dots, axis=1)
    if not JOIN:
        squares_sum = tl.where(broken, float("nan"), squares_sum)
        dots_sum = tl.where(broken, float("nan"), dots_sum)
    share, dot_shares = shares, shares + (1 + direction.to(tl.int64)) * pieces * slabs
    if JOIN:
        squares_sum += tl.load(share)
        dots_sum += tl.load(dot_shares, mask=direction_live, other=0.0)
    tl.store(share, squares_sum, mask=tl.program_id(2) == 0)
    tl.store(dot_shares, dots_sum, mask=direction_live)


# ----------------------------------------------------------------------------------------------------------------------

PIECE = 64  # an edge is two float32 rows per piece, 1/16 of a bfloat16 b
WARPS = 2
MOST_DIRECTIONS = 4  # at once: their products stay in registers


def unroll(directions: int) -> int:
    """Tokens whose rows of b and D are in flight at once, as many as spill nothing on any machine."""
    return max(1, 4 // directions)


def slab_columns(features: int, itemsize: int) -> int:
    """Columns of a program: 16 bytes of each thread, where there are so many."""
    return min(triton.next_power_of_2(features), WARPS * 32 * 16 // itemsize)


def sorted_keys(ids: torch.Tensor, rows: int, padding_idx: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Keys and tokens in the order of (id, token), and the stride of a sample: 0 where samples share their ids."""
    shared = ids.stride(0) == 0
    keys = (ids[:1] if shared else ids).to(torch.int64)
    counts = (keys >= 0) & (keys < min(rows, OUT_OF_RANGE.value))
    keys = torch.where(counts, keys, OUT_OF_RANGE.value)
    if padding_idx >= 0:
        keys = torch.where((ids[:1] if shared else ids) == padding_idx, PADDING.value, keys)
    keys, order = torch.sort(keys.contiguous(), dim=1, stable=True)
    return keys, order, 0 if shared else ids.shape[1]


def run(
    ids: torch.Tensor,
    b: torch.Tensor,
    D: torch.Tensor | None,
    norms2: torch.Tensor | None,
    dots: torch.Tensor | None,
    padding_idx: int,
) -> None:
    """Fills norms2 (B,) and dots (B,K) from ids (B,T), b (B,T,E) and D (K,V,E); see embedding_stats.h."""
    samples, tokens, features = b.shape
    directions = 0 if D is None else D.shape[0]
    if b.numel() == 0:
        for out in (norms2, dots):
            if out is not None:
                out.zero_()
        return
    dtype, sums = (torch.float64, tl.float64) if b.dtype == torch.float64 else (torch.float32, tl.float32)
    cols = slab_columns(features, b.element_size())
    at_once = min(triton.next_power_of_2(max(directions, 1)), MOST_DIRECTIONS)
    pieces, slabs = triton.cdiv(tokens, PIECE), triton.cdiv(features, cols)
    with torch.cuda.device_of(b):
        keys, order, key_sample = sorted_keys(ids, 2**63 if D is None else D.shape[1], padding_idx)
        edges = b.new_empty((samples, pieces, 2, features), dtype=dtype)
        shares = b.new_empty((samples, 1 + directions, pieces * slabs), dtype=dtype)
        for join in (False, True)[: min(pieces, 2)]:
            sum_pieces[samples * pieces, slabs, max(1, triton.cdiv(directions, at_once))](
                keys, order, b, D if directions else None, edges, shares,
                tokens, features, directions, key_sample, *b.stride()[:2], *(D.stride()[:2] if directions else (0, 0)),
                PIECE=PIECE, COLS=cols, DIRECTIONS=at_once, UNROLL=unroll(at_once), SUMS=sums, JOIN=join,
                num_warps=WARPS,
            )  # fmt: skip
        if norms2 is not None:
            norms2.copy_(shares[:, 0].sum(-1, dtype=torch.float64))
        if dots is not None:
            dots.copy_(shares[:, 1:].sum(-1, dtype=torch.float64))
