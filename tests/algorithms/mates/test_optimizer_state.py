"""The view's step is torch's own, its slope is the step's derivative, and mismatched states are named."""

import copy
import itertools

import pytest
import torch

from algorithms.mates.models import bits, same_bits, trained
from ghostgram.algorithms.mates.labels.optimizer_state import OptimizerView

SETTINGS = [
    *(
        pytest.param(kind, dict(weight_decay=wd, amsgrad=ams, maximize=up), id=f"{kind.__name__}-{wd}-{ams}-{up}")
        for kind, wd, ams, up in itertools.product(
            (torch.optim.Adam, torch.optim.AdamW), (0, 0.1), (False, True), (False, True)
        )
    ),
    pytest.param(torch.optim.AdamW, dict(foreach=True), id="foreach"),
    pytest.param(torch.optim.AdamW, dict(fused=True), id="fused"),
    pytest.param(torch.optim.AdamW, dict(betas=(0.8, 0.9), eps=1e-3), id="other betas"),
    pytest.param(torch.optim.SGD, dict(weight_decay=0.1), id="SGD"),
    pytest.param(torch.optim.SGD, dict(momentum=0.9, dampening=0.3, weight_decay=0.1), id="momentum"),
    pytest.param(torch.optim.SGD, dict(momentum=0.9, nesterov=True), id="Nesterov"),
]


def gradients(model, seed=0, size=0.1):
    g = torch.Generator().manual_seed(seed)
    return {p: size * torch.randn(p.shape, generator=g, dtype=p.dtype) for p in model.parameters()}


def torch_step(model, optimizer, grads, lrs=None):
    """Where torch itself takes each weight, by name, with everything put back."""
    twin, stepper = copy.deepcopy((model, optimizer))
    for p, grad in zip(twin.parameters(), grads.values(), strict=True):
        p.grad = grad.clone()
    for group, lr in zip(stepper.param_groups, lrs or [], strict=bool(lrs)):
        group["lr"] = lr
    stepper.step()
    return {name: p.detach() for name, p in twin.named_parameters()}


@pytest.mark.parametrize(("kind", "settings"), SETTINGS)
def test_the_step_is_torchs(kind, settings):
    model, optimizer = trained(kind, 3, grouped="betas" in settings, **settings)
    lrs = [0.02, 0.01] if "betas" in settings else None
    view = OptimizerView(model, optimizer, clip=None, lrs=lrs)
    grads = gradients(model)
    null = torch_step(model, optimizer, {p: torch.zeros_like(p) for p in grads}, lrs)
    there = torch_step(model, optimizer, grads, lrs)
    assert view.linear == (kind is torch.optim.SGD)
    for p, name in view.names.items():
        assert (view.null(p) - null[name]).abs().max() <= 1e-14
        assert (view.null(p) + view.delta(p, grads[p]) - there[name]).abs().max() <= 1e-14


@pytest.mark.parametrize(("kind", "settings"), [s for s in SETTINGS if not s.values[1].get("amsgrad")])
def test_the_slope_is_the_derivative_of_torchs_step(kind, settings):
    model, optimizer = trained(kind, 3, **settings)
    view = OptimizerView(model, optimizer, clip=None)
    roots = {p: optimizer.state[p].get("exp_avg_sq", torch.ones_like(p)).sqrt().detach() for p in view.names}
    up, down = (torch_step(model, optimizer, {p: e * root for p, root in roots.items()}) for e in (3e-4, -3e-4))
    for p, name in view.names.items():
        slope, seen = view.slope(p).expand_as(p), roots[p] > 0
        measured = (down[name] - up[name])[seen] / (6e-4 * roots[p][seen])
        assert seen.any()
        assert (slope[seen] / measured - 1).abs().max() <= 1e-6
        if kind is torch.optim.SGD:
            assert torch.allclose(view.delta(p, roots[p]), -slope * roots[p], rtol=1e-14, atol=0)


def test_the_slope_is_autodiffs_of_the_formula():
    model, optimizer = trained(grouped=True, weight_decay=0.1)
    view = OptimizerView(model, optimizer, clip=None)
    for p in view.names:
        eta, b1, b2, eps, bc1, bc2 = view.scalars(p)
        m, v = view.moments(p)
        g = torch.zeros_like(p).detach().requires_grad_()
        step = -eta * ((b1 * m + (1 - b1) * g) / bc1) / (((b2 * v + (1 - b2) * g * g) / bc2).sqrt() + eps)
        (derivative,) = torch.autograd.grad(step.sum(), g)
        known = v > 0
        assert (view.slope(p) + derivative).abs()[known].max() <= 1e-6 * view.slope(p)[known].min()


def test_each_group_has_its_settings():
    model, optimizer = trained(grouped=True, weight_decay=0.1)
    view = OptimizerView(model, optimizer, clip=None)
    rates = {view.names[p]: view.scalars(p)[0] for p in view.names}
    assert rates["token.weight"] == 3e-3
    assert rates["norm.bias"] == 1.5e-3
    assert {OptimizerView(model, optimizer, clip=None, lrs=[1.0, 2.0]).scalars(p)[0] for p in view.names} == {1.0, 2.0}


@pytest.mark.parametrize(("kind", "settings", "reason"), [
    (torch.optim.AdamW, dict(weight_decay=0.1), None),
    (torch.optim.Adam, dict(), None),
    (torch.optim.AdamW, dict(amsgrad=True), "amsgrad"),
    (torch.optim.AdamW, dict(maximize=True), "maximize"),
    (torch.optim.Adam, dict(weight_decay=0.1), "coupled"),
    (torch.optim.SGD, dict(), "second moment"),
    (torch.optim.Adagrad, dict(), "closed form"),
])  # fmt: skip
def test_what_the_moments_alone_do_not_describe_is_said(kind, settings, reason):
    said = OptimizerView(*trained(kind, 1, **settings), clip=None).why_no_moments()
    assert said is None if reason is None else reason in said


def test_weights_are_at_the_null_step_and_back_to_the_bit():
    model, optimizer = trained(weight_decay=0.1)
    view = OptimizerView(model, optimizer, clip=None)
    before, expected = bits(model, optimizer), {name: view.null(p) for p, name in view.names.items()}
    with pytest.raises(KeyboardInterrupt):
        with view.at_null():
            assert all(torch.equal(p, expected[name]) for p, name in view.names.items())
            assert not torch.equal(model.token.weight, before["model.token.weight"])
            raise KeyboardInterrupt
    assert same_bits(bits(model, optimizer), before)


def test_clipping_is_torchs():
    model, optimizer = trained()
    view = OptimizerView(model, optimizer, clip=0.5)
    grads = gradients(model)
    for p, g in grads.items():
        p.grad = g.clone()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    assert torch.allclose(view.clip_factors(norm) * grads[model.norm.bias], model.norm.bias.grad, rtol=1e-14, atol=0)
    assert view.clip_factors(torch.tensor(0.1)) == 1
    assert OptimizerView(model, optimizer, clip=None).clip_factors(norm) == 1


def test_sixteen_bits_are_widened():
    model, optimizer = trained(dtype=torch.bfloat16)
    view = OptimizerView(model, optimizer, clip=None)
    p = model.token.weight
    wide, exact = trained()
    with torch.no_grad():
        for one, other in zip(wide.parameters(), model.parameters(), strict=True):
            one.copy_(other)
            for kind in ("exp_avg", "exp_avg_sq"):
                exact.state[one][kind].copy_(optimizer.state[other][kind])
    truth = OptimizerView(wide, exact, clip=None)
    g = 0.01 * torch.randn(p.shape, dtype=torch.bfloat16)
    assert view.delta(p, g).dtype == torch.float32
    error = (view.delta(p, g) - truth.delta(wide.token.weight, g.double())).abs().max()
    assert error <= 1e-5 * truth.delta(wide.token.weight, g.double()).abs().max()


def planted(fault):
    model, optimizer = trained()
    first = model.token.weight
    if fault == "left out":
        del optimizer.param_groups[0]["params"][0]
    elif fault == "another model's":
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))]})
    elif fault == "frozen":
        first.requires_grad_(False)
    elif fault == "no state":
        del optimizer.state[first]
    elif fault == "shape":
        optimizer.state[first]["exp_avg"] = torch.zeros(3)
    elif fault == "infinite":
        optimizer.state[first]["exp_avg_sq"][2, 3] = float("inf")
    elif fault == "step":
        optimizer.state[first]["step"].zero_()
    return model, optimizer


@pytest.mark.parametrize(("fault", "message"), [
    ("left out", "optimizer: token.weight is trainable, but in none of its groups"),
    ("another model's", r"group 1's parameter 0 of shape \(3,\) is not of the model"),
    ("frozen", "token.weight is not trainable, and yet has a state"),
    ("no state", "token.weight is without a state"),
    ("shape", r"token.weight's exp_avg has shape \(3,\), not \(256, 16\)"),
    ("infinite", "token.weight's exp_avg_sq is not finite"),
    ("step", "token.weight is at step 0"),
])  # fmt: skip
def test_states_that_do_not_fit_are_named(fault, message):
    with pytest.raises(ValueError, match=message):
        OptimizerView(*planted(fault), clip=None)


def test_an_untrained_optimizer_names_some_and_counts_the_rest():
    with pytest.raises(ValueError, match=r"token.weight, position.weight, .* and 8 more are without a state"):
        OptimizerView(*trained(steps=0), clip=None)


def test_optimizers_without_a_closed_form_are_checked_and_say_so():
    view = OptimizerView(*trained(torch.optim.Adagrad), clip=None)
    assert "Adagrad has no closed form" in view.why_not()
    with pytest.raises(TypeError, match="only the exact labels"):
        view.slope(next(iter(view.names)))


@pytest.mark.parametrize(("options", "message"), [
    (dict(clip=0.0), "clip: expected a positive norm"), (dict(clip=None, lrs=[1.0, 2.0]), "lrs: expected 1, .* got 2"),
])  # fmt: skip
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        OptimizerView(*trained(), **options)
