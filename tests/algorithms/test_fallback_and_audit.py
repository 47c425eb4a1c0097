"""Parameters without a tap scored by forward mode, and the audit that finds what the sum check cannot."""

import json
import warnings

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


@pytest.mark.parametrize("late", ["stored", "replay"])
def test_a_fallback_parameter_that_no_backward_reaches_needs_no_derivative(late):
    model, batch = Small(), regression(5, 1)
    model.unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    shapley = gg.InRunShapley(
        model, optimizer, lambda m: mse(m, regression(7, 2)), v_state="post", late=late, fallback="jvp"
    )
    expected = one_by_one(Small(), batch, regression(7, 2), 0.05)
    with shapley.step(ids=range(5), losses=lambda: shares(model, batch)):
        mse(model, batch).backward()
    optimizer.step()
    np.testing.assert_allclose(phis(shapley)[:, 0], expected, rtol=1e-9)


def test_a_gradient_that_is_zero_but_for_rounding_passes_the_sum_check_of_a_replay():
    """Softmax does not see a bias that is added to all keys' scores, and a replay rounds otherwise."""
    torch.manual_seed(0)

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x):
            q, k, v = self.q(x), self.k(x), self.v(x)
            return self.out(nn.functional.scaled_dot_product_attention(q, k, v)).sum((1, 2))

    model, batch = Attention(), (torch.randn(5, 6, 8), torch.randn(5))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    held_out = torch.randn(5, 6, 8), torch.randn(5)
    shapley = gg.InRunShapley(model, optimizer, lambda m: shares(m, held_out).sum(), v_state="post", late="replay")
    for _ in range(5):
        with shapley.step(ids=range(5), losses=lambda: shares(model, batch)):
            shares(model, batch).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(shapley.step_log()) == 25


class Elsewhere(Small):
    """With a weight that is used outside its layer's forward, and a table that is looked up once for all samples."""

    def __init__(self):
        super().__init__()
        self.outside = nn.Linear(8, 8).double()
        self.table = nn.Embedding(6, 8).double()
        self.both = nn.Linear(8, 8, bias=False).double()

    def forward(self, x):
        hidden = self.norm(self.up(x)) @ self.outside.weight + self.outside.bias
        hidden = self.both(torch.tanh(hidden)) + hidden @ self.both.weight
        table = self.table(torch.tensor([[0, 2, 3], [3, 4, 4]])).mean((0, 1))
        return self.down(torch.tanh(hidden) + table).squeeze(-1)


@pytest.mark.parametrize(
    "options",
    [{}, {"v_state": "post", "late": "stored"}, {"v_state": "post", "late": "replay"}],
    ids=["early", "stored", "replayed"],
)
def test_parameters_used_where_no_tap_sees_them_join_the_fallback(options):
    model, batch, held_out = Elsewhere(), regression(5, 1), regression(7, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    shapley = gg.InRunShapley(model, optimizer, lambda m: mse(m, held_out), fallback="jvp", **options)
    assert not shapley.coverage().fallback
    for step in range(2):
        expected = one_by_one(model, batch, held_out, 0.05)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            with shapley.step(ids=range(5), losses=lambda: shares(model, batch)):
                mse(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert any("outside.weight" in str(each.message) for each in said) == (step == 0)
        np.testing.assert_allclose(phis(shapley)[-5:, 0], expected, rtol=1e-9)
    assert shapley.coverage().fallback.keys() == {"outside.weight", "outside.bias", "both.weight", "table.weight"}
    assert sum("fallback" in row.covered_by for row in shapley.coverage().rows) == 4
    for table in (shapley.step_log(), shapley.ledger()):
        assert json.loads(table.schema.metadata[b"fallback"]) == sorted(shapley.coverage().fallback)


class Dispatched(Small):
    """Sends tokens to two experts, as many to the first as there are samples."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8).double() for _ in range(2))

    def forward(self, x):
        tokens = torch.tanh(self.norm(self.up(x))).unsqueeze(1) * torch.tensor([1.0, -0.5, 2.0]).unsqueeze(1)
        first = torch.zeros(tokens.shape[:2], dtype=torch.bool)
        first[0, :], first[1, :2] = True, True  # of two of the five samples alone
        y = torch.zeros_like(tokens)
        for expert, chosen in zip(self.experts, (first, ~first), strict=True):
            y[chosen] = expert(tokens[chosen])
        return self.down(y.sum(1)).squeeze(-1)


def test_tokens_as_many_as_samples_are_not_taken_for_samples():
    model, batch, held_out = Dispatched(), regression(5, 1), regression(7, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    expected = one_by_one(model, batch, held_out, 0.05)
    shapley = gg.InRunShapley(model, optimizer, lambda m: mse(m, held_out), fallback="jvp")
    with pytest.warns(UserWarning, match=r"experts\.0\.weight"):
        with shapley.step(ids=range(5), losses=lambda: shares(model, batch)):
            mse(model, batch).backward()
    optimizer.step()
    np.testing.assert_allclose(phis(shapley)[:, 0], expected, rtol=1e-9)
    assert all(name.startswith("experts") for name in shapley.coverage().fallback)
    assert len(shapley.coverage().fallback) == 4


def test_a_parameter_used_where_no_tap_sees_it_is_an_error_without_a_fallback():
    model, batch = Elsewhere(), regression(5, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    shapley = gg.InRunShapley(model, optimizer, lambda m: mse(m, regression(7, 2)))
    with pytest.raises(ValueError, match=r"Embedding: expected ids whose first dimension is the sample"):
        with shapley.step(ids=range(5)):
            mse(model, batch).backward()
    shapley = gg.InRunShapley(model, optimizer, lambda m: mse(m, regression(2, 2)))
    with pytest.raises(RuntimeError, match=r"outside\.weight: .* some use of this parameter was not tapped"):
        with shapley.step(ids=range(2)):
            mse(model, regression(2, 1)).backward()


def test_excluded_parameters_stay_out_of_late_forward_mode():
    model, batch = Small(), regression(5, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    found = []
    for late in ("stored", "forward"):
        model = Small()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        shapley = gg.InRunShapley(
            model, optimizer, lambda m: mse(m, regression(7, 2)), v_state="post", late=late, exclude=["up.*"]
        )
        with shapley.step(ids=range(5), losses=lambda m=model: shares(m, batch)):
            mse(model, batch).backward()
        optimizer.step()
        found.append(phis(shapley)[:, 0])
    np.testing.assert_allclose(*found, rtol=1e-9)


def test_a_fallback_is_never_taken_silently():
    model = Bare()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with pytest.raises(UncoveredParameterError, match=r'gate .*fallback="jvp"'):
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
