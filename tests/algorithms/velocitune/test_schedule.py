"""Batches are a function of seed, sizes and weights: no repeat inside an epoch, exact resume, any ranks."""

import json
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest

from ghostgram.algorithms.velocitune.sampler import Schedule
from ghostgram.algorithms.velocitune.state import with_domain
from ghostgram.algorithms.velocitune.versions import Exhausted

SIZES = {"code": 40, "prose": 25, "maths": 90}


def ids(schedule, batches):
    """(batch, version, domain, sample) of everything drawn, in order."""
    found = []
    for _ in range(batches):
        slots = schedule.advance()
        each = zip(slots.domains.tolist(), schedule.samples(slots).tolist(), strict=True)
        found += [(slots.number, slots.version, *pair) for pair in each]
    return found


def samples_of(drawn, k):
    return [sample for *_, domain, sample in drawn if domain == k]


def switching(batches, every, seed=0, **options):
    """A schedule whose weights change every so many batches, asked for three batches before."""
    rng = np.random.default_rng(seed)
    schedule = Schedule(SIZES, [0.5, 0.3, 0.2], 12, **options)
    for b in range(batches):
        if b % every == 0:
            schedule.switch(rng.dirichlet(np.ones(3)), b + 3)
        yield schedule


def test_no_repeat_inside_an_epoch_whatever_the_weights_do():
    """20 changes of weights; in every domain, each sample once in every run of n_k draws."""
    drawn = []
    for schedule in switching(100, 5):
        drawn += ids(schedule, 1)
    assert len(schedule.history) == 20 + 1
    for k, size in enumerate(SIZES.values()):
        of_k = samples_of(drawn, k)
        assert len(of_k) > 3 * size
        epochs = [of_k[start : start + size] for start in range(0, len(of_k), size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs[:-1])
        assert len(set(epochs[-1])) == len(epochs[-1])
        assert epochs[0] != epochs[1]
        times = np.bincount(of_k, minlength=size)
        assert times.min() == len(of_k) // size
        assert times.max() == -(-len(of_k) // size)


@pytest.mark.parametrize("quotas", ["deadline", "multinomial"])
@pytest.mark.parametrize("at", [-1, 3, 16, 17, 18, 29])
def test_resume_is_exact(at, quotas):
    """Saved mid-epoch, mid-version and with weights asked for that do not govern yet, through JSON."""
    whole = Schedule(SIZES, [0.5, 0.3, 0.2], 12, seed=4, quotas=quotas, cap=4, keep=40)
    first = Schedule(SIZES, [0.5, 0.3, 0.2], 12, seed=4, quotas=quotas, cap=4, keep=40)
    for each in (whole, first):
        each.switch([0.1, 0.1, 0.8], 5)
        each.switch([0.0, 0.9, 0.1], 18, batch=9)
    with pytest.warns(UserWarning, match="would draw from prose for more than 4 epochs"):
        expected = ids(whole, 40)
    with pytest.warns(UserWarning, match="would draw from prose for more than 4 epochs"):
        drawn = ids(first, 30)  # read ahead of `at`, as loaders do
    saved = json.loads(json.dumps(first.state_dict(at)))
    second = Schedule(SIZES, [1, 0, 0], 1, seed=4, quotas=quotas, cap=4, keep=40)
    second.load_state_dict(saved)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = ids(second, 40 - second.next)
    assert [each for each in drawn if each[0] <= at] + again == expected
    assert second.history == whole.history
    assert second.state_dict() == whole.state_dict()


def test_a_zero_weight_may_come_back():
    schedule = Schedule(SIZES, [0.5, 0.0, 0.5], 10)
    drawn = ids(schedule, 4)
    assert samples_of(drawn, 1) == []
    schedule.switch([0.2, 0.6, 0.2], 4)
    drawn += ids(schedule, 5)
    assert len(samples_of(drawn, 1)) == 30
    assert sorted(samples_of(drawn, 1)[:25]) == list(range(25))


def test_the_cap_masks_a_domain_for_good():
    """No batch passes it; later weights that name the domain leave it out; the others keep their proportions."""
    schedule = Schedule(SIZES, [0.2, 0.6, 0.2], 12, cap=2)
    schedule.switch([0.25, 0.5, 0.25], 12)
    with pytest.warns(UserWarning, match="prose for more than 2 epochs: they have weight 0"):
        drawn = ids(schedule, 14)
    of_prose = samples_of(drawn, 1)
    assert 50 - 12 < len(of_prose) <= 50
    assert np.bincount(of_prose).max() <= 2
    forced, later = schedule.history[1:]
    assert (forced.first, forced.reason) == (7, "2 epochs of prose")
    assert forced.shares.tolist() == [0.5, 0, 0.5]
    assert later.shares.tolist() == [0.5, 0, 0.5]
    with pytest.warns(UserWarning, match="code|maths"), pytest.raises(Exhausted, match="every domain with weight"):
        ids(schedule, 30)


def test_other_ends_of_a_cap():
    stop, error, repeat = (Schedule(SIZES, [0, 1, 0], 10, cap=1, on_cap=how) for how in ("stop", "error", "repeat"))
    assert len(ids(stop, 2)) == 20
    for _ in range(2):  # asked again it says the same: nothing has moved
        with pytest.raises(Exhausted, match="batch 2 would draw from prose for more than 1 epochs"):
            stop.advance()
    ids(error, 2)
    with pytest.raises(ValueError, match="batch 2 would draw from prose"):
        error.advance()
    with pytest.warns(UserWarning, match="prose for more than 1 epochs: they go on") as said:
        ids(repeat, 8)
    assert len(said) == 1
    assert len(repeat.history) == 1


def test_a_cap_of_a_part_of_an_epoch():
    schedule = Schedule({"a": 10, "b": 100}, [0.5, 0.5], 2, cap=0.7)
    with pytest.warns(UserWarning, match="a for more than 0.7"):
        drawn = ids(schedule, 20)
    assert len(samples_of(drawn, 0)) == 7


def test_quotas_of_batches_follow_weights_within_a_draw():
    schedule = Schedule(SIZES, [0.5, 0.3, 0.2], 7)
    total = np.zeros(3)
    for b in range(30):
        total += np.bincount(schedule.advance().domains, minlength=3)
        assert np.abs(total - 7 * (b + 1) * np.array([0.5, 0.3, 0.2])).max() <= 0.75
    assert schedule.cursors.tolist() == total.tolist()


def test_the_order_inside_a_batch_is_shuffled():
    """Deadlines alone would put the heaviest domain first in every batch."""
    schedule = Schedule(SIZES, [0.5, 0.3, 0.2], 10)
    firsts = np.bincount([schedule.advance().domains[0] for _ in range(400)], minlength=3)
    assert np.abs(firsts - 400 * np.array([0.5, 0.3, 0.2])).max() < 4 * 10


@pytest.mark.parametrize("worlds", [(1, 2, 4, 3), (12, 6)])
def test_the_number_of_ranks_may_change_at_any_batch(worlds):
    """Taking turns, the ranks of every batch hold it whole and in order; ids do not know how many there are."""
    expected, schedule = ids(Schedule(SIZES, [0.5, 0.3, 0.2], 12), 8), Schedule(SIZES, [0.5, 0.3, 0.2], 12)
    together = []
    for b in range(8):
        world, slots = worlds[b * len(worlds) // 8], schedule.advance()
        parts = [slots.part(rank, world) for rank in range(world)]
        of_ranks = [list(zip(p.domains.tolist(), schedule.samples(p).tolist(), strict=True)) for p in parts]
        together += [(b, 0, *of_ranks[i % world][i // world]) for i in range(12)]
    assert together == expected


def test_state_of_a_thousand_million_samples_is_small():
    schedule = Schedule({f"domain {k}": 10**8 for k in range(10)}, np.ones(10), 512)
    drawn = ids(schedule, 3)
    assert len(set(drawn)) == 3 * 512
    assert len(json.dumps(schedule.state_dict())) < 4096


def test_weights_of_tokens_and_of_sequences():
    schedule = Schedule(SIZES, [0.5, 0.25, 0.25], 12, lengths=[100, 200, 50])
    schedule.advance()
    version = schedule.history[0]
    assert version.shares == pytest.approx([4 / 9, 1 / 9, 4 / 9], abs=1e-9)
    assert version.token_shares == pytest.approx([0.5, 0.25, 0.25], abs=1e-8)
    schedule.switch([0.5, 0.25, 0.25], 1, lengths=[1, 1, 1])
    schedule.advance()
    assert schedule.history[1].shares.tolist() == [0.5, 0.25, 0.25]


def test_a_copy_goes_on_by_itself():
    schedule = Schedule(SIZES, [0.5, 0.3, 0.2], 12, keep=6)
    ids(schedule, 5)
    copy = schedule.copy(2)
    assert copy.next == 3
    assert ids(copy, 6)[24:] == ids(schedule, 4)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="weights: expected one of each of 3 domains"):
        Schedule(SIZES, [0.5, 0.5], 12)
    with pytest.raises(ValueError, match="weights: expected 0 for 'b', which is empty"):
        Schedule({"a": 3, "b": 0}, [0.5, 0.5], 12)
    with pytest.raises(ValueError, match="quotas: expected one of"):
        Schedule(SIZES, [1, 1, 1], 12, quotas="random")
    with pytest.raises(ValueError, match="cap: expected a number of epochs > 0"):
        Schedule(SIZES, [1, 1, 1], 12, cap=0)
    with pytest.raises(ValueError, match="batch: expected at least one"):
        Schedule(SIZES, [1, 1, 1], 0)
    schedule = Schedule(SIZES, [1, 1, 1], 12)
    ids(schedule, 5)
    with pytest.raises(ValueError, match="first: expected batch 5 or a later one, got 4"):
        schedule.switch([1, 1, 1], 4)
    schedule.switch([1, 2, 1], 9)
    with pytest.raises(ValueError, match="first: expected batch 9 or a later one, got 7"):
        schedule.switch([1, 1, 1], 7)
    with pytest.raises(ValueError, match="at_batch: expected 2 to 4, got 1"):
        schedule.state_dict(1)
    with pytest.raises(ValueError, match="domain 'a' is a stream"):
        stream = Schedule({"a": None}, [1], 3)
        stream.samples(stream.advance())


@pytest.mark.parametrize(
    ("sizes", "options", "names"),
    [
        ({"prose": 25, "code": 40, "maths": 90}, {}, "domains"),
        ({**SIZES, "more": 3}, {}, "domains"),
        ({**SIZES, "prose": 26}, {}, "sizes"),
        (SIZES, {"seed": 1}, "seed"),
        (SIZES, {"quotas": "multinomial"}, "quotas"),
    ],
)
def test_a_state_of_another_run_is_refused(sizes, options, names):
    state = Schedule(SIZES, [1, 1, 1], 12).state_dict()
    with pytest.raises(ValueError, match=f"state: expected {names}"):
        Schedule(sizes, np.ones(len(sizes)), 12, **options).load_state_dict(state)


def test_a_domain_that_is_added_changes_nothing_before_it_has_weight():
    schedule = Schedule(SIZES, [0.5, 0.3, 0.2], 12, lengths=[1, 2, 1], keep=9)
    schedule.switch([0.2, 0.2, 0.6], 7)
    expected = ids(schedule, 9)
    longer = Schedule({**SIZES, "more": 30}, np.ones(4), 12)
    longer.load_state_dict(json.loads(json.dumps(with_domain(schedule.state_dict(3), "more", 30))))
    assert ids(longer, 5) == expected[48:]
    longer.switch([0.2, 0.2, 0.1, 0.5], 9)
    assert len(samples_of(ids(longer, 2), 3)) in (13, 14)  # of 24, .5 of tokens are .556 of sequences
    assert longer.history[-1].lengths == (1, 2, 1, 1)
    with pytest.raises(ValueError, match="name: expected one that is not in"):
        with_domain(schedule.state_dict(), "code", 3)


# What public loaders get wrong


def test_resume_does_not_skip_by_the_first_weights():
    """DoReMi's loader passes over as many samples of a domain as its initial weights would have drawn."""
    schedule = Schedule(SIZES, [0.5, 0.3, 0.2], 10, keep=9)
    schedule.switch([0.0, 0.1, 0.9], 2)
    expected = ids(schedule, 8)
    again = Schedule(SIZES, [0.5, 0.3, 0.2], 10)
    again.load_state_dict(schedule.state_dict(5))
    assert again.cursors.tolist() == [10, 10, 40]
    assert not np.allclose(again.cursors, 60 * np.array([0.5, 0.3, 0.2]))
    assert ids(again, 2) == expected[60:]


def test_weights_that_change_on_resume_lose_and_repeat_nothing():
    """Blends of fixed weights start their index anew: samples are lost or seen twice."""
    schedule = Schedule(SIZES, [0.5, 0.3, 0.2], 12)
    drawn = ids(schedule, 3)
    again = Schedule(SIZES, [1, 1, 1], 12)
    again.load_state_dict(schedule.state_dict())
    again.switch([0.1, 0.2, 0.7], again.next)
    drawn += ids(again, 6)
    for k, size in enumerate(SIZES.values()):
        of_k = samples_of(drawn, k)
        assert len(set(of_k[:size])) == min(len(of_k), size)


def test_other_processes_draw_the_same():
    """Loaders that draw domains from an unseeded generator differ between runs. And torch is not needed."""
    script = (
        "from ghostgram.algorithms.velocitune import ledger, replay; import sys; assert 'torch' not in sys.modules\n"
        "from ghostgram.algorithms.velocitune.sampler import Schedule; import hashlib\n"
        "s = Schedule({'a': 40, 'b': 25}, [.3, .7], 8, quotas='multinomial')\n"
        "x = [s.advance() for _ in range(20)]\n"
        "print(hashlib.sha256(b''.join(each.domains.tobytes() + s.samples(each).tobytes() for each in x)).hexdigest())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", script], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1
