"""affine_stats in Triton: b and x stream past once; sums of tokens or space stay in registers until they are used.

Long samples, and all that are channels first, are first summed to a few rows by many programs. A program then takes
some samples' slab of columns, adds up their tokens or rows, and squares, dots and adds up the sums. What bounds it:
reading b and x. See docs/gpu/affine_stats.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl


@triton.jit
def normalised(x, mean, rstd, mean_at, rstd_at, live):
    """(x - mean) * rstd, for statistics at the given offsets; without one it is 0, or 1."""
    if mean is not None:
        x -= tl.load(mean + mean_at, mask=live, other=0.0)
    if rstd is not None:
        x *= tl.load(rstd + rstd_at, mask=live, other=0.0)
    return x


@triton.jit
def sum_tokens(
    b, x, mean, rstd, rows,
    samples, tokens, features, cuts, tokens_per_cut,
    b_sample, b_row, x_sample, x_row, mean_sample, mean_step, rstd_sample, rstd_step,
    TOKENS: tl.constexpr, COLS: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """rows[part, sample, cut, columns]: sums over a cut of a sample's tokens; the weight is part 0, the bias part 1."""
    row = tl.program_id(0)
    sample, first = (row // cuts).to(tl.int64), row % cuts * tokens_per_cut
    last = tl.minimum(first + tokens_per_cut, tokens)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    col_live = cols < features
    w, v = tl.zeros((TOKENS, COLS), SUMS), tl.zeros((TOKENS, COLS), SUMS)
    for t in range(first, last, TOKENS):
        token = t + tl.arange(0, TOKENS)[:, None].to(tl.int64)
        live = (token < last) & col_live[None, :]
        y = tl.load(b + sample * b_sample + token * b_row + cols[None, :], mask=live, other=0.0).to(SUMS)
        v += y
        if x is not None:
            z = tl.load(x + sample * x_sample + token * x_row + cols[None, :], mask=live, other=0.0).to(SUMS)
            mean_at = sample * mean_sample + token * mean_step
            rstd_at = sample * rstd_sample + token * rstd_step
            w += y * normalised(z, mean, rstd, mean_at, rstd_at, token < last)
    to = rows + row.to(tl.int64) * features + cols
    if x is not None:
        tl.store(to, tl.sum(w, axis=0), mask=col_live)
    tl.store(to + tl.cast(samples, tl.int64) * cuts * features, tl.sum(v, axis=0), mask=col_live)


@triton.jit
def sum_space(
    b, x, mean, rstd, rows,
    samples, space, features, cuts, space_per_cut, features_per_group,
    b_sample, b_row, x_sample, x_row, mean_sample, mean_step, rstd_sample, rstd_step,
    CHANNELS: tl.constexpr, SPACE: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """rows[part, sample, cut, channels]: sums over a cut of the space of b and x (samples, channels, space).

    rstd, the same for a whole channel, multiplies its sum.
    """
    row = tl.program_id(0)
    sample, first = (row // cuts).to(tl.int64), row % cuts * space_per_cut
    last = tl.minimum(first + space_per_cut, space)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    channel_live, group = channel < features, channel // features_per_group
    channel_row = channel.to(tl.int64)[:, None]
    w, v = tl.zeros((CHANNELS, SPACE), SUMS), tl.zeros((CHANNELS, SPACE), SUMS)
    if mean is not None:
        middle = tl.load(mean + sample * mean_sample + group * mean_step, mask=channel_live, other=0.0)[:, None]
    for s in range(first, last, SPACE):
        point = s + tl.arange(0, SPACE)[None, :]
        live = channel_live[:, None] & (point < last)
        y = tl.load(b + sample * b_sample + channel_row * b_row + point, mask=live, other=0.0).to(SUMS)
        v += y
        if x is not None:
            z = tl.load(x + sample * x_sample + channel_row * x_row + point, mask=live, other=0.0).to(SUMS)
            w += y * (z - middle if mean is not None else z)
    to = rows + row.to(tl.int64) * features + channel
    if x is not None:
        total = tl.sum(w, axis=1)
        if rstd is not None:
            total *= tl.load(rstd + sample * rstd_sample + group * rstd_step, mask=channel_live, other=0.0)
        tl.store(to, total, mask=channel_live)
    tl.store(to + tl.cast(samples, tl.int64) * cuts * features, tl.sum(v, axis=1), mask=channel_live)


@triton.jit
def use_sums(sums, D, shares, features, slabs, directions, D_direction, sample_live, cols):
    """Shares of norms2 and dots of some samples' sums (samples, columns), to shares[number, slab] of each sample."""
    tl.store(shares, tl.sum(sums * sums, axis=1), mask=sample_live)
    if D is not None:
        for k in range(directions):
            direction = tl.load(D + tl.cast(k, tl.int64) * D_direction + cols, mask=cols < features, other=0.0)
            tl.store(shares + (1 + k) * slabs, tl.sum(sums * direction[None, :], axis=1), mask=sample_live)


@triton.jit
def use_samples(
    b, x, mean, rstd, rows, D_weight, D_bias, totals, shares,
    samples, tokens, features, weight_directions, bias_directions, weight_numbers, samples_per_group,
    b_sample, b_row, x_sample, x_row, mean_sample, mean_step, rstd_sample, rstd_step,
    D_weight_direction, D_bias_direction,
    SAMPLES: tl.constexpr, COLS: tl.constexpr, SUMS: tl.constexpr, WEIGHT: tl.constexpr,
):  # fmt: skip
    """A group of samples, some at a time: their sums are used and added to totals[part, group, columns].

    With `rows` their `tokens` are rows that an earlier kernel has summed, else those of b and x.
    """
    group, slab = tl.program_id(0), tl.program_id(1)
    slabs, groups = tl.num_programs(1), tl.num_programs(0)
    cols = slab * COLS + tl.arange(0, COLS)
    col_live = cols < features
    numbers = weight_numbers + 1 + bias_directions
    w_total, v_total = tl.zeros((SAMPLES, COLS), SUMS), tl.zeros((SAMPLES, COLS), SUMS)
    last = tl.minimum((group + 1) * samples_per_group, samples)
    for i in range(group * samples_per_group, last, SAMPLES):
        sample = i + tl.arange(0, SAMPLES).to(tl.int64)
        sample_live = sample < last
        live = sample_live[:, None] & col_live[None, :]
        w, v = tl.zeros((SAMPLES, COLS), SUMS), tl.zeros((SAMPLES, COLS), SUMS)
        for t in range(tokens):
            token = tl.cast(t, tl.int64)
            if rows is not None:
                at = rows + (sample * tokens + token)[:, None] * features + cols[None, :]
                if WEIGHT:
                    w += tl.load(at, mask=live, other=0.0)
                v += tl.load(at + tl.cast(samples, tl.int64) * tokens * features, mask=live, other=0.0)
            else:
                at = (sample * b_sample + token * b_row)[:, None] + cols[None, :]
                y = tl.load(b + at, mask=live, other=0.0).to(SUMS)
                v += y
                if WEIGHT:
                    at = (sample * x_sample + token * x_row)[:, None] + cols[None, :]
                    z = tl.load(x + at, mask=live, other=0.0).to(SUMS)
                    mean_at = (sample * mean_sample + token * mean_step)[:, None]
                    rstd_at = (sample * rstd_sample + token * rstd_step)[:, None]
                    w += y * normalised(z, mean, rstd, mean_at, rstd_at, sample_live[:, None])
        to = shares + sample * numbers * slabs + slab
        if WEIGHT:
            use_sums(w, D_weight, to, features, slabs, weight_directions, D_weight_direction, sample_live, cols)
            w_total += w
        to += weight_numbers * slabs
        use_sums(v, D_bias, to, features, slabs, bias_directions, D_bias_direction, sample_live, cols)
        v_total += v
    to = totals + group.to(tl.int64) * features + cols
    if WEIGHT:
        tl.store(to, tl.sum(w_total, axis=0), mask=col_live)
    tl.store(to + groups.to(tl.int64) * features, tl.sum(v_total, axis=0), mask=col_live)


# ----------------------------------------------------------------------------------------------------------------------

TILE = 2048  # elements of b at once: 16 per thread, whose two sums stay in registers
WARPS = 4
WANTED_PROGRAMS = 132 * 8  # a card of 132 multiprocessors is busy with so many
LEAST_TOKENS_PER_ROW, LEAST_SPACE_PER_CUT = 64, 4096


class Plan(NamedTuple):
    """How the work is cut; a function of the shapes alone, and so are the bits of the results."""

    cols: int
    """Columns of a slab, as many as fill 16 bytes of each thread of a warp."""
    space: int
    """Points of space of a tile."""
    cuts: int
    """Of each sample's tokens or space, each summed to a row; 0: no such rows."""
    samples_per_group: int


def plan_of(samples: int, tokens: int, features: int, itemsize: int, channels_first: bool) -> Plan:
    """The plan for b and x of these sizes."""
    cols = min(triton.next_power_of_2(features), 512 // itemsize)
    slabs, space = triton.cdiv(features, cols), min(triton.next_power_of_2(tokens), TILE // 8)
    if channels_first:
        programs = samples * triton.cdiv(features, TILE // space)
        cuts = max(1, min(triton.cdiv(WANTED_PROGRAMS, programs), tokens // LEAST_SPACE_PER_CUT))
    elif tokens < 2 * TILE // cols or samples * slabs >= WANTED_PROGRAMS * TILE // cols:
        cuts = 0
    else:
        cuts = max(1, min(triton.cdiv(WANTED_PROGRAMS, samples * slabs), tokens // LEAST_TOKENS_PER_ROW))
    at_once = TILE // cols
    groups = triton.cdiv(WANTED_PROGRAMS // 2, slabs)  # each costs a row of totals
    return Plan(cols, space, cuts, triton.cdiv(triton.cdiv(samples, groups), at_once) * at_once)


def run(
    b: torch.Tensor,
    x: torch.Tensor | None,
    mean: torch.Tensor | None,
    rstd: torch.Tensor | None,
    D_weight: torch.Tensor | None,
    D_bias: torch.Tensor | None,
    weight_grad: torch.Tensor | None,
    bias_grad: torch.Tensor | None,
    weight_norms2: torch.Tensor | None,
    bias_norms2: torch.Tensor | None,
    weight_dots: torch.Tensor | None,
    bias_dots: torch.Tensor | None,
    channels_first: bool,
) -> None:
    """Fills sums, squared norms and dots of both parts from b and x (B,T,F), or (B,F,T); see affine_stats.h."""
    samples, tokens, features = b.shape if not channels_first else (b.shape[0], b.shape[2], b.shape[1])
    parts = ((D_weight, weight_grad, weight_norms2, weight_dots), (D_bias, bias_grad, bias_norms2, bias_dots))
    if b.numel() == 0:
        for out in (out for _, *outs in parts for out in outs if out is not None):
            out.zero_()
        return
    dtype, sums = (torch.float64, tl.float64) if b.dtype == torch.float64 else (torch.float32, tl.float32)
    plan = plan_of(samples, tokens, features, b.element_size(), channels_first)
    inputs = (b, x, mean, rstd)
    strides = [n for y in inputs for n in ((0, 0) if y is None else y.stride()[:2])]
    directions = [0 if D is None else D.shape[0] for D, *_ in parts]
    numbers = [0 if x is None else 1 + directions[0], 1 + directions[1]]
    D_weight, D_bias = (D if count else None for D, count in zip((D_weight, D_bias), directions, strict=True))
    with torch.cuda.device_of(b):
        rows, steps = None, tokens
        if plan.cuts:
            rows, steps = b.new_empty((2, samples, plan.cuts, features), dtype=dtype), plan.cuts
            per_cut = triton.cdiv(tokens, plan.cuts)
        if channels_first:
            statistic = rstd if mean is None else mean
            per_group = features // (1 if statistic is None else statistic.shape[1])
            channels = TILE // plan.space
            sum_space[samples * plan.cuts, triton.cdiv(features, channels)](
                *inputs, rows, samples, tokens, features, plan.cuts, per_cut, per_group, *strides,
                CHANNELS=channels, SPACE=plan.space, SUMS=sums, num_warps=WARPS,
            )  # fmt: skip
        elif plan.cuts:
            sum_tokens[samples * plan.cuts, triton.cdiv(features, plan.cols)](
                *inputs, rows, samples, tokens, features, plan.cuts, per_cut, *strides,
                TOKENS=TILE // plan.cols, COLS=plan.cols, SUMS=sums, num_warps=WARPS,
            )  # fmt: skip
        groups, slabs = triton.cdiv(samples, plan.samples_per_group), triton.cdiv(features, plan.cols)
        totals = b.new_empty((2, groups, features), dtype=dtype)
        shares = b.new_empty((samples, sum(numbers), slabs), dtype=dtype)
        use_samples[groups, slabs](
            *inputs, rows, D_weight, D_bias, totals, shares,
            samples, steps, features, *directions, numbers[0], plan.samples_per_group, *strides,
            *(0 if D is None else D.stride(0) for D in (D_weight, D_bias)),
            SAMPLES=TILE // plan.cols, COLS=plan.cols, SUMS=sums, WEIGHT=x is not None, num_warps=WARPS,
        )  # fmt: skip
        for part, (_, grad, norms2, dots) in enumerate(parts):
            if grad is not None:
                grad.copy_(totals[part].sum(0, dtype=torch.float64))
            first = part * numbers[0]
            if norms2 is not None:
                norms2.copy_(shares[:, first].sum(-1, dtype=torch.float64))
            if dots is not None:
                dots.copy_(shares[:, first + 1 : first + numbers[part]].sum(-1, dtype=torch.float64))
