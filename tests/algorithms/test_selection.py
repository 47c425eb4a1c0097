"""Online selection: one pass gives the gradient of the chosen samples, and the choice is what its rule says."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import ghostgram as gg
from algorithms.models import BATCH, Small, adam_P, language_model, lm_loss, mse, phis, regression, sentences, warmed
from ghostgram.algorithms.in_run_shapley.select import StepCurvature, at_random, greedy, threshold, top_k
from ghostgram.taps import UncoveredParameterError

# Choosers ------------------------------------------------------------------------------------------------------------


def test_top_k_is_best_first_and_the_earlier_of_equals():
    assert top_k(torch.tensor([1.0, 3.0, 2.0, 3.0]), 3).tolist() == [1, 3, 2]


def test_threshold_takes_what_exceeds_it():
    assert threshold(torch.tensor([0.5, -1.0, 0.0, 2.0]), 0.0).tolist() == [0, 3]
    assert threshold(torch.tensor([-1.0]), 0.0).tolist() == []


def test_random_draws_depend_on_the_seed_alone():
    draws = [tuple(at_random(20, 5, seed).tolist()) for seed in range(10)]
    assert len(set(draws)) == 10
    assert draws[3] == tuple(at_random(20, 5, 3).tolist())
    assert all(len(set(draw)) == 5 for draw in draws)


def example(seed, count=7):
    """First-order values and a Gram matrix of steps."""
    g = torch.Generator().manual_seed(seed)
    steps = torch.randn(count, 4, generator=g, dtype=torch.float64)
    return torch.randn(count, generator=g, dtype=torch.float64), steps @ steps.T


@pytest.mark.parametrize("seed", range(5))
def test_greedy_adds_what_the_quadratic_utility_gains_most_by(seed):
    values, gram = example(seed)

    def utility(rows):
        chosen = torch.zeros(len(values), dtype=torch.float64)
        chosen[rows] = 1.0
        return float(values @ chosen - 0.3 / 2 * chosen @ gram @ chosen)

    expected = []
    for _ in range(4):
        left = [i for i in range(len(values)) if i not in expected]
        expected.append(max(left, key=lambda i: utility([*expected, i])))
    assert greedy(values, gram, 4, 0.3).tolist() == expected


@pytest.mark.parametrize("seed", range(5))
def test_greedy_without_curvature_is_top_k(seed):
    values, gram = example(seed)
    assert torch.equal(greedy(values, gram, 5, 0.0), top_k(values, 5))


def test_greedy_passes_over_a_duplicate():
    values, gram = torch.tensor([3.0, 3.0, 1.0]), torch.tensor([[4.0, 4.0, 0.0], [4.0, 4.0, 0.0], [0.0, 0.0, 1.0]])
    assert greedy(values, gram, 2, 0.5).tolist() == [0, 2]
    assert top_k(values, 2).tolist() == [0, 1]


# One pass against two ------------------------------------------------------------------------------------------------


def learner(kind, dtype=torch.float64, optimizer=torch.optim.AdamW, **options):
    """A language model past its first step, and an engine with two validation sets."""
    model = language_model(kind, dtype)
    optimizer = optimizer(model.parameters(), lr=1e-3)
    warmed(model, optimizer, lambda m: lm_loss(m, sentences(BATCH, 4)))
    sets = {name: lambda m, seed=seed: lm_loss(m, sentences(2, seed)) for name, seed in (("a", 2), ("b", 3))}
    return model, optimizer, gg.InRunShapley(model, optimizer, sets, **options)


def two_pass(model, losses):
    """The gradients that separate passes over the chosen samples add up to."""
    return torch.autograd.grad(sum(losses), list(model.parameters()))


def assert_same_gradients(model, truth, tolerance):
    for p, g in zip(model.parameters(), truth, strict=True):
        assert (p.grad - g).norm() <= tolerance * g.norm()


METHODS = {
    "top-k": {"keep": 4},
    "greedy": {"keep": 4, "curvature": 50.0},
    "random": {"keep": 3},
    "threshold": {},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["f64", "f32"])
@pytest.mark.parametrize("kind", ["gpt2", "gpt2 tied", "llama tied"])
def test_the_gradient_is_that_of_a_second_pass_over_the_chosen(kind, dtype, tolerance, method):
    if "llama" in kind:
        tolerance = max(tolerance, 1e-5)  # its norms compute in float32 whatever the input
    model, _, shapley = learner(kind, dtype)
    ids = sentences(BATCH, 1)
    options = METHODS[method]
    if method == "threshold" and kind == "gpt2":
        options = {"least": 0.016}  # all of its values are positive
    with shapley.select(range(BATCH), method=method, **options) as chosen:
        lm_loss(model, ids).backward()
    assert 0 < len(chosen.rows) < BATCH
    assert_same_gradients(model, two_pass(model, [lm_loss(model, ids[chosen.rows])]), tolerance)


def test_without_rescaling_a_sum_loss_agrees():
    model, _, shapley = learner("gpt2 tied")
    ids = sentences(BATCH, 1)
    with shapley.select(range(BATCH), 2, rescale=False) as chosen:
        lm_loss(model, ids, "sum").backward()
    assert chosen.weights.sum() == 2
    assert_same_gradients(model, two_pass(model, [lm_loss(model, ids[chosen.rows], "sum")]), 1e-10)


def test_microbatches_accumulate():
    model, optimizer, shapley = learner("gpt2 tied")
    batches, losses = [sentences(BATCH, 1), sentences(4, 5)], []
    with shapley.step():
        for ids, keep in zip(batches, (3, 2), strict=True):
            with shapley.select(range(len(ids)), keep) as chosen:
                (lm_loss(model, ids) / 2).backward()
            losses.append(lm_loss(model, ids[chosen.rows]) / 2)
        with shapley.samples([100, 101]):
            lm_loss(model, batches[0][:2]).backward()
    losses.append(lm_loss(model, batches[0][:2]))
    assert_same_gradients(model, two_pass(model, losses), 1e-10)
    optimizer.step()
    assert shapley.step_log()["weight"].to_pylist().count(0.0) == 5
    assert shapley.step_log()["weight"].to_pylist()[-2:] == [1.0, 1.0]
    assert shapley.step_log()["candidate_a"].null_count == 2


def test_excluded_parameters_are_trained_on_the_chosen_too():
    """Though their layers are not scored; and what is chosen does not depend on them."""
    model, optimizer, shapley = learner("gpt2 tied", exclude=["transformer.wte.weight", "transformer.wpe.weight"])
    ids = sentences(BATCH, 1)
    with shapley.step(ids=range(BATCH)):
        lm_loss(model, ids).backward()
    optimizer.zero_grad()
    expected = -phis_at_one(shapley, model, optimizer, ids)
    with shapley.select(range(BATCH), 2) as chosen:
        lm_loss(model, ids).backward()
    assert torch.equal(chosen.rows, expected.mean(1).argsort(descending=True)[:2].sort().values)
    assert_same_gradients(model, two_pass(model, [lm_loss(model, ids[chosen.rows])]), 1e-10)


def phis_at_one(shapley, model, optimizer, ids):
    """What an engine that does not select says of a batch, by a twin of the whole."""
    twin, theirs = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    stepper = type(optimizer)(twin.parameters(), lr=1e-3)
    stepper.load_state_dict(theirs)
    sets = {name: lambda m, seed=seed: lm_loss(m, sentences(2, seed)) for name, seed in (("a", 2), ("b", 3))}
    engine = gg.InRunShapley(twin, stepper, sets, exclude=sorted(shapley.coverage().excluded))
    with engine.step(ids=range(len(ids))):
        lm_loss(twin, ids).backward()
    stepper.step()
    return torch.from_numpy(phis(engine))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_the_log_holds_all_candidates_and_what_was_made_of_them(kind):
    model, optimizer, shapley = learner("gpt2 tied", optimizer=kind)
    ids = sentences(BATCH, 1)
    expected = phis_at_one(shapley, model, optimizer, ids)
    with shapley.select(range(10, 10 + BATCH), 4) as chosen:
        lm_loss(model, ids).backward()
    torch.testing.assert_close(chosen.values, -expected)
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    log = shapley.step_log()
    clip = log["clip"][0].as_py()
    assert clip < 1
    candidates = torch.tensor([log["candidate_a"].to_pylist(), log["candidate_b"].to_pylist()]).T.double()
    torch.testing.assert_close(candidates, clip * expected)
    assert log["weight"].to_pylist() == chosen.weights.tolist()
    torch.testing.assert_close(torch.from_numpy(phis(shapley)), chosen.weights[:, None] * candidates)
    ledger = shapley.ledger()
    torch.testing.assert_close(
        torch.tensor(ledger["sum_phi"].to_pylist()), torch.from_numpy(phis(shapley)).sum(0).float()
    )
    worth = dict(zip(shapley.values()["id"].to_pylist(), shapley.values()["value"].to_pylist(), strict=False))
    assert all((worth[10 + i] != 0) == (i in chosen.rows) for i in range(BATCH))


def test_the_ledger_follows_the_step_taken():
    """For small SGD steps the chosen samples' phi are the measured change."""
    model, held_out = Small(), regression(7, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    shapley = gg.InRunShapley(model, optimizer, lambda m: mse(m, held_out))
    with shapley.select(range(9), 4):
        mse(model, regression(9, 1)).backward()
    optimizer.step()
    row = shapley.ledger().to_pylist()[0]
    assert row["sum_phi"] < 0
    assert abs(row["residual"]) < 1e-2 * abs(row["measured"])


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_callable_gets_values_and_gram_and_may_weight(kind):
    model, held_out, batch = Small(), regression(7, 2), regression(5, 1)
    optimizer = kind(model.parameters(), lr=0.01)
    warmed(model, optimizer, lambda m: mse(m, regression(4, 3)))
    each = [
        torch.autograd.grad(mse(model, (batch[0][i : i + 1], batch[1][i : i + 1])) / 5, list(model.parameters()))
        for i in range(5)
    ]
    Ps = [
        0.01 if kind is torch.optim.SGD else adam_P(optimizer, p, optimizer.param_groups[0]) for p in model.parameters()
    ]
    steps = torch.stack([torch.cat([(P * g).flatten() for P, g in zip(Ps, grads, strict=True)]) for grads in each])
    towards = torch.cat([g.flatten() for g in torch.autograd.grad(mse(model, held_out), list(model.parameters()))])
    weights = torch.tensor([0.5, 0.0, 3.0, 0.0, 1.0])
    seen = {}

    def choose(candidates):
        seen["values"], seen["gram"] = candidates.values, candidates.gram
        return weights

    shapley = gg.InRunShapley(model, optimizer, lambda m: mse(m, held_out))
    with shapley.select(range(5), method=choose):
        mse(model, batch).backward()
    torch.testing.assert_close(seen["values"][:, 0], steps @ towards)
    torch.testing.assert_close(seen["gram"], steps @ steps.T)
    truth = [sum(w * g for w, g in zip(weights, grads, strict=True)) for grads in zip(*each, strict=True)]
    assert_same_gradients(model, truth, 1e-10)


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.inner, self.reentrant = Small(), reentrant

    def forward(self, x):
        return checkpoint(self.inner, x.requires_grad_(), use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpointing(reentrant):
    model, batch = Checkpointed(reentrant), regression(6, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    shapley = gg.InRunShapley(model, optimizer, lambda m: mse(m.inner, regression(7, 2)))
    with shapley.select(range(6), 3) as chosen:
        mse(model, batch).backward()
    rows = chosen.rows
    assert_same_gradients(model, two_pass(model, [mse(model.inner, (batch[0].detach()[rows], batch[1][rows]))]), 1e-10)


def test_under_autocast():
    model, optimizer, shapley = learner("gpt2 tied", torch.float32)
    ids = sentences(BATCH, 1)
    with torch.autocast("cpu", torch.bfloat16):
        with shapley.select(range(BATCH), 4, "greedy", curvature=50.0) as chosen:
            lm_loss(model, ids).backward()
        truth = two_pass(model, [lm_loss(model, ids[chosen.rows])])
    assert_same_gradients(model, truth, 2e-2)
    optimizer.step()
    assert shapley.step_log().num_rows == BATCH


def test_under_compile():
    torch._dynamo.reset()
    model, batch = Small(), regression(6, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    shapley = gg.InRunShapley(model, optimizer, lambda m: mse(m, regression(7, 2)))
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        with shapley.select(range(6), 3) as chosen:
            mse(compiled, batch).backward()
        rows = chosen.rows
        assert_same_gradients(model, two_pass(model, [mse(model, (batch[0][rows], batch[1][rows]))]), 1e-10)
        optimizer.step()
        optimizer.zero_grad()


# A GradScaler, Adam's first step, a measured curvature, audits -------------------------------------------------------


def test_a_grad_scaler_changes_neither_choice_nor_values():
    rows, logged = [], []
    for scale in (1.0, 2.0**16):
        model, optimizer, shapley = learner("gpt2 tied")
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        with shapley.select(
            range(BATCH), 3, "greedy", curvature=50.0, loss_scale=scaler.get_scale() if scale > 1 else 1
        ) as c:
            scaler.scale(lm_loss(model, sentences(BATCH, 1))).backward()
        scaler.step(optimizer)
        scaler.update()
        rows.append(c.rows.tolist())
        logged.append(torch.from_numpy(phis(shapley)))
    assert rows[0] == rows[1]
    torch.testing.assert_close(*logged)


def test_an_overflow_is_left_to_the_grad_scaler():
    model, optimizer, shapley = learner("gpt2 tied", torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    before = copy.deepcopy(model.state_dict())
    with shapley.select(range(BATCH), method="threshold") as chosen:
        scaler.scale(lm_loss(model, sentences(BATCH, 1)) * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert chosen.weights.tolist() == [1.0] * BATCH
    assert scaler.get_scale() < 2.0**16
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    shapley.close()
    assert shapley.step_log()["skipped"].to_pylist() == [True] * BATCH
    assert not phis(shapley).any()


def test_adams_first_step_takes_all_because_nothing_can_be_scored():
    model = Small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    shapley = gg.InRunShapley(model, optimizer, lambda m: mse(m, regression(7, 2)))
    for step, weights in enumerate(([1.0] * 6, None)):
        with shapley.select(range(6), 2) as chosen:
            mse(model, regression(6, step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert (chosen.weights.tolist() == weights) == (step == 0)
        assert (chosen.values is None) == (step == 0)


def test_curvature_is_measured_along_the_step():
    """Of a quadratic, whose Hessian is the same everywhere."""
    torch.manual_seed(0)
    x, model = torch.randn(9, 4, dtype=torch.float64), nn.Linear(4, 1, bias=False).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    curvature, weights = StepCurvature(), []
    for _ in range(3):
        weights.append(model.weight.detach().clone())
        model.weight.grad = torch.randn_like(model.weight)
        curvature.see([{model.weight: torch.autograd.grad(model(x).square().mean(), model.weight)[0]}])
        if len(weights) > 1:
            u = (weights[-1] - weights[-2])[0]
            assert curvature.value == pytest.approx(float(u @ (2 / 9 * x.T @ x) @ u / (u @ u)), rel=1e-9)
        optimizer.step()


def test_curvature_is_never_negative():
    weight, curvature = nn.Parameter(torch.ones(2)), StepCurvature()
    for step in range(2):
        curvature.see([{weight: -weight.detach()}])
        weight.data += 1.0 + step
    assert curvature.value == 0.0


def test_greedy_goes_by_the_measured_curvature():
    """The first step has none and is top-k's; later ones are GREATS' with what the engine has seen."""
    model, held_out = Small(), regression(7, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    shapley, ours = gg.InRunShapley(model, optimizer, lambda m: mse(m, held_out)), StepCurvature()
    differs = 0
    for step in range(6):
        batch = regression(12, 10 + step)
        batch = tuple(torch.cat([x, x]) for x in batch)  # whose duplicates curvature sees
        ours.see(
            [
                dict(
                    zip(
                        model.parameters(),
                        torch.autograd.grad(mse(model, held_out), list(model.parameters())),
                        strict=True,
                    )
                )
            ]
        )
        seen = {}

        def look(candidates, seen=seen):
            seen["rows"] = greedy(candidates.values[:, 0], candidates.gram, 8, ours.value)
            seen["plain"] = top_k(candidates.values[:, 0], 8)
            return torch.zeros(24)

        twin = copy.deepcopy(model)
        stepper = torch.optim.SGD(twin.parameters(), lr=0.3)
        engine = gg.InRunShapley(twin, stepper, lambda m: mse(m, held_out))
        with engine.select(range(24), method=look):
            mse(twin, batch).backward()
        with shapley.select(range(24), 8, "greedy") as chosen:
            mse(model, batch).backward()
        assert chosen.rows.tolist() == sorted(seen["rows"].tolist())
        differs += chosen.rows.tolist() != sorted(seen["plain"].tolist())
        optimizer.step()
        optimizer.zero_grad()
    assert differs


def test_an_audit_finds_nothing_wrong():
    model, batch = Small(), regression(6, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    shapley = gg.InRunShapley(model, optimizer, lambda m: mse(m, regression(7, 2)), audit_every=1)
    with shapley.select(range(6), 3, losses=lambda: mse(model, batch, "none") / 6):
        mse(model, batch).backward()
    optimizer.step()
    assert 0 <= shapley.ledger()["audit"][0].as_py() < 1e-8


def test_random_choices_differ_from_step_to_step_and_repeat_with_the_seed():
    runs = []
    for seed in (0, 0, 1):
        model = Small()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        shapley = gg.InRunShapley(model, optimizer, lambda m: mse(m, regression(7, 2)))
        runs.append([])
        for step in range(5):
            with shapley.select(range(6), 3, "random", seed=seed) as chosen:
                mse(model, regression(6, step)).backward()
            optimizer.step()
            optimizer.zero_grad()
            runs[-1].append(tuple(chosen.rows.tolist()))
    assert runs[0] == runs[1] != runs[2]
    assert len(set(runs[0])) > 1


# Refusals ------------------------------------------------------------------------------------------------------------


def small_engine(**options):
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, gg.InRunShapley(model, optimizer, lambda m: mse(m, regression(7, 2)), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 7}, "keep: expected 1 to 6, the number of candidates, got 7"),
        ({"keep": 0}, "keep: expected 1 to 6"),
        ({}, "keep: expected a number for method='top-k', got None"),
        ({"method": "threshold", "keep": 3}, "keep: expected None for method='threshold', got 3"),
        ({"method": "best", "keep": 3}, "method: expected 'top-k', 'greedy', 'threshold', 'random' or a callable"),
        ({"method": lambda c: torch.tensor([0, 0])}, "method: expected different rows of 0 to 5"),
        ({"method": lambda c: torch.tensor([6])}, "method: expected different rows of 0 to 5"),
        ({"method": lambda c: torch.ones(5)}, "method: expected 6 finite weights"),
        ({"method": lambda c: torch.full((6,), torch.nan)}, "method: expected 6 finite weights"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named_and_leave_no_gradient(options, message):
    model, shapley = small_engine()
    with pytest.raises(ValueError, match=message):
        with shapley.select(range(6), **options):
            mse(model, regression(6, 1)).backward()
    assert all(p.grad is None for p in model.parameters())
    with shapley.select(range(6), 3):  # the step was dropped whole
        mse(model, regression(6, 1)).backward()


@pytest.mark.parametrize("options", [{"order": 2}, {"v_state": "post"}])
def test_late_scores_are_refused(options):
    _, shapley = small_engine(**options)
    with pytest.raises(ValueError, match="select: expected order=1 and v_state='pre'"):
        with shapley.select(range(6), 3):
            pass


class Gated(Small):
    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.ones(5, dtype=torch.float64))

    def forward(self, x):
        return super().forward(x * self.gate)


def test_a_parameter_without_a_tap_is_refused_by_name_even_if_excluded():
    model = Gated()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    shapley = gg.InRunShapley(model, optimizer, lambda m: mse(m, regression(7, 2)), exclude=["gate"])
    with pytest.raises(UncoveredParameterError, match=r"gate \(Gated has no tap\): no sample's share"):
        with shapley.select(range(6), 3):
            pass


def test_a_penalty_on_weights_is_refused_by_name():
    model, shapley = small_engine()
    with pytest.raises(RuntimeError, match=r"up.weight: a gradient reached it past its layer's forward"):
        with shapley.select(range(6), 3):
            (mse(model, regression(6, 1)) + model.up.weight.square().sum()).backward()


def test_several_processes_are_refused(monkeypatch):
    _, shapley = small_engine()
    monkeypatch.setattr(shapley._scorer.ranks, "size", 2)
    with pytest.raises(RuntimeError, match="select: expected one process with the whole model and batch, got 2"):
        with shapley.select(range(6), 3):
            pass
