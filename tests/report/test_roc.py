import numpy as np
import pytest

from ghostgram.report.roc import roc


def area_by_pairs(scores, labels):
    """Every positive against every negative; a tie counts as half."""
    wins = [(p > n) + 0.5 * (p == n) for p in scores[labels] for n in scores[~labels]]
    return np.mean(wins)


@pytest.mark.parametrize("levels", [1, 2, 3, 7, 10_000])
@pytest.mark.parametrize("size", [2, 3, 17, 101])
def test_area_equals_pair_counting_with_ties(size, levels):
    generator = np.random.default_rng(size * 7919 + levels)
    scores = generator.integers(0, levels, size).astype(float)
    labels = generator.random(size) < 0.4
    labels[:2] = True, False
    assert roc(scores, labels).auroc == pytest.approx(area_by_pairs(scores, labels), abs=1e-12)


def test_curve_has_one_corner_per_distinct_score():
    curve = roc([3, 2, 2, 1], [True, True, False, False])
    np.testing.assert_array_equal(curve.fpr, [0, 0, 0.5, 1])
    np.testing.assert_array_equal(curve.tpr, [0, 0.5, 1, 1])
    assert curve.auroc == 0.875


def test_extremes():
    assert roc([1, 2, 3, 4], [0, 0, 1, 1]).auroc == 1
    assert roc([1, 2, 3, 4], [1, 1, 0, 0]).auroc == 0
    assert roc([5, 5, 5, 5], [1, 0, 1, 0]).auroc == 0.5
    assert roc([-np.inf, np.inf], [0, 1]).auroc == 1


def test_area_ignores_order_and_monotone_maps():
    generator = np.random.default_rng(0)
    scores, labels = generator.integers(0, 20, 200).astype(float), generator.random(200) < 0.3
    order = generator.permutation(200)
    assert roc(scores, labels).auroc == roc(np.exp(scores[order]), labels[order]).auroc


def test_area_under_the_corners_is_the_area():
    generator = np.random.default_rng(1)
    curve = roc(generator.integers(0, 5, 60), generator.random(60) < 0.5)
    assert np.trapezoid(curve.tpr, curve.fpr) == pytest.approx(curve.auroc, abs=1e-12)


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([1.0, np.nan], [0, 1], "1 scores are not a number"),
        ([1.0, 2.0], [1, 1], "positives and negatives"),
        ([], [], "positives and negatives"),
        ([1.0, 2.0], [1], "one vector each"),
    ],
)
def test_refusals(scores, labels, message):
    with pytest.raises(ValueError, match=message):
        roc(scores, labels)
