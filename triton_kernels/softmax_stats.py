"""softmax_stats in Triton: a program sums a piece of a row, or some short rows, its largest logit held out.

The algebra is that of csrc/softmax_stats/softmax_stats_cuda.cu. What bounds it: reading the logits once. See
docs/gpu/softmax_stats.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

INFINITY = tl.constexpr(float("inf"))
SLACK = tl.constexpr(4.0)  # how far above the reference a logit may lie that its weight is relative to
LARGEST = tl.constexpr(87.0)  # e^-LARGEST is a normal float, and nothing beside a 1
ALL = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def _absorb(first, reference, sums, squares, spreads, own_sum, own_squares, own_spread, z):
    """Adds a tile (rows, columns) to its rows: the largest logit, a reference, and sums over all but the largest.

    With w = e^(reference - z), sums hold w, squares w^2, spreads (reference - z) w by place in the tile, and what is of
    the row alone is in own_*, in float64. Most tiles hold no new first, and nothing far above the reference; else the
    reference moves where the second largest lies more than SLACK above it.
    """
    tile_first = tl.max(z, 1)
    low = tl.full(first.shape, -SLACK, tl.float32)  # nothing counts as lying further above the reference
    if tl.max(((tile_first > tl.minimum(first, reference + SLACK)) | (reference == -INFINITY)).to(tl.int32)) != 0:
        is_first = z == tile_first[:, None]
        tile_second = tl.max(tl.where(is_first, -INFINITY, z), 1)
        tile_second = tl.where(tl.sum(is_first.to(tl.int32), 1) > 1, tile_first, tile_second)
        new, before = tile_first > first, first
        second = tl.maximum(tl.maximum(tile_second, tl.minimum(tile_first, first)), reference)
        first = tl.maximum(first, tile_first)
        moved = second > reference + SLACK
        below = tl.where(moved & (reference > -INFINITY), second - reference, 0.0)
        k = tl.exp(-below)
        spreads = k[:, None] * (spreads + below[:, None] * sums)
        squares *= (k * k)[:, None]
        sums *= k[:, None]
        own_spread = k * (own_spread + below * own_sum)
        own_squares *= k.to(tl.float64) * k
        own_sum *= k
        reference = tl.where(moved, second, reference)
        some = reference > -INFINITY
        low = tl.where(some, reference - second, 0.0)
        # A new first counts as a second below, and the one before it joins the rest.
        gone, back = new & some, new & some & (before > -INFINITY)
        distance = tl.where(back, tl.minimum(reference - before, LARGEST), 0.0)
        minus = tl.where(gone, tl.exp(-low), 0.0).to(tl.float64)
        plus = tl.where(back, tl.exp(-distance), 0.0).to(tl.float64)
        own_sum += plus - minus
        own_squares += plus * plus - minus * minus
        own_spread += distance * plus - low * minus
    some = reference > -INFINITY
    y = tl.where(some, reference, 0.0)[:, None] - z
    y = tl.minimum(tl.maximum(y, low[:, None], propagate_nan=ALL), LARGEST, propagate_nan=ALL)
    w = tl.exp(-y)
    w = tl.where(some[:, None] | (y != y), w, 0.0)
    sums += w
    squares += w * w
    spreads += y * w
    return first, reference, sums, squares, spreads, own_sum, own_squares, own_spread


@triton.jit
def _rows(
    labels, label_sample, label_token, tokens, rows, classes, ignore_index, cuts,
    ROWS: tl.constexpr, DISTRIBUTIONS: tl.constexpr,
):  # fmt: skip
    """This program's rows, its piece of them, and which of them are to be read."""
    piece = tl.program_id(0) % cuts
    row = (tl.program_id(0) // cuts).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    if not DISTRIBUTIONS:
        label = tl.load(labels + row // tokens * label_sample + row % tokens * label_token, mask=live, other=-1)
        live &= (label != ignore_index) & (label >= 0) & (label < classes)
    return row, piece, live


@triton.jit
def stretch(
    logits, labels, stretches, rows, tokens, classes, cuts, classes_per_cut, ignore_index,
    logit_sample, logit_token, label_sample, label_token,
    ROWS: tl.constexpr, COLS: tl.constexpr, DISTRIBUTIONS: tl.constexpr,
):  # fmt: skip
    """stretches[row, piece] = largest logit, reference, and the three sums over all others of a piece of a row."""
    row, piece, live = _rows(
        labels, label_sample, label_token, tokens, rows, classes, ignore_index, cuts, ROWS, DISTRIBUTIONS
    )
    begin = piece * classes_per_cut
    end = tl.minimum(begin + classes_per_cut, classes)
    at = logits + row // tokens * logit_sample + row % tokens * logit_token
    cols = tl.arange(0, COLS)
    first = tl.full((ROWS,), -INFINITY, tl.float32)
    reference = first
    sums = tl.zeros((ROWS, COLS), tl.float32)
    squares = sums
    spreads = sums
    own_sum = tl.zeros((ROWS,), tl.float64)
    own_squares = own_sum
    own_spread = own_sum
    whole = begin
    if ROWS == 1:  # else rows are shorter than a tile
        if tl.max(live.to(tl.int32)) == 0:
            end = begin
        whole = begin + (end - begin) // COLS * COLS
        for c in range(begin, whole, COLS):  # without a mask, which would cut loads into single elements
            z = tl.load(at[:, None] + c + cols[None, :]).to(tl.float32)
            first, reference, sums, squares, spreads, own_sum, own_squares, own_spread = _absorb(
                first, reference, sums, squares, spreads, own_sum, own_squares, own_spread, z
            )
    if whole < end:
        mask = live[:, None] & (whole + cols < end)[None, :]
        z = tl.load(at[:, None] + whole + cols[None, :], mask=mask, other=-INFINITY).to(tl.float32)
        first, reference, sums, squares, spreads, own_sum, own_squares, own_spread = _absorb(
            first, reference, sums, squares, spreads, own_sum, own_squares, own_spread, z
        )
    to = stretches + (row * cuts + piece) * 5
    tl.store(to, first.to(tl.float64), mask=live)
    tl.store(to + 1, reference.to(tl.float64), mask=live)
    tl.store(to + 2, tl.sum(sums.to(tl.float64), 1) + own_sum, mask=live)
    tl.store(to + 3, tl.sum(squares.to(tl.float64), 1) + own_squares, mask=live)
    tl.store(to + 4, tl.sum(spreads.to(tl.float64), 1) + own_spread, mask=live)


@triton.jit
def _merged(stretches, row, live, cuts, CUTS: tl.constexpr):
    """Rows from their pieces, in float64.

    Returns first, reference, the three sums, e^(reference - first), others = the sum of e^(z - first) over all but the
    first, and log(1 + others).
    """
    cut = tl.arange(0, CUTS)
    at = stretches + (row[:, None] * cuts + cut[None, :]) * 5
    mask = live[:, None] & (cut < cuts)[None, :]
    firsts = tl.load(at, mask=mask, other=-INFINITY)
    references = tl.load(at + 1, mask=mask, other=-INFINITY)
    first = tl.max(firsts, 1)
    holder = tl.min(tl.where(firsts == first[:, None], cut[None, :], CUTS), 1)  # the piece whose first is the row's
    rest = tl.where(cut[None, :] == holder[:, None], -INFINITY, firsts)
    reference = tl.maximum(tl.max(rest, 1), tl.max(references, 1))

    some, joins = references > -INFINITY, rest > -INFINITY
    below = tl.where(some, reference[:, None] - references, 0.0)
    k = tl.where(some, tl.exp(-below), 0.0)
    distance = tl.where(joins, reference[:, None] - rest, 0.0)
    w = tl.where(joins, tl.exp(-distance), 0.0)
    piece_sums = tl.load(at + 2, mask=mask, other=0.0)
    spread = k * (tl.load(at + 4, mask=mask, other=0.0) + below * piece_sums)
    spread = tl.sum(spread + distance * w, 1)
    squares = tl.sum(k * k * tl.load(at + 3, mask=mask, other=0.0) + w * w, 1)
    total = tl.sum(k * piece_sums + w, 1)

    scale = tl.where(reference > -INFINITY, tl.exp(reference - first), 0.0)
    others = scale * total
    one_more = 1 + others
    log_total = tl.where(one_more == 1, others, tl.log(one_more) * (others / (one_more - 1)))
    return first, reference, total, squares, spread, scale, others, log_total


@triton.jit
def residual(
    logits, labels, stretches, residuals, rows, tokens, classes, cuts, classes_per_cut,
    logit_sample, logit_token, label_sample, label_token,
    ROWS: tl.constexpr, COLS: tl.constexpr, CUTS: tl.constexpr,
):  # fmt: skip
    """residuals[row, piece] = sum q (first - z), sum q, sum (p - q)^2 over a piece of a row with distribution q.

    p - q is formed class by class: from sums it would be the small difference of large ones. The first's p is
    1 - others / total, and is subtracted as such; its weight may be too large, and is not used.
    """
    row, piece, live = _rows(labels, label_sample, label_token, tokens, rows, classes, 0, cuts, ROWS, True)
    first, reference, _, _, _, scale, others, _ = _merged(stretches, row, live, cuts, CUTS)
    p_reference, missing = (scale / (1 + others)).to(tl.float32), (others / (1 + others)).to(tl.float32)
    zero = tl.where(reference > -INFINITY, reference, first).to(tl.float32)
    first = first.to(tl.float32)
    begin = piece * classes_per_cut
    end = tl.minimum(begin + classes_per_cut, classes)
    z_at = logits + row // tokens * logit_sample + row % tokens * logit_token
    q_at = labels + row // tokens * label_sample + row % tokens * label_token
    loss = tl.zeros((ROWS, COLS), tl.float32)
    mass = loss
    square = tl.zeros((ROWS, COLS), tl.float64)
    for c in range(begin, end, COLS):
        cols = c + tl.arange(0, COLS)
        mask = live[:, None] & (cols < end)[None, :]
        z = tl.load(z_at[:, None] + cols[None, :], mask=mask, other=-INFINITY).to(tl.float32)
        q = tl.load(q_at[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        w = tl.exp(-tl.minimum(zero[:, None] - z, LARGEST))
        difference = tl.where(z == first[:, None], (1 - q) - missing[:, None], w * p_reference[:, None] - q)
        difference = tl.where(mask, difference, 0.0).to(tl.float64)
        loss += tl.where(q != 0, q * (first[:, None] - z), 0.0)
        mass += q
        square += difference * difference
    to = residuals + (row * cuts + piece) * 3
    tl.store(to, tl.sum(loss.to(tl.float64), 1), mask=live)
    tl.store(to + 1, tl.sum(mass.to(tl.float64), 1), mask=live)
    tl.store(to + 2, tl.sum(square, 1), mask=live)


@triton.jit
def finish(
    logits, labels, stretches, residuals, loss, el2n, entropy, max_probability, bad_row,
    rows, tokens, classes, cuts, ignore_index, logit_sample, logit_token, label_sample, label_token,
    ROWS: tl.constexpr, CUTS: tl.constexpr, DISTRIBUTIONS: tl.constexpr,
):  # fmt: skip
    """The results of some rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    read = live
    if not DISTRIBUTIONS:
        label = tl.load(labels + row // tokens * label_sample + row % tokens * label_token, mask=live, other=-1)
        ignored, named = label == ignore_index, (label >= 0) & (label < classes)
        tl.atomic_min(bad_row + tl.zeros_like(row), row.to(tl.uint64), mask=live & ~ignored & ~named)
        read &= named & ~ignored
        live &= named | ignored
    first, reference, total, squares, spread, scale, others, log_total = _merged(stretches, row, read, cuts, CUTS)
    one_more = 1 + others
    lead = tl.where(reference > -INFINITY, first - reference, 0.0)
    found_entropy = log_total + scale * (spread + lead * total) / one_more
    if DISTRIBUTIONS:
        cut = tl.arange(0, CUTS)
        at = residuals + (row[:, None] * cuts + cut[None, :]) * 3
        mask = live[:, None] & (cut < cuts)[None, :]
        found_loss = tl.sum(tl.load(at, mask=mask, other=0.0), 1)
        found_loss += log_total * tl.sum(tl.load(at + 1, mask=mask, other=0.0), 1)
        found_el2n = tl.sqrt(tl.sum(tl.load(at + 2, mask=mask, other=0.0), 1))
    else:
        at = logits + row // tokens * logit_sample + row % tokens * logit_token + label
        z = tl.load(at, mask=read, other=0.0).to(tl.float64)
        found_loss = (first - z) + log_total
        # The label's own distance from 1 is the sum of the other probabilities. Where it is not the first, the first is
        # among those, and taking the label out of the sums costs a bit at most.
        w = tl.exp(z - first)
        others_too = 1 + (others - w)
        away = tl.sqrt(1 + (scale * scale * squares - w * w) + others_too * others_too)
        found_el2n = tl.where(z == first, scale * tl.sqrt(squares + total * total), away) / one_more
    defined = (first > -INFINITY) & (first < INFINITY) & (spread == spread)
    nan = float("nan")
    top = 1 / one_more
    tl.store(loss + row, tl.where(read, tl.where(defined, found_loss, nan), 0.0).to(tl.float32), mask=live)
    tl.store(el2n + row, tl.where(read, tl.where(defined, found_el2n, nan), 0.0).to(tl.float32), mask=live)
    tl.store(entropy + row, tl.where(read, tl.where(defined, found_entropy, nan), 0.0).to(tl.float32), mask=live)
    tl.store(max_probability + row, tl.where(read, tl.where(defined, top, nan), 0.0).to(tl.float32), mask=live)


# ----------------------------------------------------------------------------------------------------------------------

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TILE, MOST_ROWS, FINISH, WARPS = 2048, 32, 128, 4  # elements and rows of a tile; rows times pieces of an end; warps
MOST_TILES = 256  # of a piece: float32 sums by place in the tile grow no longer
WANTED_PROGRAMS, LEAST_CLASSES = (
    4 * 8 * 132,
    8192,
)  # four waves of a nominal card; pieces that long keep their reference


class Plan(NamedTuple):
    """How the work is cut: a function of the shapes alone."""

    rows_per_program: int
    cols: int
    cuts: int
    classes_per_cut: int


def plan(rows: int, classes: int) -> Plan:
    """Short rows share a program, long ones are cut where they are few."""
    cols = min(TILE, max(16, triton.next_power_of_2(classes)))
    cuts = max(1, min(triton.cdiv(WANTED_PROGRAMS, rows), classes // LEAST_CLASSES))
    cuts = max(cuts, triton.cdiv(classes, TILE * MOST_TILES))
    per_cut = triton.cdiv(triton.cdiv(classes, cuts), TILE) * TILE if cuts > 1 else max(classes, 1)
    return Plan(min(TILE // cols, MOST_ROWS), cols, cuts, per_cut)


def run(
    logits: torch.Tensor,
    labels: torch.Tensor,
    loss: torch.Tensor,
    el2n: torch.Tensor,
    entropy: torch.Tensor,
    max_probability: torch.Tensor,
    bad_row: torch.Tensor,
    ignore_index: int,
) -> None:
    """Fills the four results (B,T) of logits (B,T,C), and bad_row (); see softmax_stats.h."""
    if logits.dtype not in DTYPES:
        raise ValueError(
            f"softmax_stats: Triton takes float32, bfloat16 or float16, got {logits.dtype} (backend 'cpu' has it)"
        )
    samples, tokens, classes = logits.shape
    rows = samples * tokens
    bad_row.fill_(-1)  # the largest of uint64
    if rows == 0:
        return
    with torch.cuda.device_of(logits):
        shape = plan(rows, classes)
        distributions = labels.ndim == 3
        strides = (*logits.stride()[:2], *labels.stride()[:2])
        stretches = logits.new_empty((rows, shape.cuts, 5), dtype=torch.float64)
        residuals = logits.new_empty((rows, shape.cuts, 3), dtype=torch.float64) if distributions else stretches
        tile = {"ROWS": shape.rows_per_program, "COLS": shape.cols, "num_warps": WARPS}
        programs = triton.cdiv(rows, shape.rows_per_program) * shape.cuts
        cuts = triton.next_power_of_2(shape.cuts)
        stretch[programs,](
            logits, labels, stretches, rows, tokens, classes, shape.cuts, shape.classes_per_cut, ignore_index, *strides,
            DISTRIBUTIONS=distributions, **tile,
        )  # fmt: skip
        if distributions:
            residual[programs,](
                logits, labels, stretches, residuals, rows, tokens, classes, shape.cuts, shape.classes_per_cut,
                *strides, CUTS=cuts, **tile,
            )  # fmt: skip
        finish_rows = max(1, FINISH // cuts)
        finish[triton.cdiv(rows, finish_rows),](
            logits, labels, stretches, residuals, loss, el2n, entropy, max_probability, bad_row.view(torch.uint64),
            rows, tokens, classes, shape.cuts, ignore_index, *strides,
            ROWS=finish_rows, CUTS=cuts, DISTRIBUTIONS=distributions, num_warps=WARPS,
        )  # fmt: skip
