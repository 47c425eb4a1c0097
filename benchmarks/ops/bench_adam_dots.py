"""adam_dots beside the weight-gradient GEMM alone, and beside torch with every sample's gradient and step stored."""

from __future__ import annotations

import pytest
import torch
from interleave import interleaved

from ghostgram import _C, _dispatch
from ghostgram.testing import layouts, plain
from ghostgram.testing.cases import adam_dots as cases
from ghostgram.testing.compare import error_over_bound
from ghostgram.testing.roofline import percent_of_roof

SHAPES = [(8, 1024, 768, 768), (8, 256, 768, 2304), (16, 64, 768, 768), (64, 1, 768, 768)]


@pytest.mark.parametrize("cache", ["warm", "cold"])
@pytest.mark.parametrize("directions", [1, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_changes_of_step(benchmark, record, roofs, shape, dtype, directions, cache):
    small = cases.Case(*(min(n, 70) for n in shape), directions)
    worst = error_over_bound("adam_dots", small, dtype, "cpu", layouts.torch_array)
    assert max(worst.values()) <= 1, worst

    case = cases.Case(*shape, directions)
    made = cases.arrays(case, cases.inputs(case, dtype), layouts.torch_array, dtype)
    inputs = [made[name] for name in cases.INPUTS]
    out = torch.zeros(case.samples, directions)
    gemm_a, gemm_b = made["a"].flatten(0, 1), made["b"].flatten(0, 1).T
    product = torch.zeros(case.p, case.d, dtype=made["a"].dtype)
    _C.borrow_openmp()  # as the front door does
    seconds = interleaved(
        benchmark,
        lambda: _dispatch.run("adam_dots", "cpu", *inputs, out, *case.scalars),
        {
            "gemm": lambda: torch.mm(gemm_b, gemm_a, out=product),
            "stored": lambda: plain.steps_of_stored(*inputs, *case.scalars),
        },
        rounds=8,
        cold=cache == "cold",
        rest=0.06,
    )
    record(
        shape="x".join(map(str, shape)),
        dtype=dtype,
        directions=directions,
        cache=cache,
        ms=1e3 * seconds["ours"],
        gemm_ms=1e3 * seconds["gemm"],
        stored_ms=1e3 * seconds["stored"],
        over_gemm=seconds["ours"] / seconds["gemm"],
        over_stored=seconds["ours"] / seconds["stored"],
        gflops=case.flops / seconds["ours"] / 1e9,
        gbytes=case.bytes(dtype) / seconds["ours"] / 1e9,
        percent_of_roof=percent_of_roof(case.flops, case.bytes(dtype), seconds["ours"], roofs),
    )
