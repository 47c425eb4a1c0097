"""Batches of 1024 from domains of 10^9 samples: making their schedule, and looking up their samples by the cipher."""

import numpy as np
import pytest

from ghostgram.algorithms.velocitune.sampler import Schedule

BATCH = 1024


@pytest.fixture(params=[4, 20], ids=lambda domains: f"{domains} domains")
def schedule(request):
    weights = np.random.default_rng(0).dirichlet(np.ones(request.param))
    return Schedule({str(k): 10**9 for k in range(request.param)}, weights, BATCH)


def bench_batches(benchmark, schedule):
    benchmark(schedule.advance)
    assert schedule.cursors.sum() == BATCH * schedule.next


def bench_samples(benchmark, schedule):
    slots = schedule.advance()
    samples = benchmark(schedule.samples, slots)
    assert len(set(zip(slots.domains.tolist(), samples.tolist(), strict=True))) == BATCH
