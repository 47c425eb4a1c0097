"""adam_dots on GPUs: a GEMM on tensor cores whose tiles become steps of AdamW before they are dotted."""

from __future__ import annotations

from typing import Any

from ghostgram import _dispatch
from ghostgram.testing import layouts
from ghostgram.testing.cases import adam_dots as cases
from ghostgram.testing.cases.adam_dots import CASES, Case
from gpu import Build, Check, Cuda, Kernel, Mutant, Triton


def padded_work(case: Case) -> float:
    """Multiply-adds with both sides of G rounded up to a tile's."""
    return case.samples * (case.tokens + 8 + case.directions) * (-(-case.p // 64) * 64) * (-(-case.d // 64) * 64)


def _same_numbers(backend: str) -> Check:
    """Whatever dtype the values lie in, and however the matrices lie in memory, the numbers are the same."""

    def out(make: layouts.Make, case: Case, moments: str, directions: str, layout: str) -> Any:
        values = cases.inputs(case, "bfloat16")
        values |= {name: layouts.rounded(values[name], "bfloat16") for name in ("m", "v")}
        made = cases.arrays(case, values, make, "bfloat16")
        made |= {name: make(values[name][None], moments, layout)[0] for name in ("m", "v")}
        made["D"] = make(values["D"], directions, layout)
        return cases.run(case, made, backend)["out"]

    def check(make: layouts.Make) -> None:
        for case in (Case(3, 5, 29, 31, 2), Case(2, 20, 70, 65, 3)):
            expected = out(make, case, "float32", "float32", "contiguous")
            for moments in ("float32", "bfloat16"):
                for directions in ("float32", "bfloat16"):
                    for layout in ("contiguous", "sliced"):
                        found = out(make, case, moments, directions, layout)
                        assert found.equal(expected), f"{case.id}: other bits with {moments}, {directions}, {layout}"

    return check


def _directions_alone(backend: str) -> Check:
    """A direction's dots do not depend on which others are asked for: staged in shared memory or not."""

    def check(make: layouts.Make) -> None:
        case = Case(2, 9, 40, 24, 6)
        made = cases.arrays(case, cases.inputs(case, "float32"), make, "float32")
        every = cases.run(case, made, backend)["out"]
        for k in range(case.directions):
            one = layouts.poisoned_sums(made["a"], (case.samples, 1))
            inputs = [made[name] for name in ("a", "b", "clip", "m", "v")]
            _dispatch.run("adam_dots", backend, *inputs, made["D"][k : k + 1], one, *case.scalars)
            assert one[:, 0].equal(every[:, k]), f"other bits of direction {k} alone"

    return check


# What the shared cases leave out: blocks with several samples of several stages each, more samples than splits.
_OWN = [Case(70, 40, 20, 24, 1), Case(3, 100, 70, 65, 1, kind="wide")]

CUDA = Cuda(
    cases=_OWN,
    work=padded_work,
    work_limit=4e7,
    checks={"dtypes and layouts": _same_numbers("cuda"), "directions one by one": _directions_alone("cuda")},
    mutants={
        "no barrier before a stage is read": Mutant("__syncthreads(); // everyone's", "// everyone's"),
        "no barrier before warps' sums are read": Mutant("__syncthreads(); // the next", "// the next"),
        "no wait for copies": Mutant("copy_async_wait<stages - 2>();", ""),
        "no mask on the last rows staged": Mutant("r < rows_left && c < cols_left;", "c < cols_left;"),
        "no mask on the last columns read": Mutant("if (r < rows_left && c + 1 < cols_left)", "if (r < rows_left)"),
        "a direction staged over another": Mutant("directions[k * elements + to]", "directions[to]"),
        "every direction read is the first": Mutant("opaque(direction_at(k, 0, 0))", "opaque(direction_at(0, 0, 0))"),
        "the right neighbour takes the left one's state": Mutant("{roots.y, pulls.y}", "{roots.x, pulls.x}"),
        "every sample is clipped as the first": Mutant("(s.clip)[sample]", "(s.clip)[0]"),
        "moments are narrow": Mutant(
            "wide_moments = s.moment_dtype == DType::f32", "wide_moments = false", dtype="bfloat16"
        ),
        "partial sums under another tile's index": Mutant("plan.tiles + tile] = sum", "plan.tiles + tile / 2] = sum"),
        "a split takes its first sample alone": Mutant("(split + 1) / plan.splits)", "split / plan.splits + 1)"),
        "the momentum's part is left out": Mutant("state.pull * square - scaled", "-scaled", "core/adam_step.h"),
        "a launch on the default stream": Mutant("* matrix, stream, s, at);", "* matrix, nullptr, s, at);"),
    },
    showing=[
        Case(3, 17, 65, 63, 2), Case(1, 1, 1, 1, 1), Case(70, 40, 20, 24, 1), Case(3, 5, 29, 31, 11),
        Case(3, 7, 40, 24, 2, "sliced"), Case(2, 4, 16, 600, 1), Case(3, 4, 35, 20, 2, kind="first", step=1),
        Case(2, 3, 33, 15, 9, "sliced"),
    ],
    # The pipeline of 36 KiB and the state of 36, with a direction beside them where that fits.
    kernels=[
        *(
            Kernel(
                rf"adam_dots_tile<{inputs}>", 1, 128, (72 << 10, 90 << 10),
                (product, "LDGSTS.E.BYPASS.128", "MUFU.RCP", "MUFU.RSQ", *transposes),
            )
            for inputs, product, transposes in (
                ("float", "HMMA.1688.F32.TF32", ()),
                ("gg::bf16", "HMMA.16816.F32.BF16", ("LDSM.16.MT88.4",)),
                ("gg::f16", "HMMA.16816.F32", ("LDSM.16.MT88.4",)),
            )
        ),
        Kernel(r"adam_dots_sum_tiles\(", 1, 256),
    ],
)  # fmt: skip

_SIZES = {"fp32": 4, "bf16": 2, "fp16": 2}
_MULTIPLES = ("d", "p", "a_sample", "a_token", "b_sample", "b_token", "D_direction", "D_row", "m_row", "v_row")


def builds(backend: str, arch: int | str) -> list[Build]:
    """With aligned rows and without; float16 is as bfloat16 but for a modifier of the matrix instruction."""
    from ghostgram.triton_kernels import adam_dots as kernels

    found = []
    for dtype, aligned in (("fp32", True), ("fp32", False), ("bf16", True), ("bf16", False), ("fp16", True)):
        shape = kernels.launch_shape(backend, arch, _SIZES[dtype], aligned)
        pointers = dict.fromkeys(("clip", "states", "D", "partials"), "*fp32") | dict.fromkeys("ab", f"*{dtype}")
        if dtype == "fp16":
            pointers["D"] = "*fp16"  # the other dtype that the contract allows
        constants = {
            "ROWS": shape.rows, "COLS": shape.cols, "TOKENS": shape.tokens, "PRECISION": shape.precision,
            "UPCAST": False,
        }  # fmt: skip
        found.append(
            Build(
                f"{dtype}{'' if aligned else ', unaligned'}", "adam_dots_tiles",
                pointers | dict.fromkeys(("scale", "eps"), "fp32"), constants, shape.warps, shape.stages,
                _MULTIPLES if aligned else (),
                # Exact float32 products are faster on RTX Blackwell than three TF32 ones.
                matrix=(arch, dtype) != (120, "fp32"), note=f"{shape.rows} x {shape.cols} x {shape.tokens}",
            )
        )  # fmt: skip
    factors = dict.fromkeys(("root_factor", "momentum", "eps"), "fp32")
    for dtype in ("fp32", "bf16"):
        pointers = dict.fromkeys("mv", f"*{dtype}") | {"states": "*fp32"}
        constants = {"BLOCK": kernels.STATE_BLOCK}
        found.append(Build(f"states, {dtype}", "adam_states", pointers | factors, constants, multiples=_MULTIPLES))
    sums = dict.fromkeys(("partials", "out"), "*fp32") | {"unit": "fp32"}
    return [
        *found,
        Build("sum over tiles", "sum_tiles", sums, {"TILES": kernels.SUM_TILES, "COLUMNS": kernels.SUM_COLUMNS}),
    ]


def _no_span_is_empty(_: layouts.Make) -> None:
    from ghostgram.triton_kernels.adam_dots import sample_spans

    for samples in (1, 2, 7, 64, 65, 200):
        for tiles in (1, 30, 131, 132, 265, 1024):
            spans = sample_spans(tiles, samples, 132)
            assert 1 <= spans <= min(samples, 64)
            assert (spans - 1) * -(-samples // spans) < samples


_EXTRA = [Case(1, 2, 4129, 1, 1), Case(14, 40, 5, 7, 2)]  # more tiles than one step of their sum takes; several spans

TRITON = Triton(
    cases=_EXTRA,
    work=padded_work,
    work_limit=3e6,
    checks={
        "no span is empty": _no_span_is_empty,
        "dtypes and layouts": _same_numbers("triton"),
        "directions one by one": _directions_alone("triton"),
    },
    mutants={
        "no mask on tokens": Mutant("step_live = t + steps < tokens", "step_live = steps < TOKENS"),
        "no mask on columns of a": Mutant("mask=step_live[:, None] & col_live[None, :]", "mask=step_live[:, None]"),
        "no mask on rows of b": Mutant("mask=row_live[:, None] & step_live[None, :]", "mask=step_live[None, :]"),
        "tokens not advanced": Mutant("b_at += TOKENS * b_token", "b_at += 0"),
        "last sample dropped": Mutant("first + samples_per_span, samples)", "first + samples_per_span, samples - 1)"),
        "every direction is the first": Mutant("D_at += D_direction", "D_at += 0"),
        "every sample is clipped as the first": Mutant("tl.load(clip + i)", "tl.load(clip)"),
        "r0 is taken for pull": Mutant("states + tl.cast(p, tl.int64) * d, mask", "states, mask"),
        "the growing root is forgotten": Mutant("tl.sqrt(root0 * root0 + square)", "root0"),
        "eps is not scaled": Mutant("eps * power", "eps"),
        "rows of v are those of m": Mutant("v + row * v_row + col", "v + row * m_row * 2 + col"),
        "nothing keeps denominators from 0": Mutant("root = tl.maximum(root, SMALLEST)", "root = root"),
        "tiles of one step only": Mutant("sums += tl.load(", "sums = tl.load("),
    },
    # "sliced" first: what is read out of bounds there lies in the larger array, whose margins are NaN.
    showing=[
        *(case for case in CASES if case.layout == "sliced"), Case(2, 3, 19, 15, 1, kind="none"), *_EXTRA,
        Case(3, 17, 65, 63, 2), Case(3, 6, 35, 20, 1, kind="tiny"), Case(3, 6, 35, 20, 1, kind="wide"),
    ],
    builds=builds,
)  # fmt: skip
