"""Loaders give the schedule's samples whatever reads them, and new weights at the batch that was declared."""

import json
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ghostgram.algorithms.velocitune.loader import DynamicMixture
from ghostgram.algorithms.velocitune.mixed import CollateMixture, MixedDataset
from ghostgram.algorithms.velocitune.replay import replay
from ghostgram.algorithms.velocitune.sampler import Schedule
from ghostgram.algorithms.velocitune.token_file import TokenFile

SIZES = {"code": 40, "prose": 25, "maths": 90}
WEIGHTS = [0.5, 0.3, 0.2]


class Rows(Dataset):
    """Row i is (1000 k + i, ...): a sample says itself where it is from."""

    def __init__(self, k, size, hashed=None):
        self.k, self.size, self.fingerprint = k, size, hashed

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        return torch.full((4,), 1000 * self.k + i)


def mixture(weights=WEIGHTS, batch=12, hashed=None, **options):
    datasets = {name: Rows(k, size, hashed) for k, (name, size) in enumerate(SIZES.items())}
    return DynamicMixture(datasets, weights, batch, **options)


def taken(batches, n, switches=(), mixed=None):
    """(batch, version, samples) of n batches; after batch b, weights and what b_eff must be are in `switches`."""
    found = []
    for batch in batches:
        assert batch.data[:, 0].tolist() == (1000 * batch.domain_ids + batch.sample_ids).tolist()
        assert batch.tokens.tolist() == [4] * len(batch.domain_ids)
        found.append((batch.number, batch.version, batch.data[:, 0].tolist()))
        for after, weights, b_eff in switches:
            if batch.number == after:
                assert mixed.switch(weights, after) == b_eff
        if len(found) == n:
            return found
    return found


def samples_of(found):
    return sorted(sample for *_, samples in found for sample in samples)


def by_schedule(n, switches=()):
    """The same from a schedule alone."""
    schedule, found = Schedule(SIZES, WEIGHTS, 12), []
    for weights, b_eff in switches:
        schedule.switch(weights, b_eff)
    for _ in range(n):
        slots = schedule.advance()
        found.append((slots.number, slots.version, (1000 * slots.domains + schedule.samples(slots)).tolist()))
    return found


@pytest.mark.parametrize("style", ["map", "iterable"])
@pytest.mark.parametrize(
    ("workers", "prefetch", "start"),
    [(0, None, None), (1, 2, "fork"), (2, 2, "fork"), (2, 4, "fork"), (1, 2, "spawn")],
)
def test_workers_change_nothing_and_switches_come_when_declared(style, workers, prefetch, start):
    mixed = mixture()
    loader = mixed.loader(
        style=style, num_workers=workers, prefetch_factor=prefetch, multiprocessing_context=start if workers else None
    )
    lag = workers * (prefetch or 0)
    assert mixed.lag == lag
    asked = [(2, [0.1, 0.1, 0.8], 3 + lag), (5, [0.0, 0.5, 0.5], 6 + lag)]
    found = taken(loader, 10 + lag, asked, mixed)
    assert found == by_schedule(10 + lag, [(weights, b_eff) for _, weights, b_eff in asked])
    assert [version for _, version, _ in found][2 + lag : 4 + lag] == [0, 1]


@pytest.mark.parametrize("style", ["map", "iterable"])
def test_a_loader_goes_on_where_it_was_left(style):
    """Batches that workers had in hand when the loop was left are made again."""
    mixed = mixture()
    loader = mixed.loader(style=style, num_workers=2, multiprocessing_context="fork")
    first = taken(loader, 3)
    mixed.switch([0.2, 0.2, 0.6], 2)
    assert first + taken(loader, 8) == by_schedule(11, [([0.2, 0.2, 0.6], 7)])


@pytest.mark.parametrize("style", ["map", "iterable"])
def test_workers_that_persist_go_on_too(style):
    mixed = mixture()
    loader = mixed.loader(
        style=style, num_workers=2, prefetch_factor=2, persistent_workers=True, multiprocessing_context="fork"
    )
    found = taken(loader, 3)
    mixed.switch([0.2, 0.2, 0.6], 2)
    found += taken(loader, 6)
    found += taken(loader, 2)
    assert found == by_schedule(11, [([0.2, 0.2, 0.6], 7)])


@pytest.mark.parametrize("style", ["map", "iterable"])
@pytest.mark.parametrize("workers", [0, 2])
def test_resume_through_json_with_other_workers(style, workers):
    """Saved at a batch before weights that were asked for govern, while later batches are in hand."""
    asked = [([0.1, 0.1, 0.8], 7)]
    mixed = mixture()
    loader = mixed.loader(style=style, num_workers=2, prefetch_factor=2, multiprocessing_context="fork")
    found = taken(loader, 4, [(2, asked[0][0], 7)], mixed)
    state = json.loads(json.dumps(mixed.state_dict(at_batch=3)))
    again = mixture([1, 1, 1], 6)
    again.load_state_dict(state)
    more = again.loader(style=style, num_workers=workers, multiprocessing_context="fork" if workers else None)
    assert found + taken(more, 8) == by_schedule(12, asked)
    assert again.state_dict()["schedule"]["batch"] == 12


def test_prefetched_batches_are_not_counted_as_consumed():
    mixed = mixture()
    taken(mixed.loader(num_workers=2, prefetch_factor=4, multiprocessing_context="fork"), 3)
    assert mixed.schedule.next > 8
    assert mixed.state_dict()["schedule"]["batch"] == 3
    assert mixed.state_dict(at_batch=1)["schedule"]["batch"] == 2


@pytest.mark.parametrize("style", ["map", "iterable"])
def test_micro_batches_split_a_ranks_part_in_order(style):
    whole = by_schedule(12, [([0.0, 0.5, 0.5], 7)])
    for rank in (0, 1):
        mixed = mixture(rank=rank, world=2, accumulation=3)
        loader = mixed.loader(style=style, num_workers=2, prefetch_factor=2, multiprocessing_context="fork")
        assert mixed.lag == 2  # four micro-batches in hand
        micros, parts = [], {}
        for batch in loader:
            micros.append(batch.micro)
            parts.setdefault(batch.number, []).extend(batch.data[:, 0].tolist())
            if (batch.number, batch.micro) == (4, 2):
                assert mixed.switch([0.0, 0.5, 0.5], 4) == 7
            if (batch.number, batch.micro) == (11, 2):
                break
        assert micros == [0, 1, 2] * 12
        assert list(parts.values()) == [samples[rank::2] for *_, samples in whole]


def test_ranks_of_any_number_give_the_same_order():
    """world 1, 2, 4, 3, each going on from the state of the one before."""
    state, together = None, []
    for n, world in enumerate((1, 2, 4, 3)):
        ranks = [mixture(rank=rank, world=world) for rank in range(world)]
        for rank in ranks:
            if state:
                rank.load_state_dict(state)
        parts = [taken(rank.loader(), 3) for rank in ranks]
        for b in range(3):
            samples = [parts[i % world][b][2][i // world] for i in range(12)]
            together.append((3 * n + b, 0, samples))
        states = [rank.state_dict() for rank in ranks]
        assert all(each == states[0] for each in states)
        state = states[0]
    assert together == by_schedule(12)


def test_uneven_parts():
    with pytest.raises(ValueError, match="global_batch: expected a multiple of 5 ranks"):
        mixture(rank=0, world=5)
    parts = [taken(mixture(rank=rank, world=5, uneven=True).loader(), 1)[0][2] for rank in range(5)]
    assert [len(part) for part in parts] == [3, 3, 2, 2, 2]
    assert sorted(sample for part in parts for sample in part) == sorted(by_schedule(1)[0][2])


def test_early_switches_are_refused():
    mixed = mixture()
    loader = mixed.loader(num_workers=2, prefetch_factor=3, multiprocessing_context="fork")
    taken(loader, 4)
    with pytest.raises(ValueError, match=r"at: expected batch 10 or a later one, got 9: 6 batches are under way"):
        mixed.switch([1, 1, 1], 3, at=9)
    with pytest.raises(ValueError, match="after_batch: expected 3 at least, got 2"):
        mixed.switch([1, 1, 1], 2)
    assert mixed.switch({"prose": 1, "maths": 1, "code": 0}, 3, at=12, global_batch=24) == 12
    assert mixed.schedule.current.weights[0] == 0
    with pytest.raises(ValueError, match="weights: expected one of each of"):
        mixed.switch({"prose": 1}, 3)


def test_accelerate_looks_one_batch_ahead():
    mixed = mixture(lookahead=1)
    batches = iter(mixed.loader())
    ahead = [next(batches), next(batches)]
    assert mixed.switch([0, 0, 1], ahead[0].number) == 2
    assert next(batches).version == 1


def test_a_batch_of_other_weights_stops_the_run():
    mixed = mixture()
    batches = iter(mixed.loader())
    batch = next(batches)
    with pytest.raises(RuntimeError, match="batch: expected number 1 of version 0, got 0 of version 0"):
        mixed.received(batch)
    plain = mixture()
    other = next(iter(mixture([1, 1, 1]).loader()))
    plain.schedule.advance()
    with pytest.raises(RuntimeError, match="of version 0, got 0 of version 5"):
        plain.received(other._replace(version=5))


def test_iterations_that_were_left_do_not_go_on():
    mixed = mixture()
    for style in ("map", "iterable"):
        loader = mixed.loader(style=style)
        old = iter(loader)
        next(old)
        next(iter(loader))
        with pytest.raises(RuntimeError, match="this iteration has ended"):
            next(old)


@pytest.mark.parametrize("style", ["map", "iterable"])
def test_the_end_of_a_cap_is_the_end_of_the_loader(style):
    mixed = mixture(cap=1, on_cap="stop")
    loader = mixed.loader(style=style, num_workers=2, multiprocessing_context="fork")
    assert [number for number, *_ in taken(loader, 99)] == list(range(6))  # 6.67 batches hold 40 of code


def test_plain_dataloaders_of_torch():
    mixed = mixture()
    keyed = MixedDataset(list(mixed.datasets.values()))
    loader = DataLoader(keyed, batch_sampler=mixed.batch_sampler(), collate_fn=CollateMixture())
    assert taken(loader, 4) == by_schedule(4)
    mixed = mixture()
    loader = DataLoader(mixed.iterable(read_ahead=4), batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert mixed.lag == 4
    assert taken(loader, 6, [(0, [0, 0, 1], 5)], mixed) == by_schedule(6, [([0, 0, 1], 5)])
    assert mixed.state_dict(at_batch=5)["schedule"]["batch"] == 6
    with pytest.raises(ValueError, match="at_batch: expected the last batch trained on"):
        mixed.state_dict()


def test_room_for_changes_is_bounded_and_said():
    mixed = mixture()
    mixed.iterable(switches=2)
    mixed.switch([1, 0, 0], 0)
    mixed.switch([0, 1, 0], 0, lengths=[1, 2, 3])
    with pytest.raises(ValueError, match="switches: expected at most 2 in one iterable"):
        mixed.switch([0, 0, 1], 0)
    assert [request.lengths for request in mixed.shared.read(0)] == [None, (1.0, 2.0, 3.0)]
    assert [request.weights for request in mixed.shared.read(1)] == [mixed.schedule.current.weights]


def test_a_controller_gives_weights_and_is_attached():
    class Fixed:
        weights = np.array([0.2, 0.2, 0.6])

        def attach(self, mixture):
            self.mixture = mixture

    controller = Fixed()
    mixed = mixture(controller)
    assert controller.mixture is mixed
    assert mixed.schedule.current.weights == mixture([0.2, 0.2, 0.6]).schedule.current.weights


@pytest.mark.parametrize("style", ["map", "iterable"])
def test_a_replay_is_loaded_like_a_run(style):
    mixed = mixture()
    loader = mixed.loader()
    found = taken(loader, 6, [(1, [0, 0, 1], 2), (3, [0.5, 0.5, 0], 4)], mixed)
    again = replay(mixed.state_dict()["schedule"], "reversed")
    more = mixture(again.schedule, None).loader(style=style, num_workers=1, multiprocessing_context="fork")
    replayed = taken(more, again.batches)
    assert samples_of(replayed) == samples_of(found)
    assert replayed != found


def test_a_mixture_pickles_without_its_sorted_orders():
    mixed = mixture()
    expected = taken(mixed.loader(), 2)
    mixed.begin()
    again = pickle.loads(pickle.dumps(mixed))
    assert again.schedule._draws._orders == {}
    assert taken(again.loader(), 1)[0][2] == by_schedule(3)[2][2] != expected[0][2]


def test_changed_contents_are_refused():
    state = mixture(hashed="one").state_dict()
    mixture().load_state_dict(state)  # not known here: sizes are all that is compared
    with pytest.raises(ValueError, match="state: expected the contents of 'code' to be as saved, one, got two"):
        mixture(hashed="two").load_state_dict(state)


def test_what_cannot_be_loaded_is_named():
    class Stream(IterableDataset):
        def __iter__(self):
            yield 0

    with pytest.raises(TypeError, match=r"expected map-style ones, .* got Stream for 'a'"):
        DynamicMixture({"a": Stream()}, [1], 2)
    with pytest.raises(ValueError, match="rank: expected 0 <= rank < world"):
        mixture(rank=2, world=2)
    with pytest.raises(ValueError, match=r"options: expected none that the mixture decides, got \['shuffle'\]"):
        mixture().loader(shuffle=True)
    with pytest.raises(ValueError, match="style: expected"):
        mixture().loader(style="other")
    with pytest.raises(ValueError, match="weights, global_batch: expected a schedule of"):
        mixture(Schedule({"a": 3}, [1], 2), None)


def test_token_files(tmp_path):
    path = tmp_path / "tokens.bin"
    np.arange(23, dtype=np.uint16).tofile(path)
    rows = TokenFile(path, 5)
    assert len(rows) == 4
    assert rows[3].tolist() == [15, 16, 17, 18, 19]
    assert rows[3].dtype == torch.int64
    shifted = TokenFile(path, 5, stride=4)
    assert [shifted[i].tolist()[0] for i in range(len(shifted))] == [0, 4, 8, 12, 16]
    assert pickle.loads(pickle.dumps(rows))[0].tolist() == [0, 1, 2, 3, 4]
    known = rows.fingerprint
    np.arange(1, 24, dtype=np.uint16).tofile(path)
    assert TokenFile(path, 5).fingerprint != known
    with pytest.raises(IndexError, match="row: expected 0 to 3, got 4"):
        rows[4]
    for options, error, message in [
        ({"length": 24}, ValueError, "at least one row of 24 tokens, got 23"),
        ({"length": 5, "dtype": "uint32"}, ValueError, "whole uint32 numbers, got 46 bytes"),
        ({"length": 5, "dtype": "float32"}, TypeError, "a type of integers, got float32"),
        ({"length": 0}, ValueError, "at least 1, got 0"),
    ]:
        with pytest.raises(error, match=message):
            TokenFile(path, **options)


def test_batches_of_datasets_that_read_together_are_asked_for_at_once():
    class Together(Rows):
        asked = ()

        def __getitems__(self, samples):
            Together.asked += (len(samples),)
            return [self[i] for i in samples]

    mixed = DynamicMixture({"a": Together(0, 50), "b": Rows(1, 50)}, [0.5, 0.5], 8)
    taken(mixed.loader(), 2)
    assert Together.asked == (4, 4)


def test_data_sets_of_hugging_face_are_read_by_batches():
    datasets = pytest.importorskip("datasets")

    def rows(k, size):
        numbers = [[1000 * k + i] * 4 for i in range(size)]
        return datasets.Dataset.from_dict({"input_ids": numbers}).with_format("torch")

    given = {name: rows(k, size) for k, (name, size) in enumerate(SIZES.items())}
    for workers in (0, 2):
        mixed = DynamicMixture(given, WEIGHTS, 12)
        batches = [
            batch._replace(data=batch.data["input_ids"])
            for _, batch in zip(range(6), mixed.loader(num_workers=workers), strict=False)
        ]
        assert taken(batches, 6) == by_schedule(6)
