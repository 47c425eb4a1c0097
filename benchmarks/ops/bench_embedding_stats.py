"""embedding_stats beside torch: equal tokens found by sorting, their rows summed into a stored matrix."""

from __future__ import annotations

from functools import lru_cache

import pytest
from interleave import interleaved

from ghostgram import _dispatch
from ghostgram.testing import layouts, plain
from ghostgram.testing.cases import embedding_stats as cases
from ghostgram.testing.compare import error_over_bound
from ghostgram.testing.roofline import percent_of_roof

check = lru_cache(error_over_bound)  # once for warm and cold

CASES = [
    cases.Case(16, 512, 50_000, 768, 0),
    cases.Case(16, 512, 50_000, 768, 1),
    cases.Case(16, 512, 50, 768, 1),
    cases.Case(16, 512, 512, 768, 1, "distinct", layout="expanded"),  # positions: one row of ids for all samples
]


@pytest.mark.parametrize("cache", ["warm", "cold"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def bench_embedding_stats(benchmark, record, roofs, case, dtype, cache):
    worst = check("embedding_stats", case, dtype, "cpu", layouts.torch_array)
    assert max(worst.values()) <= 1, worst

    made = cases.arrays(case, cases.inputs(case, dtype), layouts.torch_array, dtype)
    norms2, dots = cases.run(case, made, "cpu").values()
    seconds = interleaved(
        benchmark,
        lambda: _dispatch.run("embedding_stats", "cpu", *made.values(), norms2, dots, case.padding_idx),
        {"sorting": lambda: plain.rows_by_sorting(**made)},
        rounds=15,
        cold=cache == "cold",
    )
    record(
        shape=case.id,
        dtype=dtype,
        cache=cache,
        ms=1e3 * seconds["ours"],
        torch_sorting_ms=1e3 * seconds["sorting"],
        ratio=seconds["ours"] / seconds["sorting"],
        gflops=case.flops / seconds["ours"] / 1e9,
        gbytes=case.bytes(dtype) / seconds["ours"] / 1e9,
        percent_of_roof=percent_of_roof(case.flops, case.bytes(dtype), seconds["ours"], roofs),
    )
