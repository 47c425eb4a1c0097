"""grad_stats beside the weight-gradient GEMM alone: what do the norms and dots of every sample cost?"""

from __future__ import annotations

import pytest
import torch
from interleave import interleaved

from ghostgram import _C, _dispatch
from ghostgram.testing import layouts
from ghostgram.testing.cases import grad_stats as cases
from ghostgram.testing.compare import error_over_bound
from ghostgram.testing.roofline import percent_of_roof

SHAPES = [(8, 256, 768, 3072), (16, 128, 768, 768), (16, 256, 768, 768), (8, 512, 768, 2304)]


@pytest.mark.parametrize("cache", ["warm", "cold"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_one_direction(benchmark, record, roofs, shape, dtype, cache):
    case = cases.Case(*shape, directions=1)
    worst = error_over_bound("grad_stats", case, dtype, "cpu", layouts.torch_array)
    assert max(worst.values()) <= 1, worst

    values = cases.inputs(case, dtype)
    a, b, D = (layouts.torch_array(values[name], dtype, "contiguous") for name in ("a", "b", "D"))
    gemm_a, gemm_b = a.flatten(0, 1), b.flatten(0, 1).T
    # Outputs are there before, on both sides: fresh ones cost a page fault per 4 KiB, which is neither kernel's doing.
    sums = torch.zeros(case.p, case.d), torch.zeros(case.samples), torch.zeros(case.samples, 1)
    _C.borrow_openmp()  # as the front door does
    product = torch.zeros(case.p, case.d, dtype=a.dtype)
    seconds = interleaved(
        benchmark,
        lambda: _dispatch.run("grad_stats", "cpu", a, b, D, *sums, False),
        {"gemm": lambda: torch.mm(gemm_b, gemm_a, out=product)},
        rounds=20,
        cold=cache == "cold",
    )
    record(
        shape="x".join(map(str, shape)),
        dtype=dtype,
        cache=cache,
        ms=1e3 * seconds["ours"],
        torch_gemm_ms=1e3 * seconds["gemm"],
        ratio=seconds["ours"] / seconds["gemm"],
        gflops=case.flops / seconds["ours"] / 1e9,
        gbytes=case.bytes(dtype) / seconds["ours"] / 1e9,
        percent_of_roof=percent_of_roof(case.flops, case.bytes(dtype), seconds["ours"], roofs),
    )
