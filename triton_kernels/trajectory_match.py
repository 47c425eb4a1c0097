"""trajectory_match in Triton: a program sums a chunk of one tensor or writes its gradient, one more adds the sums.

A launch takes a batch of tensors, told of by integers: a pointer argument each would be compiled anew for every pattern
of alignments, and a table in memory would have to be copied to the GPU. What bounds it: reading the tensors once. See
docs/gpu/trajectory_match.md.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch
import triton
import triton.language as tl


@triton.jit
def _from(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.cast(address, tl.pointer_type(DTYPE))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def _step(
    num, D, S, wrong, student, start, target, mask, gradient, i, end, dropped, power, scale,
    START: tl.constexpr, STUDENT: tl.constexpr, GRADIENT: tl.constexpr, TARGET: tl.constexpr, MASK: tl.constexpr,
    ACC: tl.constexpr, BLOCK: tl.constexpr, ROUND: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Adds what BLOCK scalars come to, those from `end` on left out, and writes their gradient.

    Loads of a `WHOLE` block are not masked: a mask would cut them into single elements.
    """
    at = i + tl.arange(0, BLOCK)
    live = None if WHOLE else at < end
    other = None if WHOLE else 0.0
    kept = at >= dropped
    if MASK == "real":
        m = tl.load(mask + at, mask=live, other=other)
        kept &= m != 0
        if START:
            wrong += tl.where(kept & ~(m >= 0), 1, 0)
        weight = tl.where(kept, m, 0.0).to(tl.float64)
    elif MASK == "bool":
        kept &= tl.load(mask + at, mask=live, other=None if WHOLE else 0) != 0
    if TARGET:
        to = tl.load(target + at, mask=live, other=other).to(ACC)
    if START:
        x = tl.load(start + at, mask=live, other=other).to(ACC)
        away = tl.where(kept, x - to, 0.0).to(tl.float64)
        x = tl.where(kept, x, 0.0).to(tl.float64)
        D += weight * (away * away) if MASK == "real" else away * away
        S += weight * (x * x) if MASK == "real" else x * x
    if STUDENT or GRADIENT:
        x = tl.load(student + at, mask=live, other=other).to(ACC)
        away = tl.where(kept, x - to if TARGET else x, 0.0)
        if STUDENT:
            wide = away.to(tl.float64)
            num += weight * (wide * wide) if MASK == "real" else wide * wide
        if GRADIENT:
            g = away * power * scale
            if MASK == "real":
                g = tl.where(kept, g * m, 0.0)
            if ROUND:
                bits = tl.cast(g, tl.int32, bitcast=True)
                g = tl.cast(bits + 0x7FFF + ((bits >> 16) & 1) & -0x10000, tl.float32, bitcast=True)
            tl.store(gradient + at, g.to(gradient.dtype.element_ty), mask=live)
    return num, D, S, wrong


@triton.jit(
    do_not_specialize=[
        *("students", "starts", "targets", "masks", "gradients", "sizes", "dropped", "weights", "first_block"),
        "first_partial",
    ]
)
def sweep(
    students, starts, targets, masks, gradients, sizes, dropped, weights, first_block,
    partials, first_partial, totals, loss_gradient, chunk,
    START: tl.constexpr, STUDENT: tl.constexpr, GRADIENT: tl.constexpr, TARGET: tl.constexpr, MASK: tl.constexpr,
    IN: tl.constexpr, OUT: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
    ROUND: tl.constexpr,
):  # fmt: skip
    """What one chunk adds to num, D, S and wrong goes to partials[first_partial + program]; its gradient is written.

    The first nine arguments say where the tensors of a launch are, how long, how many leading scalars are dropped, the
    bits of their weights, and which program is the first that works on each.
    """
    program = tl.program_id(0)
    student, start, target, mask = students[0], starts[0], targets[0], masks[0]
    gradient, size, drop, bits, first = gradients[0], sizes[0], dropped[0], weights[0], first_block[0]
    for t in tl.static_range(1, len(sizes)):
        own = program >= first_block[t]
        student, start = tl.where(own, students[t], student), tl.where(own, starts[t], start)
        target, mask = tl.where(own, targets[t], target), tl.where(own, masks[t], mask)
        gradient, size = tl.where(own, gradients[t], gradient), tl.where(own, sizes[t], size)
        drop, bits = tl.where(own, dropped[t], drop), tl.where(own, weights[t], bits)
        first = tl.where(own, first_block[t], first)

    begin = (program - first).to(tl.int64) * chunk
    end = tl.minimum(size - begin, chunk).to(tl.int32)
    drop = tl.minimum(tl.maximum(drop - begin, 0), end).to(tl.int32)
    weight = tl.cast(bits.to(tl.int64), tl.float64, bitcast=True)
    student = _from(student, IN, ALIGNED) + begin
    start = _from(start, IN, ALIGNED) + begin
    target = _from(target, IN, ALIGNED) + begin
    mask = _from(mask, tl.int8 if MASK == "bool" else ACC, ALIGNED) + begin
    gradient = _from(gradient, OUT, ALIGNED) + begin
    power = 1.0
    scale = 1.0
    if GRADIENT:
        known_D, known_S = tl.load(totals + 1), tl.load(totals + 2)
        if (tl.load(totals + 3) != 0) | (known_D <= 1e-12 * known_S):
            end = 0
            drop = 0
        # 2 g / D in two factors, a power of two near its square root and the rest: a difference is about sqrt(D), so
        # neither product leaves the range of ACC where the gradient does not.
        factor = 2.0 / known_D
        if loss_gradient is not None:
            factor = 2.0 * tl.load(loss_gradient).to(tl.float64) / known_D
        exponent = (tl.cast(factor, tl.int64, bitcast=True) >> 52) & 0x7FF
        half = tl.where((exponent == 0) | (exponent == 0x7FF), 0, (exponent - 1022) // 2)
        power = tl.cast((1023 + half) << 52, tl.float64, bitcast=True).to(ACC)
        scale = (factor * tl.cast((1023 - half) << 52, tl.float64, bitcast=True) * weight).to(ACC)

    num = tl.zeros((BLOCK,), tl.float64)
    D = tl.zeros((BLOCK,), tl.float64)
    S = tl.zeros((BLOCK,), tl.float64)
    wrong = tl.zeros((BLOCK,), tl.int32)
    whole = end // BLOCK * BLOCK
    read = tl.minimum(drop // BLOCK * BLOCK, whole)
    if GRADIENT:
        for i in range(0, read, BLOCK):
            tl.store(gradient + i + tl.arange(0, BLOCK), tl.zeros((BLOCK,), OUT))
    for i in range(read, whole, BLOCK):
        num, D, S, wrong = _step(
            num, D, S, wrong, student, start, target, mask, gradient, i, end, drop, power, scale,
            START, STUDENT, GRADIENT, TARGET, MASK, ACC, BLOCK, ROUND, True,
        )  # fmt: skip
    if whole < end:
        num, D, S, wrong = _step(
            num, D, S, wrong, student, start, target, mask, gradient, whole, end, drop, power, scale,
            START, STUDENT, GRADIENT, TARGET, MASK, ACC, BLOCK, ROUND, False,
        )  # fmt: skip
    to = partials + (first_partial + program) * 4
    if STUDENT:
        tl.store(to, weight * tl.sum(num))
    if START:
        tl.store(to + 1, weight * tl.sum(D))
        tl.store(to + 2, weight * tl.sum(S))
        tl.store(to + 3, tl.sum(wrong).to(tl.float64))


@triton.jit
def _column(partials, count, BLOCK: tl.constexpr):
    """The sum of every fourth number."""
    sums = tl.zeros((BLOCK,), tl.float64)
    for i in range(0, count, BLOCK):
        at = i + tl.arange(0, BLOCK)
        sums += tl.load(partials + at * 4, mask=at < count, other=0.0)
    return tl.sum(sums)


@triton.jit(do_not_specialize=["count"])
def finish(partials, totals, loss, count, START: tl.constexpr, STUDENT: tl.constexpr, BLOCK: tl.constexpr):
    """Adds the partial sums that a measuring sweep left."""
    if START:
        D, S, wrong = _column(partials + 1, count, BLOCK), _column(partials + 2, count, BLOCK), 0.0
        wrong = _column(partials + 3, count, BLOCK)
        tl.store(totals + 1, D)
        tl.store(totals + 2, S)
        tl.store(totals + 3, wrong)
    else:
        D, S, wrong = tl.load(totals + 1), tl.load(totals + 2), tl.load(totals + 3)
    if STUDENT:
        num = _column(partials, count, BLOCK)
        if not START:  # a sweep whose totals were not usable has read nothing
            num = tl.where((wrong != 0) | (D <= 1e-12 * S), 0.0, num)
        tl.store(totals, num)
        tl.store(loss, (num / D).to(loss.dtype.element_ty))
    else:
        tl.store(totals, 0.0)


# ----------------------------------------------------------------------------------------------------------------------

TENSORS = 16  # of a launch
BLOCK, WARPS = 1024, 4
LEAST_CHUNK, MOST_PROGRAMS = (
    2048,
    32 * 132,
)  # 32 programs for each multiprocessor of a nominal card, if there are so many
NEVER = 2**31 - 1
TYPES = {
    torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16,
}  # fmt: skip


class Table(NamedTuple):
    """What a launch is told of its tensors."""

    columns: tuple[tuple[int, ...], ...]
    """The first nine arguments of `sweep`."""
    programs: int
    aligned: bool


def chunk_of(scalars: int) -> int:
    """Scalars per program: a function of their number alone."""
    return LEAST_CHUNK * max(1, triton.cdiv(scalars, LEAST_CHUNK * MOST_PROGRAMS))


def tables(lists: list[list[torch.Tensor] | None], weights: list[float] | None, first: int, chunk: int) -> list[Table]:
    """Tables of TENSORS tensors each, empty ones left out; the last is filled up with tensors that no program takes."""
    student = lists[0] or []
    rows: list[tuple[int, ...]] = []
    made: list[Table] = []
    scalars = programs = 0
    for t, x in enumerate(student):
        size, weight = x.numel(), 1.0 if weights is None else weights[t]
        if size:
            # Of a list that is not there, an address that is not read.
            addresses = [(student if tensors is None else tensors)[t].data_ptr() for tensors in lists]
            dropped = size if weight == 0 else min(max(first - scalars, 0), size)
            (bits,) = struct.unpack("<q", struct.pack("<d", weight))
            rows.append((*addresses, size, dropped, bits, programs))
            programs += triton.cdiv(size, chunk)
            scalars += size
        if len(rows) == TENSORS or (rows and t + 1 == len(student)):
            aligned = all(address % 16 == 0 for row in rows for address in row[:5])
            rows += [(*rows[0][:-1], NEVER)] * (TENSORS - len(rows))
            made.append(Table(tuple(zip(*rows, strict=True)), programs, aligned))
            rows, programs = [], 0
    return made


def run(
    student: list[torch.Tensor],
    start: list[torch.Tensor] | None,
    target: list[torch.Tensor] | None,
    mask: list[torch.Tensor] | None,
    loss_gradient: torch.Tensor | None,
    loss: torch.Tensor | None,
    totals: torch.Tensor,
    gradient: list[torch.Tensor] | None,
    weights: list[float] | None,
    first: int,
) -> None:
    """Fills loss, totals and gradient as far as they are wanted; see trajectory_match.h."""
    chunk = chunk_of(sum(x.numel() for x in student))
    batches = tables([student, start, target, mask, gradient], weights, first, chunk)
    programs = sum(table.programs for table in batches)
    partials = totals if loss is None else totals.new_empty((max(programs, 1), 4))
    out = student[0].dtype if gradient is None else gradient[0].dtype
    # Triton's interpreter cuts bfloat16 off where GPUs round.
    rounds = out == torch.bfloat16 and not isinstance(sweep, triton.JITFunction)

    def launch(at_start: bool, at_student: bool, write: bool) -> None:
        done = 0
        for table in batches:
            sweep[table.programs,](
                *table.columns, partials, done, totals, loss_gradient, chunk,
                START=at_start, STUDENT=at_student, GRADIENT=write, TARGET=target is not None,
                MASK="none" if mask is None else "bool" if mask[0].dtype == torch.bool else "real",
                IN=TYPES[student[0].dtype], OUT=TYPES[out],
                ACC=tl.float64 if student[0].dtype == torch.float64 else tl.float32,
                BLOCK=BLOCK, ALIGNED=table.aligned, ROUND=rounds, num_warps=WARPS,
            )  # fmt: skip
            done += table.programs
        if loss is not None:
            options = {"START": at_start, "STUDENT": at_student, "BLOCK": BLOCK, "num_warps": WARPS}
            finish[1,](partials, totals, loss, programs, **options)

    with torch.cuda.device_of(totals):
        if loss is None:
            launch(at_start=False, at_student=False, write=True)
        else:
            launch(at_start=True, at_student=gradient is None, write=False)
            if gradient is not None:
                launch(at_start=False, at_student=True, write=True)
