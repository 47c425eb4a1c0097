"""Rank statistics against definitions written out, and intervals that cover what they claim to."""

import numpy as np
import pytest

from ghostgram.algorithms.mates.stats import bootstrap_interval, pearson, resample, spearman, top_overlap


def average_ranks(values):
    return [sum(v < w for v in values) + (sum(v == w for v in values) + 1) / 2 for w in values]


def test_spearman_gives_equal_values_their_average_rank():
    generator = np.random.default_rng(0)
    for _ in range(20):
        x, y = generator.integers(0, 6, (2, 17)).astype(float)
        assert spearman(x, y) == pytest.approx(np.corrcoef(average_ranks(x), average_ranks(y))[0, 1], abs=1e-14)
    assert spearman([1, 2, 2, 3], [1, 2, 2, 30]) == 1
    assert spearman([1, 2, 3], [3, 2, 1]) == -1
    assert np.isnan(spearman([1, 1, 1], [1, 2, 3]))


def test_pearson_is_the_linear_correlation_however_large_the_offset():
    x, y = np.random.default_rng(1).normal(size=(2, 50))
    assert pearson(x + 1e6, x + y) == pytest.approx(np.corrcoef(x, x + y)[0, 1], abs=1e-9)
    assert pearson(1e-200 * x, 1e200 * y) == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-14)
    assert np.isnan(pearson([0.1, 0.1, 0.1], [0.0, 1.0, 3.0]))


def test_overlap_counts_the_top_they_share():
    y = np.arange(10.0)
    assert top_overlap(y, y) == 1
    assert top_overlap(-y, y) == 0
    x = y.copy()
    x[[0, 9]] = x[[9, 0]]
    assert top_overlap(x, y) == 0.5
    assert top_overlap(x, y, 0.01) == 0


@pytest.mark.parametrize(
    ("x", "y", "says"),
    [
        ([1.0, 2.0], [1.0], "equal length"),
        ([[1.0]], [[1.0]], "one axis"),
        ([1.0, np.nan], [1.0, 2.0], "x: expected finite values, got nan"),
        ([1.0, 2.0], [1.0, np.inf], "y: expected finite values, got inf"),
    ],
)
def test_what_cannot_be_ranked_is_refused(x, y, says):
    for statistic in (spearman, pearson, top_overlap):
        with pytest.raises(ValueError, match=says):
            statistic(x, y)


def test_a_resample_depends_on_its_number_and_seed_alone():
    in_order = [resample(100, r, 7) for r in range(5)]
    backwards = [resample(100, r, 7) for r in reversed(range(5))]
    np.testing.assert_array_equal(in_order, backwards[::-1])
    assert len({row.tobytes() for row in in_order} | {resample(100, 0, 8).tobytes()}) == 6
    # Known words: what was drawn once must be drawn for ever.
    assert resample(1000, 3, 5)[:6].tolist() == [600, 494, 165, 214, 726, 64]
    counts = np.bincount(np.concatenate([resample(10, r, 0) for r in range(5000)]), minlength=10)
    assert ((counts - 5000) ** 2 / 5000).sum() < 27.9  # chi-square of 9 degrees, p = .001


def test_ranking_once_gives_the_interval_of_ranking_every_resample():
    generator = np.random.default_rng(2)
    x = generator.integers(0, 9, 40).astype(float)
    y = x + generator.normal(size=40)
    assert bootstrap_interval(x, y, resamples=200) == bootstrap_interval(
        x, y, lambda *rows: spearman(*rows), resamples=200
    )


def test_the_interval_covers_the_planted_correlation():
    rho, draws, covered = 0.9, 200, 0
    truth = 6 / np.pi * np.arcsin(rho / 2)  # Spearman of normal variables
    for draw in range(draws):
        x, noise = np.random.default_rng(draw).normal(size=(2, 128))
        low, high = bootstrap_interval(x, rho * x + np.sqrt(1 - rho**2) * noise, resamples=200, seed=draw)
        covered += low <= truth <= high
    assert 0.90 <= covered / draws <= 0.985


def test_intervals_of_rows_and_of_what_does_not_vary():
    rows = np.random.default_rng(3).normal(size=(30, 2))
    low, high = bootstrap_interval(rows, rows, lambda x, y: float((x[:, 0] - y[:, 0]).sum() + x.shape[1]))
    assert low == high == 2
    assert all(np.isnan(bootstrap_interval(np.zeros(5), np.arange(5.0), resamples=20)))
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_interval([], [])
