"""grad_gram beside torch: products of tokens with their T x T2 matrices stored, and gradients that are stored."""

from __future__ import annotations

from functools import lru_cache

import pytest
from interleave import interleaved

from ghostgram import _dispatch
from ghostgram.testing import layouts, plain
from ghostgram.testing.cases import grad_gram as cases
from ghostgram.testing.compare import error_over_bound
from ghostgram.testing.roofline import percent_of_roof

check = lru_cache(error_over_bound)  # once for warm and cold

CASES = [
    cases.Case(32, 64, 768, 768),
    cases.Case(8, 256, 768, 3072),
    cases.Case(256, 1, 768, 768),
    cases.Case(32, 32, 768, 768, (8, 128)),
    cases.Case(8, 256, 768, 3072, diagonal=True),
    cases.Case(64, 16, 768, 768, diagonal=True),
]


@pytest.mark.parametrize("cache", ["warm", "cold"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def bench_grad_gram(benchmark, record, roofs, case, dtype, cache):
    worst = check("grad_gram", case, dtype, "cpu", layouts.torch_array)
    assert max(worst.values()) <= 1, worst

    made = cases.arrays(case, cases.inputs(case, dtype), layouts.torch_array, dtype)
    out = cases.run(case, made, "cpu")["out"]
    seconds = interleaved(
        benchmark,
        lambda: _dispatch.run("grad_gram", "cpu", *made.values(), out),
        {"tokens": lambda: plain.gram_of_tokens(**made, diagonal=case.diagonal),
         "gradients": lambda: plain.gram_of_stored(**made, diagonal=case.diagonal)},
        rounds=10,
        cold=cache == "cold",
    )  # fmt: skip
    record(
        shape=case.id,
        dtype=dtype,
        cache=cache,
        ms=1e3 * seconds["ours"],
        torch_tokens_ms=1e3 * seconds["tokens"],
        torch_gradients_ms=1e3 * seconds["gradients"],
        ratio=seconds["ours"] / min(seconds["tokens"], seconds["gradients"]),
        gflops=case.flops / seconds["ours"] / 1e9,
        gbytes=case.bytes(dtype) / seconds["ours"] / 1e9,
        percent_of_roof=percent_of_roof(case.flops, case.bytes(dtype), seconds["ours"], roofs),
    )
