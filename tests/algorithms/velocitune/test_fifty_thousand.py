"""A long run of the sampler: 100 changes of weights, in every division among ranks and workers, resumed anywhere.

The short form is run always; `pytest tests/algorithms/velocitune/test_fifty_thousand.py -m long -s` is 50,000 batches
of 8, and prints what was found.
"""

import json
from functools import lru_cache

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from ghostgram.algorithms.velocitune.loader import DynamicMixture
from ghostgram.algorithms.velocitune.quotas import Q
from ghostgram.algorithms.velocitune.sampler import Schedule

SIZES = {"a": 97, "b": 1009, "c": 20_011, "d": 65_537, "e": (1 << 20) + 3}  # the last one by the cipher
BATCH, SWITCHES = 8, 100
LAG = 8  # batches that 4 workers have in hand
SHORT, WHOLE = 606, 50_000
LONG = pytest.param(WHOLE, marks=pytest.mark.long)


class Numbers(Dataset):
    """Sample i of domain k says both."""

    def __init__(self, k, size):
        self.k, self.size = k, size

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        return (i << 3) + self.k


@lru_cache(maxsize=1)
def changes(batches):
    """(first batch, weights) of `SWITCHES` changes, some of which leave out domains."""
    rng = np.random.default_rng(0)
    every = batches // (SWITCHES + 1)
    found = []
    for number in range(1, SWITCHES + 1):
        weights = rng.dirichlet(np.full(len(SIZES), 0.7))
        weights[rng.random(len(SIZES)) < 0.1] = 0
        found.append((number * every, weights / weights.sum()))
    return found


def begun(**options):
    return DynamicMixture({name: Numbers(k, size) for k, (name, size) in enumerate(SIZES.items())},
                          np.ones(len(SIZES)), BATCH, seed=3, **options)  # fmt: skip


@lru_cache(maxsize=1)
def by_schedule(batches):
    """(batches, BATCH) all samples, and the versions of weights, from a schedule alone."""
    schedule = Schedule(SIZES, np.ones(len(SIZES)), BATCH, seed=3)
    for first, weights in changes(batches):
        schedule.switch(weights, first)
    found = np.empty((batches, BATCH), np.int64)
    for b in range(batches):
        slots = schedule.advance()
        found[b] = (schedule.samples(slots) << 3) + slots.domains
    return found, schedule.history


def read(mixed, batches, until, workers):
    """(n, BATCH / world) what a loader gives until a batch, weights being asked for shortly before they govern."""
    asked = [(first, weights) for first, weights in changes(batches) if first > mixed.schedule.current.first]
    options = {"multiprocessing_context": "fork", "prefetch_factor": 2} if workers else {}
    start, found = mixed.returned + 1, []
    torch.set_num_threads(1)
    for batch in mixed.loader(num_workers=workers, **options):
        found.append(batch.data.numpy())
        while asked and batch.number >= asked[0][0] - LAG - 1:
            first, weights = asked.pop(0)
            assert mixed.switch(weights, batch.number, at=first) == first
        if batch.number + 1 == until:
            break
    assert len(found) == until - start
    return np.stack(found)


@pytest.mark.parametrize("batches", [SHORT, LONG])
def test_quotas_hold_in_every_version_of_weights(batches):
    """What a domain is short of its share, with what it was owed when the version began, is below one sample."""
    drawn, history = by_schedule(batches)
    assert len(history) == SWITCHES + 1
    counts = np.stack([(drawn & 7 == k).sum(1) for k in range(len(SIZES))], axis=1)
    owed, alone = 0.0, 0.0
    for version, end in zip(history, [*(v.first for v in history[1:]), batches], strict=True):
        share = np.cumsum(counts[version.first : end], axis=0)
        asked = BATCH * np.arange(1, len(share) + 1)[:, None] * version.shares
        owed = max(owed, np.abs(share - asked - np.array(version.carry) / Q).max())
        alone = max(alone, np.abs(share - asked).max())
        assert share[:, version.shares == 0].sum() == 0
    whole = sum((end - v.first) * BATCH * v.shares for v, end in zip(
        history, [*(v.first for v in history[1:]), batches], strict=True))  # fmt: skip
    over = np.abs(counts.sum(0) - whole).max()
    print(f"\n{batches} batches: {owed:.3f} with what is carried, {alone:.3f} without; the whole run {over:.3f}")
    assert owed < 1
    assert alone < 2  # a version makes up for what the one before has left, which is below one sample as well


@pytest.mark.parametrize("batches", [SHORT, LONG])
def test_no_sample_twice_in_an_epoch(batches):
    drawn, _ = by_schedule(batches)
    epochs = []
    for k, size in enumerate(SIZES.values()):
        of_k = drawn.ravel()[drawn.ravel() & 7 == k] >> 3
        for start in range(0, len(of_k), size):
            epoch = of_k[start : start + size]
            assert len(np.unique(epoch)) == len(epoch)
        epochs.append(len(of_k) / size)
    print(f"\n{batches} batches: epochs {', '.join(f'{each:.2f}' for each in epochs)}")
    assert max(epochs) > 3


@pytest.fixture
def by_name():
    """Workers hand tensors over by name, in half the time that it takes by descriptor."""
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    yield
    torch.multiprocessing.set_sharing_strategy(before)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker")
@pytest.mark.parametrize(
    ("batches", "worlds", "workers"),
    [
        (SHORT, (1, 2, 4), 0),
        (SHORT, (2,), 2),
        *(pytest.param(WHOLE, (1, 2, 4), n, marks=pytest.mark.long) for n in (0, 2, 4)),
    ],
)
def test_ranks_and_workers_share_one_stream(batches, worlds, workers, by_name):
    """Without workers every rank reads the whole run; with them each begins where the rank before has stopped."""
    expected, _ = by_schedule(batches)
    for world in worlds:
        state, start = None, 0
        for rank in range(world):
            mixed, stop = begun(rank=rank, world=world), (rank + 1) * batches // world if workers else batches
            if workers and state is not None:
                mixed.load_state_dict(json.loads(state))
                start = rank * batches // world
            found = read(mixed, batches, stop, workers)
            assert (found == expected[start:stop, rank::world]).all()
            state = json.dumps(mixed.state_dict())
        print(f"\n{batches} batches, {world} ranks, {workers} workers: the same", end="", flush=True)


@pytest.mark.parametrize("batches", [SHORT, LONG])
def test_resumed_at_random_batches_on_other_ranks(batches, by_name):
    """Ten kills; each time the number of ranks is another, of workers now and then, and one rank's state is kept."""
    expected, _ = by_schedule(batches)
    stops = [*sorted(np.random.default_rng(1).choice(np.arange(1, batches), 10, replace=False).tolist()), batches]
    worlds, workers = [1, 2, 4, 2, 1, 4, 8, 1, 2, 4, 1], [0, 2, 0, 0, 0, 0, 0, 2, 0, 0, 0]
    state, start = None, 0
    for stop, world, each in zip(stops, worlds, workers, strict=True):
        for rank in range(world):
            mixed = begun(rank=rank, world=world)
            if state is not None:
                mixed.load_state_dict(json.loads(state))
            found = read(mixed, batches, stop, each)
            assert (found == expected[start:stop, rank::world]).all()
        state, start = json.dumps(mixed.state_dict()), stop  # the last rank's: all of them are alike
    print(f"\n{batches} batches: resumed after {stops[:-1]}")
