"""DSA against torch's resampling and plain loops; its gradient against a Jacobian; its draws against their ranges."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ghostgram.algorithms.pad.augment import OPS, Drawn, Dsa

OF_EACH = [pytest.param(op, id=op) for op in OPS]


def images(n, channels, size, dtype=torch.float64):
    return torch.randn(n, channels, size, size, dtype=dtype, generator=torch.Generator().manual_seed(n + size))


def drawn(op, size, ids=range(6), counters=(3, 1)):
    dsa = Dsa(5, size, (op,))
    return dsa, dsa.draw(counters, ids)


def applied_by_hand(op, parameters, x):
    """One image (C, s, s), by the table in the docstring of `Dsa`."""
    p, size = parameters.tolist(), x.shape[-1]
    if op == "color":
        x = x + p[0]
        x = (x - x.mean(0, keepdim=True)) * p[1] + x.mean(0, keepdim=True)
        return (x - x.mean()) * p[2] + x.mean()
    if op == "flip":
        return x[:, :, list(range(size))[::-1]] if p[0] else x
    if op in ("crop", "cutout"):
        down, right = int(p[0]), int(p[1])
        y = torch.zeros_like(x) if op == "crop" else x.clone()
        for i in range(size):
            for j in range(size):
                if op == "cutout" and down <= i < down + p[2] and right <= j < right + p[2]:
                    y[:, i, j] = 0
                if op == "crop" and 0 <= i - down < size and 0 <= j - right < size:
                    y[:, i, j] = x[:, i - down, j - right]
        return y
    theta = [[p[0], 0, 0], [0, p[-1], 0]]
    if op == "rotate":
        theta = [[math.cos(p[0]), -math.sin(p[0]), 0], [math.sin(p[0]), math.cos(p[0]), 0]]
    grid = F.affine_grid(x.new_tensor([theta]), [1, *x.shape], align_corners=True)
    return F.grid_sample(x[None], grid, align_corners=True)[0]


@pytest.mark.parametrize("op", OF_EACH)
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 16), (2, 7)])
def test_every_operation_follows_its_rule(op, channels, size):
    dsa, batch = drawn(op, size)
    x = images(6, channels, size)
    expected = torch.stack([applied_by_hand(op, p, each) for p, each in zip(batch.parameters, x, strict=True)])
    assert not torch.equal(expected, x)
    torch.testing.assert_close(dsa.apply(batch, x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("op", OF_EACH)
@pytest.mark.parametrize(("channels", "size"), [(1, 1), (3, 5), (1, 8)])
def test_the_adjoint_is_the_transposed_jacobian(op, channels, size):
    dsa, batch = drawn(op, size, range(3))
    x, g = images(3, channels, size).requires_grad_(), images(3, channels, size) + 1
    jacobian = torch.autograd.functional.jacobian(lambda x: dsa.apply(batch, x), x).reshape(x.numel(), x.numel())
    directions = torch.eye(x.numel(), dtype=x.dtype).view(-1, *x.shape)
    zero = dsa.apply(batch, torch.zeros_like(x))
    columns = torch.stack([(dsa.apply(batch, d) - zero).flatten() for d in directions], 1)  # of A, forwards alone
    torch.testing.assert_close(jacobian, columns, rtol=0, atol=1e-12)
    expected = (columns.T @ g.flatten()).view_as(g)
    torch.testing.assert_close(dsa.adjoint(batch, g), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(dsa.apply(batch, x), x, g)[0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("op", ["scale", "rotate"])
def test_the_resampling_adjoint_at_the_largest_distortions(op):
    """The nine that it gathers are all there are: the ends of the ranges, larger images, and torch's own backward."""
    ends = [[1 / 1.2, 1.2], [1.2, 1.2], [1 / 1.2, 1 / 1.2]] if op == "scale" else [[math.radians(15)], [-0.26], [0.0]]
    batch, dsa = Drawn(op, torch.tensor(ends, dtype=torch.float64)), Dsa(0, 32, (op,))
    x, g = images(3, 3, 32).requires_grad_(), images(3, 3, 32) - 0.5
    by_torch = torch.stack([applied_by_hand(op, p, each) for p, each in zip(batch.parameters, x, strict=True)])
    (expected,) = torch.autograd.grad(by_torch, x, g)
    torch.testing.assert_close(dsa.adjoint(batch, g), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("op", OF_EACH)
def test_the_gradient_is_differentiable_again_and_forwards(op):
    dsa, batch = drawn(op, 3, range(2))
    x = images(2, 2, 3).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: dsa.apply(batch, x).sin(), x)
    tangent = images(2, 2, 3)
    _, moved = torch.func.jvp(lambda x: dsa.apply(batch, x), (x.detach(),), (tangent,))
    zero = dsa.apply(batch, torch.zeros_like(tangent))
    torch.testing.assert_close(moved, dsa.apply(batch, tangent) - zero, rtol=0, atol=1e-12)


@pytest.mark.parametrize("op", OF_EACH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrower_types_round_and_no_more(op, dtype):
    dsa, batch = drawn(op, 16)
    x = images(6, 3, 16, dtype)
    far = 64 * torch.finfo(dtype).eps
    for method in (dsa.apply, dsa.adjoint):
        found = method(batch, x)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), method(batch, x.double()), rtol=far, atol=far)


@pytest.mark.parametrize("op", OF_EACH)
def test_a_batch_in_parts_and_again_has_the_same_bits(op):
    dsa, whole = drawn(op, 16)
    x = images(6, 3, 16, torch.float32)
    both = dsa.apply(whole, x), dsa.adjoint(whole, x)
    again = Dsa(5, 16, (op,)).draw((3, 1), list(range(6)))
    parts = [dsa.draw((3, 1), ids) for ids in ([0], [1, 2, 3], torch.tensor([4, 5]))]
    for method, expected in zip((dsa.apply, dsa.adjoint), both, strict=True):
        assert torch.equal(method(again, x), expected)
        found = [method(part, each) for part, each in zip(parts, x.split([1, 3, 2]), strict=True)]
        assert torch.equal(torch.cat(found), expected)


RANGES = {
    "color": ([-0.5, 0, 0.5], [0.5, 2, 1.5]),
    "crop": ([-4, -4], [4, 4]),
    "cutout": ([-8, -8, 16], [24, 24, 16]),
    "flip": ([0], [1]),
    "scale": ([1 / 1.2, 1 / 1.2], [1.2, 1.2]),
    "rotate": ([-math.radians(15)], [math.radians(15)]),
}


@pytest.mark.parametrize("op", OF_EACH)
def test_parameters_are_uniform_on_their_ranges(op):
    low, high = (np.array(bound, np.float64) for bound in RANGES[op])
    found = drawn(op, 32, range(20_000))[1].parameters.numpy()
    assert (found >= low).all()
    assert (found <= high).all()
    if (found == found.round()).all():
        np.testing.assert_array_equal([found.min(0), found.max(0)], [low, high])
        assert [len(np.unique(column)) for column in found.T] == [*(high - low + 1).astype(int)]
        steps = high - low + 1
        spread = np.sqrt((steps**2 - 1) / 12)
    else:
        spread = (high - low) / np.sqrt(12)
    assert (np.abs(found.mean(0) - (low + high) / 2) <= 4 * spread / np.sqrt(len(found))).all()
    np.testing.assert_allclose(found.std(0), spread, rtol=0.03)
    varying = found[:, spread > 0]
    correlated = np.atleast_2d(np.corrcoef(varying.T)) - np.eye(varying.shape[1])
    assert np.abs(correlated).max() < 5 / np.sqrt(len(found))


def test_every_operation_is_drawn_equally_often_and_by_counters_alone():
    dsa = Dsa(1, 8)
    found = [dsa.draw((step,), [7]).op for step in range(900)]
    for op in OPS:
        assert abs(found.count(op) - 150) < 4 * math.sqrt(900 * 5 / 36)
    assert dsa.draw((11,), [1, 2]).op == dsa.draw((11,), [9]).op
    assert [Dsa(1, 8, stream="experts").draw((step,), [7]).op for step in range(900)] != found


def test_global_randomness_is_left_alone():
    np.random.seed(0)  # noqa: NPY002 - the global state is what is looked at
    before = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    dsa, batch = drawn("rotate", 8)
    dsa.adjoint(batch, dsa.apply(batch, images(6, 1, 8)))
    assert (np.random.get_state()[1] == before[0]).all()  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[1])


def test_what_is_wrong_is_named():
    with pytest.raises(ValueError, match="size: expected at least 1, got 0"):
        Dsa(0, 0)
    for ops in ((), ("flip", "flip"), ("flip", "blur")):
        with pytest.raises(ValueError, match="ops: expected some of color, crop"):
            Dsa(0, 8, ops)
    dsa, batch = drawn("flip", 8, range(2))
    with pytest.raises(ValueError, match=r"x: expected shape \(2, C, 8, 8\), got \(2, 3, 8, 7\)"):
        dsa.apply(batch, torch.zeros(2, 3, 8, 7))
    with pytest.raises(ValueError, match=r"g: expected shape \(2, C, 8, 8\), got \(3, 1, 8, 8\)"):
        dsa.adjoint(batch, torch.zeros(3, 1, 8, 8))
    with pytest.raises(TypeError, match="x: expected float32, float64, bfloat16 or float16, got uint8"):
        dsa.apply(batch, torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
