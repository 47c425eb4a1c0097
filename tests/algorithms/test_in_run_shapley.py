"""In-Run Data Shapley, first order: exact values, exact semantics of the loss, and an honest ledger."""

import copy
import itertools
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ghostgram as gg
from algorithms.models import (
    BATCH,
    Small,
    adam_P,
    language_model,
    lm_loss,
    mse,
    phis,
    regression,
    run_steps,
    sentences,
    warmed,
)
from ghostgram.training.linearize import linearize


@pytest.mark.parametrize("validation_samples", [1, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)], ids=["f64", "f32"])
@pytest.mark.parametrize("kind", ["gpt2", "gpt2 tied", "llama", "llama tied"])
def test_values_equal_a_loop_over_single_samples(kind, dtype, tolerance, validation_samples):
    model, ids = language_model(kind, dtype), sentences(BATCH, 1)
    sets = {"a": sentences(validation_samples, 2), "b": sentences(validation_samples, 3)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    warmed(model, optimizer, lambda m: lm_loss(m, sentences(BATCH, 4)))
    shapley = gg.InRunShapley(model, optimizer, {k: lambda m, v=v: lm_loss(m, v) for k, v in sets.items()})

    params = list(model.parameters())
    gradient = lambda loss: torch.autograd.grad(loss, params)  # noqa: E731
    directions = [
        [
            adam_P(optimizer, p, optimizer.param_groups[0]) * g
            for p, g in zip(params, gradient(lm_loss(model, v)), strict=True)
        ]
        for v in sets.values()
    ]
    truth = np.zeros((BATCH, 2))
    for i in range(BATCH):
        share = gradient(lm_loss(model, ids[i : i + 1]) / BATCH)
        truth[i] = [
            -sum(float((g.double() * d.double()).sum()) for g, d in zip(share, D, strict=True)) for D in directions
        ]
    plain = gradient(lm_loss(model, ids))

    with shapley.step(ids=torch.arange(BATCH)):
        lm_loss(model, ids).backward()
    for p, g in zip(params, plain, strict=True):
        assert (p.grad - g).norm() <= 1e-6 * g.norm() + 1e-12
    optimizer.step()
    assert np.abs(phis(shapley) - truth).max() <= tolerance * np.abs(truth).max()


@pytest.mark.parametrize("v_state", ["pre", "post"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_is_the_shapley_value_of_the_first_order_utility(kind, v_state):
    """Over all subsets of the batch, with the optimizer's real P and h."""
    model, batch, held_out = Small(), regression(5, 1), regression(7, 2)
    optimizer = kind(model.parameters(), lr=0.05, weight_decay=0.1)
    warmed(model, optimizer, lambda m: mse(m, regression(4, 3)))
    before = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    shapley = gg.InRunShapley(model, optimizer, lambda m: mse(m, held_out), v_state=v_state)
    with shapley.step(ids=range(5)):
        mse(model, batch).backward()
    optimizer.step()

    twin, params = before[0], list(before[0].parameters())
    original = kind(params, lr=0.05, weight_decay=0.1)
    original.load_state_dict(before[1])
    g_val = torch.autograd.grad(mse(twin, held_out), params)
    shares = [torch.autograd.grad(mse(twin, [x[i : i + 1] for x in batch]) / 5, params) for i in range(5)]
    whole = [sum(s) for s in zip(*shares, strict=True)]
    steps = [
        linearize(original, original.param_groups[0], [p], [g] if v_state == "post" else None)[0]
        for p, g in zip(params, whole, strict=True)
    ]

    def utility(subset):
        moved = 0.0
        for w, (P, h) in enumerate(steps):
            delta = (0 if h is None else h) - sum((P * shares[i][w] for i in subset), start=torch.zeros_like(params[w]))
            moved += float((g_val[w] * delta).sum())
        return moved

    for i in range(5):
        others = [j for j in range(5) if j != i]
        value = 0.0
        for size in range(5):
            weight = math.factorial(size) * math.factorial(4 - size) / math.factorial(5)
            value += weight * sum(utility((*s, i)) - utility(s) for s in itertools.combinations(others, size))
        assert abs(phis(shapley)[i, 0] - value) <= 1e-10 * np.abs(phis(shapley)).max()
    row = shapley.ledger().to_pylist()[0]
    assert row["predicted"] == pytest.approx(utility(range(5)), rel=1e-9)
    assert row["history"] == pytest.approx(utility(()), rel=1e-9)


def test_first_adam_step_uses_the_moment_after_the_batch():
    model, held_out = Small(), regression(7, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    shapley = gg.InRunShapley(model, optimizer, lambda m: mse(m, held_out))
    for _ in range(2):
        with shapley.step(ids=range(5)):
            mse(model, regression(5, 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert [r["v_state"] for r in shapley.ledger().to_pylist()] == ["post", "pre"]
    assert np.isfinite(phis(shapley)).all()


def test_training_is_the_same_without_the_engine():
    weights, states = [], []
    for scored in (False, True):
        torch.manual_seed(7)
        model = Small()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        shapley = gg.InRunShapley(model, optimizer, lambda m: mse(m, regression(7, 2)))
        run_steps(model, optimizer, shapley, 20, scored)
        weights.append([p.detach() for p in model.parameters()])
        states.append(torch.get_rng_state())
    for plain, tapped in zip(*weights, strict=True):
        assert (plain - tapped).abs().max() <= 1e-12
    assert torch.equal(*states)


def test_clipping_scales_values():
    log = []
    for clip in (None, 1e-3):
        model = Small()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        shapley = gg.InRunShapley(model, optimizer, lambda m: mse(m, regression(7, 2)))
        run_steps(model, optimizer, shapley, 1, clip=clip)
        log.append((phis(shapley), shapley.ledger().to_pylist()[0]))
    (free, _), (clipped, row) = log
    assert row["clip"] < 0.1
    np.testing.assert_allclose(clipped, row["clip"] * free, rtol=1e-6)
    assert row["sum_phi"] == pytest.approx(clipped.sum(), rel=1e-6)
    assert row["residual"] == pytest.approx(0, abs=1e-3 * abs(row["measured"]))


def test_clipping_one_group_scales_that_group_alone():
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    shapley = gg.InRunShapley(model, optimizer, lambda m: mse(m, regression(7, 2)))
    with shapley.step(ids=range(5)):
        mse(model, regression(5, 1)).backward()
    nn.utils.clip_grad_norm_(model.up.parameters(), 1e-4)
    optimizer.step()
    row = shapley.ledger().to_pylist()[0]
    assert row["residual"] == pytest.approx(0, abs=1e-2 * abs(row["measured"]))


def test_clipping_by_value_is_refused():
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    shapley = gg.InRunShapley(model, optimizer, lambda m: mse(m, regression(7, 2)))
    with shapley.step(ids=range(5)):
        mse(model, regression(5, 1)).backward()
    nn.utils.clip_grad_value_(model.parameters(), 1e-3)
    with pytest.raises(RuntimeError, match="more than a factor"):
        optimizer.step()


def test_grad_scaler_is_undone_and_a_skipped_step_is_logged():
    logs = []
    for scale in (1.0, 2.0**16):
        model = Small(torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        shapley = gg.InRunShapley(model, optimizer, lambda m: mse(m, regression(7, 2, torch.float32)))
        for number in range(3):
            x, y = regression(5, number, torch.float32)
            with shapley.step(ids=range(5)):
                scaler.scale(mse(model, (x, y)) * (float("inf") if number == 1 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        logs.append((phis(shapley), shapley.ledger().to_pylist(), shapley.step_log()))
    np.testing.assert_allclose(logs[0][0], logs[1][0], rtol=2e-6, atol=1e-12)
    for phi, ledger, log in logs:
        assert [row["skipped"] for row in ledger] == [False, True, False]
        assert ledger[1]["measured"] == ledger[1]["predicted"] == 0
        assert not phi[np.array(log["step"]) == 1].any()


def test_token_mean_with_ignored_tokens():
    """The training loss is used with the denominator it has; a sample without a kept token has phi = 0, logged."""
    model, ids = language_model("gpt2"), sentences(4, 1)
    labels = ids.clone()
    labels[1, 5:] = -100
    labels[2] = -100
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss(m, rows, reduction="mean"):
        logits = m(ids[rows]).logits[:, :-1].flatten(0, 1)
        return F.cross_entropy(logits, labels[rows, 1:].flatten(), reduction=reduction, ignore_index=-100)

    held_out = sentences(2, 9)
    shapley = gg.InRunShapley(model, optimizer, lambda m: lm_loss(m, held_out))
    params = list(model.parameters())
    g_val = torch.autograd.grad(lm_loss(model, held_out), params)
    kept = int((labels[:, 1:] != -100).sum())
    truth = [
        -0.1
        * sum(
            float((g * v).sum())
            for g, v in zip(torch.autograd.grad(loss(model, [i], "sum") / kept, params), g_val, strict=True)
        )
        for i in range(4)
    ]
    with shapley.step(ids=[10, 11, 12, 13]):
        loss(model, [0, 1, 2, 3]).backward()
    optimizer.step()
    np.testing.assert_allclose(phis(shapley)[:, 0], truth, rtol=1e-5, atol=1e-12)
    assert phis(shapley)[2, 0] == 0


def test_duplicates_share_equally_and_order_does_not_matter():
    model, ids = language_model("llama"), sentences(5, 1)
    ids[3] = ids[0]
    order = torch.tensor([4, 2, 0, 1, 3])
    found = []
    for rows in (torch.arange(5), order):
        twin = copy.deepcopy(model)
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
        shapley = gg.InRunShapley(twin, optimizer, lambda m: lm_loss(m, sentences(2, 2)))
        with shapley.step(ids=rows):
            lm_loss(twin, ids[rows]).backward()
        optimizer.step()
        values = shapley.values()
        assert values["id"].to_pylist() == list(range(5))
        found.append(values["value"].to_numpy())
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)
    assert found[0][0] == pytest.approx(found[0][3], rel=1e-6)


def test_excluded_parameters_close_the_ledger():
    rows = []
    for exclude in ((), ("up.*", "norm.bias")):
        model = Small()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        shapley = gg.InRunShapley(model, optimizer, lambda m: mse(m, regression(7, 2)), exclude=exclude)
        run_steps(model, optimizer, shapley, 3, clip=0.1)
        rows.append(shapley.ledger().to_pylist())
    for whole, part in zip(*rows, strict=True):
        assert whole["uncovered"] == 0
        assert part["uncovered"] != 0
        assert part["predicted"] == pytest.approx(whole["predicted"], rel=1e-6)


@pytest.mark.parametrize("v_state", ["pre", "post"])
def test_history_leaves_out_what_the_optimizer_skips(v_state):
    """A parameter without a gradient in a step is not moved: neither momentum nor decay of it count."""
    model = Small()
    model.spare = nn.Linear(5, 1).double()
    both = lambda m, batch: mse(m, batch) + m.spare(batch[0]).square().mean()  # noqa: E731
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1)
    warmed(model, optimizer, lambda m: both(m, regression(5, 1)))  # a momentum for every parameter
    shapley = gg.InRunShapley(model, optimizer, lambda m: both(m, regression(7, 2)), v_state=v_state)
    before = [p.detach().clone() for p in model.parameters()]
    with shapley.step(ids=range(5)):
        mse(model, regression(5, 1)).backward()
    optimizer.step()
    steps = [p.detach() - old for p, old in zip(model.parameters(), before, strict=True)]
    assert not steps[-1].any()
    moved = Small()
    moved.spare = nn.Linear(5, 1).double()
    for p, old in zip(moved.parameters(), before, strict=True):
        p.data.copy_(old)
    both(moved, regression(7, 2)).backward()
    expected = sum(float((p.grad * step).sum()) for p, step in zip(moved.parameters(), steps, strict=True))
    assert shapley.ledger()["predicted"].to_pylist() == [pytest.approx(expected, rel=1e-9)]


def test_ledger_follows_the_loss():
    """With small steps the prediction is the measured change; halving lr quarters the residual."""
    residuals = []
    for lr in (2e-3, 1e-3):
        model = Small()
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=0.01)
        shapley = gg.InRunShapley(
            model, optimizer, {"a": lambda m: mse(m, regression(7, 2)), "b": lambda m: mse(m, regression(9, 3))}
        )
        run_steps(model, optimizer, shapley, 1)
        ledger = shapley.ledger().to_pylist()
        assert [r["set"] for r in ledger] == ["a", "b"]
        for row in ledger:
            assert row["measured"] == pytest.approx(row["l_after"] - row["l_before"])
            assert row["predicted"] == pytest.approx(row["sum_phi"] + row["history"] + row["uncovered"])
            assert row["predicted"] == pytest.approx(row["measured"], rel=0.05)
        residuals.append(abs(ledger[0]["residual"]))
    assert 3.5 < residuals[0] / residuals[1] < 4.5


def test_looking_at_the_ledger_leaves_a_step_open():
    """Before the optimizer's step there is no row yet, and the step's values are not lost."""
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    shapley = gg.InRunShapley(model, optimizer, lambda m: mse(m, regression(7, 2)))
    with shapley.step(ids=range(5)):
        mse(model, regression(5, 1)).backward()
        assert len(shapley.ledger()) == 0
    assert len(shapley.ledger()) == 0
    optimizer.step()
    assert [row["skipped"] for row in shapley.ledger().to_pylist()] == [False]
    assert phis(shapley).all()


def test_validation_leaves_no_trace():
    model = nn.Sequential(Small(), nn.Dropout(0.5))
    model[0].norm.eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    modes = []

    def validate(m):
        modes.append(m.training)
        torch.rand(3)
        return mse(m, regression(7, 2))

    shapley = gg.InRunShapley(model, optimizer, validate)
    state = torch.get_rng_state()
    with shapley.step(ids=range(5)):
        assert torch.equal(torch.get_rng_state(), state)
        assert all(p.grad is None for p in model.parameters())
        assert model.training
        assert not model[0].norm.training
        mse(model, regression(5, 1)).backward()
    assert modes == [False]


class UsesWeightTwice(Small):
    def forward(self, x):
        return super().forward(x) + F.linear(x, self.up.weight).sum(-1)


def test_a_use_that_no_tap_saw_is_an_error():
    model = UsesWeightTwice()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    shapley = gg.InRunShapley(model, optimizer, lambda m: mse(m, regression(7, 2)))
    with pytest.raises(RuntimeError, match=r"up\.weight: the samples' dots sum to"):
        with shapley.step(ids=range(5)):
            mse(model, regression(5, 1)).backward()
    assert len(shapley.step_log()) == 0


def test_gradients_left_over_are_an_error():
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    shapley = gg.InRunShapley(model, optimizer, lambda m: mse(m, regression(7, 2)))
    mse(model, regression(5, 1)).backward()
    with pytest.raises(RuntimeError, match="left over from before"):
        with shapley.step(ids=range(5)):
            mse(model, regression(5, 1)).backward()


def test_a_step_that_raises_is_dropped_whole():
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    shapley = gg.InRunShapley(model, optimizer, lambda m: mse(m, regression(7, 2)))
    with pytest.raises(ZeroDivisionError), shapley.step(ids=range(5)):
        mse(model, regression(5, 1)).backward()
        raise ZeroDivisionError
    optimizer.step()
    assert len(shapley.step_log()) == len(shapley.ledger()) == 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"order": 3}, ValueError, "order: expected 1 or 2, got 3"),
        ({"order": 2, "v_state": "pre"}, ValueError, "v_state: expected 'secant' or 'post' for order 2"),
        ({"order": 2, "refresh": 2}, ValueError, "refresh: expected 1 for order 2"),
        ({"compare_orders": True}, ValueError, "compare_orders: expected False for order 1"),
        ({"curvature": "fisher"}, ValueError, "curvature: expected 'midpoint' or 'hvp', got 'fisher'"),
        ({"late": "never"}, ValueError, "late: expected 'auto' or 'stored'"),
        ({"audit_every": -1}, ValueError, "audit_every: expected at least 0, got -1"),
        ({"v_state": "now"}, ValueError, "v_state: expected 'pre' or 'post' or 'secant', got 'now'"),
        ({"validation": {}}, ValueError, "validation: expected a callable"),
        ({"flush_every": 0}, ValueError, "flush_every: expected at least 1"),
        ({"exclude": ["nothing"]}, ValueError, "exclude: 'nothing' matches no"),
        ({"exclude": ["*"]}, ValueError, r"exclude: expected at least one trainable parameter .* got \['\*'\]"),
    ],
)
def test_bad_arguments(arguments, error, message):
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with pytest.raises(error, match=message):
        gg.InRunShapley(model, optimizer, **({"validation": lambda m: mse(m, regression(7, 2))} | arguments))


@pytest.mark.parametrize("ids", [[], [0.5, 1.5], torch.tensor(3), "abc"])
def test_bad_ids(ids):
    model = Small()
    shapley = gg.InRunShapley(model, torch.optim.SGD(model.parameters(), lr=0.01), lambda m: mse(m, regression(7, 2)))
    with pytest.raises(ValueError, match="ids: expected a non-empty"), shapley.step(ids=ids):
        pass


def test_wrong_number_of_ids():
    model = Small()
    shapley = gg.InRunShapley(model, torch.optim.SGD(model.parameters(), lr=0.01), lambda m: mse(m, regression(7, 2)))
    with (
        pytest.raises(ValueError, match=r"first dimension is the sample \(4\), got \(5, 5\)"),
        shapley.step(ids=range(4)),
    ):
        mse(model, regression(5, 1)).backward()


def test_misuse_of_the_loop():
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    shapley = gg.InRunShapley(model, optimizer, lambda m: mse(m, regression(7, 2)))
    with pytest.raises(RuntimeError, match=r"outside `with shapley\.step"), shapley.samples([1]):
        pass
    with pytest.raises(RuntimeError, match="entered twice"), shapley.step(ids=[1]), shapley.step(ids=[1]):
        pass
    with pytest.raises(RuntimeError, match=r"inside `with shapley\.step"), shapley.step(ids=range(5)):
        mse(model, regression(5, 1)).backward()
        optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="no samples were scored"), shapley.step():
        pass
    with shapley.step(ids=range(5)):
        mse(model, regression(5, 1)).backward()
    optimizer.param_groups[0]["lr"] = 0.5
    with pytest.raises(RuntimeError, match="learning rates changed"):
        optimizer.step()


def test_log_on_disk_survives_and_resumes(tmp_path):
    def engine(**more):
        model = Small()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        return (
            model,
            optimizer,
            gg.InRunShapley(
                model, optimizer, {"a": lambda m: mse(m, regression(7, 2))}, log=tmp_path / "run", flush_every=2, **more
            ),
        )

    model, optimizer, shapley = engine()
    run_steps(model, optimizer, shapley, 5)  # killed here: steps 0 to 3 are on disk, 4 is lost with the process
    steps = pq.read_table(tmp_path / "run" / "steps")
    assert sorted(set(steps["step"].to_pylist())) == [0, 1, 2, 3]
    assert steps.schema.metadata[b"sign"] == b"value = -phi, positive = helped"
    (tmp_path / "run" / "steps" / "part-torn.tmp").write_bytes(b"PAR1")  # what a kill may leave of a part

    with pytest.raises(FileExistsError, match="already holds a run"):
        engine()
    model, optimizer, resumed = engine(resume=True)
    run_steps(model, optimizer, resumed, 2)
    resumed.close()
    log = resumed.step_log()
    assert log["step"].to_pylist() == [s for s in range(6) for _ in range(5)]
    ledger = resumed.ledger()
    assert ledger["step"].to_pylist() == list(range(6))
    assert ledger["cumulative_residual"].to_pylist() == pytest.approx(np.cumsum(ledger["residual"]).tolist(), rel=1e-12)
    values = resumed.values().to_pydict()
    for sample, value, seen in zip(values["id"], values["value"], values["steps"], strict=True):
        rows = np.array(log["sample_id"]) == sample
        assert value == -np.array(log["phi_a"])[rows].astype(np.float64).sum()
        assert seen == len(set(np.array(log["step"])[rows]))


def test_high_level_function():
    model = Small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 3)
    batches = [{"id": torch.arange(5) + 5 * n, "data": regression(5, n)} for n in range(4)]
    seen = []
    result = gg.in_run_shapley(
        model, optimizer, batches, lambda m: mse(m, regression(7, 2)), lambda m, b: mse(m, b["data"]),
        max_norm=0.5, scheduler=scheduler, on_step=lambda n, loss: seen.append((n, loss)),
    )  # fmt: skip
    assert len(result.values) == 20
    assert len(result.ledger) == 4
    assert [loss for _, loss in seen] == result.losses
    assert len(set(result.step_log["lr"].to_pylist())) == 4
