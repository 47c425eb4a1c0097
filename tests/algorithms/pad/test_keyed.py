"""Keyed randomness: of the key and the id alone, continued and never repeated, and without touching global state."""

import random

import numpy as np
import pytest
import torch

from ghostgram.algorithms.pad import keyed
from ghostgram.reference import gumbel_topk as reference


def test_the_blocks_are_those_of_the_reference():
    ids = np.array([0, 1, 2**40 + 7, -1], dtype=np.int64)
    key = keyed._key(3, "dsa", (5,))
    blocks = np.uint64(1) * np.ones(4, np.uint64)
    words = reference.philox4x32_10(
        (ids.view(np.uint64) & reference.LOW, ids.view(np.uint64) >> np.uint64(32), blocks, 0 * blocks), key
    )
    expected = [((high << np.uint64(32)) + low >> np.uint64(11)) * 2.0**-53 for high, low in (words[:2], words[2:])]
    assert np.array_equal(keyed.uniforms(3, "dsa", (5,), ids, 4)[:, 2:], np.stack(expected, axis=1))


def test_known_values_stay():
    """A later version that drew others would silently change every run."""
    assert keyed.uniforms(0, "dsa", (1, 2), [3], 2).tolist() == [[0.45529109983076943, 0.6433132664313429]]


def test_an_id_gets_the_same_numbers_in_any_company():
    ids = np.arange(-50, 1000)
    whole = keyed.uniforms(7, "dsa", (4, 2), ids, 5)
    some = np.array([900, -3, 12, 12])
    assert np.array_equal(keyed.uniforms(7, "dsa", (4, 2), some, 5), whole[some + 50])
    assert np.array_equal(keyed.uniforms(7, "dsa", (4, 2), ids, 3), whole[:, :3])


@pytest.mark.parametrize(
    "other",
    [
        (8, "dsa", (4, 2)),
        (7, "dsb", (4, 2)),
        (7, "dsa", (4, 3)),
        (7, "dsa", (4, 2, 0)),
        (7, "dsa", (42,)),
        (7, "dsa", ()),
    ],
)
def test_other_keys_give_other_numbers(other):
    assert not np.isin(keyed.uniforms(7, "dsa", (4, 2), range(100), 4), keyed.uniforms(*other, range(100), 4)).any()


def test_numbers_are_uniform():
    drawn = keyed.uniforms(1, "check", (), range(20_000), 3)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    counts = np.stack([np.bincount((column * 50).astype(int), minlength=50) for column in drawn.T])
    chi_squared = ((counts - 400) ** 2 / 400).sum(axis=1)  # mean 49, standard deviation 9.9
    assert (np.abs(chi_squared - 49) < 5 * 9.9).all()
    assert np.abs(np.corrcoef(drawn.T) - np.eye(3)).max() < 5 / np.sqrt(20_000)


def test_permutations():
    drawn = [keyed.permutation(2, "order", (i,), 4) for i in range(4800)]
    assert all(sorted(order) == [0, 1, 2, 3] for order in drawn)
    _, counts = np.unique(np.stack(drawn), axis=0, return_counts=True)
    assert len(counts) == 24
    assert ((counts - 200) ** 2 / 200).sum() < 23 + 5 * np.sqrt(2 * 23)
    assert keyed.permutation(2, "order", (), 0).tolist() == []


def test_integers_reach_both_ends_and_no_further():
    counts = np.bincount([keyed.integer(0, "start", (i,), -2, 3) + 2 for i in range(2000)])
    assert len(counts) == 5
    assert (np.abs(counts - 400) < 5 * np.sqrt(320)).all()
    with pytest.raises(ValueError, match="low = 3 and high = 3"):
        keyed.integer(0, "start", (), 3, 3)


def test_a_generator_is_its_keys_own_and_global_state_is_untouched():
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    before = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), random.getstate()  # noqa: NPY002
    one, same, other = (torch.rand(4, generator=keyed.generator(0, "net", (i,))) for i in (1, 1, 2))
    keyed.uniforms(0, "dsa", (), range(9), 2)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert before == (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), random.getstate())  # noqa: NPY002


@pytest.mark.parametrize(
    ("ids", "count", "error", "match"),
    [
        ([[1, 2]], 1, ValueError, r"ids: expected shape \(n,\), got \(1, 2\)"),
        ([0.5], 1, TypeError, "ids: expected integers, got float64"),
        ([1], -1, ValueError, "count: expected at least 0, got -1"),
    ],
)
def test_bad_input_is_named(ids, count, error, match):
    with pytest.raises(error, match=match):
        keyed.uniforms(0, "dsa", (), ids, count)
