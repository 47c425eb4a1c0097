"""The difficulty schedule: published numbers, ragged classes, exact shares, and what is left of whom."""

import itertools
import math

import numpy as np
import pytest

from ghostgram.algorithms.pad.schedule import PRESETS, DifficultySchedule
from ghostgram.algorithms.pad.scores import Scores

DIGITS = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def scores_of(sizes, seed=0):
    generator = np.random.default_rng(seed)
    labels = generator.permutation(np.repeat(np.arange(len(sizes)), sizes))
    return Scores(generator.normal(size=len(labels)), labels, {})


def kept(schedule, epochs):
    found = [schedule.kept(epoch) for epoch in epochs]
    assert all(len(set(counts.tolist())) == 1 for counts in found)
    return [int(counts[0]) for counts in found]


def test_cifar10_has_the_published_numbers():
    schedule = DifficultySchedule.preset("pad-cifar10", scores_of([5000] * 3))
    expected = [3750, 3812, 4062, 4187, 4375, 4562, 4937, 5000]
    assert kept(schedule, [0, 1, 5, 7, 10, 13, 19, 20]) == expected
    assert kept(schedule, range(21, 41)) == [5000] * 20
    assert kept(schedule, range(41, 61)) == [4500] * 20
    assert kept(schedule, [61, 80, 99, 5000]) == [4000] * 4


@pytest.mark.parametrize("name", ["pad-cifar100", "pad-tiny"])
def test_a_class_of_500_follows_the_curve_too(name):
    """Public code took 5000 for the size of every class: then the curve did nothing, and a removal left nothing."""
    schedule = DifficultySchedule.preset(name, scores_of([500] * 4))
    assert kept(schedule, [0, 1, 10, 13, 20, 39, 40]) == [375, 378, 406, 415, 437, 496, 500]
    assert kept(schedule, [60, 61, 80, 81]) == [500, 450, 450, 400]


def test_ragged_classes_have_their_own_numbers():
    schedule = DifficultySchedule(scores_of(DIGITS), 0.75, 3, [(5, 0.1)])
    assert schedule.kept(0).tolist() == [133, 136, 132, 137, 135, 136, 135, 134, 130, 135]
    assert schedule.kept(0).sum() == 1343
    assert (np.array(DIGITS) - schedule.kept(6)).tolist() == [17, 18, 17, 18, 18, 18, 18, 17, 17, 18]
    assert schedule.kept(3).tolist() == schedule.kept(5).tolist() == DIGITS
    assert schedule.share(0) == 1343 / 1797


def test_an_epoch_has_the_easy_ones_first_and_at_last_not_the_easiest():
    scores = scores_of([40, 60, 25])
    schedule = DifficultySchedule(scores, 0.5, 4, [(5, 0.2), (7, 0.5)])
    for epoch in range(10):
        indices = schedule.indices(epoch)
        assert (np.diff(indices) > 0).all()
        for c in range(3):
            order = scores.order(c)
            first = {6: 0.2, 7: 0.2}.get(epoch, 0.5 if epoch > 7 else 0)
            last = min(1, 0.5 + 0.125 * epoch)
            own = order[math.floor(first * len(order)) : math.floor(last * len(order))]
            assert set(indices[scores.labels[indices] == c]) == set(own)
    before = [set(schedule.indices(epoch)) for epoch in range(5)]
    assert all(a < b for a, b in itertools.pairwise(before))


def test_shares_are_taken_as_written():
    """.575 of 6000 is 3450; in floats it is a little less."""
    scores = scores_of([6000])
    for ratio in (0.5, ".5", "1/2"):
        assert kept(DifficultySchedule(scores, ratio, 20), [3]) == [3450]
    assert kept(DifficultySchedule(scores, 0.5, 20, exact=False), [3]) == [3449]
    assert kept(DifficultySchedule(scores_of([10]), 1, 0, [(0, 0.7)]), [1]) == [3]
    for sizes in ([500], [5000], [6000]):
        for ratio in (0.75, 0.8):
            exact, floats = (DifficultySchedule(scores_of(sizes), ratio, 40, exact=e) for e in (True, False))
            assert kept(exact, range(41)) == kept(floats, range(41))


@pytest.mark.parametrize(
    ("curve", "p"),
    [
        ("linear", lambda a, x: a + (1 - a) * x),
        ("root", lambda a, x: math.sqrt(a**2 + (1 - a**2) * x)),
        ("geometric", lambda a, x: 2 ** (math.log2(a) * (1 - x))),
    ],
)
def test_curves_run_from_the_first_share_to_all(curve, p):
    n, end = 99991, 30
    for exact in (True, False):
        schedule = DifficultySchedule(scores_of([n]), 0.3, end, curve=curve, exact=exact)
        found = kept(schedule, range(end + 1))
        expected = [p(0.3, epoch / end) * n for epoch in range(end + 1)]
        assert all(abs(k + 0.5 - x) <= 0.5 + 1e-6 for k, x in zip(found[:-1], expected, strict=False))
        assert found[0] == 29997
        assert found[-1] == n
    # Where p n is a whole number, a float may be on either side of it.
    quarter = DifficultySchedule(scores_of([1000]), 0.25, 2, curve="geometric")
    assert kept(quarter, [0, 1, 2]) == [250, 500, 1000]
    assert kept(DifficultySchedule(scores_of([1000]), 0.6, 16, curve="root"), [7]) == [800]


def test_without_a_schedule_everything_is_in():
    schedule = DifficultySchedule.preset("none", scores_of(DIGITS))
    assert schedule.indices(0).tolist() == schedule.indices(99).tolist() == list(range(1797))
    assert set(PRESETS) == {"pad-cifar10", "pad-cifar100", "pad-tiny", "none"}


def test_an_empty_class_is_named_with_its_epoch():
    with pytest.raises(ValueError, match="class 1 has none of its 3 images left in epoch 0"):
        DifficultySchedule(scores_of([50, 3]), 0.3, 5)
    with pytest.raises(ValueError, match="class 0 has none of its 50 images left in epoch 9"):
        DifficultySchedule(scores_of([50, 3]), 0.5, 5, [(8, 1)])


def test_what_is_wrong_is_named():
    scores = scores_of([50, 30])
    for ratio in (0, 1.1, -1):
        with pytest.raises(ValueError, match="init_ratio: expected above 0 and at most 1"):
            DifficultySchedule(scores, ratio, 5)
    with pytest.raises(ValueError, match="add_end: expected at least 0, got -1"):
        DifficultySchedule(scores, 0.5, -1)
    for removals in ([(4, 0.1)], [(6, 0.1), (6, 0.2)], [(9, 0.1), (7, 0.2)]):
        with pytest.raises(ValueError, match="removals: expected rising epochs from add_end 5 on"):
            DifficultySchedule(scores, 0.5, 5, removals)
    with pytest.raises(ValueError, match="removals: expected ratios from 0 to 1"):
        DifficultySchedule(scores, 0.5, 5, [(6, 1.5)])
    with pytest.raises(ValueError, match="curve: expected one of linear, root, geometric, got 'cosine'"):
        DifficultySchedule(scores, 0.5, 5, curve="cosine")
    with pytest.raises(ValueError, match="name: expected one of pad-cifar10"):
        DifficultySchedule.preset("pad-imagenet", scores)
    with pytest.raises(ValueError, match="epoch: expected at least 0, got -1"):
        DifficultySchedule(scores, 0.5, 5).indices(-1)


def test_the_digest_is_of_all_that_decides():
    scores = scores_of([50, 30])
    same = DifficultySchedule(scores, 0.5, 5, [(6, 0.1)]).digest
    assert DifficultySchedule(scores, "1/2", 5, [(6, ".1")]).digest == same
    monotone = Scores(scores.values * 2 + 1, scores.labels, {})
    assert DifficultySchedule(monotone, 0.5, 5, [(6, 0.1)]).digest == same
    others = [
        DifficultySchedule(scores_of([50, 30], 1), 0.5, 5, [(6, 0.1)]),
        DifficultySchedule(scores, 0.6, 5, [(6, 0.1)]),
        DifficultySchedule(scores, 0.5, 5, [(6, 0.2)]),
        DifficultySchedule(scores, 0.5, 5, [(6, 0.1)], curve="root"),
    ]
    assert len({same, *(other.digest for other in others)}) == 5


def test_it_draws_what_it_keeps():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    axes = figure.subplots()
    schedule = DifficultySchedule(scores_of(DIGITS), 0.75, 3, [(5, 0.1)])
    schedule.plot(axes, 8)
    (line,) = axes.lines
    assert line.get_ydata().tolist() == [schedule.share(epoch) for epoch in range(8)]
