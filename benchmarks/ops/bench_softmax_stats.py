"""softmax_stats beside the same four numbers from torch: how near to the memory's rate is one read of the logits?"""

from __future__ import annotations

import statistics

import pytest
import torch
from interleave import interleaved

import ghostgram as gg
from ghostgram.testing import layouts, plain, roofline
from ghostgram.testing.cases import softmax_stats as cases
from ghostgram.testing.compare import error_over_bound

SHAPES = {(4096, 50257): 5, (8, 262144): 50, (256, 1000): 500, (50000, 10): 50}
"""(N, C) -> how many rounds. The first is a language model's batch, far from any cache; (256, 1000) stays in L2."""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_class_numbers(benchmark, record, shape, dtype):
    rows, classes = shape
    few = cases.Case(1, min(rows, 16), classes)
    worst = error_over_bound("softmax_stats", few, dtype, "cpu", layouts.torch_array)
    assert max(worst.values()) <= 1, worst

    case = cases.Case(1, rows, classes)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator).mul_(3).to(getattr(torch, dtype))
    labels = torch.randint(classes, (rows,), generator=generator)
    # Memory that other tenants share is another one each minute: its rate is measured between the rounds.
    reads: list[float] = []
    seconds = interleaved(
        benchmark,
        lambda: gg.softmax_stats(logits, labels),
        {
            "torch": lambda: plain.four_of_softmax(logits, labels),
            "log_softmax alone": lambda: torch.log_softmax(logits, 1),
            "read": lambda: reads.append(roofline.measure(0.02).read) if len(reads) < 10 else None,
        },
        rounds=SHAPES[shape],
        cold=False,
    )
    gbytes = case.bytes(dtype) / seconds["ours"] / 1e9
    record(
        shape="x".join(map(str, shape)),
        dtype=dtype,
        ms=1e3 * seconds["ours"],
        gbytes=gbytes,
        percent_of_read=100 * gbytes * 1e9 / statistics.median(reads),
        ns_per_logit=1e9 * seconds["ours"] / (rows * classes),
        torch_ms=1e3 * seconds["torch"],
        torch_over_ours=seconds["torch"] / seconds["ours"],
        log_softmax_over_ours=seconds["log_softmax alone"] / seconds["ours"],
    )


def bench_distributions(benchmark, record):
    rows, classes = 512, 50257
    logits, other = torch.randn((2, rows, classes), generator=torch.Generator().manual_seed(0)).mul_(3)
    labels = torch.softmax(other, 1)
    ours, rivals = lambda: gg.softmax_stats(logits, labels), {"torch": lambda: plain.four_of_softmax(logits, labels)}
    for got, expected in zip(ours(), plain.four_of_softmax(logits, labels), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    seconds = interleaved(benchmark, ours, rivals, rounds=10, cold=False)
    record(
        shape=f"{rows}x{classes}",
        dtype="float32, distributions",
        ms=1e3 * seconds["ours"],
        gbytes=2 * logits.nbytes / seconds["ours"] / 1e9,
        torch_ms=1e3 * seconds["torch"],
        torch_over_ours=seconds["torch"] / seconds["ours"],
    )
