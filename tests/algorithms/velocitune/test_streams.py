"""Streams are mixed by the same schedule, end at the same batch on all ranks, and go on where they were left."""

import copy
import json

import numpy as np
import pytest
from torch.utils.data import DataLoader

from ghostgram.algorithms.velocitune import streams
from ghostgram.algorithms.velocitune.feeds import unchanged
from ghostgram.algorithms.velocitune.sampler import Schedule
from ghostgram.algorithms.velocitune.streams import dynamic_interleave


class Stream:
    """(k, epoch, i) in order, with the three methods of a streaming data set."""

    def __init__(self, k, n):
        self.k, self.n, self.epoch, self.at = k, n, 0, 0

    def __iter__(self):
        start, self.at = self.at, 0
        for i in range(start, self.n):
            self.at = i + 1
            yield (self.k, self.epoch, i)
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]

    def set_epoch(self, epoch):
        self.epoch = epoch


SIZES, WEIGHTS = (11, 7, 30), [0.5, 0.3, 0.2]


def mixture(stateful=True, weights=WEIGHTS, batch=6, **options):
    streams = [Stream(k, n) if stateful else [(k, 0, i) for i in range(n)] for k, n in enumerate(SIZES)]
    names = ("code", "prose", "maths")
    return dynamic_interleave(dict(zip(names, streams, strict=True)), weights, batch, collate_fn=list, **options)


def taken(batches, n=99):
    found = []
    for batch in batches:
        assert [item[0] for item in batch.data] == batch.domain_ids.tolist()
        found.append((batch.number, batch.version, batch.data))
        if len(found) == n:
            break
    return found


def test_domains_are_the_schedules_and_samples_come_in_order():
    mixed = mixture()
    first = taken(mixed, 4)
    assert mixed.switch([0, 0, 1], 3) == 4
    found = first + taken(mixed, 3)
    schedule = Schedule(dict.fromkeys("abc"), WEIGHTS, 6)
    schedule.switch([0, 0, 1], 4)
    assert [[k for k, *_ in items] for *_, items in found] == [schedule.advance().domains.tolist() for _ in range(7)]
    for k, n in enumerate(SIZES):
        of_k = [item for *_, items in found for item in items if item[0] == k]
        assert of_k == [(k, i // n, i % n) for i in range(len(of_k))]


@pytest.mark.parametrize("stateful", [True, False])
@pytest.mark.parametrize("at", [0, 3, 5])
def test_resume_is_exact_and_read_ahead_is_read_again(stateful, at):
    whole = taken(mixture(stateful), 12)
    mixed = mixture(stateful, lookahead=4)
    taken(mixed, 6)
    state = json.loads(json.dumps(mixed.state_dict(at_batch=at))) if at > 0 else mixed.state_dict()
    again = mixture(stateful)
    if stateful:
        again.load_state_dict(state)
    else:
        with pytest.warns(UserWarning, match="keeps no state"):
            again.load_state_dict(state)
    assert taken(again, 6) == whole[state["schedule"]["batch"] :][:6]


def test_a_state_too_far_back_is_refused():
    mixed = mixture()
    taken(mixed, 6)
    assert mixed.state_dict()["schedule"]["batch"] == 6
    with pytest.raises(ValueError, match="at_batch: expected 4 to 5, got 3"):
        mixed.state_dict(3)


def test_shuffle_buffers():
    """Each epoch is a permutation; with exact=True a resumed run goes on with what was in the buffer."""
    mixed = mixture(shuffle_buffer=5, exact=True)
    whole = taken(mixed, 14)
    for k, n in enumerate(SIZES):
        of_k = [item for *_, items in whole for item in items if item[0] == k]
        for start in range(0, len(of_k) - n + 1, n):
            assert sorted(of_k[start : start + n]) == [(k, start // n, i) for i in range(n)]
            assert of_k[start : start + n] != sorted(of_k[start : start + n])
    for exact in (True, False):
        first = mixture(shuffle_buffer=5, exact=exact)
        found, state = taken(first, 5), copy.deepcopy(first.state_dict())
        again = mixture(shuffle_buffer=5, exact=exact)
        if exact:
            again.load_state_dict(state)
        else:
            with pytest.warns(UserWarning, match=r"up to 5 samples of '\w+', in its shuffle buffer then, are lost"):
                again.load_state_dict(state)
        assert (found + taken(again, 9) == whole) == exact


def test_every_rank_ends_at_the_same_batch():
    whole = taken(mixture(stopping="first"))
    assert len(whole) == 3  # the fourth batch of 6 would be prose's 7 samples and more, or code's 11
    parts = [taken(mixture(stopping="first", rank=rank, world=3)) for rank in range(3)]
    for b, (number, version, items) in enumerate(whole):
        assert [part[b][:2] for part in parts] == [(number, version)] * 3
        assert [parts[i % 3][b][2][i // 3] for i in range(6)] == items
    assert {len(part) for part in parts} == {3}


def test_stopping_when_all_have_been_read():
    found = taken(mixture(stopping="all"))
    seen = {item for *_, items in found for item in items}
    assert {(k, 0, i) for k, n in enumerate(SIZES) for i in range(n)} <= seen
    without_last = {item for *_, items in found[:-1] for item in items}
    assert not {(2, 1, 0)} & without_last


def test_split_sources_are_read_by_their_rank_alone():
    mixed = mixture(rank=1, world=2, split=True)
    found = taken(mixed, 4)
    of_code = [item for *_, items in found for item in items if item[0] == 0]
    assert of_code == [(0, 0, i) for i in range(len(of_code))]
    assert [len(items) for *_, items in found] == [3] * 4


def test_torchs_loader_and_its_workers(monkeypatch):
    assert taken(DataLoader(mixture(), batch_size=None, collate_fn=unchanged), 3) == taken(mixture(), 3)
    monkeypatch.setattr(streams, "get_worker_info", lambda: "a worker's")
    with pytest.raises(ValueError, match="num_workers: expected 0"):
        next(iter(mixture()))


def test_what_cannot_be_mixed_is_named():
    for options, message in [
        ({"stopping": "last"}, "stopping: expected one of"),
        ({"stopping": "first", "split": True}, 'stopping: expected "never" where split'),
        ({"rank": 2, "world": 2}, "rank, world, global_batch"),
        ({"shuffle_buffer": -1}, "shuffle_buffer, lookahead"),
    ]:
        with pytest.raises(ValueError, match=message):
            mixture(**options)
    with pytest.raises(ValueError, match="datasets: expected samples in 'a', got none"):
        taken(dynamic_interleave({"a": []}, [1], 2))


def test_streaming_data_sets_of_hugging_face():
    datasets = pytest.importorskip("datasets")

    def stream(k, n):
        rows = datasets.Dataset.from_dict({"x": [1000 * k + i for i in range(n)]})
        return rows.to_iterable_dataset(num_shards=2)

    def mixed(**options):
        streams = {"a": stream(0, 10), "b": stream(1, 6)}
        return dynamic_interleave(streams, [0.6, 0.4], 5, **options)

    whole = [batch.data["x"].tolist() for _, batch in zip(range(8), mixed(), strict=False)]
    assert sorted(np.concatenate(whole)[np.concatenate(whole) < 1000][:10]) == list(range(10))
    first = mixed()
    for _ in zip(range(3), first, strict=False):
        pass
    again = mixed()
    again.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [batch.data["x"].tolist() for _, batch in zip(range(5), again, strict=False)] == whole[3:]


def test_streams_of_hugging_face_that_ranks_share():
    datasets = pytest.importorskip("datasets")
    from datasets.distributed import split_dataset_by_node

    shared = []
    for rank in range(2):
        rows = [datasets.Dataset.from_dict({"x": [1000 * k + i for i in range(8)]}) for k in range(2)]
        shares = [split_dataset_by_node(each.to_iterable_dataset(num_shards=2), rank, 2) for each in rows]
        own = [[row["x"] for row in share] for share in shares]
        mixed = dynamic_interleave(
            dict(zip("ab", shares, strict=True)), [0.5, 0.5], 4, rank=rank, world=2, split=True, stopping="never"
        )
        found = np.concatenate([batch.data["x"].numpy() for _, batch in zip(range(10), mixed, strict=False)])
        for k in range(2):
            drawn = found[found // 1000 == k].tolist()
            assert drawn == (own[k] * 9)[: len(drawn)]  # the rank's share, in order, again and again
            assert len(drawn) > len(own[k])
        shared += own
    assert sorted(number for own in shared for number in own) == [*range(8), *range(1000, 1008)]
