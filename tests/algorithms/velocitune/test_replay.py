"""Replays hold the same samples in another order; intervals say what three seeds can show."""

import json
from collections import Counter

import numpy as np
import pytest

from ghostgram.algorithms.velocitune.replay import compare_orders, replay, stages
from ghostgram.algorithms.velocitune.sampler import Schedule

SIZES = {"code": 40, "prose": 25, "maths": 90}


def drawn(schedule, batches):
    found = []
    for _ in range(batches):
        slots = schedule.advance()
        found.append(list(zip(slots.domains.tolist(), schedule.samples(slots).tolist(), strict=True)))
    return found


def finished(quotas="deadline", **options):
    """A run of 60 batches: weights change every seventh batch and once the size of batches, a domain is capped."""
    rng = np.random.default_rng(0)
    schedule = Schedule(SIZES, [0.5, 0.3, 0.2], 12, seed=3, quotas=quotas, **options)
    for first in range(7, 60, 7):
        schedule.switch(rng.dirichlet(np.ones(3)), first, batch=9 if first == 35 else None)
    samples = drawn(schedule, 60)
    return samples, json.loads(json.dumps(schedule.state_dict()))


def counted(batches):
    return Counter(sample for batch in batches for sample in batch)


@pytest.mark.parametrize("quotas", ["deadline", "multinomial"])
def test_exact_is_the_run(quotas):
    samples, run = finished(quotas)
    again = replay(run, "exact")
    assert again.batches == 60
    assert drawn(*again) == samples


@pytest.mark.parametrize("quotas", ["deadline", "multinomial"])
@pytest.mark.parametrize("kind", ["shuffled", "reversed"])
def test_other_orders_hold_the_same_samples(kind, quotas):
    samples, run = finished(quotas)
    other = drawn(*replay(run, kind))
    assert counted(other) == counted(samples)
    assert other != samples
    if kind == "reversed":
        assert [version["weights"] for version in run["history"]][::-1] == [
            list(version.weights) for version in replay_history(run, kind)
        ]


def replay_history(run, kind, **options):
    again = replay(run, kind, **options)
    drawn(*again)
    return again.schedule.history


def test_shuffles_differ_by_seed_and_are_never_the_run():
    _, run = finished()
    orders = {tuple(v.reason for v in replay_history(run, "shuffled", seed=seed)) for seed in range(4)}
    assert len(orders) == 4
    schedule = Schedule(SIZES, [1, 0, 0], 4)
    schedule.switch([0, 1, 0], 2)
    drawn(schedule, 5)
    for seed in range(8):  # two segments have one other order
        reasons = [v.reason for v in replay_history(schedule.state_dict(), "shuffled", seed=seed)]
        assert reasons == ["replay of version 1", "replay of version 0"]


def test_a_run_under_a_cap_is_replayed_without_one():
    with pytest.warns(UserWarning, match="(prose|code) for more than 5 epochs"):
        samples, run = finished(cap=5)
    assert any("epochs of prose" in version["reason"] for version in run["history"])
    assert drawn(*replay(run, "exact")) == samples
    assert counted(drawn(*replay(run, "reversed"))) == counted(samples)


def test_constant_weights():
    samples, run = finished()
    average, final = replay(run, "average"), replay(run, "final")
    by_average = counted(drawn(*average))
    per_domain = np.zeros((2, 3), int)
    for row, found in enumerate((by_average, counted(samples))):
        for (k, _), times in found.items():
            per_domain[row, k] += times
    assert abs(per_domain[0] - per_domain[1]).max() <= 1
    drawn(*final)
    assert {tuple(v.weights) for v in final.schedule.history} == {tuple(run["history"][-1]["weights"])}
    assert [v.batch for v in average.schedule.history] == [version["batch"] for version in run["history"]]


@pytest.mark.parametrize("batches", [30, 150])
def test_stretched(batches):
    _, run = finished()
    again = replay(run, "stretched", batches=batches)
    drawn(*again)
    assert again.batches == batches
    assert [v.weights for v in again.schedule.history] == [tuple(version["weights"]) for version in run["history"]]
    assert [v.first for v in again.schedule.history] == [v["first"] * batches // 60 for v in run["history"]]


def test_stages_add_up():
    samples, run = finished()
    found = json.loads(json.dumps(stages(run)))
    assert sum(stage["sequences"] for stage in found) == sum(map(len, samples))
    assert found[5]["first_sequence"] == 35 * 12
    assert found[6]["first_sequence"] == 35 * 12 + 7 * 9
    assert found[0]["weights"] == pytest.approx({"code": 0.5, "prose": 0.3, "maths": 0.2}, abs=1e-9)


def test_what_cannot_be_replayed_is_named():
    _, run = finished()
    with pytest.raises(ValueError, match="kind: expected one of"):
        replay(run, "backwards")
    with pytest.raises(ValueError, match="batches: expected a number for 'stretched'"):
        replay(run, "stretched")
    with pytest.raises(ValueError, match="batches: expected a number for 'stretched'"):
        replay(run, "exact", batches=3)
    schedule = Schedule(SIZES, [1, 1, 1], 12)
    with pytest.raises(ValueError, match="run: expected at least one batch"):
        replay(schedule.state_dict(), "exact")
    schedule.advance()
    with pytest.raises(ValueError, match="run: expected at least two segments to be reversed"):
        replay(schedule.state_dict(), "reversed")


def test_differences_that_chance_explains_are_not_told_apart():
    """Of 400 comparisons of arms that are alike, 3 and 8 runs each, no more than the level allows are called one."""
    rng, names = np.random.default_rng(0), [f"d{k}" for k in range(50)]
    for runs, most in ((3, 0), (8, 0.08)):
        called, bare = [], []
        for trial in range(8):
            ours, theirs = rng.normal(size=(2, runs, 50))
            found = compare_orders(names, ours, theirs, seed=trial)
            called += [difference.verdict != "not distinguishable" for difference in found]
            bare += [not difference.low <= 0 <= difference.high for difference in found]
        assert np.mean(called) <= most
        if runs == 3:
            assert np.mean(bare) > 0.15  # why the bootstrap is not asked alone


def test_differences_that_are_there_are_found():
    rng = np.random.default_rng(1)
    theirs = rng.normal(2, 0.3, (8, 2))
    ours = theirs + np.array([-0.1, 0.1]) + rng.normal(0, 0.02, (8, 2))
    lower, higher = compare_orders(["a", "b"], ours, theirs)
    assert (lower.verdict, higher.verdict) == ("lower", "higher")
    assert lower.low < -0.1 + 0.03
    assert lower.low <= lower.mean <= lower.high < 0
    assert lower.p == 2 / 2**8
    many = compare_orders(["a", "b"], np.tile(ours, (3, 1)), np.tile(theirs, (3, 1)))
    assert many[0].verdict == "lower"
    with pytest.raises(ValueError, match="expected at least three runs of 2 domains"):
        compare_orders(["a", "b"], ours[:2], theirs[:2])
