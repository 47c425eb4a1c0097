"""grad_project beside torch: projected tokens and bmm for Kronecker, bmm and index_add_ for sparse projections."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from interleave import interleaved

import ghostgram as gg
from ghostgram.testing import layouts, plain
from ghostgram.testing.cases import grad_project as cases
from ghostgram.testing.compare import error_over_bound
from ghostgram.testing.roofline import percent_of_roof

KRONECKER = [
    *[((8, 256, 768, 3072), k) for k in (16, 64)],
    *[((16, 128, 768, 768), k) for k in (16, 64)],
    *[((256, 1, 768, 3072), k) for k in (16, 64)],
]
SPARSE = [((8, 256, 768, 3072), 1), ((8, 256, 768, 3072), 4), ((256, 1, 768, 3072), 1), ((256, 1, 768, 3072), 4)]
CHECKED_SAMPLES = 16  # the reference forms every gradient: 256 of them would take longer than all timings


def checked_tensors(case, dtype):
    worst = error_over_bound(
        "grad_project", replace(case, samples=min(case.samples, CHECKED_SAMPLES)), dtype, "cpu", layouts.torch_array
    )
    assert max(worst.values()) <= 1, worst
    values = cases.inputs(case, dtype)
    return [None if x is None else layouts.torch_array(x, dtype, "contiguous") for x in values.values()]


def row(case, dtype, name, seconds, roofs):
    return {
        "shape": "x".join(map(str, (case.samples, case.tokens, case.d, case.p))),
        "size": "x".join(map(str, case.size)),
        "dtype": dtype,
        "ms": 1e3 * seconds["ours"],
        f"{name}_ms": 1e3 * seconds[name],
        "ratio": seconds["ours"] / seconds[name],
        "gflops": case.flops / seconds["ours"] / 1e9,
        "gbytes": case.bytes(dtype) / seconds["ours"] / 1e9,
        "percent_of_roof": percent_of_roof(case.flops, case.bytes(dtype), seconds["ours"], roofs),
    }


@pytest.mark.parametrize("matrices", ["given", "drawn"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("shape", "k"), KRONECKER, ids=str)
def bench_kronecker(benchmark, record, roofs, shape, k, dtype, matrices):
    case = cases.Case(*shape, (k, k), given=cases.BOTH)
    P_out, P_in, a, b = checked_tensors(case, dtype)
    ours = (lambda: gg.grad_project(a, b, P_out, P_in)) if matrices == "given" else lambda: gg.grad_project(a, b, k, k)
    seconds = interleaved(
        benchmark, ours, {"torch": lambda: plain.projection(a, b, P_out, P_in)}, rounds=30, cold=False
    )
    record(kind="kronecker", matrices=matrices, **row(case, dtype, "torch", seconds, roofs))


@pytest.mark.parametrize(("shape", "nonzeros"), SPARSE, ids=str)
def bench_sparse(benchmark, record, roofs, shape, nonzeros):
    case = cases.Case(*shape, (4096, nonzeros), "sparse")
    _, _, a, b = checked_tensors(case, "float32")
    entries = shape[2] * shape[3]
    buckets = torch.randint(case.size[0], (nonzeros, entries))
    signs = torch.randint(2, (nonzeros, entries)) * 2.0 - 1

    seconds = interleaved(
        benchmark,
        lambda: gg.grad_sketch(a, b, case.size[0], nonzeros=nonzeros),
        {"torch": lambda: plain.sketch_of_stored(a, b, buckets, signs, case.size[0])},
        rounds=5,
        cold=False,
    )
    record(kind="sparse", **row(case, "float32", "torch", seconds, roofs))
