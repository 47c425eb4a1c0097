"""The secant of an optimizer's step goes from torch's step on no gradient to torch's step on the batch's."""

import copy
import itertools

import pytest
import torch

from ghostgram.training.linearize import linearize
from ghostgram.training.secant import secant

SETTINGS = [pytest.param(torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, id="SGD")] + [
    pytest.param(
        kind, {"weight_decay": decay, "amsgrad": ams, "maximize": up}, id=f"{kind.__name__}-{decay}-{ams}-{up}"
    )
    for kind, decay, ams, up in itertools.product(
        (torch.optim.Adam, torch.optim.AdamW), (0, 0.1), (False, True), (False, True)
    )
]


def moved(optimizer, w, grad):
    """How far torch's step on a gradient goes."""
    twin = copy.deepcopy(optimizer)
    (copied,) = twin.param_groups[0]["params"]
    copied.grad = grad
    twin.step()
    return copied.detach() - w.detach()


def warmed(kind, steps, dtype=torch.float64, **setting):
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.randn(40, dtype=dtype))
    optimizer = kind([w], lr=0.1, **setting)
    for _ in range(steps):
        w.grad = torch.randn_like(w)
        optimizer.step()
    return w, optimizer


@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])  # the gradient's, beside those before it
@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize(("kind", "setting"), SETTINGS)
def test_both_ends_are_the_real_step(kind, setting, steps, size):
    w, optimizer = warmed(kind, steps, **setting)
    grad = size * torch.randn_like(w).detach()
    ((P, h),) = secant(optimizer, optimizer.param_groups[0], [w], [grad])
    h = torch.zeros_like(w) if h is None else h
    assert (h - moved(optimizer, w, torch.zeros_like(grad))).abs().max() <= 1e-12
    assert (h - P * grad - moved(optimizer, w, grad)).abs().max() <= 1e-12


@pytest.mark.parametrize(("kind", "setting"), [case for case in SETTINGS if not case.values[1].get("amsgrad")])
def test_a_gradient_of_zero_gets_the_slope_there(kind, setting):
    w, optimizer = warmed(kind, 3, **setting)
    ((P, _),) = secant(optimizer, optimizer.param_groups[0], [w], [torch.zeros_like(w).detach()])
    small = torch.full_like(w, 1e-5).detach()
    slope = (moved(optimizer, w, small) - moved(optimizer, w, -small)) / 2e-5
    assert (slope + P).abs().max() <= 1e-7


def test_gradients_far_below_the_second_moment_lose_no_digits():
    """A quotient of differences of the steps would."""
    w, optimizer = warmed(torch.optim.AdamW, 3, torch.float32)
    grad = torch.full_like(w, 1e-6).detach()
    ((P, _),) = secant(optimizer, optimizer.param_groups[0], [w], [grad])
    wide, exact = warmed(torch.optim.AdamW, 0)
    exact.load_state_dict(optimizer.state_dict())
    with torch.no_grad():
        wide.copy_(w)
    ((truth, _),) = secant(exact, exact.param_groups[0], [wide], [grad.double()])
    assert (P - truth).abs().max() <= 1e-6 * truth.abs().max()


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_the_first_step_is_that_of_frozen_state(kind):
    """There is no momentum yet that could be shortened."""
    w, optimizer = warmed(kind, 0, weight_decay=0)
    grad = [torch.randn_like(w).detach()]
    ((P, h),) = secant(optimizer, optimizer.param_groups[0], [w], grad)
    ((frozen, _),) = linearize(optimizer, optimizer.param_groups[0], [w], grad)
    assert (P - frozen).abs().max() <= 1e-12 * frozen.abs().max()
    assert not h.any()


def test_elements_that_no_gradient_ever_reached_stay_finite():
    w, optimizer = warmed(torch.optim.Adam, 0)
    ((P, h),) = secant(optimizer, optimizer.param_groups[0], [w], [torch.zeros_like(w).detach()])
    assert torch.isfinite(P).all()
    assert not h.any()


def test_gradients_along_the_momentum_pay_for_shortening_it():
    w, optimizer = warmed(torch.optim.AdamW, 1)
    along = optimizer.state[w]["exp_avg"]
    for grad, smaller in ((along, True), (-along, False)):
        ((frozen, _),) = linearize(optimizer, optimizer.param_groups[0], [w], [grad])
        ((P, _),) = secant(optimizer, optimizer.param_groups[0], [w], [grad])
        assert ((frozen - P > 0) == smaller).all()


def test_the_state_is_not_changed():
    w, optimizer = warmed(torch.optim.AdamW, 2, amsgrad=True)
    before = {name: value.clone() for name, value in optimizer.state[w].items()}
    secant(optimizer, optimizer.param_groups[0], [w], [w.grad])
    assert all(torch.equal(optimizer.state[w][name], value) for name, value in before.items())
