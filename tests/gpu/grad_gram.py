"""grad_gram on GPUs: tiles of tokens by tokens on tensor cores, summed by samples on the way."""

from __future__ import annotations

from typing import Any

from ghostgram import _dispatch
from ghostgram.testing import layouts
from ghostgram.testing.cases import grad_gram as cases
from ghostgram.testing.cases.grad_gram import Case
from gpu import Build, Cuda, Kernel, Mutant, Triton


def padded_work(case: Case) -> float:
    """Multiply-adds with tokens rounded up to tiles and features to a stage, and the tiles' sums."""
    rows = -(-case.samples * case.tokens // 64) * 64
    cols = -(-case.second[0] * case.second[1] // 64) * 64 if case.second else (rows + 64) / 2
    if case.diagonal:
        cols = min(cols, case.tokens / 2 + 64)
    return rows * cols * (-(-case.d // 32) * 32 + -(-case.p // 32) * 32 + 50)


def _rows_of_out_may_lie_apart(make: layouts.Make) -> None:
    for case in (Case(5, 3, 9, 7), Case(3, 70, 9, 7), Case(2, 0, 3, 2), Case(3, 5, 9, 7, (4, 70))):
        values = cases.inputs(case, "bfloat16")
        made = cases.arrays(case, values, make, "bfloat16")
        cols = case.second[0] if case.second else case.samples
        wide = layouts.poisoned_sums(made["a"], (case.samples, cols + 3))
        _dispatch.run("grad_gram", "cuda", *made.values(), wide[:, :cols])
        assert wide[:, :cols].equal(cases.run(case, made, "cuda")["out"]), case.id
        assert wide[:, cols:].isnan().all(), f"{case.id}: a write between the rows of out"


def _exactly_symmetric(make: layouts.Make) -> None:
    case = Case(9, 23, 17, 40)
    out = cases.run(case, cases.arrays(case, cases.inputs(case, "float32"), make, "float32"), "cuda")["out"]
    assert out.equal(out.T)


CUDA = Cuda(
    # What the shared cases leave out: samples of exactly one tile and of several, with and without a rest; sums of
    # more tiles than a warp has lanes; large tiles, which take more tokens, of one sample and of several.
    cases=[
        Case(2, 64, 33, 40, (3, 64)), Case(3, 128, 9, 8), Case(2, 100, 17, 33), Case(1, 2113, 3, 4, (1, 1)),
        Case(1, 1056, 8, 8, diagonal=True), Case(12, 95, 4, 3, diagonal=True), Case(5, 1, 520, 1032, diagonal=True),
    ],
    work=padded_work,
    work_limit=9e7,
    checks={"rows of out may lie apart": _rows_of_out_may_lie_apart, "exactly symmetric": _exactly_symmetric},
    mutants={
        "no barrier before a stage is read": Mutant("__syncthreads(); // everyone's copies", "// everyone's copies"),
        "no wait for copies": Mutant("copy_async_wait<stages - 2>();", ""),
        "no mask on the last rows": Mutant("row < rows_left ?", "row <= rows_left ?", "core/inner.cuh"),
        "no mask on the last features": Mutant(
            "most(0, least(n, features_left - feature))", "n", "core/inner.cuh"
        ),
        "halves of a row fragment swapped": Mutant(
            "lane / 8 % 2 * 8) * stride + lane / 16 * (step / 2)",
            "lane / 16 * 8) * stride + lane / 8 % 2 * (step / 2)",
            "core/inner.cuh",
        ),
        "one window for both sides": Mutant("same ? x : x + size * S::x_stride", "x"),
        "the tile below the diagonal forgotten": Mutant("    sum *= 2;", "    ;"),
        "not mirrored": Mutant("out[j * s.out_row + i] = float(sum);", ";"),
        "a sample's tiles overwrite each other": Mutant("+ row_piece) * plan.col_pieces", ") * plan.col_pieces"),
        "a tile below the diagonal is summed": Mutant("if (!s.symmetric || row + k <= col + l)", ""),
        "pairs of tokens counted once": Mutant("(with_itself ? 1 : 2)", "1"),
        "the last features of a token forgotten": Mutant("for (int f = whole + int(threadIdx.x);", "for (int f = n;"),
        "a launch on the default stream": Mutant(
            "S::bytes + offsets, stream, s, at);", "S::bytes + offsets, nullptr, s, at);"
        ),
    },
    showing=[
        Case(3, 37, 11, 6), Case(2, 64, 33, 40, (3, 64)), Case(2, 131, 9, 8, diagonal=True),
        Case(3, 7, 40, 24, (4, 5), layout="sliced"), Case(2, 3, 1033, 26, diagonal=True),
    ],
    # The pipeline, and the offsets of a tile's rows.
    kernels=[
        Kernel(r"grad_gram_tile<float, .*<64, 64,", 1, 128, (42 << 10,),
               ("HMMA.1688.F32.TF32", "LDGSTS.E.BYPASS.128", "LDSM.16.M88.4")),
        Kernel(r"grad_gram_tile<gg::bf16, .*<64, 64,", 1, 128, (42 << 10,),
               ("HMMA.16816.F32.BF16", "LDGSTS.E.BYPASS.128", "LDSM.16.M88.4")),
        Kernel(r"grad_gram_tile<gg::f16, .*<64, 64,", 1, 128, (42 << 10,),
               ("HMMA.16816.F32", "LDGSTS.E.BYPASS.128", "LDSM.16.M88.4")),
        Kernel(r"grad_gram_tile<gg::bf16, .*<128, 128,", 1, 256, (84 << 10,),
               ("HMMA.16816.F32.BF16", "LDGSTS.E.BYPASS.128", "LDSM.16.M88.4")),
        Kernel(r"grad_gram_tile<gg::f16, .*<128, 128,", 1, 256, (84 << 10,),
               ("HMMA.16816.F32", "LDGSTS.E.BYPASS.128", "LDSM.16.M88.4")),
        Kernel(r"grad_gram_sum_pieces\(", 1, 256),
        Kernel(r"grad_gram_short_norms<.*, 1>", 3, 128, (32,), ("LDG.E.128",)),
        Kernel(r"grad_gram_short_norms<.*, 4>", 3, 128, (320,), ("LDG.E.128",)),
    ],
)  # fmt: skip

_SIZES = {"fp32": 4, "bf16": 2, "fp16": 2}
_MULTIPLES = ("d", "p", *(f"{side}_{axis}" for side in ("a", "b", "a2", "b2") for axis in ("sample", "token")))
_FORMS = {"two sides": (False, False), "symmetric": (True, False), "diagonal": (True, True)}


def builds(backend: str, arch: int | str) -> list[Build]:
    """Samples of whole tiles and of units of 16, and single tokens, which are stored straight out."""
    from ghostgram.triton_kernels import grad_gram as kernels

    found = []
    for dtype, form, unit, aligned in [
        *((dtype, "symmetric", None, True) for dtype in ("fp32", "bf16")), ("bf16", "diagonal", None, True),
        ("bf16", "two sides", 1, True), *((dtype, "two sides", 16, False) for dtype in ("fp32", "bf16")),
    ]:  # fmt: skip
        shape = kernels.launch_shape(backend, arch, _SIZES[dtype], aligned)
        unit, (symmetric, diagonal) = unit or shape.tile, _FORMS[form]
        pointers: dict[str, Any] = dict.fromkeys(("a", "b", "a2", "b2"), f"*{dtype}")
        pointers["sums"] = "*fp32" if unit == 1 else "*fp64"
        constants = {
            "TILE": shape.tile, "FEATURES": shape.features, "UNIT": unit, "UNIT2": unit, "SYMMETRIC": symmetric,
            "DIAGONAL": diagonal, "DIRECT": unit == 1, "UPCAST": False, "PRECISION": shape.precision,
        }  # fmt: skip
        found.append(
            Build(
                f"{dtype}, {form}, units of {unit}{'' if aligned else ', unaligned'}", "grad_gram_tiles", pointers,
                constants, shape.warps, shape.stages, _MULTIPLES if aligned else (),
                # Exact float32 products are faster on RTX Blackwell than three TF32 ones.
                matrix=(arch, dtype) != (120, "fp32"),
                note=f"{shape.tile} x {shape.tile} x {shape.features}",
            )
        )  # fmt: skip
    constants = {
        "UNITS_PER_TILE": 2, "PAIRS": kernels.PAIRS, "SUMS": kernels.SUMS, "SYMMETRIC": True, "DIAGONAL": False,
    }  # fmt: skip
    return [*found, Build("sum over units", "sum_units", {"sums": "*fp64", "out": "*fp32"}, constants)]


def _units_pad_little(_: layouts.Make) -> None:
    from ghostgram.triton_kernels.grad_gram import unit_of

    for tile in (32, 64, 128):
        for tokens in range(1, 400):
            unit = unit_of(tokens, tile)
            assert tile % unit == 0
            assert unit <= 16 or -(-tokens // unit) * unit * 8 <= tokens * 9


TRITON = Triton(
    # Samples of several tiles, and the middle row of an odd triangle.
    cases=[Case(2, 33, 5, 6), Case(3, 40, 9, 8, diagonal=True), Case(3, 32, 9, 8), Case(2, 70, 9, 8, (3, 33))],
    checks={"units pad little": _units_pad_little},
    mutants={
        "no mask on tokens": Mutant("row_live = (i < samples) & (t < tokens)", "row_live = i < samples"),
        "no mask on features": Mutant(
            "mask=x_live[:, None] & live[None, :]", "mask=x_live[:, None] & (live | True)[None, :]"
        ),
        "features not advanced": Mutant("y_at += FEATURES", "y_at += 0"),
        "the tile below the diagonal forgotten": Mutant("2 * by_units, by_units)", "by_units, by_units)"),
        "not mirrored": Mutant("tl.store(out + j * out_row + i, result, mask=live)", "pass"),
        "not mirrored where direct": Mutant(
            "tl.store(sums + j.to(tl.int64) * out_row + i, by_units.to(tl.float32), mask=live)", "pass"
        ),
        "one tile's column for all": Mutant("tl.where(at < tiles - row_tile, row_tile + at, at - 1)", "row_tile + at"),
        "units of a sample overwrite each other": Mutant("row_unit % units)", "0)"),
        "a tile below the diagonal is summed": Mutant("there &= row_tile <= col_tile", "pass"),
        "units summed up to the first step only": Mutant("total += tl.load(sums", "total = tl.load(sums"),
    },
    showing=[
        Case(3, 7, 40, 24, (4, 5), layout="sliced"), Case(2, 70, 9, 8, diagonal=True), Case(3, 37, 11, 6),
        Case(40, 3, 6, 5), Case(2, 101, 9, 8, (3, 67)), Case(1, 200, 3, 2, (1, 200)),
    ],
    builds=builds,
)  # fmt: skip
