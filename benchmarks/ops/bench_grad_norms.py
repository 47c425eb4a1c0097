"""grad_norms of short samples beside the two ways in use: Gram matrices of tokens, and gradients that are stored."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from interleave import interleaved

import ghostgram as gg
from ghostgram.testing import layouts
from ghostgram.testing.cases import grad_gram as cases
from ghostgram.testing.compare import error_over_bound
from ghostgram.testing.roofline import percent_of_roof

check = lru_cache(error_over_bound)  # once for warm and cold

SHAPES = [(256, 1, 1024, 1024), (64, 16, 1024, 1024)]

try:
    from opacus.grad_sample.linear import compute_linear_norm_sample
except ImportError:
    GHOST = "torch einsum, as ghost clipping does"

    def ghost_norms(a, b):
        squares = torch.einsum("nik,njk->nij", b, b) * torch.einsum("nik,njk->nij", a, a)
        return squares.sum((1, 2)).clamp(min=0).sqrt()
else:
    GHOST = "opacus"

    def ghost_norms(a, b):
        layer = torch.nn.Linear(a.shape[-1], b.shape[-1], bias=False, device="meta")
        return compute_linear_norm_sample(layer, [a], b)[layer.weight]


def stored_norms(a, b):
    return torch.linalg.vector_norm(torch.bmm(b.mT, a), dim=(1, 2))


# Apart, because stored gradients leave nothing in cache and give a gigabyte back to the system: who comes next pays.
@pytest.mark.parametrize("rival", ["ghost", "stored"])
@pytest.mark.parametrize("cache", ["warm", "cold"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_short_samples(benchmark, record, roofs, shape, dtype, cache, rival):
    case = cases.Case(*shape, diagonal=True)
    worst = check("grad_gram", case, dtype, "cpu", layouts.torch_array)
    assert max(worst.values()) <= 1, worst

    values = cases.inputs(case, dtype)
    a, b = (layouts.torch_array(values[name], dtype, "contiguous") for name in ("a", "b"))
    their_norms, way = {"ghost": (ghost_norms, GHOST), "stored": (stored_norms, "torch bmm")}[rival]
    tolerance = 1e-4 if dtype == "float32" else 2e-2
    torch.testing.assert_close(gg.grad_norms(a, b), their_norms(a, b).float(), rtol=tolerance, atol=0)

    seconds = interleaved(
        benchmark,
        lambda: gg.grad_norms(a, b),
        {rival: lambda: their_norms(a, b)},
        rounds=50 if rival == "ghost" else 5,
        cold=cache == "cold",
    )
    record(
        shape="x".join(map(str, shape)),
        dtype=dtype,
        cache=cache,
        rival=f"{rival} ({way})",
        ms=1e3 * seconds["ours"],
        rival_ms=1e3 * seconds[rival],
        times_faster=seconds[rival] / seconds["ours"],
        gflops=case.flops / seconds["ours"] / 1e9,
        gbytes=case.bytes(dtype) / seconds["ours"] / 1e9,
        percent_of_roof=percent_of_roof(case.flops, case.bytes(dtype), seconds["ours"], roofs),
    )
