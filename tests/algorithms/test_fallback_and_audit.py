"""Parameters without a tap scored by forward mode, and the audit that finds what the sum check cannot."""

import numpy as np
import pytest
import torch
from torch import nn

import ghostgram as gg
from algorithms.models import Small, mse, phis, regression
from ghostgram.taps import UncoveredParameterError, linear


class Bare(Small):
    """With parameters that belong to no tapped layer, one of them used beside a tapped layer's."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.linspace(0.5, 1.5, 8, dtype=torch.float64))
        self.rnn = nn.LSTM(8, 8).double()

    def forward(self, x):
        hidden = torch.tanh(self.norm(self.up(x))) * self.gate
        return self.down(hidden + self.rnn(hidden.unsqueeze(0))[0].squeeze(0)).squeeze(-1)


def shares(model, batch):
    return (model(batch[0]) - batch[1]).square() / len(batch[1])


def one_by_one(model, batch, held_out, lr):
    params = list(model.parameters())
    g = torch.autograd.grad(mse(model, held_out), params)
    loss = lambda i: shares(model, batch)[i]  # noqa: E731
    each = [torch.autograd.grad(loss(i), params) for i in range(len(batch[1]))]
    return [-lr * sum(float((a * b).sum()) for a, b in zip(grads, g, strict=True)) for grads in each]


@pytest.mark.parametrize("clip", [None, 1e-3])
@pytest.mark.parametrize("options", [{}, {"order": 2}, {"order": 2, "late": "replay"}], ids=["1", "2", "2 replayed"])
def test_forward_mode_scores_what_no_tap_covers(options, clip):
    found, batch, held_out = [], regression(5, 1), regression(7, 2)
    for late in (options, {"order": options.get("order", 1), "v_state": "post", "late": "forward"}):
        model = Bare()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        expected = one_by_one(model, batch, held_out, 0.05)
        shapley = gg.InRunShapley(model, optimizer, lambda m: mse(m, held_out), fallback="jvp", **late)
        assert shapley.coverage().fallback.keys() >= {"gate", "rnn.weight_ih_l0"}
        with shapley.step(ids=range(5), losses=lambda m=model: shares(m, batch)):
            mse(model, batch).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        found.append(phis(shapley)[:, 0])
        if not options:
            c = shapley.ledger()["clip"][0].as_py()
            np.testing.assert_allclose(found[-1], c * np.array(expected), rtol=1e-9)
    np.testing.assert_allclose(*found, rtol=1e-9)


def test_a_fallback_is_never_taken_silently():
    model = Bare()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with pytest.raises(UncoveredParameterError, match=r"gate .*fallback='jvp'"):
        gg.InRunShapley(model, optimizer, lambda m: mse(m, regression(7, 2)))
    shapley = gg.InRunShapley(model, optimizer, lambda m: mse(m, regression(7, 2)), fallback="jvp")
    with pytest.raises(ValueError, match="losses: expected a callable that gives every sample's share"):
        with shapley.step(ids=range(5)):
            mse(model, regression(5, 1)).backward()


def test_scaling_fallback_parameters_differently_is_an_error():
    model, batch = Bare(), regression(5, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    shapley = gg.InRunShapley(model, optimizer, lambda m: mse(m, regression(7, 2)), fallback="jvp")
    with shapley.step(ids=range(5), losses=lambda: shares(model, batch)):
        mse(model, batch).backward()
    nn.utils.clip_grad_norm_([model.gate], 1e-6)
    with pytest.raises(RuntimeError, match="scaled by different factors"):
        optimizer.step()


def test_shares_that_are_not_of_the_loss_are_an_error():
    model, batch = Bare(), regression(5, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    shapley = gg.InRunShapley(model, optimizer, lambda m: mse(m, regression(7, 2)), fallback="jvp")
    with pytest.raises(RuntimeError, match="not shares of the loss that backward was called on"):
        with shapley.step(ids=range(5), losses=lambda: 5 * shares(model, batch)):
            mse(model, batch).backward()


@pytest.mark.parametrize("options", [{}, {"order": 2}, {"order": 2, "late": "replay"}], ids=["1", "2", "2 replayed"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_audit_of_right_dots_passes(options, dtype):
    model, batch = Small(dtype), regression(5, 1, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    shapley = gg.InRunShapley(model, optimizer, lambda m: mse(m, regression(7, 2, dtype)), audit_every=2, **options)
    for _ in range(3):
        with shapley.step(ids=range(5), losses=lambda: shares(model, batch)):
            mse(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    audits = shapley.ledger()["audit"].to_pylist()
    assert audits[1] is None
    assert max(audits[0], audits[2]) < (1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("on_audit_failure", ["raise", "mark"])
def test_an_audit_finds_values_exchanged_between_samples(monkeypatch, on_audit_failure):
    """Which leaves their sum as it is."""
    right = linear.matrix_stats

    def exchanged(*args):
        grad, dots = right(*args)
        return grad, None if dots is None else dots.roll(1, 0)

    monkeypatch.setattr(linear, "matrix_stats", exchanged)
    model, batch = Small(), regression(5, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    shapley = gg.InRunShapley(
        model, optimizer, lambda m: mse(m, regression(7, 2)), audit_every=1, on_audit_failure=on_audit_failure
    )
    with shapley.step(ids=range(5), losses=lambda: shares(model, batch)):
        mse(model, batch).backward()
    if on_audit_failure == "raise":
        with pytest.raises(gg.AuditError, match=r"Most by: (up|down)\.weight"):
            optimizer.step()
        assert len(shapley.step_log()) == 0
    else:
        optimizer.step()
        assert shapley.ledger()["audit"].to_pylist()[0] > 1e-3
