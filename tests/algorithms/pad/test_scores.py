"""Scores: their order and file."""

import numpy as np
import pytest

from ghostgram.algorithms.pad.scores import Scores


def ragged():
    return Scores(np.array([3.0, 1.0, 1.0, 0.5, 1.0, -2.0]), np.array([1, 0, 0, 1, 0, 0]), {"kind": "el2n", "runs": 3})


def test_the_order_is_by_score_then_by_index():
    scores = ragged()
    assert scores.classes == 2
    assert scores.order(0).tolist() == [5, 1, 2, 4]
    assert scores.order(1).tolist() == [3, 0]


def test_a_saved_file_is_read_back_or_refused(tmp_path):
    path = tmp_path / "scores.npz"
    scores = ragged()
    scores.save(path)
    loaded = Scores.load(path)
    assert np.array_equal(loaded.values, scores.values)
    assert np.array_equal(loaded.labels, scores.labels)
    assert loaded.meta == scores.meta
    whole = path.read_bytes()
    at = whole.index(scores.values.tobytes())
    path.write_bytes(whole[:at] + b"\1" + whole[at + 1 :])
    with pytest.raises(ValueError, match=r"scores\.npz: expected saved Scores"):
        Scores.load(path)
    path.write_bytes(whole[:-30])
    with pytest.raises(ValueError, match=r"scores\.npz: expected saved Scores"):
        Scores.load(path)
    np.savez(path, order=np.arange(3))
    with pytest.raises(ValueError, match=r"scores\.npz: expected saved Scores"):
        Scores.load(path)


def test_a_published_order_is_kept():
    order = np.random.default_rng(0).permutation(60).reshape(4, 15)
    scores = Scores.of_order(order)
    assert np.array_equal(np.stack([scores.order(c) for c in range(4)]), order)
    assert scores.meta["kind"] == "order"


@pytest.mark.parametrize(
    ("order", "error", "message"),
    [
        (np.arange(60), ValueError, r"order: expected shape \(C, n / C\), .* got \(60,\)"),
        (np.zeros((2, 3)), TypeError, "order: expected integers, got float64"),
        (np.array([[0, 1], [1, 2]]), ValueError, "order: expected each of 0 to 3 once"),
        (np.array([[0, 1], [2, 4]]), ValueError, "order: expected each of 0 to 3 once"),
    ],
)
def test_what_is_no_order_is_refused(order, error, message):
    with pytest.raises(error, match=message):
        Scores.of_order(order)


@pytest.mark.parametrize(
    ("values", "labels", "message"),
    [
        ([0.0, np.nan], [0, 0], "values: expected finite scores, got nan at image 1"),
        ([0.0, 1.0], [0, 2], "labels: expected images of every class to 2, got none of 1"),
        ([0.0, 1.0], [0, -1], "labels: expected at least 0, got -1"),
        ([0.0, 1.0], [0], r"labels: expected shape \(2,\) like values, got \(1,\)"),
        ([], [], r"values: expected shape \(n,\) with n >= 1"),
    ],
)
def test_what_is_wrong_is_named(values, labels, message):
    with pytest.raises(ValueError, match=message):
        Scores(np.array(values, np.float64), np.array(labels, np.int64), {})
