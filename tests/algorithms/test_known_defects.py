"""Defects seen in public code for In-Run Data Shapley and its like, each put into ours: a check must refuse it.

What a check is here: the always-on sum check, the audit, or the comparison with one-sample gradients that the other
tests make to 1e-5. Distributed defects stand in test_distributed.py, silent fallbacks in test_fallback_and_audit.py.
"""

import dataclasses
import gc

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import ghostgram as gg
from algorithms.models import BATCH, Small, language_model, lm_loss, mse, phis, regression, sentences
from ghostgram.ops.cost_model import choose_way
from ghostgram.taps import Taps, linear
from ghostgram.taps import session as sessions
from ghostgram.taps.uses import TableUse


def one_step(kind="gpt2 tied", dtype=torch.float32, held_out=3, lr=0.1):
    """(phi of the engine, phi of a loop over single samples) of one SGD step."""
    model, ids, validation = language_model(kind, dtype), sentences(BATCH, 1), sentences(held_out, 2)
    params = list(model.parameters())
    g = torch.autograd.grad(lm_loss(model, validation), params)
    shares = [torch.autograd.grad(lm_loss(model, ids[i : i + 1]) / BATCH, params) for i in range(BATCH)]
    truth = np.array([-lr * sum(float((a * b).sum()) for a, b in zip(s, g, strict=True)) for s in shares])
    shapley = gg.InRunShapley(model, torch.optim.SGD(params, lr=lr), lambda m: lm_loss(m, validation))
    with shapley.step(ids=range(BATCH)):
        lm_loss(model, ids).backward()
    shapley._optimizer.step()
    return phis(shapley)[:, 0], truth


def error(found, truth):
    return np.abs(found - truth).max() / np.abs(truth).max()


def test_products_of_batch_sums_are_right_for_one_validation_sample_only():
    """Validation rows of a and b summed before their product: invisible with V = 1, wrong with V = 3."""
    torch.manual_seed(0)
    layer, batch = nn.Linear(7, 5, bias=False).double(), torch.randn(4, 7, dtype=torch.float64)
    for rows in (1, 3):
        held_out = torch.randn(rows, 7, dtype=torch.float64)
        y = layer(held_out)
        b = torch.autograd.grad(torch.tanh(y).sum(), y)[0]
        summed = -torch.outer(b.sum(0), held_out.sum(0))
        optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
        shapley = gg.InRunShapley(layer, optimizer, lambda m, x=held_out: torch.tanh(m(x)).sum())
        with shapley.step(ids=range(4)):
            layer(batch).square().sum().backward()
        defect = (2 * layer(batch)[:, :, None] * batch[:, None, :] * summed).sum((1, 2)).detach().numpy()
        shapley._before_optimizer()
        wrong = error(defect, phis(shapley)[:, 0])
        assert wrong < 1e-12 if rows == 1 else wrong > 0.1
        layer.zero_grad()


def test_one_use_of_a_tied_weight_overwriting_the_other(monkeypatch):
    """The embedding's dots lost, the head's kept."""
    monkeypatch.setattr(TableUse, "dots", lambda _, D: D.new_zeros(BATCH, 1))
    with pytest.raises(RuntimeError, match=r"wte\.weight: the samples' dots sum to"):
        one_step()


def test_tied_weights_by_products_of_each_use_without_cross_terms():
    """Each use's own validation gradient times that use's sample gradient: the cross terms are missing."""
    torch.manual_seed(0)
    W = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    first, second = W * 1.0, W * 1.0

    def loss(ids):
        return torch.logsumexp(torch.tanh(first[ids]) @ second.T, -1).mean(-1)

    train, held_out = torch.randint(0, 9, (5, 6)), torch.randint(0, 9, (2, 6))
    g_first, g_second = torch.autograd.grad(loss(held_out).mean(), (first, second), retain_graph=True)
    whole, parted = [], []
    for i in range(5):
        s_first, s_second = torch.autograd.grad(loss(train)[i], (first, second), retain_graph=True)
        whole.append(float(((s_first + s_second) * (g_first + g_second)).sum()))
        parted.append(float((s_first * g_first).sum() + (s_second * g_second).sum()))
    assert error(np.array(parted), np.array(whole)) > 0.05


def test_dots_in_bfloat16_within_a_float32_run(monkeypatch):
    assert error(*one_step()) < 1e-5
    right = linear.matrix_stats

    def rounded(a, b, D, *rest):
        return right(a.bfloat16(), b.bfloat16(), D, *rest)

    monkeypatch.setattr(linear, "matrix_stats", rounded)
    assert error(*one_step()) > 1e-4


def test_values_carry_the_learning_rate_and_no_batch_factor():
    """Twice the learning rate is twice the value; validation rows given twice, or more of them, change no scale."""
    base, _ = one_step(lr=0.1)
    np.testing.assert_allclose(one_step(lr=0.2)[0], 2 * base, rtol=1e-5)
    model, ids, validation = language_model("gpt2"), sentences(BATCH, 1), sentences(3, 2)
    found = []
    for rows in (validation, validation.repeat(2, 1)):
        shapley = gg.InRunShapley(model, torch.optim.SGD(model.parameters(), lr=0.1), lambda m, v=rows: lm_loss(m, v))
        with shapley.step(ids=range(BATCH)):
            lm_loss(model, ids).backward()
        shapley._before_optimizer()
        model.zero_grad()
        found.append(phis(shapley))
    np.testing.assert_allclose(*found, rtol=1e-9)


def test_scores_of_one_microbatch_overwriting_another():
    """Every microbatch of a step has its rows; under a common denominator they are those of one batch."""
    found = []
    for pieces in ([slice(0, 6)], [slice(0, 2), slice(2, 6)]):
        model, (x, y) = Small(), regression(6, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        shapley = gg.InRunShapley(model, optimizer, lambda m: mse(m, regression(7, 2)))
        with shapley.step():
            for piece in pieces:
                with shapley.samples(torch.arange(6)[piece]):
                    (mse(model, (x[piece], y[piece]), "sum") / 6).backward()
        optimizer.step()
        assert shapley.step_log()["sample_id"].to_pylist() == list(range(6))
        found.append(phis(shapley))
    assert shapley.step_log()["microbatch"].to_pylist() == [0, 0, 1, 1, 1, 1]
    np.testing.assert_allclose(*found, rtol=1e-9)


def test_frozen_parameters_stay_frozen():
    model = Small()
    model.up.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    shapley = gg.InRunShapley(model, optimizer, lambda m: mse(m, regression(7, 2)))
    with shapley.step(ids=range(5)):
        mse(model, regression(5, 1)).backward()
    assert not model.up.weight.requires_grad
    assert model.up.weight.grad is None
    assert "up.weight" not in {row.name for row in shapley.coverage().rows}


def test_a_padding_row_that_is_scored(monkeypatch):
    """Its gradient is zero, so its dots must be; the sum check refuses a plain gather of D at padded positions."""

    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.tok, self.head = nn.Embedding(9, 6, padding_idx=0), nn.Linear(6, 1)
            nn.init.normal_(self.tok.weight)

        def forward(self, ids):
            return self.head(torch.tanh(self.tok(ids))).mean((1, 2))

    ids = torch.tensor([[1, 2, 0], [3, 0, 0], [4, 5, 6]])

    def step():
        model = Padded()
        shapley = gg.InRunShapley(
            model, torch.optim.SGD([*model.parameters()], lr=0.1), lambda m: m(ids.roll(1, 1)).exp().mean()
        )
        with shapley.step(ids=range(3)):
            model(ids).square().sum().backward()

    step()
    right = TableUse.dots
    monkeypatch.setattr(TableUse, "dots", lambda use, D: right(dataclasses.replace(use, padding=-1), D + 1.0))
    with pytest.raises(RuntimeError, match=r"tok\.weight: the samples' dots sum to"):
        step()


def test_a_module_called_twice_whose_first_call_is_forgotten(monkeypatch):
    class Twice(Small):
        def forward(self, x):
            return super().forward(
                torch.tanh(x @ self.up.weight.detach().T) @ self.up.weight.detach()
            ) + super().forward(x)

    def step():
        model = Twice()
        shapley = gg.InRunShapley(
            model, torch.optim.SGD(model.parameters(), lr=0.1), lambda m: mse(m, regression(7, 2))
        )
        with shapley.step(ids=range(5)):
            mse(model, regression(5, 1)).backward()

    step()
    seen = set()
    right = linear.matrix_stats

    def first_only(a, b, D, *rest):
        grad, dots = right(a, b, D, *rest)
        fresh = a.shape not in seen
        seen.add(a.shape)
        return grad, dots if fresh or dots is None else dots * 0

    monkeypatch.setattr(linear, "matrix_stats", first_only)
    with pytest.raises(RuntimeError, match=r"(up|down)\.weight: the samples' dots sum to"):
        step()


def test_checkpointed_activations_are_not_held():
    """No layer input of a checkpointed block is alive between forward and backward."""

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(5, 37), nn.Linear(37, 5)

        def forward(self, x):
            block = lambda y: self.down(torch.tanh(self.up(y)))  # noqa: E731
            return checkpoint(block, x, use_reentrant=False)

    model = Checkpointed()
    shapley = gg.InRunShapley(model, torch.optim.SGD(model.parameters(), lr=0.1), lambda m: m(torch.ones(1, 5)).sum())
    with shapley.step(ids=range(4)):
        loss = model(torch.randn(4, 5)).square().sum()
        gc.collect()
        assert not [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and o.shape == (4, 37)]
        loss.backward()


def test_a_batch_that_raises_raises():
    model = Small()
    shapley = gg.InRunShapley(model, torch.optim.SGD(model.parameters(), lr=0.1), lambda m: mse(m, regression(7, 2)))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        with shapley.step(ids=range(5)):
            model(torch.ones(5, 4, dtype=torch.float64)).sum().backward()


def test_scores_that_are_all_zero(monkeypatch):
    """As another library's were under torch.compile: a probe that gets no gradient is not taken for a value of zero."""
    monkeypatch.setattr(sessions, "scores", lambda *_: (None,) * 7)
    monkeypatch.setattr(linear, "scores", lambda *_: (None,) * 7)
    model = Small()
    shapley = gg.InRunShapley(model, torch.optim.SGD(model.parameters(), lr=0.1), lambda m: mse(m, regression(7, 2)))
    with pytest.raises(RuntimeError, match="the samples' dots sum to"):
        with shapley.step(ids=range(5)):
            mse(torch.compile(model, backend="eager"), regression(5, 1)).backward()


def test_a_hessian_recursion_that_drops_a_factor():
    """g_z^T H G from tangents of the validation pass along G; the published recursion lacks an inner product of inputs.

    Two linear layers with tanh between. With b', a' the tangents along G, it is the sum over layers of
    (b_z.b'_v)(a_z.a_v) + (b_z.b_v)(a_z.a'_v); the second factor of the first term is what the recursion leaves out.
    """
    torch.manual_seed(0)
    Ws = [torch.randn(6, 4, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)]
    x_v, x_z = torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    G = [torch.randn_like(W) for W in Ws]

    def pairs(W1, W2, x):
        """Inputs and output gradients of both layers for the loss sum(y^3)."""
        a2 = torch.tanh(W1 @ x)
        b2 = 3 * (W2 @ a2) ** 2
        return (x, (W2.T @ b2) * (1 - a2**2)), (a2, b2)

    at_v, tangents = torch.func.jvp(lambda *W: pairs(*W, x_v), tuple(Ws), tuple(G))
    at_z = pairs(*Ws, x_z)
    loss = lambda W1, W2: ((W2 @ torch.tanh(W1 @ x_v)) ** 3).sum()  # noqa: E731
    H_G = torch.func.jvp(torch.func.grad(loss, argnums=(0, 1)), tuple(Ws), tuple(G))[1]
    truth = sum(float((torch.outer(b, a) * h).sum()) for (a, b), h in zip(at_z, H_G, strict=True))
    terms = [((bz @ b_t) * (az @ av), (bz @ bv) * (az @ a_t), bz @ b_t)
             for (az, bz), (av, bv), (a_t, b_t) in zip(at_z, at_v, tangents, strict=True)]  # fmt: skip
    assert float(sum(first + second for first, second, _ in terms)) == pytest.approx(truth, rel=1e-9)
    assert abs(float(sum(dropped + second for _, second, dropped in terms)) - truth) > 1e-2 * abs(truth)


def test_the_memory_rule_that_takes_the_slower_way():
    """2 T^2 <= d p says Gram for GPT-2's MLP and head at T = 1024, where it takes more multiply-adds."""
    B, T = 16, 1024
    for d, p in ((768, 3072), (3072, 768), (768, 50257)):
        assert d * p >= 2 * T**2
        assert T * (d + p) > d * p
    # Norms need half of the Gram matrix alone, which turns the head's case but not the MLP's.
    assert [choose_way("norms", ("M", "G"), B, T, *layer) for layer in ((768, 3072), (3072, 768))] == ["M", "M"]


def test_uses_add_up_per_parameter_not_per_call():
    """What `Taps.contract` adds is what autograd adds."""
    model, ids = language_model("gpt2 tied", torch.float64), sentences(BATCH, 1)
    from ghostgram.taps import cover

    coverage = cover(model, model.parameters())
    taps = Taps(coverage, list(coverage.scored.values()))
    D = {p: torch.randn(2, *p.shape, dtype=p.dtype) for p in model.parameters()}
    with taps.samples(BATCH, D):
        lm_loss(model, ids).backward()
    early = taps.dots()
    with taps.samples(BATCH, None):
        lm_loss(model, ids).backward()
    late = Taps.contract(taps.kept(), D)
    for p in model.parameters():
        torch.testing.assert_close(early[p], late[p])


def test_a_mean_over_kept_tokens_is_not_a_mean_over_samples():
    """HF's num_items_in_batch: microbatches under the count of the whole batch are the batch, whatever each holds."""
    ids = sentences(4, 1)
    labels = ids.clone()
    labels[0, 3:] = -100
    labels[2, 8:] = -100
    kept = int((labels[:, 1:] != -100).sum())

    def loss(model, rows):
        logits = model(ids[rows]).logits[:, :-1].flatten(0, 1)
        return F.cross_entropy(logits, labels[rows, 1:].flatten(), reduction="sum", ignore_index=-100) / kept

    found = []
    for pieces in ([[0, 1, 2, 3]], [[0, 1], [2, 3]], [[0], [1, 2, 3]]):
        model = language_model("llama")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        shapley = gg.InRunShapley(model, optimizer, lambda m: lm_loss(m, sentences(2, 2)))
        with shapley.step():
            for rows in pieces:
                with shapley.samples(rows):
                    loss(model, rows).backward()
        optimizer.step()
        found.append(phis(shapley)[:, 0])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-6)
    np.testing.assert_allclose(found[2], found[0], rtol=1e-6)
