"""Every epoch is a fresh permutation, small domains by sorted keys and large ones by a cipher."""

import numpy as np
import pytest

from ghostgram.algorithms.velocitune.draws import EPOCH, SORTED, Cipher, Draws, philox, shuffled


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 17, 1000, 1023, 1024, 1025, 65537, SORTED, SORTED + 1])
def test_an_epoch_is_a_permutation_and_the_next_another(n):
    draws = Draws(5, [n])
    first, second = (draws.samples(0, np.arange(n) + n * epoch) for epoch in (0, 1))
    for order in (first, second):
        assert (np.bincount(order, minlength=n) == 1).all()
    if n >= 16:
        assert (first != second).any()
        assert (first != np.arange(n)).any()


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 17, 1000, 1025, 65537])
def test_the_cipher_is_a_bijection_of_any_size(n):
    order = Cipher(n, philox(1, 3, 0, 0, 8))(np.arange(n))
    assert (np.bincount(order, minlength=n) == 1).all()


def test_positions_and_items_are_uniform():
    counts = np.zeros((10, 10))
    for epoch in range(20_000):
        counts[np.arange(10), shuffled(3, EPOCH, 0, epoch, 10)] += 1
    assert 0.7 <= ((counts - 2000) ** 2 / 2000).sum() / 81 <= 1.35


def test_the_cipher_is_uniform_at_the_size_where_it_begins():
    """Where it sends numbers next to each other: 64 by 64 cells of 1.05 million pairs."""
    n = SORTED + 1
    order = Cipher(n, philox(9, 3, 0, 0, 8))(np.arange(n))
    cells = np.bincount(order[:-1] * 64 // n * 64 + order[1:] * 64 // n, minlength=4096)
    expected = (n - 1) / 4096
    assert 0.9 <= ((cells - expected) ** 2 / expected).sum() / 4095 <= 1.1


def test_draws_in_any_order_and_across_epochs_are_the_same():
    asked = np.random.default_rng(0).integers(0, 60, 200)
    in_order = Draws(2, [7, 11]).samples(1, np.arange(60))
    assert (Draws(2, [7, 11]).samples(1, asked) == in_order[asked]).all()


def test_domains_and_seeds_have_their_own_orders():
    orders = [Draws(seed, [50, 50]).samples(k, np.arange(50)).tolist() for seed in (0, 1) for k in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_the_order_is_pinned():
    """NumPy promises these words; another order would make every saved state another run."""
    assert philox(0, EPOCH, 0, 0, 2).tolist() == [213000021201967259, 4455796210202625458]
    assert Draws(0, [10]).samples(0, np.arange(10)).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert Draws(0, [SORTED + 1]).samples(0, np.arange(3)).tolist() == [180330, 166052, 488689]


def test_a_seed_out_of_range_is_named():
    with pytest.raises(ValueError, match="seed: expected"):
        philox(-1, EPOCH, 0, 0, 1)
