"""Domains that join or leave a run: a version of weights, and everything else goes on where it was."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from algorithms.velocitune.tiny import (  # noqa: E402
    BATCH,
    HELD_OUT,
    LENGTH,
    TOKENS,
    TRAINING,
    chain,
    model_and_optimizer,
    sampler,
    targets,
    train,
)
from ghostgram.algorithms.velocitune.domains import targets_with, with_domain, without_domain  # noqa: E402
from ghostgram.algorithms.velocitune.guards import Guards  # noqa: E402
from ghostgram.algorithms.velocitune.rules.static import Static  # noqa: E402
from ghostgram.algorithms.velocitune.rules.velocitune import Velocitune  # noqa: E402
from ghostgram.algorithms.velocitune.run import velocitune  # noqa: E402
from ghostgram.algorithms.velocitune.targets import DomainTarget  # noqa: E402

NEW = DomainTarget(2.5, 2.2, 0.02, 0.02)


@pytest.fixture
def cut():
    """A model in training and the state after its tenth batch, decided to change at the eighth."""
    model, optimizer = model_and_optimizer()
    _, state = train(model, optimizer, sampler(model), stop=9)
    return model, optimizer, json.loads(json.dumps(state))


def test_a_domain_joins_from_the_next_batch_on(cut):
    model, optimizer, state = cut
    longer = with_domain(state, "law", 25, 0.25, NEW)
    rows = chain(7, 40, 1.5)
    data = velocitune(
        TRAINING | {"law": rows[:25]}, model, HELD_OUT | {"law": rows[25:]}, tokens=TOKENS, global_batch=BATCH,
        interval=1 / 6, rule=Velocitune(targets_with(targets(), "law", NEW), "paper"),
    )  # fmt: skip
    data.load_state_dict(longer)
    before = np.array(state["controller"]["rule"]["weights"])
    np.testing.assert_allclose(data.weights, [*(0.75 * before), 0.25], atol=1e-15)
    ids, _ = train(model, optimizer, data)
    history = data.mixture.schedule.history
    assert [version.first for version in history] == [0, 4, 8, 10, 12, 16, 20]
    assert history[3].reason == "law joined"
    assert history[3].shares[3] == pytest.approx(0.25, abs=1e-8)
    new = [sample for batch in ids for domain, sample in batch if domain == 3]
    assert np.ptp(np.bincount(new, minlength=25)) <= 1  # each sample once an epoch
    # Those of old domains go on where they were: each sample of an epoch once.
    drawn = np.array(longer["controller"]["counts"]["draws"]) + np.bincount(
        [domain for batch in ids for domain, _ in batch], minlength=4
    )
    np.testing.assert_array_equal(data.controller.counts.draws, drawn)
    np.testing.assert_array_equal(data.mixture.schedule.cursors, drawn)


def test_a_domain_leaves_for_good(cut):
    model, optimizer, state = cut
    data = sampler(model)
    data.load_state_dict(without_domain(state, "code"))
    before = np.array(state["controller"]["rule"]["weights"])
    np.testing.assert_allclose(data.weights, before * [1, 0, 1] / (before[0] + before[2]), atol=1e-15)
    ids, _ = train(model, optimizer, data)
    assert {domain for batch in ids for domain, _ in batch} == {0, 2}
    assert data.weights[1] == 0
    assert len(ids) == TOKENS // (BATCH * LENGTH) - 10


def test_a_floor_does_not_bring_it_back():
    model, optimizer = model_and_optimizer()
    floored = Guards(floor=0.1)

    def made():
        return sampler(model, rule=Velocitune(targets(), "paper", guards=floored))

    _, state = train(model, optimizer, made(), stop=9)
    data = made()
    data.load_state_dict(without_domain(state, "maths"))
    train(model, optimizer, data)
    assert data.weights[2] == 0
    assert data.controller.rule.updates == 6


def test_what_cannot_be_is_refused(cut):
    model, optimizer, state = cut
    with pytest.raises(ValueError, match="name: expected one that is not in"):
        with_domain(state, "code", 5, 0.1, NEW)
    with pytest.raises(ValueError, match="weight, size, length"):
        with_domain(state, "law", 5, 1.0, NEW)
    with pytest.raises(ValueError, match="name: expected one of"):
        without_domain(state, "law")
    for name in ("code", "maths"):
        state = without_domain(state, name)
    with pytest.raises(ValueError, match="all of it in 'prose'"):
        without_domain(state, "prose")
    _, other = train(model, optimizer, sampler(model, rule=Static()), stop=1)
    with pytest.raises(ValueError, match="rule: expected velocitune"):
        with_domain(other, "law", 5, 0.1, NEW)
    unfloored = sampler(model, rule=Velocitune(targets(), "paper", guards=Guards(floor=0.1, floor_to="uniform")))
    _, uniform = train(model, optimizer, unfloored, stop=1)
    with pytest.raises(ValueError, match="towards uniform weights"):
        without_domain(uniform, "code")


def test_a_longer_list_alone_is_no_new_domain(cut):
    model, _, state = cut
    data = velocitune(
        TRAINING | {"law": TRAINING["code"]}, model, HELD_OUT | {"law": HELD_OUT["code"]}, tokens=TOKENS,
        global_batch=BATCH, interval=1 / 6, rule=Velocitune(targets_with(targets(), "law", NEW), "paper"),
    )  # fmt: skip
    with pytest.raises(ValueError, match="domains"):
        data.load_state_dict(state)
