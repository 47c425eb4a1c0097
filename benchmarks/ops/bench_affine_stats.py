"""affine_stats beside torch: its own sum over all samples alone, and per-sample sums with their products stored."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from interleave import interleaved

from ghostgram import _dispatch
from ghostgram.testing import layouts
from ghostgram.testing.cases import affine_stats as cases
from ghostgram.testing.compare import error_over_bound
from ghostgram.testing.roofline import percent_of_roof

check = lru_cache(error_over_bound)  # once for warm and cold

CASES = [
    cases.Case(16, 512, 768, 1),
    cases.Case(512, 16, 768, 1),
    cases.Case(2, 4096, 768, 1),
    cases.Case(16, 512, 768, 1, "rms"),
    cases.Case(16, 512, 3072, 1, "bias"),
    cases.Case(16, 3136, 2, 1, groups=32),
    cases.Case(16, 784, 8, 1, groups=32),
    cases.Case(16, 49, 64, 1, groups=32),
    cases.Case(16, 3136, 1, 1, groups=64),
    cases.Case(16, 784, 256, 1, "bias", groups=1),
]


def summed(b, x, mean, rstd, D_weight, D_bias, channels_first):
    """Gradients of the whole batch, with no word on single samples: what training computes anyway."""
    if channels_first:
        if x is None:
            return b.sum((0, 2))
        sizes, weight = (*b.shape, mean.shape[1]), mean.new_ones(b.shape[1])
        return torch.ops.aten.native_group_norm_backward(b, x, mean, rstd, weight, *sizes, [False, True, True])
    if x is None:
        return b.sum((0, 1))
    if mean is None:
        return (b * (x * rstd[..., None])).sum((0, 1)), b.sum((0, 1))
    shape = [b.shape[-1]]
    weight = mean.new_ones(shape)
    mean, rstd = mean[..., None], rstd[..., None]
    return torch.ops.aten.native_layer_norm_backward(b, x, shape, mean, rstd, weight, weight, [False, True, True])


def per_sample(b, x, mean, rstd, D_weight, D_bias, channels_first):
    tokens = 2 if channels_first else 1
    rows = [(b.sum(tokens), D_bias)]
    if x is not None:
        if channels_first:
            mean, rstd = (y.repeat_interleave(b.shape[1] // y.shape[1], 1) for y in (mean, rstd))
        centred = x if mean is None else x - mean[..., None]
        rows.append(((b * (centred * rstd[..., None])).sum(tokens), D_weight))
    return [(row.sum(0), torch.linalg.vecdot(row, row), row.to(D.dtype) @ D.T) for row, D in rows]


@pytest.mark.parametrize("cache", ["warm", "cold"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def bench_affine_stats(benchmark, record, roofs, case, dtype, cache):
    worst = check("affine_stats", case, dtype, "cpu", layouts.torch_array)
    assert max(worst.values()) <= 1, worst

    made = cases.arrays(case, cases.inputs(case, dtype), layouts.torch_array, dtype)
    found = cases.run(case, made, "cpu")
    names = [f"{part}_{what}" for what in ("grad", "norms2", "dots") for part in ("weight", "bias")]
    outputs = [found.get(name) for name in names]
    channels_first = case.groups is not None
    seconds = interleaved(
        benchmark,
        lambda: _dispatch.run("affine_stats", "cpu", *made.values(), *outputs, channels_first),
        {
            "summed": lambda: summed(**made, channels_first=channels_first),
            "per sample": lambda: per_sample(**made, channels_first=channels_first),
        },
        rounds=15,
        cold=cache == "cold",
    )
    record(
        shape=case.id,
        dtype=dtype,
        cache=cache,
        ms=1e3 * seconds["ours"],
        torch_summed_ms=1e3 * seconds["summed"],
        torch_per_sample_ms=1e3 * seconds["per sample"],
        ratio_to_summed=seconds["ours"] / seconds["summed"],
        ratio_to_per_sample=seconds["ours"] / seconds["per sample"],
        gflops=case.flops / seconds["ours"] / 1e9,
        gbytes=case.bytes(dtype) / seconds["ours"] / 1e9,
        percent_of_roof=percent_of_roof(case.flops, case.bytes(dtype), seconds["ours"], roofs),
    )
