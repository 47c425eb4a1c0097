"""What reweighting costs, by the formulas and as it is booked."""

import json
import warnings

import pytest

from ghostgram.algorithms.velocitune import ledger
from ghostgram.algorithms.velocitune.ledger import Ledger, Overhead, equal_compute

N = 7e9


def test_the_example_of_the_specification():
    """7B parameters, 10 domains of 1 M evaluation tokens, 100 steps of 4 M tokens between updates."""
    method = ledger.velocitune(N, proxy_tokens=0, eval_tokens=10e6, every=100)
    assert method.update == pytest.approx(1.4e17, rel=0.01)
    assert ledger.training(N, 100 * 4e6) == pytest.approx(1.68e19, rel=0.01)
    assert method.update / ledger.training(N, 100 * 4e6) < 0.01


def test_formulas_by_hand():
    assert ledger.velocitune(10, 100, 7, 5).of(14) == 6 * 10 * 100 + 3 * 2 * 10 * 7  # before training and two updates
    assert ledger.dbl(10, 7, 5, reference=3).of(14) == 3 + 2 * 2 * 10 * 7
    assert ledger.doremi(2, 30, 40).of(999) == 6 * 2 * 30 + 8 * 2 * 40
    assert ledger.skillit(10, 50, 7, 5).of(5) == 6 * 10 * 50 + 2 * 10 * 7
    assert ledger.aioli(10, domains=3, rounds=4, eval_tokens=7, every=5).of(10) == 2 * 13 * 2 * 10 * 7
    assert ledger.doge(2, domains=3, steps=11, tokens=8).of(1) == 4 * 11 * 6 * 2 * 8


def test_equal_compute_leaves_less_than_a_batch():
    overheads = {
        "static": Overhead(),
        "velocitune": ledger.velocitune(N, 0.15 * 1000 * 4e6, 10e6, 10),
        "doremi": ledger.doremi(3e8, 2e9, 2e9),
        "aioli": ledger.aioli(N, 10, 4, 1e5, 100),
    }
    arms = equal_compute(overheads, 1000, 4_000_000, N)
    assert arms["static"].batches == 1000
    assert arms["static"].overhead == 0
    step = ledger.training(N, 4e6)
    for name, arm in arms.items():
        assert arm.tokens == arm.batches * 4_000_000
        assert arm.flops == pytest.approx(arm.batches * step + overheads[name].of(arm.batches))
        assert 0 <= 1000 * step - arm.flops < step
    per_batch = step + overheads["velocitune"].update / 10
    expected = (1000 * step - overheads["velocitune"].fixed) / per_batch  # 783.8
    assert arms["velocitune"].batches == pytest.approx(expected, abs=1)
    with pytest.raises(ValueError, match="overheads: expected 'dear' to leave a batch"):
        equal_compute({"dear": Overhead(fixed=1e30)}, 1000, 4_000_000, N)
    with pytest.raises(ValueError, match="expected numbers > 0"):
        equal_compute({}, 0, 1, 1)


def test_evaluations_that_cost_too_much_are_warned_of_once():
    book = Ledger(N, budget_tokens=1e9)
    book.evaluate(59e6)
    assert book.evaluation_share == pytest.approx(0.0197, abs=1e-4)
    with pytest.warns(UserWarning, match=r"evaluations have cost 2\.3% of the training budget"):
        book.evaluate(10e6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        book.evaluate(10e6)


def test_what_is_booked_adds_up_and_comes_back():
    book = Ledger(N)
    book.train(1e6, seconds=2.0)
    book.train(1e6, seconds=1.0)
    with pytest.raises(KeyError):
        with book.timed("fit"):
            raise KeyError
    assert book.seconds["train"] == 3.0
    assert book.seconds["fit"] > 0
    assert book.total == 12 * N * 1e6
    again = Ledger(N)
    again.load_state_dict(json.loads(json.dumps(book.state_dict())))
    assert again == book
    with pytest.raises(ValueError, match="kind: expected one of"):
        book.add("label", 1)
    with pytest.raises(ValueError, match="flops, seconds: expected finite numbers"):
        book.add("train", float("nan"))
