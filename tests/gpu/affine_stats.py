"""affine_stats on GPUs: two streams of rows, summed by sample; bandwidth and nothing else."""

from __future__ import annotations

from typing import Any

from ghostgram import _dispatch
from ghostgram.testing import layouts
from ghostgram.testing.cases import affine_stats as cases
from ghostgram.testing.cases.affine_stats import CASES, Case
from gpu import DTYPES, Build, Check, Cuda, Kernel, Mutant, Triton

# What the shared cases leave out: tokens cut into rows, with more than one slab of columns and with lanes that share a
# row; groups of more samples than a block has warps; space cut, aligned and not.
OWN_CASES = [
    Case(3, 130, 300, 2), Case(2, 200, 515, 1), Case(1, 200, 40, 1, "bias"), Case(9, 40, 24, 0), Case(2, 64, 1030, 1),
    Case(480, 1, 1030, 0, "bias"), Case(1, 9000, 3, 1, groups=2), Case(2, 8201, 1, 1, groups=3),
    Case(17, 48, 5, 3, groups=4),
]  # fmt: skip


def _same_bits(backend: str) -> Check:
    """Whatever else is wanted, and however D lies in memory, the numbers are the same."""

    def outputs(make: layouts.Make, case: Case, wanted: str, gap: bool = False) -> dict[str, Any]:
        made = cases.arrays(case, cases.inputs(case, "bfloat16"), make, "bfloat16")
        if gap:
            for name in ("D_weight", "D_bias"):
                made[name] = make(cases.inputs(case, "bfloat16")[name][None], "float32", "sliced")[0]
        out: dict[str, Any] = {}
        for what, shape in (("grad", (case.channels,)), ("norms2", (case.samples,)), ("dots", (case.samples, 2))):
            for part in ("weight", "bias"):
                name = f"{part}_{what}"
                out[name] = layouts.poisoned_sums(made["b"], shape) if what in wanted or what == "dots" else None
        _dispatch.run("affine_stats", backend, *(made[name] for name in cases.INPUTS), *out.values(), bool(case.groups))
        return {name: x for name, x in out.items() if x is not None}

    def check(make: layouts.Make) -> None:
        for case in (Case(3, 5, 29, 2), Case(2, 150, 40, 2), Case(2, 10, 3, 2, groups=2)):
            everything = outputs(make, case, "grad norms2")
            for wanted, gap in (("", False), ("grad", False), ("norms2", False), ("grad norms2", True)):
                for name, x in outputs(make, case, wanted, gap).items():
                    assert x.equal(everything[name]), f"{case.id}: other bits of {name} with {wanted!r}, {gap}"

    return check


_SHARED = {"float": 8 << 10, "double": 8 << 10, "gg::bf16": 16 << 10, "gg::f16": 16 << 10}

CUDA = Cuda(
    cases=OWN_CASES,
    work_limit=4e6,
    dtypes=(*DTYPES, "float64"),
    checks={"outputs are optional, directions unaligned": _same_bits("cuda")},
    mutants={
        "no barrier before warps' sums are read": Mutant(
            "Acc *bias) const {\n    __syncthreads();", "Acc *bias) const {"
        ),
        "rows that no four are together are dropped": Mutant("for (; t < last; t += step)", "for (; false; t += step)"),
        "lanes that share columns add no rows": Mutant(
            "away >= from.across().lanes; away", "away > from.across().lanes; away"
        ),
        "a lane of a slab's sum is lost": Mutant("away = across.lanes / 2;", "away = across.lanes / 4;"),
        "columns beyond the last are read": Mutant(
            "j < left ? widen(from[j]) : 0", "widen(from[j])", "core/columns.cuh"
        ),
        "all rows are taken for aligned": Mutant("if (from.aligned && at.left == n)", "if (at.left == n)"),
        "the mean of the first token": Mutant("i * s.mean_sample + t * s.mean_step", "i * s.mean_sample"),
        "a cut of tokens is lost": Mutant("return int(at.plan.cuts);", "return int(at.plan.cuts - 1);"),
        "the other samples of a group are lost": Mutant(
            "sample < last; sample += warps", "sample < last; sample += 64"
        ),
        "every channel is of the first group": Mutant("group = channel / s.features_per_group", "group = 0 * channel"),
        "rstd of a channel is forgotten": Mutant("if (with_x && exists)", "if (false)"),
        "lanes of a channel are not added": Mutant("away = lanes / 2;", "away = lanes / 4;"),
        "every direction is the first": Mutant("+ k * part.D_direction +", "+"),
        "a group's totals are lost": Mutant("group < at.plan.groups; group += warps", "group < 1; group += warps"),
        "the bias gradient reads the weight's totals": Mutant("at.totals + part * at.plan", "at.totals + 0 * at.plan"),
        "a launch on the default stream": Mutant("threads * 8, stream, s, at)", "threads * 8, nullptr, s, at)"),
    },
    showing=[
        Case(2, 200, 515, 1), Case(9, 40, 24, 1), Case(17, 5, 16, 2), Case(3, 7, 40, 2, layout="sliced"),
        Case(17, 48, 5, 3, groups=4), Case(1, 9000, 3, 1, groups=2), Case(480, 1, 1030, 0, "bias"),
    ],
    kernels=[
        *(
            kernel
            for dtype, shared in _SHARED.items()
            for kernel in (
                Kernel(rf"affine_stats_sum_tokens<{dtype}, ", 2, 256, (shared,), ("LDG.E.EF.128",)),
                Kernel(rf"affine_stats_use_samples<.*Tokens<{dtype}, ", 2, 256, (shared,), ("LDG.E.EF.128",)),
                Kernel(rf"affine_stats_sum_space<{dtype}, 1, ", 2, 256),
                Kernel(rf"affine_stats_sum_space<{dtype}, [248], ", 2, 256, (0,), ("LDG.E.EF.128",)),
            )
        ),
        Kernel(r"affine_stats_use_samples<.*SummedRows<", 4, 256, (8 << 10,), ("LDG.E.128",)),
        Kernel(r"affine_stats_merge_slabs<", 2, 256),
        Kernel(r"affine_stats_merge_groups<", 2, 256, (2 << 10,)),
    ],
)  # fmt: skip


def builds(_backend: str, _arch: int | str) -> list[Build]:
    """A layer with one direction of each part, its rows aligned; float16 is as bfloat16 but for a conversion."""
    import triton.language as tl

    from ghostgram.triton_kernels import affine_stats as kernels

    sums = dict.fromkeys(("mean", "rstd", "rows", "D_weight", "D_bias", "totals", "shares"), "*fp32")
    multiples = ("features", "b_sample", "b_row", "x_sample", "x_row")

    def build(kernel: str, dtype: str, constants: dict[str, Any], note: str) -> Build:
        signature = sums | dict.fromkeys("bx", f"*{dtype}")
        constants |= {"SUMS": tl.float32}
        return Build(f"{kernel} {dtype} {note}", kernel, signature, constants, kernels.WARPS, 1, multiples, note=note)

    columns = {dtype: kernels.plan_of(8, 1024, 4096, size, False).cols for dtype, size in (("bf16", 2), ("fp32", 4))}
    cols = columns["bf16"]
    at_once, tile = kernels.TILE // cols, f"{kernels.TILE // cols} x {cols}"
    space = kernels.plan_of(8, 784, 256, 2, True).space
    channels = kernels.TILE // space
    of_rows = {"SAMPLES": kernels.TILE // columns["fp32"], "COLS": columns["fp32"], "WEIGHT": True}
    no_tokens = {"b": None, "x": None, "mean": None, "rstd": None}
    return [
        build("sum_tokens", "bf16", {"TOKENS": at_once, "COLS": cols}, tile),
        build("sum_space", "bf16", {"CHANNELS": channels, "SPACE": space}, f"{channels} x {space}"),
        build("use_samples", "bf16", {"SAMPLES": at_once, "COLS": cols, "WEIGHT": True, "rows": None}, tile),
        build("use_samples", "fp32", of_rows | no_tokens, f"{of_rows['SAMPLES']} x {of_rows['COLS']} rows"),
    ]


TRITON = Triton(
    cases=OWN_CASES,
    work_limit=1.2e5,
    dtypes=(*DTYPES, "float64"),
    checks={"outputs are optional, directions unaligned": _same_bits("triton")},
    mutants={
        "tokens of the next cut are added": Mutant(
            "last = tl.minimum(first + tokens_per_cut, tokens)", "last = tl.minimum(first + tokens_per_cut + 1, tokens)"
        ),
        "no mask on columns": Mutant("live = sample_live[:, None] & col_live[None, :]", "live = sample_live[:, None]"),
        "no mask on space": Mutant("channel_live[:, None] & (point < last)", "channel_live[:, None] & (point >= 0)"),
        "the mean is not subtracted from space": Mutant("y * (z - middle if mean is not None else z)", "y * z"),
        "the mean of the first token": Mutant(
            "            mean_at = sample * mean_sample + token * mean_step\n",
            "            mean_at = sample * mean_sample + token * 0\n",
        ),
        "every channel is of the first group": Mutant("channel // features_per_group", "channel * 0"),
        "rows of the weight are the bias's": Mutant(
            "v += tl.load(at + tl.cast(samples, tl.int64) * tokens * features", "v += tl.load(at + 0"
        ),
        "every direction is the first": Mutant("tl.cast(k, tl.int64) * D_direction", "tl.cast(k, tl.int64) * 0"),
        "samples overwrite each other": Mutant("v_total += v", "v_total = v"),
        "totals of one group alone": Mutant("totals[part].sum(0, ", "totals[part, :1].sum(0, "),
        "norms of one slab alone": Mutant("shares[:, first].sum(-1, ", "shares[:, first, :1].sum(-1, "),
    },
    # "sliced" first: what is read out of bounds there lies in the larger array, whose margins are NaN.
    showing=[
        *(case for case in CASES if case.layout == "sliced"), Case(2, 130, 300, 1), Case(17, 5, 16, 2),
        Case(3, 48, 5, 2, groups=4), Case(1, 9000, 1, 1, groups=2), Case(950, 1, 1030, 0, "bias"),
    ],
    builds=builds,
)  # fmt: skip
