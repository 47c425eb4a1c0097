"""The step of adaptive GSAM against its formula, and its limits: SAM, SGD, one expert among many."""

import warnings

import pytest
import torch

from ghostgram.algorithms.pad.gsam import check_gsam, gsam_step


def quadratic(seed=0):
    """A loss 1/2 w' A w - b' w of 10 parameters, by its gradient, and where to begin."""
    chance = torch.Generator().manual_seed(seed)
    half = torch.randn(10, 10, generator=chance, dtype=torch.float64)
    a, b, w = half @ half.T, *torch.randn(2, 10, generator=chance, dtype=torch.float64)
    return lambda at: at @ a - b, w


def by_the_formula(gradient, w, lr, rho, alpha):
    g = gradient(w)
    e = [rho * w[j] ** 2 * g[j] / (sum((w[i] * g[i]) ** 2 for i in range(10)) ** 0.5 + 1e-12) for j in range(10)]
    p = gradient(w + torch.stack(e))
    along = sum(g[j] * p[j] for j in range(10)) / sum(p[j] ** 2 for j in range(10))
    return torch.stack([w[j] - lr * (p[j] - alpha * (g[j] - along * p[j])) for j in range(10)])


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("rho", [0.01, 0.4])
def test_step_is_the_formula(rho, alpha):
    gradient, w = quadratic()
    step = gsam_step(w, gradient, 0.02, rho, alpha)
    torch.testing.assert_close(step, by_the_formula(gradient, w, 0.02, rho, alpha), rtol=1e-12, atol=1e-12)
    assert (step - gsam_step(w, gradient, 0.02, 0.0, alpha)).abs().max() > 1e-4


def test_without_the_surrogate_gap_it_is_adaptive_sam():
    gradient, w = quadratic(1)
    g = gradient(w)
    moved = w + 0.1 * w**2 * g / ((w.abs() * g).norm() + 1e-12)
    torch.testing.assert_close(gsam_step(w, gradient, 0.02, 0.1, 0.0), w - 0.02 * gradient(moved), rtol=1e-12, atol=0)


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_without_a_radius_it_is_sgd_of_one_gradient(alpha):
    gradient, w = quadratic(2)
    asked = []
    step = gsam_step(w, lambda at: asked.append(at) or gradient(at), 0.02, 0.0, alpha)
    assert torch.equal(step, w - 0.02 * gradient(w))
    assert len(asked) == 1


def test_gap_is_taken_across_the_perturbed_gradient_only():
    gradient, w = quadratic(3)
    plain, guided = (gsam_step(w, gradient, 1.0, 0.2, alpha) for alpha in (0.0, 0.7))
    assert abs(torch.dot(guided - plain, w - plain)) < 1e-12 * (guided - plain).norm() * (w - plain).norm() * 10


def test_each_expert_steps_alone():
    gradient, _ = quadratic()
    w = torch.randn(3, 10, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    together = gsam_step(w, gradient, 0.02, 0.3, 0.3)
    for row, alone in zip(w, together, strict=True):
        torch.testing.assert_close(gsam_step(row, gradient, 0.02, 0.3, 0.3), alone, rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_a_minimum_it_stays(dtype):
    w = torch.ones(2, 5, dtype=dtype)
    assert torch.equal(gsam_step(w, torch.zeros_like, 0.1, 0.01, 0.3), w)


def test_zero_gradient_beside_the_minimum_takes_the_whole_of_the_first_one_off():
    w, g = torch.ones(4, dtype=torch.float64), torch.full((4,), 2.0, dtype=torch.float64)
    step = gsam_step(w, lambda at: g if at is w else torch.zeros_like(g), 0.1, 0.01, 0.5)
    torch.testing.assert_close(step, w + 0.1 * 0.5 * g, rtol=1e-15, atol=0)


def test_large_radius_is_warned_of_and_nonsense_refused():
    with pytest.warns(UserWarning, match=r"rho: 2\.0 is more than 0\.5"):
        check_gsam(2.0, 0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_gsam(0.5, 0.3)
    for rho, alpha, name in (
        (-0.1, 0, "rho"),
        (float("nan"), 0, "rho"),
        (True, 0, "rho"),
        (0.1, float("inf"), "alpha"),
    ):
        with pytest.raises(ValueError, match=f"{name}: expected a finite number"):
            check_gsam(rho, alpha)
