"""Closed forms against Shapley values over subsets: of the quadratic utility, and of torch's own step."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ghostgram.algorithms.in_run_shapley.fidelity import FORMS, agreement, closed_form, fidelity
from ghostgram.algorithms.in_run_shapley.monte_carlo import StepGame, exact_shapley, monte_carlo_shapley
from ghostgram.training.linearize import linearize

BATCH = 6
OPTIMIZERS = {
    "SGD": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, weight_decay=0.1),
    "AdamW": lambda p, lr: torch.optim.AdamW(p, lr=lr, betas=(0.9, 0.95), weight_decay=0.1),
}


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 1)
        self.double()

    def forward(self, x):
        return self.down(torch.tanh(self.up(x))).squeeze(-1)


def regression(count, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=g, dtype=torch.float64)
    return x, torch.sin(x.sum(1)) + 0.1 * torch.randn(count, generator=g, dtype=torch.float64)


def squares(model, batch):
    """Shares of a mean."""
    return F.mse_loss(model(batch[0]), batch[1], reduction="none") / len(batch[0])


SETS = {"a": lambda m: squares(m, regression(7, 2)).sum(), "b": lambda m: squares(m, regression(5, 3)).sum()}


def warmed(optimizer, lr=0.05, steps=2, batch=BATCH):
    """A game of a model that has trained a little."""
    model = TwoLayers()
    optimizer = optimizer(model.parameters(), lr)
    for number in range(steps):
        optimizer.zero_grad()
        squares(model, regression(batch, 10 + number)).sum().backward()
        optimizer.step()
    optimizer.zero_grad()
    return model, optimizer, StepGame(model, optimizer, lambda: squares(model, regression(batch, 1)), SETS)


def shapley(utility, count):
    """By definition, over all subsets of `count` players."""
    utilities = {s: utility(s) for size in range(count + 1) for s in itertools.combinations(range(count), size)}
    values = []
    for i in range(count):
        without = [s for s in utilities if i not in s]
        weights = [math.factorial(len(s)) * math.factorial(count - 1 - len(s)) / math.factorial(count) for s in without]
        values.append(
            sum(w * (utilities[tuple(sorted((*s, i)))] - utilities[s]) for w, s in zip(weights, without, strict=True))
        )
    return torch.stack(values)


def taylor(model, order):
    """U(u) = <g, u> + u^T H u / 2 of both sets, (K,), and the flat gradients that the batch's samples give."""
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    shapes = {name: p.shape for name, p in model.named_parameters()}

    def loss(w):
        parts = w.split([s.numel() for s in shapes.values()])
        weights = {name: part.view(s) for (name, s), part in zip(shapes.items(), parts, strict=True)}
        call = lambda x: torch.func.functional_call(model, weights, (x,))  # noqa: E731
        return torch.stack([loss(call) for loss in SETS.values()])

    g = torch.autograd.functional.jacobian(loss, flat)
    H = torch.stack([torch.autograd.functional.hessian(lambda w, k=k: loss(w)[k], flat) for k in range(len(SETS))])
    return g, H, lambda u: g @ u + (u @ H @ u / 2 if order == 2 else 0)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("v_state", ["pre", "post"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_closed_form_is_the_shapley_value_of_the_taylor_utility(kind, v_state, order):
    model, optimizer, game = warmed(OPTIMIZERS[kind])
    batch = regression(BATCH, 1)
    parameters = list(model.parameters())
    g = [torch.autograd.grad(share, parameters, retain_graph=True) for share in squares(model, batch)]
    whole = [sum(each) for each in zip(*g, strict=True)]
    steps = linearize(optimizer, optimizer.param_groups[0], parameters, whole if v_state == "post" else None)
    h = torch.cat([step.h.flatten() for step in steps])
    delta = torch.stack([-torch.cat([(s.P * d).flatten() for s, d in zip(steps, each, strict=True)]) for each in g])
    _, _, U = taylor(model, order)

    truth = shapley(lambda s: U(h + delta[list(s)].sum(0)), BATCH)
    found = closed_form(game, v_state, "hvp" if order == 2 else None)
    assert (found.values + truth).abs().max() <= 1e-10 * truth.abs().max()
    assert (found.history - U(h)).abs().max() <= 1e-10
    assert (found.history - found.values.sum(0) - U(h + delta.sum(0))).abs().max() <= 1e-10  # efficiency


def test_plain_sgd_gives_theorems_3_and_4():
    model, _, game = warmed(lambda p, lr: torch.optim.SGD(p, lr))
    g, H, _ = taylor(model, 2)
    shares, lr = game.shares, 0.05
    first = -lr * shares @ g.T
    second = first + lr**2 / 2 * torch.einsum("ia,kab,b->ik", shares, H, shares.sum(0))
    for v_state in ("pre", "post", "secant", "proxy"):
        assert (closed_form(game, v_state).values + first).abs().max() <= 1e-12
    assert (closed_form(game, "post", "hvp").values + second).abs().max() <= 1e-12
    assert not closed_form(game, "post", "hvp").history.any()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_exact_shapley_is_the_definition_with_torchs_own_step(kind):
    model, optimizer, game = warmed(OPTIMIZERS[kind], batch=4)
    batch = regression(4, 1)

    def utility(subset):
        twin, stepper = copy.deepcopy((model, optimizer))
        squares(twin, batch)[list(subset)].sum().backward()
        stepper.step()
        return torch.stack([loss(twin) - loss(model) for loss in SETS.values()]).detach()

    truth, found = shapley(utility, 4), exact_shapley(game)
    assert (found.values + truth).abs().max() <= 1e-12
    assert (found.history - utility(())).abs().max() <= 1e-12
    assert not found.errors.any()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_monte_carlo_is_within_its_standard_error(kind):
    """Of 12 values, three standard errors away would be one in 30 such tests; and more permutations come nearer."""
    _, _, game = warmed(OPTIMIZERS[kind], lr=0.3)
    truth = exact_shapley(game)
    for permutations in (40, 400):
        found = monte_carlo_shapley(game, permutations, seed=1)
        z = (found.values - truth.values) / found.errors
        assert z.abs().max() <= 4
        assert 0.3 <= z.square().mean().sqrt() <= 2
        assert (found.values.sum(0) - truth.values.sum(0)).abs().max() <= 1e-12
        assert torch.equal(found.history, truth.history)
    assert (
        monte_carlo_shapley(game, 400, seed=1).errors.mean() < monte_carlo_shapley(game, 40, seed=1).errors.mean() / 2
    )


def test_reverse_permutations_make_quadratic_utilities_exact():
    """The loss of a linear model is quadratic in the weights, plain SGD linear in the gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    game = StepGame(model, optimizer, lambda: squares(model, regression(BATCH, 1)), SETS)
    truth = exact_shapley(game).values
    assert (monte_carlo_shapley(game, 4).values - truth).abs().max() <= 1e-12
    assert (closed_form(game, "post", "hvp").values - truth).abs().max() <= 1e-12


def test_midpoints_residual_falls_eightfold_when_the_step_is_halved():
    _, optimizer, game = warmed(OPTIMIZERS["SGD"], lr=0.1)
    residuals = []
    for lr in (0.1, 0.05, 0.025):
        optimizer.param_groups[0]["lr"] = lr
        found = closed_form(game, "post", "midpoint")
        measured = game.changes(torch.ones(1, BATCH, dtype=torch.bool))[0]
        residuals.append((measured - found.history + found.values.sum(0)).abs())
    for larger, smaller in itertools.pairwise(residuals):
        assert ((larger / smaller >= 6) & (larger / smaller <= 10)).all()


@pytest.mark.parametrize("lr", [0.4, 0.2, 0.1, 0.05])
def test_midpoint_is_nearer_to_the_true_utility_than_the_hessian(lr):
    _, optimizer, game = warmed(lambda p, lr: torch.optim.SGD(p, lr), lr=0.1)
    optimizer.param_groups[0]["lr"] = lr
    truth = exact_shapley(game).values
    first, hvp, midpoint = (
        (closed_form(game, "post", curvature).values - truth).norm() for curvature in (None, "hvp", "midpoint")
    )
    assert midpoint < hvp < first


def test_each_form_is_nearer_to_adams_real_step_than_the_one_before():
    """Mean over 40 steps of the two-layer model, all subsets of 8 samples."""
    model = TwoLayers()
    optimizer = OPTIMIZERS["AdamW"](model.parameters(), 0.02)
    order = ("proxy", "pre", "post", "post, midpoint", "secant, midpoint")
    found = {form: [] for form in order}
    for number in range(44):
        batch = regression(8, 100 + number)
        if number >= 4:
            game = StepGame(model, optimizer, lambda batch=batch: squares(model, batch), SETS["a"], together=256)
            truth = exact_shapley(game).values[:, 0]
            for form in order:
                found[form].append(agreement(closed_form(game, *FORMS[form]).values[:, 0], truth))
        optimizer.zero_grad()
        squares(model, batch).sum().backward()
        optimizer.step()
    pearson = {form: sum(each.pearson for each in rows) / 40 for form, rows in found.items()}
    error = {form: sum(each.relative_rmse for each in rows) / 40 for form, rows in found.items()}
    assert all(pearson[a] < pearson[b] for a, b in itertools.pairwise(order))
    assert all(error[a] > error[b] for a, b in itertools.pairwise(order))
    assert pearson["post"] > 0.98
    assert pearson["secant, midpoint"] > 0.999


def test_fidelity_of_a_step_names_forms_and_sets_and_changes_nothing():
    model, optimizer, _ = warmed(OPTIMIZERS["AdamW"])
    model.insert = nn.Dropout(0.5)  # draws nothing in evaluation
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict())), torch.get_rng_state()
    found = fidelity(model, optimizer, lambda: squares(model, regression(BATCH, 1)), SETS, permutations=20)
    assert set(found) == {(form, name) for form in FORMS for name in SETS}
    assert found["secant, midpoint", "a"].pearson > found["proxy", "a"].pearson
    for old, new in zip(before[0], (model.state_dict(), optimizer.state_dict()), strict=True):
        torch.testing.assert_close(old, new, rtol=0, atol=0)
    assert torch.equal(before[1], torch.get_rng_state())
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_one_subset_at_a_time_is_the_same():
    model, optimizer, game = warmed(OPTIMIZERS["AdamW"])
    loop = StepGame(model, optimizer, lambda: squares(model, regression(BATCH, 1)), SETS, together=1)
    subsets = torch.tensor([[0, 1, 1, 0, 1, 0], [1] * 6, [0] * 6]).bool()
    assert (loop.changes(subsets) - game.changes(subsets)).abs().max() <= 1e-14


def test_parameters_that_no_sample_reaches_stay():
    """As the optimizer leaves them: neither decay nor momentum moves what has no gradient."""
    model = TwoLayers()
    model.unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    model.frozen = nn.Parameter(torch.ones(3, dtype=torch.float64), requires_grad=False)
    optimizer = OPTIMIZERS["SGD"](model.parameters(), 0.1)
    loss = lambda m: SETS["a"](m) + m.unused.square().sum() + m.frozen.sum()  # noqa: E731
    game = StepGame(model, optimizer, lambda: squares(model, regression(BATCH, 1)), loss)
    _, _, plain = warmed(OPTIMIZERS["SGD"], 0.1, steps=0)
    assert (exact_shapley(game).values[:, 0] - exact_shapley(plain).values[:, 0]).abs().max() <= 1e-12


def test_agreement():
    truth = torch.tensor([1.0, 2.0, 3.0, 3.0])
    assert agreement(2 * truth, truth) == pytest.approx((1, 1, math.sqrt(23 / 4), 1))
    assert agreement(-(truth**3), truth).spearman == pytest.approx(-1)
    assert agreement(torch.tensor([1.0, 3.0, 2.0, 2.0]), truth).spearman == pytest.approx(1 / 3)
    assert math.isnan(agreement(torch.zeros(4), truth).pearson)


def test_bad_arguments_are_named():
    model, optimizer, game = warmed(OPTIMIZERS["SGD"])
    with pytest.raises(ValueError, match="permutations: expected an even number, at least 4, got 5"):
        monte_carlo_shapley(game, 5)
    with pytest.raises(ValueError, match=r"v_state: expected .*, got 'late'"):
        closed_form(game, "late")
    with pytest.raises(ValueError, match=r"curvature: expected .*, got 'exact'"):
        closed_form(game, "post", "exact")
    with pytest.raises(ValueError, match=r"forms: expected some of .*, got \['best'\]"):
        fidelity(model, optimizer, lambda: squares(model, regression(3, 1)), SETS, forms=["pre", "best"])
    with pytest.raises(ValueError, match="1 of its parameters do not belong to the model"):
        StepGame(model, torch.optim.SGD([nn.Parameter(torch.zeros(2))]), lambda: torch.zeros(2), SETS)
    with pytest.raises(ValueError, match=r"expected a floating-point \(B,\) tensor"):
        StepGame(model, optimizer, lambda: squares(model, regression(3, 1)).sum(), SETS)
    with pytest.raises(TypeError, match="got Adagrad"):
        StepGame(model, torch.optim.Adagrad(model.parameters()), lambda: torch.zeros(2), SETS)
    with pytest.raises(ValueError, match="at most 16 samples for all their subsets, got 17"):
        exact_shapley(StepGame(model, optimizer, lambda: squares(model, regression(17, 1)), SETS))
