"""Every rule against numbers worked out beforehand, and against its formula written plainly here."""

import math

import numpy as np
import pytest

from ghostgram.algorithms.velocitune.guards import OFF
from ghostgram.algorithms.velocitune.rules.ado import ADO, ADOSettings, preference, savitzky_golay
from ghostgram.algorithms.velocitune.rules.aioli import Aioli, AioliSettings, effects_of, probe_mixtures
from ghostgram.algorithms.velocitune.rules.dbl import DBL, SHEARED_LLAMA_1_3B
from ghostgram.algorithms.velocitune.rules.doge import DoGE
from ghostgram.algorithms.velocitune.rules.doremi import DoReMi, DoReMiSettings, excess, loss_weights
from ghostgram.algorithms.velocitune.rules.exponentiated import Custom
from ghostgram.algorithms.velocitune.rules.observation import Observation
from ghostgram.algorithms.velocitune.rules.odm import ODM, ODMSettings
from ghostgram.algorithms.velocitune.rules.skillit import SkillIt
from ghostgram.algorithms.velocitune.rules.static import Static, StaticSettings
from ghostgram.algorithms.velocitune.rules.velocitune import Velocitune, VelocituneSettings
from ghostgram.algorithms.velocitune.targets import Targets

WEB_TO_C4 = (0.67, 0.045, 0.045, 0.02, 0.045, 0.025, 0.15)


def names(k):
    return [f"d{i}" for i in range(k)]


def targets(l_init, target, **errors):
    return Targets.given(names(len(l_init)), l_init, target, **errors)


def printed(values, expected):
    decimals = max(len(f"{x}".partition(".")[2]) for x in expected)
    np.testing.assert_allclose(values, expected, rtol=0, atol=0.5000001 * 10.0**-decimals)


def plain_step(w, s, c=0.0):
    """Exponentiated gradient as a child would write it."""
    grown = [a * math.exp(b) for a, b in zip(w, s, strict=True)]
    return [(1 - c) * g / sum(grown) + c / len(w) for g in grown]


def updated(rule, prior, *observations):
    rule.init(prior, names(len(prior)))
    for obs in observations:
        w = rule.update(obs)
    return w


def evaluation(*loss, tokens=1):
    return Observation(step=1, tokens=tokens, eval_loss=loss)


@pytest.mark.parametrize(
    ("w", "loss", "l_init", "target", "v", "after"),
    [
        ((0.5, 0.5), (1.9, 1.2), (2.0, 1.2), (1.8, 0.9), (0.5, 1), (0.3775407, 0.6224593)),
        (
            *((0.6, 0.3, 0.1), (2.35, 1.10, 0.95), (2.5, 1.6, 0.9), (2.2, 1.0, 0.7)),
            *((0.5, 0.1666667, 1), (0.6123502, 0.2193840, 0.1682658)),
        ),
    ],
)
def test_velocitune(w, loss, l_init, target, v, after):
    rule = Velocitune(targets(l_init, target), "paper")
    found = updated(rule, w, evaluation(*loss))
    printed(rule.shown["V"], v)
    printed(found, after)
    np.testing.assert_allclose(found, plain_step(w, rule.shown["V"]), rtol=1e-12)


@pytest.mark.parametrize("updates", [1, 5, 20])
def test_velocitune_integrates_constant_velocities(updates):
    rule = Velocitune(targets((2, 2), (1, 1)), "paper")
    w = updated(rule, (0.5, 0.5), *[evaluation(2, 1)] * updates)  # V is 1 and 0
    assert abs(w[1] - 1 / (1 + math.exp(updates))) < 1e-14
    same = updated(rule, (0.3, 0.7), *[evaluation(1.4, 1.4)] * updates)
    np.testing.assert_allclose(same, (0.3, 0.7), rtol=1e-13)


def test_velocitune_does_not_see_the_unit_of_losses_and_dbl_does():
    loss, l_init, target = np.array([[1.9, 1.2, 0.9], [2.1, 1.6, 1.0], [1.5, 1.1, 0.4]])
    first = updated(Velocitune(targets(l_init, target), "paper"), (0.2, 0.3, 0.5), evaluation(*loss))
    a, b = 2.7, -0.3
    moved = targets(a * l_init + b, a * target + b)
    again = updated(Velocitune(moved, "paper"), (0.2, 0.3, 0.5), evaluation(*(a * loss + b)))
    np.testing.assert_allclose(again, first, rtol=1e-12)
    one = updated(DBL(targets(l_init, target)), (0.2, 0.3, 0.5), evaluation(*loss))
    other = updated(DBL(moved), (0.2, 0.3, 0.5), evaluation(*(a * loss + b)))
    assert np.abs(one - other).max() > 0.01


def test_velocitune_scales_eta_by_the_tokens_since_the_last_update():
    settings = VelocituneSettings(eta=0.3, per=0.01)
    rule = Velocitune(targets((2, 2), (1, 1)), settings, budget=1000, guards=OFF)
    w = updated(rule, (0.5, 0.5), evaluation(2, 1, tokens=10), evaluation(2, 1, tokens=15))
    assert w[0] / w[1] == pytest.approx(math.exp(0.3 * 1.5), rel=1e-12)
    with pytest.raises(ValueError, match="tokens: expected at least the 15"):
        rule.update(evaluation(2, 1, tokens=14))
    with pytest.raises(ValueError, match="budget: expected the tokens of the run"):
        Velocitune(targets((2, 2), (1, 1)), "robust")


def test_velocitune_waits_and_clamps_as_told():
    rule = Velocitune(targets((2, 2), (1, 1)), VelocituneSettings(warmup=1, v_max=1.5))
    assert updated(rule, (0.5, 0.5), evaluation(2.4, 1)).tolist() == [0.5, 0.5]
    w = rule.update(evaluation(2.7, 0.5))
    np.testing.assert_allclose(rule.shown["V"], (1.5, 0))
    np.testing.assert_allclose(w, plain_step((0.5, 0.5), (1.5, 0)), rtol=1e-12)
    free = Velocitune(targets((2, 2), (1, 1)), VelocituneSettings(v_max=None))
    updated(free, (0.5, 0.5), evaluation(2.7, 0.5))
    np.testing.assert_allclose(free.shown["V"], (1.7, -0.5))


def test_dbl():
    gap = np.array([0.30, 0.10, 0.50, 0.20, -0.05, 0.15, 0.40])
    shipped = Targets.given(list(SHEARED_LLAMA_1_3B), np.full(7, 3.0), list(SHEARED_LLAMA_1_3B.values()))

    def of(preset):
        rule = DBL(shipped, preset)
        rule.init(WEB_TO_C4, list(SHEARED_LLAMA_1_3B))
        return rule.update(evaluation(*(shipped.loss + gap)))

    printed(of("code"), (0.6706803, 0.0368938, 0.0550320, 0.0181290, 0.0317568, 0.0215534, 0.1659547))
    printed(of("bandit"), (0.2468915, 0.1082045, 0.1614151, 0.1166308, 0.0931345, 0.1114994, 0.1622242))
    np.testing.assert_allclose(of("code"), plain_step(WEB_TO_C4, gap, 1e-4), rtol=1e-12)
    np.testing.assert_allclose(of("paper"), plain_step(WEB_TO_C4, np.maximum(gap, 0), 1e-4), rtol=1e-12)
    np.testing.assert_allclose(of("bandit"), plain_step(np.ones(7), WEB_TO_C4 + gap, 1e-4), rtol=1e-12)
    np.testing.assert_allclose(of("constant"), WEB_TO_C4, rtol=1e-15)


def test_doremi():
    sums, tokens = excess([1.5, 0.8, 1.1, 1.3, 1.4], [1.0, 1.0, 1.0, 1.0, 1.0], [0, 0, 0, 1, 1], 3)
    np.testing.assert_allclose(sums, (0.6, 0.7, 0), atol=1e-15)
    assert tokens.tolist() == [3, 2, 0]
    rule = DoReMi(DoReMiSettings(c=1e-4, unseen=0.25))
    obs = Observation(step=1, tokens=5, excess_sum=sums, excess_tokens=tokens)
    w = updated(rule, (0.5, 0.3, 0.2), obs)
    np.testing.assert_allclose(rule.shown["score"], (0.2, 0.35, 0.25), atol=1e-15)
    printed(w, (0.4722168, 0.3291927, 0.1985905))
    printed(loss_weights(w, (0.6, 0.3, 0.1)), (0.2033537, 0.2835247, 0.5131216))
    np.testing.assert_allclose(w, plain_step((0.5, 0.3, 0.2), (0.2, 0.35, 0.25), 1e-4), rtol=1e-12)
    # a domain that is absent has its last score again, and the result is the mean over the start and all updates
    second = rule.update(Observation(step=2, tokens=9, excess_sum=(0, 0, 1.6), excess_tokens=(0, 0, 4)))
    np.testing.assert_allclose(second, plain_step(w, (0.2, 0.35, 0.4), 1e-4), rtol=1e-12)
    np.testing.assert_allclose(rule.mean_weights, (np.array([0.5, 0.3, 0.2]) + w + second) / 3, rtol=1e-14)
    with pytest.raises(ValueError, match="sampling: expected"):
        loss_weights(w, (0.6, 0.4, 0.0))


def test_skillit():
    graph = np.array([(1, 0.5, 0), (0, 1, 0.5), (0.5, 0, 1)])
    losses = np.array([(2, 1.5, 1), (1.8, 1.4, 1), (1.7, 1.3, 0.9)])
    rule = SkillIt(graph)
    first = rule.init((0.2, 0.3, 0.5))
    np.testing.assert_allclose(first, plain_step(np.ones(3), 0.2 * graph.sum(1)), rtol=1e-12)
    for loss in losses:
        w = rule.update(evaluation(*loss))
    printed(w, (0.4247883, 0.2876058, 0.2876058))
    w = rule.update(evaluation(1.5, 1.1, 0.9))  # the window has three places: the first evaluation leaves it
    recent = losses[1:].sum(0) + np.array((1.5, 1.1, 0.9))
    np.testing.assert_allclose(w, plain_step(np.ones(3), 0.2 * graph @ recent), rtol=1e-12)


def test_aioli():
    drops = np.array([(0.040, 0.010, 0.002), (0.012, 0.050, 0.004), (-0.001, 0.006, 0.030)])
    mixtures = probe_mixtures(3, 0.75)
    printed(effects_of(drops, mixtures).sum(0), (0.3333333, 0.4375, 0.2291667))
    asked = []

    def rule_and_probe(settings):
        state = np.array([2.0, 1.5, 1.0])

        def probe(mixture, steps):
            asked.append((mixture.tolist(), steps))
            state[:] -= drops[:, len(asked) % 3 - 1]
            return state

        return Aioli(settings), Observation(step=1, tokens=1, eval_loss=state.copy(), probe=probe)

    rule, obs = rule_and_probe(AioliSettings(rounds=2))
    w = updated(rule, (0.2, 0.3, 0.5), obs)
    printed(w, (0.3332851, 0.3403014, 0.3264135))
    assert asked == [(mixture, 5) for mixture in mixtures.tolist()] * 2
    rule, obs = rule_and_probe(AioliSettings(average=0.5))
    updated(rule, (0.2, 0.3, 0.5), obs)
    printed(rule.update(rule_and_probe(AioliSettings())[1]), (0.3332851, 0.3403014, 0.3264135))  # no memory of w


def test_aioli_shifts_negative_effects_and_has_no_preference_without_any():
    mixtures = probe_mixtures(2, 0.75)
    made = effects_of(np.array([(0.1, -0.1), (0.0, 0.1)]), mixtures)
    assert made.min() == 0
    assert made.sum() == pytest.approx(1, abs=1e-15)
    assert effects_of(np.zeros((2, 2)), mixtures).tolist() == [[0.25, 0.25], [0.25, 0.25]]
    with pytest.raises(ValueError, match="f: expected a share"):
        Aioli(AioliSettings(f=0.5)).init((0.5, 0.5))


def test_doge():
    gradients = np.array([(1, 0, 0.5), (0.2, 0.3, -0.1), (-0.5, 0.4, 0)])
    align, norm = gradients @ (0.8, 0.1, 0.3), np.sqrt((gradients**2).sum(1))
    w = updated(DoGE(), (0.2, 0.3, 0.5), Observation(step=1, tokens=1, lr=1e-3, align=align, grad_norm=norm))
    printed(w, (0.3610477, 0.3230715, 0.3158808))
    steep = Observation(step=1, tokens=1, lr=1e-3, align=(100, 0, 0), grad_norm=norm)
    np.testing.assert_allclose(
        updated(DoGE(), (0.2, 0.3, 0.5), steep), plain_step(np.ones(3), (0.5, 0, 0)), rtol=1e-12
    )  # clipped to 5 lr


def odm_at(variant, *losses):
    rule = ODM(ODMSettings(variant=variant, warmup=0))
    rule.init((0.5, 0.3, 0.2))
    return [
        rule.update(Observation(step=100 + i, tokens=1, train_loss_sum=np.multiply(x, 7), train_tokens=(7, 7, 7)))
        for i, x in enumerate(losses)
    ]


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("exp3", [(0.298040, 0.307734, 0.394226), (0.328528, 0.326921, 0.344552)]),
        ("smoothed", [(0.3033129, 0.1937652, 0.5029218), (0.3116089, 0.1981827, 0.4902085)]),
    ],
)
def test_odm(variant, expected):
    for found, numbers in zip(odm_at(variant, (2.4, 1.8, 3.0), (2.3, 1.7, 2.8)), expected, strict=True):
        printed(found, numbers)


def test_odm_waits_and_keeps_the_reward_of_an_absent_domain():
    rule = ODM(ODMSettings(warmup=5))
    rule.init((0.5, 0.3, 0.2))
    early = rule.update(Observation(step=5, tokens=1, train_loss_sum=(1, 1, 1), train_tokens=(1, 1, 1)))
    assert early.tolist() == [0.5, 0.3, 0.2]
    assert rule.memory == {}
    rule.update(Observation(step=6, tokens=1, train_loss_sum=(2, 2, 2), train_tokens=(1, 1, 1)))
    rule.update(Observation(step=7, tokens=1, train_loss_sum=(2, 0, 2), train_tokens=(1, 0, 1)))
    reward = 0.5 * math.exp(2)
    np.testing.assert_allclose(rule.memory["rewards"], (1.5 * reward, reward, 1.5 * reward), rtol=1e-12)


def test_ado_preference():
    mu, h = np.array([0.6, 0.3, 0.1]), np.array([0.55, 0.35, 0.10])
    laws = np.array([np.exp((0.6, 0.7, 0.5)), (2, 1.5, 1), (0.30, 0.02, 0.40)])
    made = preference(laws, np.full(3, 1e5), mu, mu, h, 1000)
    printed(made.rho, (0.4918744, 0.4981709, 0.0099547))
    printed(made.sampling, (0.5891874, 0.3198171, 0.0909955))
    printed(made.mean, (0.5998920, 0.3001980, 0.0999100))


def test_the_smoother_keeps_cubics():
    x = np.arange(101) - 50.0
    assert savitzky_golay(101, 3) @ (2 + 3 * x - 0.1 * x**2 + 0.01 * x**3) == pytest.approx(2, abs=1e-9)
    assert savitzky_golay(101, 3).sum() == pytest.approx(1, abs=1e-13)


def test_ado_finds_the_laws_that_losses_follow():
    """Losses of known laws, drawn in fixed shares: the weights are those of the true laws."""
    e, a, alpha = np.array([1.2, 1.6]), np.array([1.5, 1.0]), np.array([0.3, 0.15])
    rule = ADO(ADOSettings(first=600, refit=100))
    prior, share = np.array([0.6, 0.4]), np.array([0.5, 0.5])
    rule.init(prior)
    for step in range(1, 601):
        seen = 64.0 * step * share
        losses = e + np.exp(a) * seen.sum() ** -alpha
        w = rule.update(
            Observation(step=step, tokens=step, train_loss_sum=losses * 32, train_tokens=(32, 32), seen=seen)
        )
        assert (w.tolist() == prior.tolist()) == (step < 600)
    np.testing.assert_allclose(rule.memory["laws"], (e, a, alpha), rtol=0.02)
    expected = preference(np.array([e, a, alpha]), np.full(2, 64.0 * 600), prior, prior, share, 600)
    np.testing.assert_allclose(rule.shown["score"], expected.rho, rtol=0.01)


def test_ado_says_which_domain_was_never_there():
    rule = ADO(ADOSettings(first=250))
    rule.init((0.5, 0.5), ("a", "b"))
    with pytest.raises(ValueError, match="expected losses of 'b' at 4 counts or more"):
        for step in range(1, 251):
            rule.update(Observation(step, step, train_loss_sum=(9, 0), train_tokens=(3, 0), seen=(step, 0)))


def test_static():
    assert Static().init((2, 6)).tolist() == [0.25, 0.75]
    assert Static("uniform").init((2, 6, 0)).tolist() == [0.5, 0.5, 0]
    np.testing.assert_allclose(Static("temperature").init((1, 9)), (0.25, 0.75), rtol=1e-15)
    rule = Static.of((1, 3))
    assert rule.init((0.5, 0.5)).tolist() == [0.25, 0.75]
    assert rule.update(Observation(1, 1)).tolist() == [0.25, 0.75]
    with pytest.raises(ValueError, match="weights: expected 3 as prior has, got 2"):
        rule.init((1, 1, 1))
    with pytest.raises(ValueError, match="temperature: expected a positive number"):
        Static(StaticSettings(temperature=0.0))


def test_custom():
    rule = Custom(lambda obs: np.array(obs.grad_norm) * 2, eta=0.5, c=0.1, needs=frozenset({"grad_norm"}))
    w = updated(rule, (0.2, 0.8), Observation(1, 1, grad_norm=(1, 2)))
    np.testing.assert_allclose(w, plain_step((0.2, 0.8), (1, 2), 0.1), rtol=1e-12)
    with pytest.raises(ValueError, match="grad_norm: custom needs it"):
        rule.update(Observation(1, 1))
