"""affine_stats beside torch: its own sum over all samples alone, and per-sample sums with their products stored."""

from __future__ import annotations

from functools import lru_cache

import pytest
from interleave import interleaved

from ghostgram import _dispatch
from ghostgram.testing import layouts, plain
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
            "summed": lambda: plain.affine_of_batch(**made, channels_first=channels_first),
            "per sample": lambda: plain.affine_of_samples(**made, channels_first=channels_first),
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
