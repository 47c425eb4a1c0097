"""Laws: exact on exact losses, the same in other units, and their minimum by another road."""

import numpy as np
import pytest

from ghostgram.algorithms.velocitune.fits import anchored, chinchilla, chinchilla_nd, fit, geometric_mean
from ghostgram.algorithms.velocitune.least_squares import bounded_least_squares

D = np.geomspace(1 / 64, 1 / 4, 6) * 1e9
SE = np.full(6, 0.003)


def continued(d, l_init=2.5, gain=0.8, scale=2e8, b=0.4):
    return l_init - gain * (1 - (1 + d / scale) ** -b)


def span(d):
    return d.min() / geometric_mean(d), d.max() / geometric_mean(d)


def test_chinchilla_without_noise():
    found = fit(chinchilla(), D, (1.3 + 60 * D**-0.25)[None], SE)
    assert found.parameters() == pytest.approx({"E": 1.3, "B": 60, "b": 0.25}, rel=1e-8)
    assert abs(found.at([1e9])[0, 0] - (1.3 + 60 * 1e9**-0.25)) < 1e-9


def test_anchored_without_noise():
    found = fit(anchored(2.5, span(D), prior=False), D, continued(D)[None], SE)
    assert found.parameters() == pytest.approx({"G": 0.8, "D0": 2e8, "b": 0.4}, rel=1e-8)
    assert abs(found.at([1e9])[0, 0] - continued(1e9)) < 1e-9
    assert found.at([1e-300])[0, 0] == 2.5  # exact where training starts


def test_chinchilla_of_sizes_and_tokens_without_noise():
    n, d = np.repeat([1e7, 3e7, 1e8], 4), np.tile([1e8, 3e8, 1e9, 3e9], 3)
    found = fit(chinchilla_nd(), d, (1.5 + 400 * n**-0.34 + 410 * d**-0.28)[None], np.full(12, 0.003), n)
    assert found.parameters() == pytest.approx({"E": 1.5, "A": 400, "a": 0.34, "B": 410, "b": 0.28}, rel=1e-8)
    assert abs(found.at([1e10], [1e9])[0, 0] - (1.5 + 400 * 1e9**-0.34 + 410 * 1e10**-0.28)) < 1e-9


@pytest.mark.parametrize("form", ["chinchilla", "anchored"])
def test_the_unit_of_tokens_does_not_matter(form):
    noise = np.random.default_rng(3).normal(0, 0.003, 6)
    at = []
    for unit in (1.0, 4096.0, 1e9 / 7):
        d = D / unit
        shape = chinchilla() if form == "chinchilla" else anchored(2.5, span(d))
        at.append(fit(shape, d, (continued(D) + noise)[None], SE).at([1e9 / unit])[0, 0])
    assert max(at) - min(at) < 1e-9


@pytest.mark.parametrize("form", ["chinchilla", "anchored", "anchored without prior"])
def test_no_parameters_nearby_are_better(form):
    """The minimum by brute force, from the formula as it is written in the head of the module."""
    losses = continued(D) + np.random.default_rng(4).normal(0, 0.003, 6)
    prior = form == "anchored"
    shape = chinchilla() if form == "chinchilla" else anchored(2.5, span(D), prior)
    found = fit(shape, D, losses[None], SE).parameters()

    def cost(p):
        plain = form == "chinchilla"
        law = p["E"] + p["B"] / D ** p["b"] if plain else continued(D, 2.5, p["G"], p["D0"], p["b"])
        if not 0.02 <= p["b"] <= 1.5 + 1e-12:
            return np.inf
        return (((losses - law) / SE) ** 2).sum() + prior * (np.log(p["b"] / 0.5) / 0.5) ** 2

    best = cost(found)
    rng = np.random.default_rng(5)
    for size in (1e-1, 1e-3, 1e-5):
        for _ in range(2000):
            assert cost({name: x * np.exp(size * rng.normal()) for name, x in found.items()}) >= best * (1 - 1e-12)


def test_many_data_sets_are_each_as_alone():
    losses = continued(D) + np.random.default_rng(6).normal(0, 0.003, (7, 6))
    together = fit(anchored(2.5, span(D)), D, losses, SE).at([1e9])[:, 0]
    alone = [fit(anchored(2.5, span(D)), D, row[None], SE).at([1e9])[0, 0] for row in losses]
    np.testing.assert_allclose(together, alone, rtol=1e-8)


def test_an_outlier_moves_a_robust_fit_little():
    losses = 1.3 + 60 * D**-0.25
    losses[2] += 0.05
    moved = [abs(fit(chinchilla(), D, losses[None], SE, robust=r).at([1e9])[0, 0] - 1.637396) for r in (False, True)]
    assert moved[1] < 0.1 * moved[0]


def test_rising_losses_end_at_a_constant():
    found = fit(chinchilla(), D, np.linspace(1, 2, 6)[None], SE)
    assert found.coefficients[0, 1] == 0
    assert found.parameters()["E"] == pytest.approx(1.5)


def test_the_largest_coefficient_holds():
    free = fit(chinchilla(), D, (0.1 + 60 * D**-0.25)[None], SE)
    assert free.parameters()["B"] == pytest.approx(60, rel=1e-8)
    held = fit(chinchilla(largest=(np.log(20.0), geometric_mean(D))), D, (0.1 + 60 * D**-0.25)[None], SE)
    assert held.parameters()["B"] == pytest.approx(20, rel=1e-9)
    floored = fit(chinchilla(floor=0.4), D, (0.1 + 60 * D**-0.25)[None], SE)
    assert floored.parameters()["E"] == pytest.approx(0.4, abs=1e-12)


@pytest.mark.parametrize("limit", [None, 0.5])
def test_least_squares_within_limits(limit):
    """Against every corner and a fine search along each coefficient: no feasible move lowers the cost."""
    rng = np.random.default_rng(7)
    columns, y = rng.normal(size=(40, 6, 3)), rng.normal(size=(40, 6))
    upper = None if limit is None else np.full((40, 3), limit)
    found, residuals = bounded_least_squares(columns, y, upper)
    np.testing.assert_allclose(residuals, np.einsum("nmp,np->nm", columns, found) - y, atol=1e-13)
    assert (found >= 0).all()
    assert limit is None or (found <= limit).all()
    slope = np.einsum("nmp,nm->np", columns, residuals)  # the conditions of Karush, Kuhn and Tucker
    at_0, at_top = found == 0, found == (np.inf if limit is None else limit)
    assert np.abs(slope[~at_0 & ~at_top]).max() < 1e-12
    assert (slope[at_0] >= 0).all()
    assert (slope[at_top] <= 0).all()
    assert at_0.any()
    assert at_top.any() == (limit is not None)
