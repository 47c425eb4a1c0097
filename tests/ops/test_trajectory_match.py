"""trajectory_match beyond what every op promises: masks, derivatives of every order, errors, memory."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import ghostgram as gg

SHAPES = [(4, 3, 2), (), (5,), (0, 3), (6, 7)]


def lists(dtype=torch.float64, seed=0):
    """student, start and target over SHAPES."""
    generator = torch.Generator().manual_seed(seed)
    return tuple([torch.randn(s, generator=generator, dtype=dtype) for s in SHAPES] for _ in range(3))


def masks(dtype=torch.float64):
    """One mask of every kind."""
    generator = torch.Generator().manual_seed(9)
    real = [torch.rand(s, generator=generator, dtype=dtype) for s in SHAPES]
    return {
        "none": None,
        "first": 26,
        "weights": [1.0, 0.0, 2.5, 1.0, 0.5],
        "bool": [x > 0.4 for x in real],
        "real": [torch.where(x > 0.3, x, 0) for x in real],
    }


def by_hand(student, start, target, mask):
    """The expression in torch, by flat vectors."""
    flat = [torch.cat([x.reshape(-1) for x in xs]) for xs in (student, start, target)]
    if mask is None:
        m = torch.ones_like(flat[0])
    elif isinstance(mask, int):
        m = (torch.arange(flat[0].numel()) >= mask).to(flat[0].dtype)
    elif isinstance(mask[0], float):
        m = torch.cat([torch.full((x.numel(),), w, dtype=x.dtype) for x, w in zip(student, mask, strict=True)])
    else:
        m = torch.cat([x.reshape(-1).to(flat[0].dtype) for x in mask])
    return (m * (flat[0] - flat[2]) ** 2).sum() / (m * (flat[1] - flat[2]) ** 2).sum()


@pytest.mark.parametrize("mask", masks())
def test_loss_and_gradient_equal_the_expression(mask):
    student, start, target = lists()
    leaves = [x.clone().requires_grad_() for x in student]
    expected = by_hand(leaves, start, target, masks()[mask])
    gradient = torch.autograd.grad(expected, leaves)
    loss = gg.trajectory_match(leaves, start, target, masks()[mask])
    found = gg.trajectory_match_grad(student, start, target, masks()[mask])
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(found.loss, expected.detach(), rtol=1e-13, atol=0)
    for by_autograd, at_once, truth in zip(torch.autograd.grad(loss, leaves), found.gradient, gradient, strict=True):
        torch.testing.assert_close(by_autograd, truth, rtol=1e-13, atol=1e-15)
        torch.testing.assert_close(at_once, truth, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("mask", masks())
def test_derivatives_of_two_orders(mask):
    student, start, target = lists()

    def loss(*tensors):
        return gg.trajectory_match(list(tensors), start, target, masks()[mask])

    leaves = [x.requires_grad_() for x in student]
    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradgradcheck(loss, leaves)


def test_a_third_derivative():
    """Of L^2, whose third derivative is not 0."""
    student, start, target = lists()
    x = student[0].clone().requires_grad_()
    results = []
    for match in (gg.trajectory_match, by_hand):
        value = match([x], start[:1], target[:1], None) ** 2
        for _ in range(3):
            value = torch.autograd.grad(value, x, create_graph=True)[0].sin().sum()
        results.append(value)
    torch.testing.assert_close(*results, rtol=1e-10, atol=0)


@pytest.mark.parametrize("mask", masks())
def test_compiled_loss_and_gradient(mask):
    student, start, target = lists(torch.float32)
    leaves = [x.requires_grad_() for x in student]

    chosen = masks(torch.float32)[mask]

    def step(leaves):
        return gg.trajectory_match(leaves, start, target, chosen) * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(leaves)
    eager = step(leaves)
    assert torch.equal(compiled, eager)
    for x, y in zip(torch.autograd.grad(compiled, leaves), torch.autograd.grad(eager, leaves), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_get_a_wide_loss_and_their_own_gradient(dtype):
    student, start, target = lists(dtype)
    leaves = [x.requires_grad_() for x in student]
    loss = gg.trajectory_match(leaves, start, target)
    loss.backward()
    found = gg.trajectory_match_grad([x.detach() for x in leaves], start, target)
    assert loss.dtype is torch.float32
    for x, wide in zip(leaves, found.gradient, strict=True):
        assert x.grad.dtype is dtype
        assert wide.dtype is torch.float32
        torch.testing.assert_close(x.grad, wide.to(dtype), rtol=0, atol=0)


def test_masks_agree_with_each_other_to_the_bit():
    student, start, target = lists()
    match = lambda mask: gg.trajectory_match(student, start, target, mask)  # noqa: E731
    bools = masks()["bool"]
    assert match(0) == match(None) == match([1.0] * 5)
    assert match(bools) == match([x.double() for x in bools])
    assert match([0, 0, 0, 1, 1]) == gg.trajectory_match(student[3:], start[3:], target[3:])
    assert match([2.0] * 5) == match(None)


def test_the_front_that_a_mask_drops_grows():
    student, start, target = lists()
    flat = torch.cat([x.reshape(-1) for x in student])
    for k in range(flat.numel()):
        gradient = gg.trajectory_match_grad(student, start, target, k).gradient
        kept = torch.cat([x.reshape(-1) for x in gradient]) != 0
        assert torch.equal(kept, torch.arange(flat.numel()) >= k)


@pytest.mark.parametrize("value", [np.inf, np.nan])
@pytest.mark.parametrize("mask", ["first", "weights", "bool", "real"])
def test_what_is_dropped_takes_no_part(mask, value):
    student, start, target = lists()
    dropped = [0] if mask == "first" else [1] if mask == "weights" else [0, 2, 4]
    expected = gg.trajectory_match_grad(student, start, target, masks()[mask])
    for t in dropped:
        for x in (student[t], start[t], target[t]):
            x[masks()[mask][t] == 0 if mask in ("bool", "real") else ...] = value
    found = gg.trajectory_match_grad(student, start, target, masks()[mask])
    assert found.loss == expected.loss
    for x, y in zip(found.gradient, expected.gradient, strict=True):
        assert torch.equal(x, y)


def test_values_that_are_not_finite_reach_the_loss():
    student, start, target = lists()
    student[4][2, 2] = np.inf
    assert gg.trajectory_match(student, start, target) == np.inf
    target[4][2, 3] = np.nan
    assert gg.trajectory_match(student, start, target).isnan()


def test_any_strides():
    student, start, target = lists()
    expected = gg.trajectory_match_grad(student, start, target, masks()["real"])
    turned = lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0) if x.ndim else x  # noqa: E731
    odd = ([turned(x) for x in xs] for xs in (student, start, target, masks()["real"]))
    found = gg.trajectory_match_grad(*odd)
    assert found.loss == expected.loss
    assert all(torch.equal(x, y) for x, y in zip(found.gradient, expected.gradient, strict=True))
    window = np.random.default_rng(0).standard_normal((3, 8, 9))[:, ::2, 1:8]
    assert gg.trajectory_match(*window) == gg.trajectory_match(*window.copy())


def test_one_array_is_a_list_of_one():
    student, start, target = (x[4].numpy() for x in lists(torch.float32))
    found = gg.trajectory_match_grad(student, start, target)
    assert type(found.gradient) is np.ndarray
    assert found.loss == gg.trajectory_match([student], [start], [target])
    by_jax = gg.trajectory_match_grad(*(jnp.asarray(x) for x in (student, start, target)))
    assert np.array_equal(found.gradient, by_jax.gradient)


def test_only_the_student_has_a_gradient():
    student, start, target = lists()
    student[0].requires_grad_()
    start[2].requires_grad_()
    with pytest.raises(RuntimeError, match=r"^start\[2\]: expected a constant, got a tensor that requires"):
        gg.trajectory_match(student, start, target)
    with torch.no_grad():
        gg.trajectory_match(student, start, target)


def test_a_student_changed_in_place_is_noticed():
    student, start, target = lists()
    x = student[0].clone().requires_grad_()
    y = x * 1
    loss = gg.trajectory_match([y], start[:1], target[:1])
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


ERRORS = [
    (lambda s, b, t: ([], [], []), ValueError, r"^student: expected an array, or a list of at least one"),
    (lambda s, b, t: (s, b[:2], t), ValueError, r"^start: expected a list of 5 like student, got a list of 2"),
    (lambda s, b, t: (s, b, t[0]), ValueError, r"^target: expected a list of 5 like student, got one array"),
    (lambda s, b, t: (s[0], b[0], t[2]), ValueError, r"^target: expected shape \(4, 3, 2\) like student, got \(5,\)"),
    (lambda s, b, t: (s, b, [*t[:4], t[4].T]), ValueError, r"^target\[4\]: expected shape \(6, 7\)"),
    (lambda s, b, t: (s, [x.float() for x in b], t), TypeError, r"^start\[0\]: expected float64 like student"),
    (lambda s, b, t: ([*s[:4], s[4].float()], b, t), TypeError, r"^student\[4\]: expected float64 like student\[0\]"),
    (lambda s, b, t: (s, b, [x.numpy() for x in t]), TypeError, r"^target\[0\]: expected a torch array like student"),
    (lambda s, b, t: ([x.int() for x in s], b, t), TypeError, r"^student\[0\]: expected float32, float64"),
    (lambda s, b, t: (s, b, t, 72), ValueError, r"^mask: expected 0 <= k < 72, the number of scalars, got 72"),
    (lambda s, b, t: (s, b, t, -1), ValueError, r"^mask: expected 0 <= k < 72"),
    (lambda s, b, t: (s, b, t, [1.0]), ValueError, r"^mask: expected a weight for each of 5 tensors, got 1"),
    (lambda s, b, t: (s, b, t, [1, 1, -1, 1, 1]), ValueError, r"^mask: expected weights >= 0 that are not all 0"),
    (lambda s, b, t: (s, b, t, [0] * 5), ValueError, r"^mask: expected weights >= 0 that are not all 0"),
    (lambda s, b, t: (s, b, t, s[:2]), ValueError, r"^mask: expected a list of 5 like student, got a list of 2"),
    (lambda s, b, t: (s, b, t, [x.int() for x in s]), TypeError, r"^mask\[0\]: expected bool or float64, got int32"),
    (lambda s, b, t: (s, b, t, [x * 0 for x in s]), ValueError, r"^mask: expected some weight above 0, got none"),
    (lambda s, b, t: (s, b, t, [x * 0 > 1 for x in s]), ValueError, r"^mask: expected some weight above 0, got none"),
    (
        lambda s, b, t: (s, b, t, [-x.abs() for x in s]),
        ValueError,
        r"^mask: expected weights >= 0, got 72 that",
    ),
    (lambda s, b, t: (s, b, t, True), ValueError, r"^mask: expected a list of 5 like student, got one array"),
    (lambda s, b, t: (s, t, t), ValueError, r"^start: expected to differ from target by more than rounding, got D = 0"),
    (lambda s, b, t: (s, [x + 1e-9 for x in t], t), ValueError, r"^start: expected to differ from target"),
    (lambda s, b, t: (s, [*b[:4], t[4]], t, 30), ValueError, r"^start: expected to differ from target"),
]


@pytest.mark.parametrize(("change", "kind", "message"), ERRORS, ids=[message[:40] for _, _, message in ERRORS])
@pytest.mark.parametrize("match", [gg.trajectory_match, gg.trajectory_match_grad])
def test_errors_name_the_argument(match, change, kind, message):
    with pytest.raises(kind, match=message):
        match(*change(*lists()))
