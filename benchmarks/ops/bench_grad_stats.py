"""grad_stats beside the weight-gradient GEMM alone: what do the norms and dots of every sample cost?

The rivals in float32 are torch's GEMM and NumPy's, which is OpenBLAS; `openblas` says for which processor its kernels
are. Environment variables can hold it to an old one: unset OPENBLAS_CORETYPE.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from interleave import interleaved

from ghostgram import _C, _dispatch
from ghostgram.testing import layouts
from ghostgram.testing.cases import grad_stats as cases
from ghostgram.testing.compare import error_over_bound
from ghostgram.testing.roofline import percent_of_roof

SHAPES = [(8, 256, 768, 3072), (16, 128, 768, 768), (16, 256, 768, 768), (8, 512, 768, 2304)]


@functools.cache
def openblas_core() -> str:
    """The processor that the kernels of NumPy's OpenBLAS are for; "" when it is built with another BLAS."""
    for library in Path(np.__file__).parent.parent.glob("numpy.libs/*openblas*"):
        name = ctypes.CDLL(str(library)).scipy_openblas_get_corename64_
        name.restype = ctypes.c_char_p
        return str(name().decode())
    return ""


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
    rivals = {"torch": lambda: torch.mm(gemm_b, gemm_a, out=product)}
    if dtype == "float32" and openblas_core():
        rivals["openblas"] = lambda: np.matmul(gemm_b.numpy(), gemm_a.numpy(), out=product.numpy())
    seconds = interleaved(
        benchmark,
        lambda: _dispatch.run("grad_stats", "cpu", a, b, D, *sums, False),
        rivals,
        rounds=20,
        cold=cache == "cold",
        rest=0.06,
    )
    record(
        shape="x".join(map(str, shape)),
        dtype=dtype,
        cache=cache,
        ms=1e3 * seconds["ours"],
        openblas=openblas_core(),
        **{f"{name}_gemm_ms": 1e3 * seconds[name] for name in rivals},
        **{f"over_{name}": seconds["ours"] / seconds[name] for name in rivals},
        gflops=case.flops / seconds["ours"] / 1e9,
        gbytes=case.bytes(dtype) / seconds["ours"] / 1e9,
        percent_of_roof=percent_of_roof(case.flops, case.bytes(dtype), seconds["ours"], roofs),
    )
