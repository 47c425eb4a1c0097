"""Guards: what each does, that it says so, and their order."""

import math
import warnings

import numpy as np
import pytest

from ghostgram.algorithms.velocitune.guards import OFF, ROBUST, Firing, Guards
from ghostgram.algorithms.velocitune.rules.dbl import DBL
from ghostgram.algorithms.velocitune.rules.observation import Observation
from ghostgram.algorithms.velocitune.rules.velocitune import Velocitune, VelocituneSettings
from ghostgram.algorithms.velocitune.targets import DomainTarget, Targets
from ghostgram.algorithms.velocitune.velocity import degenerate, enough_tokens, shrunk, velocity, velocity_se

ABC = ("a", "b", "c")


def velocitune(guards, l_init=(2, 2, 2), target=(1, 1, 1), w=(0.5, 0.3, 0.2), eta=1.0, **errors):
    rule = Velocitune(Targets.given(ABC, l_init, target, **errors), VelocituneSettings(eta=eta), guards=guards)
    rule.init(w, ABC)
    return rule


def evaluation(*loss, **fields):
    return Observation(1, 1, eval_loss=loss, **fields)


def step(w, s):
    grown = np.array(w) * np.exp(s)
    return grown / grown.sum()


def test_velocity_is_clamped():
    ends = velocity(np.array([0.5, 3.0, 1.25]), np.full(3, 2.0), np.ones(3))
    assert ends.tolist() == [0, 1, 0.25]


def test_a_degenerate_gap_is_held():
    rule = velocitune(OFF, target=(1, 1, 2))  # the gap of c is 0
    w = rule.update(evaluation(1.8, 1.2, 2.5))
    np.testing.assert_allclose(w, (0.6018264, 0.1981736, 0.2), atol=5e-8)
    assert abs(w[2] - 0.2) <= 1e-15
    assert [(f.guard, f.domain) for f in rule.fired] == [("degenerate", "c")]
    assert rule.fired[0].after == pytest.approx(math.log((0.5 * math.exp(0.8) + 0.3 * math.exp(0.2)) / 0.8), abs=1e-15)
    assert rule.shown["degenerate"].tolist() == [0, 0, 1]


def test_all_gaps_degenerate_leave_everything_as_it_is():
    rule = velocitune(OFF, target=(2, 3, 2))
    assert rule.update(evaluation(1.8, 1.2, 2.5)).tolist() == [0.5, 0.3, 0.2]
    only_c = velocitune(OFF, target=(1, 1, 2), w=(0, 0, 1))  # and so they do when no other has weight
    assert only_c.update(evaluation(1.8, 1.2, 2.5)).tolist() == [0, 0, 1]


def test_held_without_a_step():
    rule = velocitune(OFF, target=(1, 1, 2), eta=0.0)
    np.testing.assert_allclose(rule.update(evaluation(1.8, 1.2, 2.5)), (0.5, 0.3, 0.2), rtol=1e-15)


def test_other_policies_for_a_degenerate_gap():
    rule = velocitune(Guards(degenerate="zero"), target=(1, 1, 2))
    np.testing.assert_allclose(rule.update(evaluation(1.8, 1.2, 2.5)), step((0.5, 0.3, 0.2), (0.8, 0.2, 0)), rtol=1e-12)
    rule = velocitune(Guards(degenerate="raise"), target=(1, 1, 2))
    with pytest.raises(ValueError, match=r"degenerate: expected a gap of every domain, got \{'c': 0.0\}"):
        rule.update(evaluation(1.8, 1.2, 2.5))
    assert rule.updates == 0


@pytest.mark.parametrize(("gap", "expected"), [(0.0149, True), (0.0151, False)])
def test_a_gap_within_its_noise_is_degenerate(gap, expected):
    found = degenerate(np.array([gap]), np.array([0.003]), np.array([0.004]), 1e-3, 3.0)  # 3 sqrt(.003^2 + .004^2)
    assert found.tolist() == [expected]


def test_targets_within_their_noise_are_warned_of_where_no_guard_holds_them():
    guess = DomainTarget(2.0, 1.9, 0.1, 0.1, flags=("degenerate",))
    targets, prior = Targets({"a": DomainTarget(2.0, 1.0), "b": guess}), np.array([0.5, 0.5])
    for rule in (Velocitune(targets, "paper"), DBL(targets)):
        with pytest.warns(UserWarning, match="targets: those of b are no further below l_init"):
            rule.start(prior, ("a", "b"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Velocitune(targets, "robust", budget=1e6).start(prior, ("a", "b"))


def test_the_standard_error_of_a_velocity():
    """Against draws of all three losses."""
    rng = np.random.default_rng(0)
    target, l_init, loss = (x + s * rng.normal(size=200_000) for x, s in ((1.0, 0.02), (2.0, 0.01), (1.3, 0.03)))
    drawn = ((loss - target) / (l_init - target)).std()
    found = velocity_se(*(np.array([x]) for x in (0.3, 1.0, 0.03, 0.01, 0.02)))
    assert found[0] == pytest.approx(drawn, rel=0.02)


def test_shrinkage():
    v, se = np.array([0.2, 0.5, 0.8]), np.array([0.1, 0.1, 0.1])
    np.testing.assert_allclose(shrunk(v, se), 0.5 + (1 - 0.01 / 0.09) * (v - 0.5), rtol=1e-14)
    assert shrunk(v, 4 * se).tolist() == [0.5, 0.5, 0.5]  # nothing but noise
    assert shrunk(np.array([0.3, 0.3]), se[:2]).tolist() == [0.3, 0.3]
    assert shrunk(np.array([0.3]), se[:1]).tolist() == [0.3]


def test_shrinkage_takes_out_what_noise_adds():
    """Of domains that differ by a known spread, the expected squared error falls, and to what theory says."""
    rng = np.random.default_rng(0)
    truth = rng.normal(0.5, 0.1, (500, 100))
    seen = truth + rng.normal(0, 0.1, truth.shape)
    error = [((row - t) ** 2).mean() for row, t in zip(seen, truth, strict=True)]
    less = [((shrunk(row, np.full(100, 0.1)) - t) ** 2).mean() for row, t in zip(seen, truth, strict=True)]
    assert np.mean(less) / np.mean(error) == pytest.approx(0.5, abs=0.03)  # spread / (spread + noise)


def test_velocities_are_shrunk_then_averaged_then_held():
    guards = Guards(shrink=True, ema=0.5)
    rule = velocitune(guards, target=(1, 1, 2))
    se = (0.1, 0.1, 0.1)
    first = rule.update(evaluation(1.8, 1.2, 2.5, eval_se=se))
    v1 = shrunk(np.array([0.8, 0.2]), velocity_se(np.array([0.8, 0.2]), np.ones(2), np.full(2, 0.1), *np.zeros((2, 2))))
    np.testing.assert_allclose(rule.shown["V"][:2], v1, rtol=1e-14)
    assert abs(first[2] - 0.2) <= 1e-15
    second = rule.update(evaluation(1.6, 1.1, 2.5, eval_se=se))
    v2 = shrunk(np.array([0.6, 0.1]), velocity_se(np.array([0.6, 0.1]), np.ones(2), np.full(2, 0.1), *np.zeros((2, 2))))
    np.testing.assert_allclose(rule.shown["V"][:2], (v1 + v2) / 2, rtol=1e-14)
    assert abs(second[2] - 0.2) <= 1e-15
    assert [f.guard for f in rule.fired] == ["shrink", "shrink", "ema", "ema", "degenerate"]


def test_the_step_is_capped_around_its_mean():
    rule = velocitune(Guards(max_step=0.2), eta=1.0)
    w = rule.update(evaluation(1.9, 1.3, 1.0))  # V .9, .3, 0: mean .4
    np.testing.assert_allclose(w, step((0.5, 0.3, 0.2), (0.2, -0.1, -0.2)), rtol=1e-13)
    assert {f.guard for f in rule.fired} == {"max_step"}
    within = velocitune(Guards(max_step=0.51))
    np.testing.assert_allclose(
        within.update(evaluation(1.9, 1.3, 1.0)), step((0.5, 0.3, 0.2), (0.9, 0.3, 0)), rtol=1e-13
    )
    assert within.fired == ()


def test_the_cap_of_a_step_leaves_held_domains_alone():
    rule = velocitune(Guards(max_step=0.1), target=(1, 1, 2))
    w = rule.update(evaluation(1.8, 1.2, 2.5))
    assert abs(w[2] - 0.2) <= 1e-15
    np.testing.assert_allclose(w[:2], 0.8 * step((0.5, 0.3), (0.1, -0.1)), rtol=1e-13)


def test_the_floor():
    prior = np.array([0.5, 0.3, 0.2])
    rule = velocitune(Guards(floor=0.1))
    moved = step(prior, (0.9, 0.3, 0))
    np.testing.assert_allclose(rule.update(evaluation(1.9, 1.3, 1.0)), 0.9 * moved + 0.1 * prior, rtol=1e-13)
    rule = velocitune(Guards(floor=0.1, floor_to="uniform"))
    np.testing.assert_allclose(rule.update(evaluation(1.9, 1.3, 1.0)), 0.9 * moved + 0.1 / 3, rtol=1e-13)


def test_used_up_domains_get_no_weight_whatever_the_floor():
    rule = velocitune(Guards(floor=0.1, max_epochs=2))
    moved = 0.9 * step((0.5, 0.3, 0.2), (0.9, 0.3, 0)) + 0.1 * np.array([0.5, 0.3, 0.2])
    w = rule.update(evaluation(1.9, 1.3, 1.0, seen=(20, 19, 3), avail=(10, 10, 10)))
    np.testing.assert_allclose(w, np.array([0, moved[1], moved[2]]) / (moved[1] + moved[2]), rtol=1e-13)
    first = next(f for f in rule.fired if f.guard == "max_epochs")
    assert first == Firing("max_epochs", "a", pytest.approx(moved[0]), 0.0)
    with pytest.raises(ValueError, match="max_epochs: expected a domain with data left"):
        rule.update(evaluation(1.9, 1.3, 1.0, seen=(20, 20, 20), avail=(10, 10, 10)))
    with pytest.raises(ValueError, match="avail: velocitune needs it"):
        rule.update(evaluation(1.9, 1.3, 1.0, seen=(20, 20, 20)))


def test_frozen_domains_keep_their_weight_to_the_last():
    rule = velocitune(Guards(floor=0.1, frozen=("b",), max_epochs=2))
    for _ in range(3):
        w = rule.update(evaluation(1.9, 1.3, 1.0, seen=(1, 1, 1), avail=(10, 10, 10)))
        assert abs(w[1] - 0.3) <= 1e-15
    assert w[0] > 0.55
    spent = rule.update(evaluation(1.9, 1.3, 1.0, seen=(1, 20, 1), avail=(10, 10, 10)))
    assert spent[1] == 0  # data that are used up cannot be kept
    with pytest.raises(ValueError, match=r"frozen: expected some of \['a', 'b', 'c'\], got \['z'\]"):
        velocitune(Guards(frozen=("z",)))


def test_frozen_domains_must_leave_weight_to_others():
    rule = velocitune(Guards(frozen=("a", "b"), max_epochs=1))
    with pytest.raises(ValueError, match=r"frozen: expected other domains to take the weight 0\.2"):
        rule.update(evaluation(1.9, 1.3, 1.0, seen=(1, 1, 10), avail=(10, 10, 10)))


def test_guards_follow_any_rule():
    rule = DBL(Targets.given(ABC, (2, 2, 2), (1, 1, 1)), guards=Guards(max_step=0.2))
    rule.init((0.5, 0.3, 0.2), ABC)
    w = rule.update(evaluation(1.9, 1.3, 1.0))
    assert abs(np.log(w / (0.5, 0.3, 0.2))).max() < 0.5
    assert {f.guard for f in rule.fired} == {"max_step"}


def test_presets():
    assert (OFF.min_gap, OFF.k, OFF.shrink, OFF.max_step, OFF.floor, OFF.max_epochs) == (0, 0, False, None, 0, None)
    assert (ROBUST.min_gap, ROBUST.k, ROBUST.max_step, ROBUST.floor, ROBUST.max_epochs) == (1e-3, 3, 0.5, 1e-3, 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"degenerate": "skip"}, "degenerate: expected"),
        ({"floor_to": "mean"}, "floor_to: expected"),
        ({"k": -1.0}, "min_gap, k: expected"),
        ({"ema": 1.0}, "ema: expected"),
        ({"floor": 1.5}, "floor: expected"),
        ({"max_step": 0.0}, "max_step: expected"),
        ({"max_epochs": -1.0}, "max_epochs: expected"),
    ],
)
def test_guards_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        Guards(**settings)


def test_enough_evaluation_tokens():
    assert enough_tokens(10_000, se=0.05, gap=0.1) == 1_000_000
    with pytest.raises(ValueError, match="gap: expected a positive number"):
        enough_tokens(10_000, se=0.05, gap=0.0)
