"""gumbel_topk beside NumPy's noise and argpartition: documents a second, peak memory, the same result however fed."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from interleave import interleaved

import ghostgram as gg
from ghostgram import _C
from ghostgram.testing import plain
from ghostgram.testing.cases import gumbel_topk as cases
from ghostgram.testing.compare import error_over_bound
from ghostgram.testing.layouts import numpy_array
from ghostgram.testing.roofline import percent_of_roof

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def seconds_and_peak(call):
    """How long one call takes, and by how many bytes memory grows at its highest."""
    resident = {}
    CLEAR_REFS.write_text("5")  # the peak is counted from here
    for name in ("VmRSS", "VmHWM"):
        if name == "VmHWM":
            started = time.perf_counter()
            result = call()
            seconds = time.perf_counter() - started
        (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith(name))
        resident[name] = 1024 * int(line.split()[1])
    return result, seconds, resident["VmHWM"] - resident["VmRSS"]


@pytest.mark.parametrize("ids", ["none", "random"])
@pytest.mark.parametrize(("n", "k"), [(10**7, 10**5), (10**7, 10**3)])
def bench_interleaved(benchmark, record, roofs, n, k, ids):
    case = cases.Case(100_003, 1_000, ids=ids, spare=65536)
    worst = error_over_bound("gumbel_topk", case, "float32", "cpu", numpy_array)
    assert max(worst.values()) <= 1, worst

    rng = np.random.default_rng(0)
    scores = rng.standard_normal(n, dtype=np.float32)
    own = None if ids == "none" else rng.permutation(n)
    ways = {
        "numpy": lambda: plain.noise_and_partition(scores, k),
        "noise": lambda: gg.gumbel_topk(scores, 0, ids=own),  # every key is drawn and bounded, none is kept
    }
    seconds = interleaved(benchmark, lambda: gg.gumbel_topk(scores, k, ids=own), ways, rounds=7, cold=False)
    case = cases.Case(n, k, ids=ids)
    record(
        documents=n,
        k=k,
        ids=ids,
        threads=_C.num_threads(),
        ms=1e3 * seconds["ours"],
        numpy_ms=1e3 * seconds["numpy"],
        ratio=seconds["ours"] / seconds["numpy"],
        mdocs_per_s=n / seconds["ours"] / 1e6,
        percent_of_noise_alone=100 * seconds["noise"] / seconds["ours"],
        gbytes=case.bytes("float32") / seconds["ours"] / 1e9,
        percent_of_roof=percent_of_roof(case.flops, case.bytes("float32"), seconds["ours"], roofs),
    )


def bench_a_hundred_million(benchmark, record, roofs):
    """Once each, 5 GB of NumPy's; also shuffled and in shards."""
    n, k = 10**8, 10**6
    rng = np.random.default_rng(0)
    scores = rng.standard_normal(n, dtype=np.float32)
    best, seconds, peak = seconds_and_peak(lambda: gg.gumbel_topk(scores, k))
    _, numpy_seconds, numpy_peak = seconds_and_peak(lambda: plain.noise_and_partition(scores, k))

    order = rng.permutation(n)
    shuffled = order[gg.gumbel_topk(scores[order], k, ids=order)]

    def in_shards():
        shards = [gg.GumbelTopK(k) for _ in range(4)]
        ids = np.arange(n)
        for i, shard in enumerate(shards):
            for part in np.array_split(np.arange(i, n, 4), 10):
                shard.update(scores[part], ids[part])
        for shard in shards[1:]:
            shards[0].merge(shard)
        return shards[0].result()[0]

    same = np.array_equal(best, shuffled) and np.array_equal(best, in_shards())
    assert same
    benchmark.pedantic(lambda: gg.gumbel_topk(scores, k), rounds=3, warmup_rounds=1)
    median, case = benchmark.stats.stats.median, cases.Case(n, k)
    record(
        documents=n,
        k=k,
        ids="none",
        threads=_C.num_threads(),
        ms=1e3 * median,
        first_call_ms=1e3 * seconds,
        numpy_ms=1e3 * numpy_seconds,
        ratio=median / numpy_seconds,
        mdocs_per_s=n / median / 1e6,
        peak_megabytes=peak / 1e6,
        peak_bytes_per_k=peak / k,
        numpy_peak_megabytes=numpy_peak / 1e6,
        percent_of_roof=percent_of_roof(case.flops, case.bytes("float32"), median, roofs),
        same_shuffled_and_sharded=same,
    )
