"""grad_project on GPUs: Kronecker projections on tensor cores, and sketches through sorted lists."""

from __future__ import annotations

import numpy as np

from ghostgram import _dispatch
from ghostgram.testing import compare, layouts
from ghostgram.testing.cases import grad_project as cases
from ghostgram.testing.cases.grad_project import BOTH, Case
from gpu import Build, Cuda, Kernel, Mutant, Triton


def padded_work(case: Case) -> float:
    """Multiply-adds with everything rounded up to tiles and stages, sorting, and the rest of the scattering."""
    if case.sparse:
        tiles = -(-case.p // 64) * -(-case.d // 64)
        lists = tiles * case.size[1]
        return tiles * case.samples * 4096 * (-(-case.tokens // 32) * 32 + 30) + lists * (case.samples * 1e5 + 1e6)
    k_out, k_in = case.size
    rows = -(-case.samples * case.tokens // 64) * 64
    outer = case.samples * case.tokens * (-(-k_out // 32) * 32) * (-(-k_in // 32) * 32)
    return rows * (case.p * -(-k_out // 64) + case.d * -(-k_in // 64)) * 64 + 3 * outer


def _draws_the_same_bits(
    make: layouts.Make, backend: str, d: int, p: int, dtypes: tuple[str, ...] = ("float32", "bfloat16")
) -> None:
    """Integers have no rounding errors, and these scales are powers of two: one wrong sign or bucket shows."""
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-3, 4, (2, 2, n)).astype(np.float64) for n in (d, p))
    for seed, layer in ((0, 0), (2**32 + 5, 2**32 - 1), (2**63 - 1, 7)):
        for shape, kind, nonzeros in (((500,), "sparse", 1), ((501,), "sparse", 4), ((256, 16), "rademacher", 0)):
            for dtype in dtypes:
                x, y = make(a, dtype, "contiguous"), make(b, dtype, "contiguous")
                found, truth = layouts.poisoned_sums(x, (2, *shape)), np.empty((2, *shape))
                _dispatch.run("grad_project", backend, x, y, None, None, found, kind, nonzeros, seed, layer)
                _dispatch.run("grad_project", "reference", a, b, None, None, truth, kind, nonzeros, seed, layer)
                assert np.array_equal(found.numpy(), truth), f"{kind}, seed {seed}, layer {layer}, {dtype}"


def _infinity_stays_where_it_belongs(make: layouts.Make, backend: str = "cuda") -> None:
    """Elements of a tile that lie beyond the edges of G are 0 x infinity there, and nobody's."""
    case = Case(2, 3, 14, 9, (40, 1), "sparse")
    values = cases.inputs(case, "bfloat16")
    values["a"][0, 1, 5] = np.inf
    found, truth = (
        cases.run(case, cases.arrays(case, values, how, dtype), name)["out"]
        for how, dtype, name in ((make, "bfloat16", backend), (layouts.numpy_array, "float64", "reference"))
    )
    assert 0 < np.isinf(truth).sum() < 20
    assert np.array_equal(np.isfinite(found.numpy()), np.isfinite(truth))


def _lists_in_several_goes(make: layouts.Make) -> None:
    """So many nonzeros that the lists of all tiles would take more than 16 MiB."""
    case = Case(2, 2, 150, 3, (690, 230), "sparse")
    worst = compare.error_over_bound("grad_project", case, "bfloat16", "cuda", make)
    assert worst["out"] <= 1, worst


KRONECKER, SPARSE = (f"grad_project/grad_project_{kind}.cuh" for kind in ("kronecker", "sparse"))

CUDA = Cuda(
    # What the shared cases leave out: spans of features, of which the last is short; a table of buckets that does not
    # fit into shared memory; slabs of several tiles, and samples of several stages.
    cases=[
        Case(2, 3, 300, 600, (5, 6)), Case(2, 3, 290, 70, (66, 5), "gaussian"),
        Case(2, 3, 130, 270, (5, 66), given=BOTH),
        Case(2, 3, 70, 66, (8193, 2), "sparse"), Case(67, 40, 70, 130, (50, 2), "sparse"),
        Case(140, 33, 130, 66, (100, 1), "sparse"),
    ],
    work=padded_work,
    work_limit=5e7,
    checks={
        "draws the same bits": lambda make: _draws_the_same_bits(make, "cuda", 50, 35),
        "infinity stays where it belongs": _infinity_stays_where_it_belongs,
        "lists in several goes": _lists_in_several_goes,
    },
    mutants={
        "no barrier before a stage of tokens is read": Mutant(
            "__syncthreads(); // everyone's copies of this slot have landed, and everyone is done with the slot "
            "before it\n"
            "    fetch((slot + stages - 1) % stages);\n    const char *stage",
            "fetch((slot + stages - 1) % stages);\n    const char *stage",
            KRONECKER,
        ),
        "spans begin at the first feature": Mutant(
            "const M *y = static_cast<const M *>(side.matrix) + feature;",
            "const M *y = static_cast<const M *>(side.matrix);",
            KRONECKER,
        ),
        "sine and cosine not exchanged": Mutant("quarter & 1 ? sine : cosine, s", "cosine, s", KRONECKER, "bfloat16"),
        "a matrix's second half forgotten": Mutant(
            "f[c].high[k][1], f[c].low[k][1]", "f[c].high[k][0], f[c].low[k][1]", "core/inner.cuh", "bfloat16"
        ),
        "the scale of both where one is given": Mutant(
            "(s.P_out.data ? 1.0 : double(s.k_out))", "double(s.k_out)", KRONECKER
        ),
        "no barrier before elements are placed": Mutant(
            "__syncthreads(); // all beginnings", "// all beginnings", SPARSE
        ),
        "unstable order": Mutant(
            "use(e, count + uint32_t(before));", "use(e, count + uint32_t(__popc(alike) - 1 - before));", SPARSE
        ),
        "sorted by the first digit only": Mutant(
            "width >> shift; shift += 8", "width >> shift && shift < 8; shift += 8", SPARSE
        ),
        "signs forgotten": Mutant("^ (hash & ~none)", "^ 0", SPARSE),
        "a bucket's other threads forgotten": Mutant("sum += ends[t].first_sum;", "", SPARSE),
        "no barrier before the tile is read": Mutant("__syncthreads(); // the whole tile", "// the whole tile", SPARSE),
        "a launch on the default stream": Mutant(
            "list_shared, stream, s, at);", "list_shared, nullptr, s, at);", SPARSE
        ),
    },
    showing=[
        Case(2, 3, 47, 31, (16, 1), "sparse"), Case(3, 5, 33, 18, (9, 6), given=("P_out",)),
        Case(2, 3, 130, 270, (5, 40), "gaussian"), Case(2, 3, 300, 20, (70, 6)),
        Case(2, 3, 100, 66, (600, 2), "sparse"),
    ],
    kernels=[
        Kernel(r"grad_project_tokens<float, float>", 1, 128, (41 << 10,),
               ("HMMA.1688.F32.TF32", "LDGSTS.E.BYPASS.128", "LDSM.16.M88.4")),
        Kernel(r"grad_project_tokens<gg::b?f16, float>", 2, 128, (61 << 10,),
               ("HMMA.1688.F32.TF32", "LDGSTS.E.BYPASS.128", "LDSM.16.M88.4")),
        Kernel(r"grad_project_tokens<gg::bf16, gg::bf16>", 1, 128, (41 << 10,),
               ("HMMA.16816.F32.BF16", "LDGSTS.E.BYPASS.128", "LDSM.16.M88.4")),
        Kernel(r"grad_project_tokens<gg::f16, gg::f16>", 1, 128, (41 << 10,),
               ("HMMA.16816.F32", "LDGSTS.E.BYPASS.128", "LDSM.16.M88.4")),
        Kernel(r"grad_project_outer\(", 1, 128, (20 << 10,), ("HMMA.1688.F32.TF32", "LDGSTS.E.BYPASS.128")),
        # Beside a table of 4096 buckets.
        Kernel(r"grad_project_sketch<float>", 1, 128, (70 << 10,), ("HMMA.1688.F32.TF32", "LDGSTS.E.BYPASS.128")),
        Kernel(r"grad_project_sketch<gg::bf16>", 1, 128, (70 << 10,),
               ("HMMA.16816.F32.BF16", "LDGSTS.E.BYPASS.128", "LDSM.16.MT88.4")),
        Kernel(r"grad_project_sketch<gg::f16>", 1, 128, (70 << 10,),
               ("HMMA.16816.F32", "LDGSTS.E.BYPASS.128", "LDSM.16.MT88.4")),
        Kernel(r"grad_project_list\(", 1, 256, (42 << 10,), ("MATCH.ANY",)),
        Kernel(r"grad_project_(matrix<|sum_spans|sum_slabs)", 7, 256),
    ],
)  # fmt: skip

_SIZES = {"fp32": 4, "bf16": 2}


def builds(backend: str, arch: int | str) -> list[Build]:
    """Every kernel in the types that differ; float16 is as bfloat16 but for a modifier of the matrix instruction."""
    from ghostgram.triton_kernels import grad_project as kernels

    exact = arch == 120  # exact float32 products are faster on RTX Blackwell than three TF32 ones
    found = []
    for x, matrix, aligned in (
        ("fp32", "fp32", True), ("bf16", "bf16", True), ("bf16", "fp32", True), ("bf16", "bf16", False),
    ):  # fmt: skip
        wide = "fp32" in (x, matrix)
        shape = kernels.project_shape(backend, arch, (_SIZES[x], _SIZES[matrix]), 64, aligned)
        constants = {
            "ROWS": shape.rows, "COLS": shape.cols, "FEATURES": shape.inner, "WIDEN": x != matrix,
            "PRECISION": shape.precision,
        }  # fmt: skip
        pointers = {"x": f"*{x}", "matrix": f"*{matrix}", "projected": "*fp32"}
        multiples = ("span", "projected_row") + (("features", "x_sample", "x_token", "matrix_row") if aligned else ())
        title = f"{x} by {matrix}{'' if aligned else ', unaligned'}"
        found.append(
            Build(
                title, "project_tokens", pointers, constants, shape.warps, shape.stages, multiples,
                matrix=not (exact and wide), note=f"{shape.rows} x {shape.cols} x {shape.inner}",
            )
        )  # fmt: skip
    shape = kernels.outer_shape(64, 64)
    constants = {"ROWS": shape.rows, "COLS": shape.cols, "TOKENS": shape.inner, "PRECISION": shape.precision}
    pointers = dict.fromkeys(("left", "right", "out"), "*fp32") | {"scale": "fp32"}
    found.append(
        Build(
            "samples' products", "outer_products", pointers, constants, shape.warps, shape.stages,
            ("left_row", "right_row"), note=f"{shape.rows} x {shape.cols} x {shape.inner}",
            # Exact float32 products, for which AMD has matrix instructions.
            matrix=backend == "hip",
        )
    )  # fmt: skip
    for dtype, itemsize in _SIZES.items():
        shape = kernels.sketch_shape(backend, arch, itemsize, True)
        constants = {
            "ROWS": shape.rows, "COLS": shape.cols, "TOKENS": shape.inner, "UPCAST": False,
            "PRECISION": shape.precision,
        }  # fmt: skip
        pointers = {"a": f"*{dtype}", "b": f"*{dtype}", "hashes": "*i32", "places": "*i16", "tables": "*fp32"}
        found.append(
            Build(
                f"sketch, {dtype}", "sketch_tiles", pointers, constants, shape.warps, shape.stages,
                ("d", "p", "a_sample", "a_token", "b_sample", "b_token"), matrix=not (exact and dtype == "fp32"),
                note=f"{shape.rows} x {shape.cols} x {shape.inner}",
            )
        )  # fmt: skip
    words = {"seed": "i64", "layer": "i64"}
    found.append(Build("hashes", "hash_tiles", {"hashes": "*i32"} | words, {"ROWS": 64, "COLS": 64}, warps=1))
    normals = {"SIGNS": False, "COLS": kernels.DRAW_COLS}
    return [*found, Build("normals", "draw_matrix", {"to": "*fp32"} | words, normals, multiples=("to_row",))]


def _interpreted_work(case: Case) -> float:
    """FLOPs, as which a scanned element counts for many: the interpreter takes a tenth of a millisecond for it."""
    scanned = case.samples * -(-case.p // 16) * -(-case.d // 16) * 256 * case.size[1] if case.sparse else 0
    return case.flops + 1300 * scanned


TRITON = Triton(
    cases=[Case(2, 3, 300, 60, (5, 6)), Case(2, 3, 290, 70, (66, 5), "gaussian")],
    work=_interpreted_work,
    work_limit=2e6,
    checks={
        "draws the same bits": lambda make: _draws_the_same_bits(make, "triton", 20, 17, ("float32",)),
        "infinity stays where it belongs": lambda make: _infinity_stays_where_it_belongs(make, "triton"),
    },
    mutants={
        "spans begin at the first feature": Mutant(
            "matrix_row + start + steps[:, None]", "matrix_row + steps[:, None]"
        ),
        "no mask on features": Mutant(
            "live = f + steps < tl.minimum(start + span, features)", "live = f + steps < f + FEATURES"
        ),
        "sine and cosine not exchanged": Mutant("tl.where(odd, sine, cosine) *", "cosine *"),
        "the scale of both where one is given": Mutant("(k_in if P_in is None else 1)", "k_in"),
        "words of other rows": Mutant("w1[None, :] >> bits & 1", "w0[None, :] >> bits & 1"),
        "signs forgotten": Mutant("tl.where(hash < 0, -value, value)", "value"),
        "sums do not begin anew": Mutant("tl.where(y_begins != 0, y, x + y)", "x + y"),
        "one bucket for all nonzeros": Mutant(
            "first = (j.to(tl.int64) * buckets", "first = (0 * j.to(tl.int64) * buckets"
        ),
    },
    showing=[
        Case(2, 3, 14, 9, (16, 2), "sparse"), Case(2, 3, 20, 17, (16, 1), "sparse"),
        Case(3, 5, 33, 18, (65, 6), given=("P_in",)), Case(2, 3, 300, 20, (5, 40), "gaussian"),
        Case(4, 5, 33, 18, (9, 6), "rademacher", BOTH, "sliced"),
    ],
    builds=builds,
)  # fmt: skip
