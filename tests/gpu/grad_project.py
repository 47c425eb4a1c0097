"""grad_project on GPUs: Kronecker projections on tensor cores, and sketches through sorted lists."""

from __future__ import annotations

import numpy as np

from ghostgram import _dispatch
from ghostgram.testing import layouts
from ghostgram.testing.cases.grad_project import BOTH, Case
from gpu import Cuda, Kernel, Mutant


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


def _draws_the_same_bits(make: layouts.Make) -> None:
    """Integers have no rounding errors, and these scales are powers of two: one wrong sign or bucket shows."""
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-3, 4, (2, 2, n)).astype(np.float64) for n in (50, 35))
    for seed, layer in ((0, 0), (2**32 + 5, 2**32 - 1), (2**63 - 1, 7)):
        for shape, kind, nonzeros in (((500,), "sparse", 1), ((501,), "sparse", 4), ((256, 16), "rademacher", 0)):
            for dtype in ("float32", "bfloat16"):
                x, y = make(a, dtype, "contiguous"), make(b, dtype, "contiguous")
                found, truth = layouts.poisoned_sums(x, (2, *shape)), np.empty((2, *shape))
                _dispatch.run("grad_project", "cuda", x, y, None, None, found, kind, nonzeros, seed, layer)
                _dispatch.run("grad_project", "reference", a, b, None, None, truth, kind, nonzeros, seed, layer)
                assert np.array_equal(found.numpy(), truth), f"{kind}, seed {seed}, layer {layer}, {dtype}"


CUDA = Cuda(
    # What the shared cases leave out: spans of features, of which the last is short; a table of buckets that does not
    # fit into shared memory; slabs of several tiles, and samples of several stages.
    cases=[
        Case(2, 3, 300, 600, (5, 6)), Case(2, 3, 290, 70, (66, 5), "gaussian"), Case(2, 3, 130, 270, (5, 66), given=BOTH),
        Case(2, 3, 70, 66, (8193, 2), "sparse"), Case(67, 40, 70, 130, (50, 2), "sparse"),
        Case(140, 33, 130, 66, (100, 1), "sparse"),
    ],
    work=padded_work,
    work_limit=5e7,
    checks={"draws the same bits": _draws_the_same_bits},
    mutants={
        "no barrier before a stage of tokens is read": Mutant(
            "__syncthreads(); // everyone's copies of this slot have landed, and everyone is done with the slot before it\n"
            "    fetch((slot + stages - 1) % stages);\n    const char *stage",
            "fetch((slot + stages - 1) % stages);\n    const char *stage",
        ),
        "no wait for projected tokens": Mutant(
            "copy_async_wait<stages - 2>();\n    __syncthreads(); // everyone's copies of this slot have landed, and everyone "
            "is done with the slot before it\n    fetch((slot + stages - 1) % stages);\n    sum.",
            "__syncthreads();\n    fetch((slot + stages - 1) % stages);\n    sum.",
        ),
        "one span for all": Mutant("sum += side.projected[span * count + i];", "sum += side.projected[i];"),
        "spans begin at the first feature": Mutant(
            "const M *y = static_cast<const M *>(side.matrix) + feature;", "const M *y = static_cast<const M *>(side.matrix);"
        ),
        "signs of another word": Mutant("words.at[word] >> r % 32 & 1", "words.at[0] >> r % 32 & 1"),
        "sine and cosine not exchanged": Mutant("quarter & 1 ? sine : cosine, s", "cosine, s", dtype="bfloat16"),
        "a matrix's second half forgotten": Mutant(
            "f[c].high[k][1], f[c].low[k][1]", "f[c].high[k][0], f[c].low[k][1]", "core/inner.cuh", "bfloat16"
        ),
        "the scale of both where one is given": Mutant("(s.P_in.data ? 1.0 : double(s.k_in))", "double(s.k_in)"),
        "no barrier before the list is sorted": Mutant("__syncthreads(); // the order so far", "// the order so far"),
        "no barrier before elements are placed": Mutant("__syncthreads(); // all beginnings", "// all beginnings"),
        "unstable order": Mutant("use(e, count + uint32_t(before));", "use(e, count + uint32_t(__popc(alike) - 1 - before));"),
        "sorted by the first digit only": Mutant("width >> shift; shift += 8", "width >> shift && shift < 8; shift += 8"),
        "signs forgotten": Mutant("^ (hash & ~none)", "^ 0"),
        "a bucket's other threads forgotten": Mutant("sum += ends[t].first_sum;", ""),
        "no barrier before ends are read": Mutant("__syncthreads(); // everyone's ends", "// everyone's ends"),
        "no barrier before the tile is read": Mutant("__syncthreads(); // the whole tile", "// the whole tile"),
        "elements beyond the edges have buckets": Mutant("hashes[e] = inside ? hash : none;", "hashes[e] = hash;"),
        "the last slab forgotten": Mutant("slab < at.slabs; ++slab", "slab + 1 < at.slabs; ++slab"),
        "a launch on the default stream": Mutant("list_shared, stream, s, at);", "list_shared, nullptr, s, at);"),
    },
    showing=[
        Case(2, 3, 47, 31, (16, 1), "sparse"), Case(3, 5, 33, 18, (9, 6), given=("P_out",)),
        Case(2, 3, 130, 270, (5, 40), "gaussian"), Case(2, 3, 300, 20, (70, 6)), Case(2, 3, 100, 66, (600, 2), "sparse"),
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
