"""What holds for every rule: the simplex, the order of domains, saving and loading, and refusals."""

import json

import numpy as np
import pytest

from ghostgram.algorithms.velocitune.guards import Guards
from ghostgram.algorithms.velocitune.rules.ado import ADO, ADOSettings
from ghostgram.algorithms.velocitune.rules.aioli import Aioli, AioliSettings
from ghostgram.algorithms.velocitune.rules.dbl import DBL
from ghostgram.algorithms.velocitune.rules.doge import DoGE
from ghostgram.algorithms.velocitune.rules.doremi import DoReMi
from ghostgram.algorithms.velocitune.rules.exponentiated import Custom
from ghostgram.algorithms.velocitune.rules.observation import Observation
from ghostgram.algorithms.velocitune.rules.odm import ODM, ODMSettings
from ghostgram.algorithms.velocitune.rules.skillit import SkillIt
from ghostgram.algorithms.velocitune.rules.static import Static
from ghostgram.algorithms.velocitune.rules.velocitune import Velocitune
from ghostgram.algorithms.velocitune.targets import Targets

K = 5
NAMES = [f"d{i}" for i in range(K)]
ORDER = np.array([3, 0, 4, 1, 2])
PRIOR = np.array([0.4, 0.05, 0.25, 0.2, 0.1])
GRAPH = np.random.default_rng(1).random((K, K))
L_INIT, TARGET = np.array([2.5, 2.2, 1.9, 3.1, 1.2]), np.array([2.0, 2.1, 1.0, 2.8, 1.19])


def targets(order):
    return Targets.given([NAMES[i] for i in order], L_INIT[order], TARGET[order], se_init=0.004, se_target=0.004)


def score(obs):
    return np.asarray(obs.eval_loss)


RULES = {
    "static": lambda order: Static("temperature"),
    "velocitune-paper": lambda order: Velocitune(targets(order), "paper"),
    "velocitune-robust": lambda order: Velocitune(targets(order), "robust", budget=100_000),
    "dbl-code": lambda order: DBL(targets(order)),
    "dbl-bandit": lambda order: DBL(targets(order), "bandit"),
    "doremi": lambda order: DoReMi(),
    "skillit": lambda order: SkillIt(GRAPH[np.ix_(order, order)]),
    "aioli": lambda order: Aioli(AioliSettings(rounds=1, f=0.6)),
    "aioli-ema": lambda order: Aioli(AioliSettings(rounds=1, f=0.6, average=0.5)),
    "doge": lambda order: DoGE(),
    "odm-smoothed": lambda order: ODM(ODMSettings(warmup=3)),
    "odm-exp3": lambda order: ODM(ODMSettings(variant="exp3", warmup=3)),
    "ado": lambda order: ADO(ADOSettings(first=250, refit=5)),
    "custom": lambda order: Custom(score, eta=0.5, c=0.01, needs=frozenset({"eval_loss"})),
}
UPDATES = dict.fromkeys(RULES, 12) | {"ado": 257}


def observations(order, count):
    """A run of noisy falling losses, of the domains in an order."""
    rng = np.random.default_rng(0)
    seen = np.zeros(K)
    for step in range(1, count + 1):
        seen = seen + rng.integers(1, 9, K)
        loss = TARGET + (L_INIT - TARGET) * np.exp(-seen / 300) + rng.normal(0, 0.003, K)
        tokens = rng.integers(0, 3, K) * 128.0
        effects, now = rng.random((K, K))[np.ix_(order, order)] * 0.1, loss[order]

        def probe(mixture, steps, now=now, effects=effects):
            now -= effects @ mixture * steps
            return now

        fields = {
            "train_loss_sum": loss * tokens,
            "train_tokens": tokens,
            "seen": seen,
            "avail": np.full(K, 10_000.0),
            "eval_loss": loss,
            "eval_se": np.full(K, 0.003),
            "excess_sum": rng.random(K) * tokens,
            "excess_tokens": tokens,
            "align": rng.normal(0, 1, K),
            "grad_norm": rng.random(K),
        }
        arranged = {name: value[order] for name, value in fields.items()}
        yield Observation(step, step * 1000, lr=1e-3, probe=probe, **arranged)


def run(name, order=None):
    order = np.arange(K) if order is None else order
    rule = RULES[name](order)
    history = [rule.init(PRIOR[order], [NAMES[i] for i in order])]
    history += [rule.update(obs) for obs in observations(order, UPDATES[name])]
    return np.array(history), rule


@pytest.mark.parametrize("name", RULES)
def test_weights_stay_on_the_simplex_and_follow_the_order_of_domains(name):
    history, rule = run(name)
    assert (history >= 0).all()
    assert np.abs(history.sum(1) - 1).max() <= 1e-15
    assert np.abs(rule.mean_weights - history.mean(0)).max() < 1e-14
    assert (np.abs(history - history[0]).max() > 1e-6) == (name != "static")  # and the test sees it move
    np.testing.assert_allclose(run(name, ORDER)[0], history[:, ORDER], rtol=1e-9 if name == "ado" else 1e-11)


@pytest.mark.parametrize("name", RULES)
def test_a_state_goes_on_to_the_bit(name):
    whole, _ = run(name)
    half = UPDATES[name] - 5

    def seen():  # anew each time: probes train
        return list(observations(np.arange(K), UPDATES[name]))

    first = RULES[name](np.arange(K))
    first.init(PRIOR, NAMES)
    for obs in seen()[:half]:
        first.update(obs)
    text = json.dumps(first.state_dict(), allow_nan=False)
    second = RULES[name](np.arange(K))
    second.load_state_dict(json.loads(text))
    rest = np.array([second.update(obs) for obs in seen()[half:]])
    assert rest.tobytes() == whole[half + 1 :].tobytes()
    for obs in seen()[half:]:
        first.update(obs)
    assert json.dumps(first.state_dict()) == json.dumps(second.state_dict())


@pytest.mark.parametrize("name", [name for name in RULES if name != "static"])
def test_an_absent_field_is_named_and_changes_nothing(name):
    rule = RULES[name](np.arange(K))
    rule.init(PRIOR, NAMES)
    obs = next(observations(np.arange(K), 1))
    before = rule.state_dict()
    for field in sorted(rule.needs):
        lacking = Observation(**{**vars(obs), field: None})
        with pytest.raises(ValueError, match=f"{field}: {rule.name} needs it"):
            rule.update(lacking)
    assert rule.state_dict() == before


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("eval_loss", np.ones(K - 1), r"eval_loss: expected \(5,\) finite numbers, got \[1.0"),
        ("eval_loss", [1, 2, 3, np.nan, 5], "eval_loss: expected"),
        ("eval_se", -np.ones(K), "eval_se: expected numbers of at least 0"),
    ],
)
def test_a_wrong_field_is_named(field, value, message):
    rule = RULES["velocitune-robust"](np.arange(K))
    rule.init(PRIOR, NAMES)
    obs = Observation(**{**vars(next(observations(np.arange(K), 1))), field: value})
    with pytest.raises(ValueError, match=message):
        rule.update(obs)


@pytest.mark.parametrize("name", ["velocitune-paper", "dbl-code", "doremi", "custom"])
def test_a_constant_on_all_scores_changes_nothing(name):
    rule = RULES[name](np.arange(K))
    obs = next(observations(np.arange(K), 1))
    rule.init(PRIOR, NAMES)
    first = rule.update(obs)
    more = {"eval_loss": obs.eval_loss + 0.3, "excess_sum": obs.excess_sum + 0.3 * obs.excess_tokens}
    if name == "velocitune-paper":  # all gaps alike and nothing clamped: V moves by .3 everywhere
        level = Targets.given(NAMES, obs.eval_loss + 0.5, obs.eval_loss - 0.5)
        rule = Velocitune(level, "paper")
        first = PRIOR
    if name == "doremi":
        tokens = np.full(K, 128.0)
        more["excess_tokens"], more["excess_sum"] = tokens, np.arange(K) * 9 + 0.3 * tokens
        rule.init(PRIOR, NAMES)
        first = rule.update(Observation(1, 1, excess_tokens=tokens, excess_sum=np.arange(K) * 9))
    rule.init(PRIOR, NAMES)
    np.testing.assert_allclose(rule.update(Observation(**{**vars(obs), **more})), first, rtol=1e-13)


def test_states_of_others_are_refused():
    rule = RULES["dbl-code"](np.arange(K))
    rule.init(PRIOR, NAMES)
    state = rule.state_dict()
    with pytest.raises(ValueError, match="rule: expected the state of doremi, got that of dbl"):
        DoReMi().load_state_dict(state)
    with pytest.raises(ValueError, match="settings: expected the state of"):
        RULES["dbl-bandit"](np.arange(K)).load_state_dict(state)
    with pytest.raises(ValueError, match="given: expected the state of"):
        RULES["dbl-code"](ORDER).load_state_dict(state)
    with pytest.raises(ValueError, match="guards: expected the state of"):
        DBL(targets(np.arange(K)), guards=Guards(floor=0.1)).load_state_dict(state)
    other = DoReMi()
    other.init(PRIOR, NAMES)
    mine = DoReMi()
    mine.init(PRIOR, [NAMES[i] for i in ORDER])
    with pytest.raises(ValueError, match="domains: expected the state of"):
        mine.load_state_dict(other.state_dict())


def test_starts_that_cannot_be():
    with pytest.raises(RuntimeError, match=r"expected init\(prior\) or load_state_dict"):
        DoReMi().update(Observation(1, 1))
    with pytest.raises(RuntimeError, match=r"expected init\(prior\) before state_dict"):
        DoReMi().state_dict()
    with pytest.raises(ValueError, match=r"prior: expected \(K,\) numbers"):
        DoReMi().init((1, -1))
    with pytest.raises(ValueError, match="domains: expected 2 names"):
        DoReMi().init((1, 1), ("a",))
    with pytest.raises(ValueError, match="domains: expected different names"):
        DoReMi().init((1, 1), ("a", "a"))
    with pytest.raises(ValueError, match="domains: expected those of the targets"):
        RULES["dbl-code"](ORDER).init(PRIOR, NAMES)
    with pytest.raises(ValueError, match=r"preset: expected one of \['paper', 'code'\] of doremi"):
        DoReMi("robust")


def test_a_rule_describes_itself_in_full():
    text = RULES["velocitune-robust"](np.arange(K)).describe()
    assert text.splitlines()[0] == "velocitune-robust"
    for line in ("cadence = 'tokens'", "eta = 0.3", "per = 0.01", "guards.k = 3.0", "guards.max_epochs = 4.0"):
        assert f"  {line.replace(chr(39), '')}" in text.replace("'", "")
