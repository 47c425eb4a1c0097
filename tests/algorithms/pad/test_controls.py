"""Splits hold out a share of each class, and controls choose as many real images of each."""

import itertools

import numpy as np
import pytest

from ghostgram.algorithms.pad.controls import k_centre, random_real, split

SIZES = (178, 182, 177, 183, 181, 182, 181, 179, 174, 180)  # of digits
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(10), SIZES))


@pytest.mark.parametrize("fraction", [0.1, "0.1", 0.5])
def test_split_holds_out_a_share_of_each_class(fraction):
    train, held_out, digest = split(LABELS, fraction, 7)
    assert np.array_equal(np.sort(np.concatenate([train, held_out])), np.arange(len(LABELS)))
    assert np.array_equal(np.bincount(LABELS[held_out]), [int(float(fraction) * n + 0.5) for n in SIZES])
    assert (np.diff(train) > 0).all()
    assert (np.diff(held_out) > 0).all()
    assert split(LABELS, fraction, 7).digest == digest
    assert split(LABELS, fraction, 8).digest != digest


def test_shares_are_exact():
    labels = np.zeros(45, np.int64)
    assert len(split(labels, 0.7, 0).held_out) == 32  # 31.5; in floats .7 * 45 + .5 is 31.999999999999996


def test_half_a_class_may_be_any_half():
    labels = np.array([0, 0, 0, 0])
    halves = {tuple(split(labels, 0.5, seed).held_out) for seed in range(200)}
    assert halves == set(itertools.combinations(range(4), 2))


def test_random_real_images_are_nested_and_of_each_class():
    chosen = {ipc: random_real(LABELS, ipc, 3) for ipc in (1, 10, 174)}
    for ipc, ids in chosen.items():
        assert np.array_equal(LABELS[ids], np.repeat(np.arange(10), ipc))
        assert len(np.unique(ids)) == len(ids)
    assert np.array_equal(chosen[174].reshape(10, -1)[:, :10], chosen[10].reshape(10, -1))
    assert not np.array_equal(chosen[10], random_real(LABELS, 10, 4))
    with pytest.raises(ValueError, match="ipc: expected at most 174, the images of class 8, got 175"):
        random_real(LABELS, 175, 3)


def test_k_centre_chooses_the_farthest_each_time():
    chance = np.random.default_rng(1)
    features, labels = chance.standard_normal((60, 5)).astype(np.float32), chance.permutation(np.repeat([0, 1, 4], 20))
    chosen = k_centre(features, labels, 6).reshape(3, 6)
    for label, ids in zip((0, 1, 4), chosen, strict=True):
        members = np.flatnonzero(labels == label)
        assert set(ids) <= set(members)
        away = np.linalg.norm(features[members] - features[members].mean(0), axis=1)
        assert ids[0] == members[away.argmin()]
        for k in range(1, 6):
            reach = {i: min(np.linalg.norm(features[i] - features[j]) for j in ids[:k]) for i in members}
            assert reach[ids[k]] == max(reach.values())


def test_k_centre_takes_copies_once_each():
    assert sorted(k_centre(np.zeros((3, 2)), [0, 0, 0], 3)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: split(LABELS, 1.0, 0), ValueError, "fraction: expected above 0 and below 1, got 1.0"),
        (lambda: split([0, 0, 0, 0, 0, 1], 0.2, 0), ValueError, "fraction: 0.2 of the 1 images of class 1 is 0"),
        (lambda: split([0.5], 0.2, 0), TypeError, "labels: expected integers, got float64"),
        (lambda: split([[0]], 0.2, 0), ValueError, r"labels: expected shape \(n,\) with n at least 1, got \(1, 1\)"),
        (lambda: random_real(LABELS, 0, 0), ValueError, "ipc: expected at least 1, got 0"),
        (lambda: k_centre(np.zeros((3, 2, 2)), [0, 0, 0], 1), ValueError, r"features: expected shape \(3, d\)"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
