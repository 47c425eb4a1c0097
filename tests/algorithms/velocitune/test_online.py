"""Targets from the run's own evaluations: held until determined, then near the truth, and resumed to the bit."""

import json

import numpy as np
import pytest

from ghostgram.algorithms.velocitune.rules.observation import Observation
from ghostgram.algorithms.velocitune.rules.online import OnlineVelocitune
from ghostgram.algorithms.velocitune.rules.velocitune import VelocituneSettings

L_INIT, GAIN, SCALE = np.array([2.5, 2.0]), np.array([0.8, 0.3]), np.array([100.0, 200.0])
BUDGET = 1000


def loss(tokens):
    return L_INIT - GAIN * (1 - (1 + tokens / SCALE) ** -0.5)


def rule():
    settings = VelocituneSettings(eta=0.5)
    return OnlineVelocitune(("a", "b"), L_INIT, BUDGET, settings, se_init=0.001, resamples=20)


def observations(start, end):
    return [Observation(i, 40 * i, eval_loss=loss(40 * i), eval_se=(0.001, 0.001)) for i in range(start, end)]


def test_weights_hold_until_targets_are_determined_and_these_near_the_truth():
    online = rule()
    online.init((0.5, 0.5), ("a", "b"))
    for obs in observations(1, 4):
        assert online.update(obs).tolist() == [0.5, 0.5]  # three sizes determine no law of three parameters
        assert online.shown["undetermined"].tolist() == [1, 1]
    for obs in observations(4, 14):
        w = online.update(obs)
    assert online.shown["undetermined"].tolist() == [0, 0]
    np.testing.assert_allclose(online.shown["target"], loss(BUDGET), atol=0.01)
    assert w[1] > 0.55  # b is the slower one


def test_a_state_goes_on_to_the_bit():
    whole, first, second = rule(), rule(), rule()
    whole.init((0.5, 0.5), ("a", "b"))
    first.init((0.5, 0.5), ("a", "b"))
    expected = [whole.update(obs) for obs in observations(1, 9)]
    for obs in observations(1, 6):
        first.update(obs)
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    found = [second.update(obs) for obs in observations(6, 9)]
    assert np.array(found).tobytes() == np.array(expected[5:]).tobytes()


def test_a_budget_is_asked_for():
    with pytest.raises(ValueError, match="budget: expected the tokens of the run, got 0"):
        OnlineVelocitune(("a", "b"), L_INIT, 0)
