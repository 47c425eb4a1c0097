"""grad_stats on GPUs: a GEMM on tensor cores that takes norms and dots of its tiles on the way."""

from __future__ import annotations

from typing import Any

from ghostgram import _dispatch
from ghostgram.testing import layouts
from ghostgram.testing.cases import grad_stats as cases
from ghostgram.testing.cases.grad_stats import CASES, Case
from gpu import Build, Cuda, Kernel, Mutant, Triton


def padded_work(case: Case) -> float:
    """Multiply-adds with both sides of G rounded up to a tile's."""
    return case.samples * case.tokens * (-(-case.p // 64) * 64) * (-(-case.d // 64) * 64)


def _outputs(
    make: layouts.Make, case: Case, wanted: str = "wnd", row_gap: int = 0, wide: bool = True
) -> dict[str, Any]:
    """bfloat16 inputs' results on a card: weight_grad, norms2 and dots as far as their first letters are wanted."""
    values = cases.inputs(case, "bfloat16")
    made = cases.arrays(case, values, make, "bfloat16")
    D = make(values["D"], "float32" if wide else "bfloat16", "contiguous")
    padded = layouts.poisoned_sums(made["a"], (case.p, case.d + row_gap))
    out = {
        "weight_grad": padded[:, : case.d],
        "norms2": layouts.poisoned_sums(made["a"], (case.samples,)),
        "dots": layouts.poisoned_sums(made["a"], (case.samples, case.directions)),
    }
    given = [x if name[0] in wanted else None for name, x in out.items()]
    _dispatch.run("grad_stats", "cuda", made["a"], made["b"], D if "d" in wanted else None, *given, False)
    assert padded[:, case.d :].isnan().all(), "a write between the rows of weight_grad"
    return {name: x for name, x in zip(out, given, strict=True) if x is not None}


def _same_bits(make: layouts.Make, *others: dict[str, Any]) -> None:
    """Whatever else is wanted of it, the kernel gives the same results."""
    for case in (Case(3, 5, 29, 31, 2), Case(2, 0, 3, 2, 1), Case(2, 33, 127, 129, 1)):
        everything = _outputs(make, case)
        for options in others:
            for name, x in _outputs(make, case, **options).items():
                assert x.equal(everything[name]), f"{case.id}: other bits of {name} with {options}"


CUDA = Cuda(
    # What the shared cases leave out: blocks with several samples of several stages each, more samples than splits,
    # sums on top of sums with one block per tile; large tiles, cut by both edges, with whole and with odd strides.
    cases=[
        Case(33, 40, 20, 24, 1), Case(1, 5, 33, 20, 1, accumulate=True), Case(2, 40, 136, 130, 2),
        Case(2, 33, 1104, 1000, 1), Case(2, 17, 1101, 1001, 2, accumulate=True),
    ],
    work=padded_work,
    work_limit=9e7,
    checks={
        "outputs are optional": lambda make: _same_bits(make, *({"wanted": w} for w in ("w", "n", "d", "nd"))),
        "rows of weight_grad may lie apart": lambda make: _same_bits(make, {"row_gap": 3}),
        "directions may be as narrow as inputs": lambda make: _same_bits(make, {"wide": False}),
    },
    mutants={
        "no barrier before a stage is read": Mutant("__syncthreads(); // everyone's", "// everyone's"),
        "no barrier before warps' sums are read": Mutant("__syncthreads(); // the next", "// the next"),
        "no wait for copies": Mutant("copy_async_wait<stages - 2>();", ""),
        "a wait one stage too short": Mutant("copy_async_wait<stages - 2>", "copy_async_wait<stages - 1>"),
        "no mask on the last tokens": Mutant("token < tokens_left ?", "token <= tokens_left ?", "core/tile.cuh"),
        "no mask on the last columns": Mutant("most(0, least(n, cols_left - col))", "n", "core/tile.cuh"),
        "halves of a row fragment swapped": Mutant(
            "x + (lane % 8 + lane / 16 * 8) * stride", "x + (lane % 8 + (1 - lane / 16) * 8) * stride",
            "core/mma.cuh", "bfloat16",
        ),
        "wrong token in a split fragment": Mutant(
            "x[(lane % 4 + e / 2 * 4)", "x[(lane % 4 + e / 2 * 2)", "core/mma.cuh", "float32"
        ),
        "a product of the split left out": Mutant(
            "multiply_m16n8k8_tf32(product, rows.high, cols.low);", "", "core/mma.cuh", "float32"
        ),
        "weight_grad takes the last sample only": Mutant("value[i][j][e] += grad", "value[i][j][e] = grad"),
        "partial sums under another tile's index": Mutant("plan.tiles + tile] = sum", "plan.tiles + tile / 2] = sum"),
        "one split not merged": Mutant("split < at.plan.splits;", "split + 1 < at.plan.splits;"),
        "start of weight_grad forgotten": Mutant("add ? to[0] + x : x", "x"),
        "a launch on the default stream": Mutant("* direction, stream, s, at);", "* direction, nullptr, s, at);"),
    },
    showing=[
        Case(3, 17, 65, 63, 2), Case(1, 1, 1, 1, 1), Case(33, 40, 20, 24, 1), Case(1, 5, 33, 20, 1, accumulate=True),
        Case(3, 7, 40, 24, 2, "sliced"), Case(2, 40, 136, 130, 2),
    ],
    # KiB of the pipeline, and of one direction staged beside it: two blocks share a multiprocessor, or one for large.
    kernels=[
        Kernel(r"grad_stats_tile<float, float, .*<64, 64,", 1, 128, (36 << 10, 54 << 10),
               ("HMMA.1688.F32.TF32", "LDGSTS.E.BYPASS.128")),
        Kernel(r"grad_stats_tile<gg::bf16, float, .*<64, 64,", 1, 128, (36 << 10, 54 << 10),
               ("HMMA.16816.F32.BF16", "LDGSTS.E.BYPASS.128", "LDSM.16.MT88.4")),
        Kernel(r"grad_stats_tile<gg::bf16, gg::bf16, .*<64, 64,", 1, 128, (36 << 10, 45 << 10),
               ("HMMA.16816.F32.BF16", "LDGSTS.E.BYPASS.128", "LDSM.16.MT88.4")),
        Kernel(r"grad_stats_tile<gg::f16, float, .*<64, 64,", 1, 128, (36 << 10, 54 << 10),
               ("HMMA.16816.F32", "LDGSTS.E.BYPASS.128", "LDSM.16.MT88.4")),
        Kernel(r"grad_stats_tile<gg::f16, gg::f16, .*<64, 64,", 1, 128, (36 << 10, 45 << 10),
               ("HMMA.16816.F32", "LDGSTS.E.BYPASS.128", "LDSM.16.MT88.4")),
        Kernel(r"grad_stats_tile<gg::bf16, .*<128, 128,", 2, 256, (68 << 10, 136 << 10),
               ("HMMA.16816.F32.BF16", "LDGSTS.E.BYPASS.128", "LDSM.16.MT88.4")),
        Kernel(r"grad_stats_tile<gg::f16, .*<128, 128,", 2, 256, (68 << 10, 136 << 10),
               ("HMMA.16816.F32", "LDGSTS.E.BYPASS.128", "LDSM.16.MT88.4")),
        Kernel(r"grad_stats_sum_tiles\(", 1, 256),
        Kernel(r"grad_stats_sum_splits\(", 1, 256),
    ],
)  # fmt: skip

_SIZES = {"fp32": 4, "bf16": 2, "fp16": 2}
_MULTIPLES = (
    "d", "p", "a_sample", "a_token", "b_sample", "b_token", "D_direction", "D_row",
    "weight_grad_span", "weight_grad_row",
)  # fmt: skip


def builds(backend: str, arch: int | str) -> list[Build]:
    """One direction is the common call; float16 is as bfloat16 but for a modifier of the matrix instruction."""
    from ghostgram.triton_kernels import grad_stats as kernels

    found = []
    for dtype, directions, aligned in [
        *((dtype, 1, aligned) for dtype in ("fp32", "bf16") for aligned in (True, False)), ("fp16", 1, True),
        *((dtype, directions, True) for dtype in ("fp32", "bf16") for directions in (0, 2)),
    ]:  # fmt: skip
        shape = kernels.launch_shape(backend, arch, _SIZES[dtype], directions, aligned)
        pointers = dict.fromkeys(("D", "weight_grad", "partials"), "*fp32") | dict.fromkeys("ab", f"*{dtype}")
        if dtype == "fp16":
            pointers["D"] = "*fp16"  # the other dtype that the contract allows
        constants = {
            "ROWS": shape.rows, "COLS": shape.cols, "TOKENS": shape.tokens, "PRECISION": shape.precision,
            "ACCUMULATE": True, "KEEP_DIRECTION": directions == 1, "UPCAST": False,
        } | ({} if directions else {"D": None})  # fmt: skip
        found.append(
            Build(
                f"{dtype}, K = {directions}{'' if aligned else ', unaligned'}", "grad_stats_tiles", pointers, constants,
                shape.warps, shape.stages, _MULTIPLES if aligned else (),
                # Exact float32 products are faster on RTX Blackwell than three TF32 ones.
                matrix=(arch, dtype) != (120, "fp32"),
                note=f"{shape.rows} x {shape.cols} x {shape.tokens}",
            )
        )  # fmt: skip
    pointers = dict.fromkeys(("partials", "norms2", "dots"), "*fp32")
    constants = {"TILES": kernels.SUM_TILES, "COLUMNS": kernels.SUM_COLUMNS}
    return [*found, Build("sum over tiles", "sum_tiles", pointers, constants)]


def _no_span_is_empty(_: layouts.Make) -> None:
    from ghostgram.triton_kernels.grad_stats import sample_spans

    for samples in (1, 2, 7, 8, 9, 64):
        for tiles in (1, 30, 36, 131, 132, 133, 1024):
            spans = sample_spans(tiles, samples, 1024, 132, True)
            assert 1 <= spans <= samples
            assert (spans - 1) * -(-samples // spans) < samples


_EXTRA = [
    Case(2, 2, 4129, 1, 1),  # more tiles than one step of the sum over tiles takes
    Case(8, 600, 5, 7, 2),  # long enough to be cut into spans of samples
    Case(8, 600, 5, 7, 1, accumulate=True),
]

TRITON = Triton(
    cases=_EXTRA,
    checks={"no span is empty": _no_span_is_empty},
    mutants={
        "no mask on tokens": Mutant("step_live = t + steps < tokens", "step_live = steps < TOKENS"),
        "no mask on columns of a": Mutant("mask=step_live[:, None] & col_live[None, :]", "mask=step_live[:, None]"),
        "no mask on rows of b": Mutant("mask=row_live[:, None] & step_live[None, :]", "mask=step_live[None, :]"),
        "token loop one short": Mutant("tl.range(0, tokens, TOKENS)", "tl.range(0, tokens - 1, TOKENS)"),
        "tokens not advanced": Mutant("b_at += TOKENS * b_token", "b_at += 0"),
        "last sample dropped": Mutant("first + samples_per_span, samples)", "first + samples_per_span, samples - 1)"),
        "samples overwrite each other": Mutant("total += gradient", "total = gradient"),
        "dots shifted by one": Mutant("tl.store(sums + 1 + k,", "tl.store(sums + k,"),
        "one direction for all": Mutant("D_at += D_direction", "D_at += 0"),
        "previous weight_grad lost": Mutant("ACCUMULATE=accumulate and not cut", "ACCUMULATE=False"),
        "previous weight_grad lost by spans": Mutant("weight_grad + total if accumulate else total", "total"),
        "spans overwrite each other": Mutant("span.to(tl.int64) * weight_grad_span", "0"),
        "tiles of one step only": Mutant("sums += tl.load(", "sums = tl.load("),
    },
    # "sliced" first: what is read out of bounds there lies in the larger array, whose margins are NaN.
    showing=[case for case in CASES if case.layout == "sliced"] + _EXTRA + CASES[4:],
    builds=builds,
)
