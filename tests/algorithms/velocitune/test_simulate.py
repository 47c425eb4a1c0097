"""The toy loop: its first steps by hand, and what it says about intervals."""

import math

import numpy as np
import pytest

from ghostgram.algorithms.velocitune.guards import Guards
from ghostgram.algorithms.velocitune.rules.dbl import DBL
from ghostgram.algorithms.velocitune.rules.doge import DoGE
from ghostgram.algorithms.velocitune.rules.static import Static
from ghostgram.algorithms.velocitune.rules.velocitune import Velocitune, VelocituneSettings
from ghostgram.algorithms.velocitune.simulate import Toy, simulate

TOY = Toy.of((1, 3))
EVEN = (0.5, 0.5)


def per_update(eta=1.0):
    return Velocitune(TOY.targets(), VelocituneSettings(eta=eta))


def per_token():
    """eta of 1 for a unit of 6."""
    return Velocitune(TOY.targets(), VelocituneSettings(eta=1.0, per=1 / 6), budget=6.0)


def test_the_first_updates():
    found = simulate(per_update(), TOY, EVEN, total=2.0, interval=0.5)
    np.testing.assert_allclose(found.weights[1:, 1], (0.5352523, 0.5903592, 0.6513846, 0.7082310), atol=5e-8)
    w, n = [0.5, 0.5], [0.0, 0.0]
    for row in found.weights[1:]:  # and by a loop that is written here
        n = [n[i] + 0.5 * w[i] for i in range(2)]
        grown = [w[i] * math.exp(math.exp(-n[i] / (1, 3)[i])) for i in range(2)]
        w = [x / sum(grown) for x in grown]
        np.testing.assert_allclose(row, w, rtol=1e-12)


def test_a_step_for_each_token_does_not_depend_on_the_interval():
    last = [simulate(per_token(), TOY, EVEN, 6.0, d).weights[-1, 1] for d in (0.01, 0.1, 0.5)]
    np.testing.assert_allclose(last, (0.79516, 0.79620, 0.80112), atol=5e-6)
    fixed = [simulate(per_update(), TOY, EVEN, 6.0, d).weights[-1, 1] for d in (0.01, 0.1, 0.5)]
    np.testing.assert_allclose(fixed, (0.76, 0.58, 0.87), atol=0.005)


def test_weights_swing_around_the_shares_that_make_velocities_equal():
    found = simulate(per_update(), TOY, EVEN, 6.0, 0.01)
    assert (found.weights[:, 1].min(), found.weights[:, 1].max()) == pytest.approx((0.50, 0.915), abs=0.005)
    assert found.shares[1] == pytest.approx(0.739, abs=0.001)  # 3 / (1 + 3) is the ideal
    assert simulate(per_token(), TOY, EVEN, 6.0, 0.01).swing[1] < 0.5 * found.swing[1]


def test_an_average_of_velocities_overshoots_further():
    """Why the robust guards have none."""

    def peak(ema):
        rule = Velocitune(TOY.targets(), "robust", budget=6.0, guards=Guards(ema=ema))
        return simulate(rule, TOY, EVEN, 6.0, 0.06).weights[:, 1].max()

    np.testing.assert_allclose([peak(ema) for ema in (0, 0.5, 0.9)], (0.895, 0.903, 0.948), atol=5e-4)


@pytest.mark.parametrize(("preset", "last", "shares"), [("paper", 0.27, 0.05), ("robust", 0.014, 0.012)])
def test_robust_does_not_depend_on_the_interval(preset, last, shares):
    """The spread over intervals of .5, 1, 2 and 5 % of the run, of the last weight and of the share of tokens."""
    runs = [simulate(Velocitune(TOY.targets(), preset, budget=6.0), TOY, EVEN, 6.0, d) for d in (0.03, 0.06, 0.12, 0.3)]
    assert np.ptp([run.weights[-1, 1] for run in runs]) == pytest.approx(last, abs=0.005)
    assert np.ptp([run.shares[1] for run in runs]) == pytest.approx(shares, abs=0.002)


def test_robust_follows_noise_less():
    """sum |dw| under evaluations of standard error .05, over that without noise."""

    def path(preset, se):
        rule = Velocitune(TOY.targets(), preset, budget=6.0)
        return np.abs(np.diff(simulate(rule, TOY, EVEN, 6.0, 0.06, se=se).weights[:, 1])).sum()

    assert path("paper", 0.05) > 1.2 * path("paper", 0.0)
    assert path("robust", 0.05) < 1.05 * path("robust", 0.0)


def test_other_rules_and_the_bookkeeping():
    toy = Toy.of((1, 2, 4), gap=(0.5, 1, 2), floor=(1, 2, 3))
    found = simulate(Static(), toy, (1, 1, 2), 4.0, 0.5)
    np.testing.assert_allclose(found.seen[-1], (1, 1, 2))
    np.testing.assert_allclose(found.losses[-1], (1 + 0.5 / math.e, 2 + math.exp(-0.5), 3 + 2 * math.exp(-0.5)))
    assert found.losses[0].tolist() == [1.5, 3, 5]
    assert simulate(DBL(toy.targets()), toy, (1, 1, 2), 4.0, 0.5).weights[-1, 2] > 0.9  # the largest gap in nats


def test_noise_moves_weights_and_is_seeded():
    quiet, one, again, other = (
        simulate(per_update(), TOY, EVEN, 3.0, 0.1, se=se, seed=seed).weights
        for se, seed in ((0, 0), (0.1, 1), (0.1, 1), (0.1, 2))
    )
    assert one.tobytes() == again.tobytes()
    assert np.abs(one - quiet).max() > 0.005
    assert np.abs(one - other).max() > 0.005


def test_toys_that_cannot_be():
    with pytest.raises(ValueError, match="rule: expected one that needs evaluation losses only, got doge"):
        simulate(DoGE(), TOY, EVEN, 1.0, 0.1)
    with pytest.raises(ValueError, match=r"interval: expected a positive number that divides the total 1\.0, got 0\.3"):
        simulate(Static(), TOY, EVEN, 1.0, 0.3)
    with pytest.raises(ValueError, match="tau, gap, floor: expected"):
        Toy.of((1, 0))
    with pytest.raises(ValueError, match="tau, gap, floor: expected"):
        Toy.of((1, 2), gap=(1, 2, 3))
