"""adam_dots beyond what every op promises: real steps of AdamW, every digit, tied weights, gradients already formed."""

from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch

import ghostgram as gg
from ghostgram.reference.adam_dots import change_of_step
from ghostgram.testing import layouts
from ghostgram.testing.cases import adam_dots as cases

SCALARS = (1e-3, 0.9, 0.95, 1e-8, 1 - 0.9**1000, 1 - 0.95**1000)


def by_adamw(gradient, m, v, weight, step, eta=1e-3, betas=(0.9, 0.95), eps=1e-8, decay=0.1):
    """The weight after one real step of torch's AdamW on a gradient, from moments that `step` - 1 steps have left."""
    weight = torch.nn.Parameter(torch.tensor(weight))
    optimizer = torch.optim.AdamW([weight], lr=eta, betas=betas, eps=eps, weight_decay=decay)
    moments = {"exp_avg": torch.tensor(m), "exp_avg_sq": torch.tensor(v), "step": torch.tensor(step - 1.0)}
    optimizer.state[weight] = moments
    weight.grad = torch.tensor(gradient)
    optimizer.step()
    return weight.detach().numpy()


def test_equals_the_difference_of_two_steps_of_torch():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((3, 5, 4)), rng.standard_normal((3, 5, 6))
    clip, m, v = rng.uniform(0.1, 1, 3), rng.standard_normal((6, 4)), rng.uniform(0.1, 2, (6, 4))
    D, weight = rng.standard_normal((2, 6, 4)), rng.standard_normal((6, 4))
    found = gg.adam_dots(a, b, clip, m, v, D, (1e-3, 0.9, 0.95, 1e-8, 1 - 0.9**7, 1 - 0.95**7))
    null = by_adamw(np.zeros_like(m), m, v, weight, 7)
    changes = [by_adamw(c * (y.T @ x), m, v, weight, 7) - null for c, x, y in zip(clip, a, b, strict=True)]
    np.testing.assert_allclose(found, np.einsum("kpd,ipd->ik", D, changes), rtol=1e-10)


def exactly(g, m, v, scalars):
    """step(g) - step(0) of one element in 60 digits, straight from the definition; and the sum of its terms' sizes."""
    with localcontext() as context:
        context.prec = 160
        g, m, v, eta, beta1, beta2, eps, bc1, bc2 = map(Decimal, (g, m, v, *scalars))
        root = lambda x: (x / bc2).sqrt() + eps  # noqa: E731
        s, s0 = root(beta2 * v + (1 - beta2) * g * g), root(beta2 * v)
        own, pull = (1 - beta1) * g / bc1 / s, beta1 * m / bc1 * (1 / s - 1 / s0)
        return float(-eta * (own + pull)), float(eta * (abs(own) + abs(pull)))


def elements(dtype, n=1500):
    """g, m and v over tens of decades in all combinations, zeros, subnormals and the ends of the dtype among them."""
    rng = np.random.default_rng(1)
    sign = rng.choice([-1, 1], (2, n))
    decades = (-36, 30) if dtype == "float32" else (-290, 290)
    g = 10 ** rng.uniform(-24, 4, n)
    g[: n // 4] = 10 ** rng.uniform(-34, decades[1], n // 4)
    m, v = 10 ** rng.uniform(-20, 3, n), 10 ** rng.uniform(decades[0], 4, n)
    g[::11] = m[1::13] = v[2::17] = v[::22] = 0
    v[5::19] = 1e-42 if dtype == "float32" else 1e-315
    return tuple(layouts.rounded(x, dtype) for x in (sign[0] * g, sign[1] * m, v))


def naive(g, m, v, scalars):
    """step(g) - step(0) as one would write it, in the dtype of its inputs."""
    eta, beta1, beta2, eps, bc1, bc2 = (g.dtype.type(x) for x in scalars)

    def step(g):
        root = np.sqrt((beta2 * v + (1 - beta2) * g * g) / bc2)
        return -eta * ((beta1 * m + (1 - beta1) * g) / bc1) / (root + eps)

    with np.errstate(all="ignore"):
        return step(g) - step(np.zeros_like(g))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float64", 1e-14)])
def test_every_element_keeps_its_digits(dtype, tolerance):
    """One-hot directions read single elements; the naive difference loses all of them somewhere, ours none anywhere."""
    g, m, v = elements(dtype)
    exact, sizes = np.array([exactly(*x, SCALARS) for x in zip(g, m, v, strict=True)]).T
    narrow = [x.astype(dtype) for x in (g, m, v)]
    found = np.diagonal(one_by_one(*narrow)).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        error = np.where(found == exact, 0, np.abs(found - exact) / sizes)
        of_naive = np.abs(naive(*narrow, SCALARS).astype(np.float64) - exact) / sizes
    assert error.max() <= tolerance
    assert (found[g == 0] == 0).all()
    assert np.mean(~(of_naive[g != 0] <= 0.1)) > 0.01  # not a digit left
    assert np.abs(change_of_step(g, m, v, *SCALARS) - exact).max() <= 1e-14 * sizes.max()


def one_by_one(g, m, v):
    """(n, n): row i has the gradient of element i alone, so that its dots with one-hot directions are no sums."""
    n, block = len(g), 250
    found = np.zeros((n, n), g.dtype)
    for first in range(0, n, block):
        rows = slice(first, first + block)
        gradients, ones = np.diag(g[rows]), np.ones(block, g.dtype)
        directions = np.eye(block, dtype=g.dtype)[:, None]
        moments = (x[rows][None] for x in (m, v))
        found[rows, rows] = gg.adam_dots(gradients, ones[:, None], ones, *moments, directions, SCALARS)
    return found


def test_the_naive_difference_is_beyond_the_bound():
    """In float32 and with the sums in float64, on every case whose gradients are small beside the moments."""
    small = [case for case in cases.CASES if case.kind == "small"]
    for case in small:
        values = cases.inputs(case, "float32")
        a, b, clip, m, v, D = (values[name] for name in cases.INPUTS)
        exact = cases.run(case, cases.arrays(case, values, layouts.numpy_array, "float64"), "reference")["out"]
        gradients = clip[:, None, None] * np.einsum("itp,itd->ipd", b, a)
        steps = naive(*(x.astype(np.float32) for x in (gradients, m, v)), case.scalars).astype(np.float64)
        allowed = cases.bound(case, "float32") * cases.scales(case, values)["out"]
        assert (np.abs(np.einsum("ipd,kpd->ik", steps, D) - exact) > allowed).all()


def test_uses_of_a_tied_weight_go_along_the_tokens():
    """A head and the table that it shares: both uses before the step; the sum of two steps would be wrong."""
    rng = np.random.default_rng(2)
    hidden, embedded, logits = (rng.standard_normal((2, 7, n)) for n in (5, 5, 11))
    clip, m, v, D = np.ones(2), rng.standard_normal((11, 5)), rng.uniform(0.1, 1, (11, 5)), rng.standard_normal((11, 5))
    one_hot = np.eye(11)[rng.integers(0, 11, (2, 7))]
    both = gg.adam_dots(
        np.concatenate([hidden, embedded], 1), np.concatenate([logits, one_hot], 1), clip, m, v, D, SCALARS
    )
    gradients = np.einsum("itp,itd->ipd", logits, hidden) + np.einsum("itp,itd->ipd", one_hot, embedded)
    expected = [np.sum(D * change_of_step(g, m, v, *SCALARS)) for g in gradients]
    np.testing.assert_allclose(both, expected, rtol=1e-12)
    apart = [gg.adam_dots(x, y, clip, m, v, D, SCALARS) for x, y in ((hidden, logits), (embedded, one_hot))]
    assert (np.abs(sum(apart) - both) > 0.02 * np.abs(both)).all()


def test_gradients_that_are_already_formed():
    rng = np.random.default_rng(3)
    g, m, v, D = (
        rng.standard_normal((4, 37)),
        rng.standard_normal(37),
        rng.uniform(0, 1, 37),
        rng.standard_normal((2, 37)),
    )
    clip = rng.uniform(0.1, 1, 4)
    found = gg.adam_dots(g, np.ones((4, 1)), clip, m[None], v[None], D[:, None], SCALARS)
    changes = [change_of_step(c * x, m, v, *SCALARS) for c, x in zip(clip, g, strict=True)]
    np.testing.assert_allclose(found, np.array(changes) @ D.T, rtol=1e-12)


def test_a_batch_gives_the_numbers_of_its_samples():
    case = cases.Case(5, 6, 33, 20, 2)
    values = cases.inputs(case, "float32")
    a, b, clip, m, v, D = (values[name].astype(np.float32) for name in cases.INPUTS)
    whole = gg.adam_dots(a, b, clip, m, v, D, case.scalars)
    single = [gg.adam_dots(a[i : i + 1], b[i : i + 1], clip[i : i + 1], m, v, D, case.scalars)[0] for i in range(5)]
    assert np.array_equal(whole, single)
