"""Validation sets that rotate or serve for several steps, and what the ledger makes of them."""

import numpy as np
import pytest
import torch

import ghostgram as gg
from algorithms.models import Small, mse, phis, regression, run_steps


def engine(model, validation, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    return optimizer, gg.InRunShapley(model, optimizer, validation, **options)


def members(indices):
    x, y = regression(9, 2)
    return x[indices], y[indices]


def test_every_member_has_its_turn_before_any_has_its_second():
    pool = gg.RotatingPool(lambda m, i: mse(m, members(i)), size=9, take=4, seed=3)
    parts = [pool.part(step).tolist() for step in range(6)]
    assert parts == [pool.part(step).tolist() for step in range(6)]
    for first, second in zip(parts[::2], parts[1::2], strict=True):
        assert len({*first, *second}) == 8
    assert parts[0] != parts[2]
    with pytest.raises(ValueError, match="take: expected 1 to size = 9, got 10"):
        gg.RotatingPool(lambda m, i: mse(m, members(i)), size=9, take=10)


def test_a_step_is_measured_on_the_part_that_it_was_scored_with():
    pool = gg.RotatingPool(lambda m, i: mse(m, members(i)), size=9, take=3)
    model, seen = Small(), []
    optimizer, shapley = engine(model, pool)
    for number in range(4):
        part = pool.part(number)
        before = float(mse(model, members(part)).detach())
        run_steps(model, optimizer, shapley, 1)
        seen.append((before, float(mse(model, members(part)).detach())))
    ledger = shapley.ledger()
    np.testing.assert_allclose(ledger["l_before"].to_numpy(), [b for b, _ in seen], rtol=1e-12)
    np.testing.assert_allclose(ledger["l_after"].to_numpy(), [a for _, a in seen], rtol=1e-12)
    assert np.abs(ledger["residual"].to_numpy()).max() < 0.2 * np.abs(ledger["measured"].to_numpy()).max()


def test_a_pool_read_whole_is_a_fixed_set():
    logs = []
    for validation in (
        gg.RotatingPool(lambda m, i: mse(m, members(i)), size=9, take=9),
        lambda m: mse(m, members(range(9))),
    ):
        model = Small()
        optimizer, shapley = engine(model, validation)
        run_steps(model, optimizer, shapley, 3)
        logs.append(phis(shapley))
    np.testing.assert_allclose(*logs, rtol=1e-9)


def test_refresh_of_one_is_the_default_to_the_bit():
    logs = []
    for options in ({}, {"refresh": 1}):
        model = Small()
        optimizer, shapley = engine(model, lambda m: mse(m, regression(7, 2)), **options)
        run_steps(model, optimizer, shapley, 3)
        logs.append((phis(shapley).tolist(), shapley.ledger().to_pylist()))
    assert logs[0] == logs[1]


def test_a_gradient_that_serves_for_three_steps():
    """Its age and, once replaced, its turn are logged; the cumulative residual is that of the losses measured."""
    model = Small()
    optimizer, shapley = engine(model, lambda m: mse(m, regression(7, 2)), refresh=3)
    passes, first = [], float(mse(model, regression(7, 2)).detach())
    original = shapley._sets.gradients
    shapley._sets.gradients = lambda *a: passes.append(1) or original(*a)
    gradients, w = [], []
    for number in range(7):
        w.append([p.detach().clone() for p in model.parameters()])
        with shapley.step(ids=range(5)):
            mse(model, regression(5, 10 + number)).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        optimizer.step()
        optimizer.zero_grad()
    ledger = shapley.ledger().to_pylist()
    assert len(passes) == 3
    assert [row["g_val_age"] for row in ledger] == [0, 1, 2, 0, 1, 2, 0]
    assert [row["measured"] is None for row in ledger] == [True, True, True, True, True, True, False]
    assert [row["cumulative_residual"] is None for row in ledger] == [True, True, False, True, True, False, False]
    predicted = np.cumsum([row["predicted"] for row in ledger])
    last = float(mse(model, regression(7, 2)).detach())
    assert ledger[-1]["cumulative_residual"] == pytest.approx(last - first - predicted[-1], rel=1e-9)

    def at(weights):
        twin = Small()
        with torch.no_grad():
            for p, value in zip(twin.parameters(), weights, strict=True):
                p.copy_(value)
        return torch.autograd.grad(mse(twin, regression(7, 2)), list(twin.parameters()))

    for step in range(7):  # the values of every step are those of the gradient it used
        g = at(w[step - ledger[step]["g_val_age"]])
        expected = -0.02 * sum(float((a * b).sum()) for a, b in zip(g, gradients[step], strict=True))
        assert ledger[step]["sum_phi"] == pytest.approx(expected, rel=1e-9)
    old, new = (torch.cat([g.flatten() for g in at(w[step])]) for step in (0, 3))
    assert ledger[3]["g_val_cosine"] == pytest.approx(float(torch.cosine_similarity(old, new, 0)), rel=1e-9)
    assert ledger[3]["g_val_ratio"] == pytest.approx(float(old.norm() / new.norm()), rel=1e-9)
    assert [row["g_val_cosine"] is None for row in ledger] == [True, True, True, False, True, True, False]


def test_a_pool_cannot_be_refreshed_rarely():
    pool = gg.RotatingPool(lambda m, i: mse(m, members(i)), size=9, take=3)
    with pytest.raises(ValueError, match="refresh: expected 1 for a RotatingPool, got 2"):
        engine(Small(), pool, refresh=2)
