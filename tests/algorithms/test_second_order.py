"""Second order: the Shapley value of the quadratic utility, by every way to take dots that come late."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import ghostgram as gg
from algorithms.models import BATCH, Small, language_model, lm_loss, mse, phis, regression, sentences, warmed
from ghostgram.algorithms.in_run_shapley import directions
from ghostgram.training.linearize import linearize
from ghostgram.training.secant import secant

COUNT = 5


def all_subsets(utility):
    """Shapley values of COUNT players by definition."""
    values = []
    for i in range(COUNT):
        others = [j for j in range(COUNT) if j != i]
        values.append(
            sum(
                math.factorial(size) * math.factorial(COUNT - 1 - size) / math.factorial(COUNT)
                * (utility((*s, i)) - utility(s))
                for size in range(COUNT)
                for s in itertools.combinations(others, size)
            )
        )  # fmt: skip
    return np.array(values)


class Setting:
    """One warmed step of a small model, with everything that its utility is made of."""

    def __init__(self, kind, lr=0.05, v_state="secant", **options):
        self.model, self.batch, self.held_out = Small(), regression(COUNT, 1), regression(7, 2)
        self.make = lambda parameters: kind(parameters, lr=lr, weight_decay=0.1, **options)
        self.optimizer = self.make(self.model.parameters())
        warmed(self.model, self.optimizer, lambda m: mse(m, regression(4, 3)))
        self.twin = copy.deepcopy(self.model)
        params = list(self.twin.parameters())
        original = self.make(params)
        original.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        share = lambda i: mse(self.twin, [x[i : i + 1] for x in self.batch]) / COUNT  # noqa: E731
        self.shares = [torch.autograd.grad(share(i), params) for i in range(COUNT)]
        whole = [sum(s) for s in zip(*self.shares, strict=True)]
        self.v_state = v_state
        form = secant if v_state == "secant" else linearize
        self.steps = form(original, original.param_groups[0], params, whole)

    def moved(self, subset):
        return [
            (0 if h is None else h) - sum((P * self.shares[i][w] for i in subset), start=torch.zeros_like(P))
            for w, (P, h) in enumerate(self.steps)
        ]

    def quadratic(self, subset):
        params, delta = list(self.twin.parameters()), self.moved(subset)
        g = torch.autograd.grad(mse(self.twin, self.held_out), params, create_graph=True)
        slope = sum((a * b).sum() for a, b in zip(g, delta, strict=True))
        H = torch.autograd.grad(slope, params)
        return float(slope.detach() + 0.5 * sum((a * b).sum() for a, b in zip(H, delta, strict=True)))

    def true(self, subset):
        params, delta = list(self.twin.parameters()), self.moved(subset)
        moved = {n: p + d for (n, p), d in zip(self.twin.named_parameters(), delta, strict=True)}
        assert len(params) == len(moved)
        y = torch.func.functional_call(self.twin, moved, (self.held_out[0],))
        return float(F.mse_loss(y, self.held_out[1]) - mse(self.twin, self.held_out))

    def scored(self, **options):
        """(phi, ledger row) of the engine, whose optimizer takes the step."""
        shapley = gg.InRunShapley(
            self.model,
            self.optimizer,
            lambda m: mse(m, self.held_out),
            **{"order": 2, "v_state": self.v_state} | options,
        )
        with shapley.step(ids=range(COUNT), losses=lambda: share_of_mse(self.model, self.batch)):
            mse(self.model, self.batch).backward()
        self.optimizer.step()
        return phis(shapley)[:, 0], shapley.ledger().to_pylist()[0]


def share_of_mse(model, batch):
    return (model(batch[0]) - batch[1]).square() / len(batch[1])


KINDS = {
    "SGD": (torch.optim.SGD, {}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "AdamW": (torch.optim.AdamW, {}),
    "AdamW, post": (torch.optim.AdamW, {"v_state": "post"}),
    "Adam": (torch.optim.Adam, {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_hessian_form_is_the_shapley_value_of_the_quadratic_utility(kind):
    optimizer, options = KINDS[kind]
    setting = Setting(optimizer, **options)
    expected = all_subsets(setting.quadratic)
    phi, row = setting.scored(curvature="hvp")
    assert np.abs(phi - expected).max() <= 1e-10 * np.abs(expected).max()
    assert row["history"] == pytest.approx(setting.quadratic(()), rel=1e-10)
    assert row["predicted"] == pytest.approx(setting.quadratic(range(COUNT)), rel=1e-10)
    assert row["v_state"] == setting.v_state
    assert row["order"] == 2


@pytest.mark.parametrize("kind", KINDS)
def test_middle_of_the_step_is_nearer_to_the_true_utility_than_the_hessian_form(kind):
    optimizer, options = KINDS[kind]
    errors = []
    for curvature in ("midpoint", "hvp"):
        setting = Setting(optimizer, **options)
        expected = all_subsets(setting.true)
        phi, row = setting.scored(curvature=curvature)
        errors.append(np.abs(phi - expected).max() / np.abs(expected).max())
        assert row["history"] == pytest.approx(setting.true(()) if curvature == "midpoint" else setting.quadratic(()))
    assert errors[0] < errors[1] < 0.3


def test_residual_of_the_middle_falls_eightfold_when_the_step_is_halved():
    residuals = [abs(Setting(torch.optim.SGD, lr=lr).scored()[1]["residual"]) for lr in (0.02, 0.01)]
    assert 6 < residuals[0] / residuals[1] < 10


@pytest.mark.parametrize("kind", ["Adam", "AdamW"])
def test_where_the_loss_bends_more_gradients_than_the_middle_are_nearer_to_the_truth(kind, monkeypatch):
    """At a learning rate of 0.5 the step is far outside of where third derivatives are small."""
    optimizer, options = KINDS[kind]
    errors, left = [], []
    for parts in (1, 27):
        monkeypatch.setattr(directions, "PARTS", parts)
        setting = Setting(optimizer, lr=0.5, **options)
        expected = all_subsets(setting.true)
        phi, row = setting.scored()
        errors.append(np.abs(phi - expected).max() / np.abs(expected).max())
        left.append(abs(row["residual"]) / (abs(row["sum_phi"]) + abs(row["history"])))
        assert row["history"] == pytest.approx(setting.true(()))
    assert left[1] <= directions.CLOSE < left[0]
    assert errors[1] < errors[0] / 2


def test_values_of_a_bent_step_are_averages_along_it(monkeypatch):
    """At 1 + 3 parts: of the gradients in the middles of thirds, the middle one taken once."""
    monkeypatch.setattr(directions, "PARTS", 3)
    monkeypatch.setattr(directions, "BENT", 0.0)
    monkeypatch.setattr(directions, "CLOSE", 0.0)
    setting = Setting(torch.optim.AdamW)
    P, h = zip(*setting.steps, strict=True)
    G = [sum(parts) for parts in zip(*setting.shares, strict=True)]
    expected = np.zeros(COUNT)
    for s in (1 / 6, 3 / 6, 5 / 6):
        twin = copy.deepcopy(setting.twin)
        with torch.no_grad():
            for w, factor, carried, gradient in zip(twin.parameters(), P, h, G, strict=True):
                w += carried - s * factor * gradient
        q = torch.autograd.grad(mse(twin, setting.held_out), list(twin.parameters()))
        expected -= [
            sum(float((g * a * b).sum()) / 3 for g, a, b in zip(each, P, q, strict=True)) for each in setting.shares
        ]
    np.testing.assert_allclose(setting.scored()[0], expected, rtol=1e-9)


def test_an_ordinary_step_takes_one_validation_gradient():
    for lr, expected in ((0.05, 1), (0.5, 3)):
        setting, taken = Setting(torch.optim.AdamW, lr=lr), []

        def validation(model, setting=setting, taken=taken):
            taken.append(torch.is_grad_enabled())
            return mse(model, setting.held_out)

        shapley = gg.InRunShapley(setting.model, setting.optimizer, validation, order=2)
        with shapley.step(ids=range(COUNT)):
            mse(setting.model, setting.batch).backward()
        setting.optimizer.step()
        shapley.close()
        assert sum(taken) == expected


def test_first_order_beside_second():
    phi1 = Setting(torch.optim.AdamW).scored(order=1, v_state="post")[0]
    setting = Setting(torch.optim.AdamW)
    shapley = gg.InRunShapley(
        setting.model, setting.optimizer, lambda m: mse(m, setting.held_out), 2, v_state="post", compare_orders=True
    )
    with shapley.step(ids=range(COUNT)):
        mse(setting.model, setting.batch).backward()
    setting.optimizer.step()
    log = shapley.step_log()
    np.testing.assert_allclose(log["phi1_validation"].to_numpy(), phi1, rtol=1e-12)
    alone = Setting(torch.optim.AdamW, v_state="post").scored()[0]
    np.testing.assert_allclose(log["phi_validation"].to_numpy(), alone, rtol=1e-12)


class WithDropout(Small):
    def forward(self, x):
        return super().forward(F.dropout(x, 0.3, self.training))


@pytest.mark.parametrize("pieces", [[slice(0, 6)], [slice(0, 2), slice(2, 6)]], ids=["one batch", "two"])
@pytest.mark.parametrize("clip", [None, 1e-2])
@pytest.mark.parametrize("scale", [1.0, 2.0**10])
def test_late_ways_agree(pieces, clip, scale):
    """Stored, replayed and forward-only dots are the same, through dropout, accumulation, clipping and scaling."""
    x, y = regression(6, 1, torch.float64)
    found = {}
    for late in ("stored", "replay", "forward"):
        torch.manual_seed(5)
        model = WithDropout()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        shapley = gg.InRunShapley(model, optimizer, lambda m: mse(m, regression(7, 2)), order=2, late=late)
        for _ in range(2):
            with shapley.step():
                for piece in pieces:
                    losses = lambda p=piece, m=model, s=scaler: s.scale((m(x[p]) - y[p]).square() / 6)  # noqa: E731
                    with shapley.samples(torch.arange(6)[piece], losses):
                        losses().sum().backward()
            scaler.unscale_(optimizer)
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        found[late] = phis(shapley)
        assert shapley.ledger().to_pylist()[1]["residual"] == pytest.approx(0, abs=1e-3)
    for late in ("replay", "forward"):
        np.testing.assert_allclose(found[late], found["stored"], rtol=1e-9, atol=1e-15)


def test_replayed_training_is_plain_training_to_the_bit():
    weights = []
    for scored in (False, True):
        torch.manual_seed(7)
        model = WithDropout(torch.float32)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        shapley = gg.InRunShapley(
            model, optimizer, lambda m: mse(m, regression(7, 2, torch.float32)), order=2, late="replay"
        )
        for number in range(5):
            batch = regression(5, number, torch.float32)
            if scored:
                with shapley.step(ids=range(5), losses=lambda m=model, b=batch: mse(m, b)):
                    mse(model, batch).backward()
            else:
                mse(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append([p.detach() for p in model.parameters()] + [torch.get_rng_state()])
    assert all(torch.equal(*pair) for pair in zip(*weights, strict=True))


@pytest.mark.parametrize("late", ["stored", "replay"])
def test_language_model_by_all_its_layers(late):
    """Second order on a tied GPT-2 equals the definition with one-sample gradients."""
    model, ids, held_out = language_model("gpt2 tied"), sentences(BATCH, 1), sentences(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    warmed(model, optimizer, lambda m: lm_loss(m, sentences(BATCH, 4)))
    params = list(model.parameters())
    shares = [torch.autograd.grad(lm_loss(model, ids[i : i + 1]) / BATCH, params) for i in range(BATCH)]
    whole = [sum(s) for s in zip(*shares, strict=True)]
    steps = secant(optimizer, optimizer.param_groups[0], params, whole)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for w, (P, h), G in zip(twin.parameters(), steps, whole, strict=True):
            w += h - 0.5 * P * G
    q = torch.autograd.grad(lm_loss(twin, held_out), list(twin.parameters()))
    expected = [-sum(float((g * P * m).sum()) for g, (P, _), m in zip(s, steps, q, strict=True)) for s in shares]
    shapley = gg.InRunShapley(model, optimizer, lambda m: lm_loss(m, held_out), order=2, late=late)
    before = [p.detach().clone() for p in params]
    with shapley.step(ids=range(BATCH), losses=lambda: lm_loss(model, ids)):
        lm_loss(model, ids).backward()
    shapley._before_optimizer()
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))
    optimizer.step()
    np.testing.assert_allclose(phis(shapley)[:, 0], expected, rtol=1e-8)


def test_flash_attention_alone_does_for_the_middle_but_not_for_the_hessian():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 1)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.out(mixed.transpose(1, 2).flatten(2)).mean((1, 2))

    torch.manual_seed(1)
    x, y = torch.randn(4, 6, 8), torch.randn(4)
    for curvature in ("midpoint", "hvp"):
        model = Attention()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        shapley = gg.InRunShapley(model, optimizer, lambda m: F.mse_loss(m(x + 1), y), order=2, curvature=curvature)
        with shapley.step(ids=range(4)):
            F.mse_loss(model(x), y).backward()
        if curvature == "hvp":
            with pytest.raises(RuntimeError, match=r"cannot be differentiated twice.*flash.*midpoint"):
                optimizer.step()
        else:
            optimizer.step()
            row = shapley.ledger().to_pylist()[0]
            assert row["predicted"] == pytest.approx(row["measured"], rel=1e-2)


def test_sixteen_bit_weights_cannot_be_put_in_the_middle():
    model = Small(torch.bfloat16)
    with pytest.raises(ValueError, match="curvature: expected 'hvp' for 16-bit weights"):
        gg.InRunShapley(model, torch.optim.SGD(model.parameters(), lr=0.1), lambda m: m(torch.ones(1, 5)), order=2)


def test_replay_without_losses_is_an_error():
    setting = Setting(torch.optim.SGD)
    shapley = gg.InRunShapley(
        setting.model, setting.optimizer, lambda m: mse(m, setting.held_out), order=2, late="replay"
    )
    with pytest.raises(ValueError, match="losses: expected a callable that computes the loss again"):
        with shapley.step(ids=range(COUNT)):
            mse(setting.model, setting.batch).backward()
