"""The primitives inside jit, vmap and grad of JAX: the kernels' own bits, batched where that pays, clear errors."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import ghostgram as gg
from doors import EVERY, arrays, results
from ghostgram.ops.cost_model import choose_way

SIZES = {
    "usual": {},
    "one of each": {"samples": 1, "tokens": 1, "d": 1, "p": 1},
    "primes": {"samples": 5, "tokens": 17, "d": 37, "p": 31},
    "no samples": {"samples": 0},
}


def numbers(found):
    return [np.asarray(x) for x in results(found)]


def same(got, expected):
    assert len(got) == len(expected)
    for x, y in zip(got, expected, strict=True):
        assert x.shape == y.shape
        assert np.array_equal(x, y, equal_nan=True)


def close(got, expected):
    """As `same`, for a kernel whose sums may be in another order where there are more samples."""
    assert len(got) == len(expected)
    for x, y in zip(got, expected, strict=True):
        assert x.dtype == y.dtype or x.dtype == np.int32
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def batches(count=3, make=jnp.asarray):
    """One set of inputs for each of a batch, and all of them along a new first axis."""
    each = [arrays(make, seed=seed) for seed in range(count)]
    return each, {name: jnp.stack([v[name] for v in each]) for name in each[0]}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("door", EVERY)
def test_all_frameworks_give_the_same_bits_jitted_or_not(door, sizes):
    if sizes == "no samples" and door.startswith(("trajectory", "gumbel")):
        pytest.skip("nothing to match or to draw")
    call, sizes = EVERY[door], SIZES[sizes]
    expected = numbers(call(arrays(**sizes)))
    for x, y in zip(numbers(call(arrays(torch.from_numpy, **sizes))), expected, strict=True):
        # But for the roots of norms, which are torch's: where it takes MKL's vectors, a unit in the last place off.
        np.testing.assert_allclose(x, y, rtol=np.finfo(np.float32).eps, atol=0)
    v = arrays(jnp.asarray, **sizes)
    for run in (call, jax.jit(call)):
        found = run(v)
        assert all(isinstance(x, jax.Array) for x in results(found))
        same(numbers(found), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("door", ["grad_norms", "grad_stats", "softmax_stats of distributions", "trajectory_match"])
def test_half_types_give_the_same_bits(door, dtype):
    v = {n: x.astype(dtype) if x.dtype == np.float32 else x for n, x in arrays(jnp.asarray).items()}
    eager = EVERY[door](v)
    assert all(x.dtype == jnp.float32 for x in results(eager))
    same(numbers(jax.jit(EVERY[door])(v)), numbers(eager))


def test_float64_and_int64_where_jax_has_them():
    with jax.enable_x64(True):
        v = arrays(jnp.asarray, dtype=np.float64)
        for door, call in EVERY.items():
            found = jax.jit(call)(v)
            assert {str(x.dtype) for x in results(found)} == ({"int64"} if door == "gumbel_topk" else {"float64"})
            same(numbers(found), numbers(call(arrays(dtype=np.float64))))
        ids = np.array([2**63 + 5, 1, 2**64 - 1], np.uint64)
        scores = np.zeros(3)
        drawn = jax.jit(lambda s, i: gg.gumbel_topk(s, 2, ids=i, seed=1))(jnp.asarray(scores), jnp.asarray(ids))
        same([np.asarray(drawn)], [gg.gumbel_topk(scores, 2, ids=ids, seed=1)])


def test_dtypes_are_those_that_jax_can_hold():
    found = jax.jit(EVERY["gumbel_topk"])(arrays(jnp.asarray))
    assert [x.dtype for x in found] == [jnp.int32] * 3


@pytest.mark.parametrize("door", EVERY)
def test_vmap_is_a_loop_over_calls(door):
    each, together = batches()
    found = numbers(jax.jit(jax.vmap(EVERY[door]))(together))
    for i, v in enumerate(each):
        close([x[i] for x in found], numbers(EVERY[door](v)))


SHARED = {
    "grad_norms": ("", "b"),
    "grad_dots": ("D",),
    "grad_stats": ("a", "D"),
    "embedding_stats": ("table", "ids"),
    "softmax_stats": ("",),
    "grad_project": ("P_out P_in", "b"),
    "grad_sketch": ("",),
    "trajectory_match": ("b", "row"),
    "gumbel_topk": ("mean", "unique"),
    "adam_dots": ("m v D",),
}
"""Inputs that a batch of calls may share; the first of them such that the batch is merged, where it can be."""


@pytest.mark.parametrize("door", SHARED)
def test_vmap_with_shared_inputs_and_of_a_vmap(door):
    each, together = batches(2)

    @jax.jit
    def run(together, once):
        def over(names):
            axes = {name: None if name in names.split() else 0 for name in together}
            mixed = {name: together[name] if axes[name] == 0 else once[name] for name in together}
            return jax.vmap(EVERY[door], in_axes=(axes,))(mixed)

        twice = {name: jnp.stack([x, x[::-1], x]) for name, x in together.items()}
        return list(map(over, SHARED[door])), jax.vmap(jax.vmap(EVERY[door]))(twice)

    shared, twice = run(together, each[0])
    for names, found in zip(SHARED[door], shared, strict=True):
        for i, v in enumerate(each):
            once = {name: each[0][name] for name in names.split()}
            close([x[i] for x in numbers(found)], numbers(EVERY[door](v | once)))
    for i, j in np.ndindex(3, 2):
        close([x[i, j] for x in numbers(twice)], numbers(EVERY[door](each[j if i != 1 else 1 - j])))


def test_vmap_over_samples_is_one_call_of_more_samples():
    """On its own each sample is too small to be shared among threads; seen here by the row that an error names."""
    logits, labels = jnp.zeros((4, 2, 3, 5)), jnp.zeros((4, 2, 3), jnp.int32).at[3, 1, 2].set(9)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"labels: .*got 9 at row 23"):
        jax.block_until_ready(jax.vmap(gg.el2n)(logits, labels))


def test_scan_and_the_platform_that_a_function_is_compiled_for():
    each, together = batches()
    _, found = jax.lax.scan(lambda c, v: (c, gg.grad_norms(v["a"], v["b"], backend="cpu")), 0, together)
    same([np.asarray(found)], [np.stack([gg.grad_norms(np.asarray(v["a"]), np.asarray(v["b"])) for v in each])])


def test_arrays_over_several_devices():
    """In a process of its own: how many devices a CPU has is decided when JAX starts."""
    program = """
import jax, jax.numpy as jnp, numpy as np, ghostgram as gg
from jax.sharding import Mesh, NamedSharding, PartitionSpec

values = np.random.default_rng(0).standard_normal((4, 3, 8)).astype(np.float32)
mesh, rows = Mesh(np.array(jax.devices()), ("x",)), PartitionSpec("x")
x = jax.device_put(values, NamedSharding(mesh, rows))
assert len(x.devices()) == 2
apart = jax.jit(jax.shard_map(gg.grad_norms, mesh=mesh, in_specs=(rows, rows), out_specs=rows))
for run in (gg.grad_norms, jax.jit(gg.grad_norms), apart):
    np.testing.assert_allclose(run(x, x), gg.grad_norms(values, values), rtol=1e-6)
assert len(apart(x, x).devices()) == 2
"""
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    subprocess.run([sys.executable, "-c", program], env=env, check=True)


def test_a_constant_beside_a_traced_array():
    v = arrays(jnp.asarray)
    expected = numbers(gg.grad_stats(v["a"], v["b"], v["D"]))
    for name in ("a", "b", "D"):
        same(numbers(jax.jit(lambda x, name=name: EVERY["grad_stats"](v | {name: x}))(v[name])), expected)


# Gradients


def match(v, mask=None):
    """trajectory_match as a function of the student, and in words of jax.numpy."""
    start, target, m = [v["x"], 2 * v["row"]], [3 * v["x"], v["row"] - 1], [2.0, 0.5] if mask is None else mask

    def plain(student):
        weights = [jnp.asarray(w, jnp.float32) for w in m] if isinstance(m, list) else [1.0, 1.0]
        over = lambda xs: sum(jnp.sum(w * (x - y) ** 2) for w, x, y in zip(weights, xs, target, strict=True))  # noqa: E731
        return over(student) / over(start)

    return (lambda student: gg.trajectory_match(student, start, target, m)), plain, [v["b"], v["row"]]


@pytest.mark.parametrize("masked", [False, True])
def test_the_matching_loss_has_all_derivatives(masked):
    v = arrays(jnp.asarray)
    ours, plain, student = match(v, [v["x"] > 0, v["row"] > -1] if masked else None)
    along = [jnp.cos(x) for x in student]
    derivatives = {
        "reverse": lambda f: jax.grad(f),
        "forward": lambda f: lambda s: jax.jvp(f, (s,), (along,)),
        "reverse over reverse": lambda f: jax.grad(
            lambda s: sum(jnp.vdot(g, d) for g, d in zip(jax.grad(f)(s), along, strict=True)) ** 2
        ),
        "forward over reverse": lambda f: lambda s: jax.jvp(jax.grad(f), (s,), (along,)),
        "third": lambda f: jax.grad(lambda s: jnp.vdot(jax.jvp(jax.grad(f), (s,), (along,))[1][0], s[0] ** 2)),
    }
    for name, derivative in derivatives.items():
        got, expected = (jax.tree.leaves(jax.jit(derivative(f))(student)) for f in (ours, plain))
        for x, y in zip(got, expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6, err_msg=name)


def test_the_gradient_is_the_one_of_torch():
    v = arrays(jnp.asarray)
    ours, _, student = match(v)
    gradient = jax.jit(jax.grad(ours))(student)
    same([np.asarray(g) for g in jax.grad(ours)(student)], [np.asarray(g) for g in gradient])
    t = arrays(lambda x: torch.from_numpy(x).requires_grad_(x.dtype == np.float32))
    fixed = {name: x.detach() for name, x in t.items()}
    gg.trajectory_match(
        [t["b"], t["row"]], [fixed["x"], 2 * fixed["row"]], [3 * fixed["x"], fixed["row"] - 1], [2.0, 0.5]
    ).backward()
    same([np.asarray(g) for g in gradient], [t["b"].grad.numpy(), t["row"].grad.numpy()])


def test_per_sample_gradients_by_vmap_of_grad():
    each, together = batches()
    gradient = jax.grad(lambda b, x: gg.trajectory_match(b, x, 3 * x))
    found = jax.vmap(gradient)(together["b"], together["x"])
    for i, v in enumerate(each):
        same([np.asarray(found[i])], [np.asarray(gradient(v["b"], v["x"]))])


@pytest.mark.parametrize("name", ["start", "target"])
def test_only_the_student_has_a_gradient(name):
    v = arrays(jnp.asarray)
    lists = {"student": v["b"], "start": v["x"], "target": 3 * v["x"]}
    with pytest.raises(TypeError, match=rf"{name}\[0\]: expected a constant"):
        jax.grad(lambda x: gg.trajectory_match(**lists | {name: x}))(lists[name])


def test_other_results_are_constants():
    """An error where a gradient is asked for, and none where a result is only looked at."""
    v = arrays(jnp.asarray)
    with pytest.raises(TypeError, match="grad_stats: reads its inputs as constants: it has no gradient"):
        jax.jit(jax.grad(lambda a: gg.grad_stats(a, v["b"]).norms.sum()))(v["a"])
    loss = lambda a: (jnp.sum(a**2), gg.grad_norms(a, v["b"]))  # noqa: E731
    (_, norms), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(v["a"])
    same([np.asarray(norms), np.asarray(gradient)], [gg.grad_norms(*map(np.asarray, (v["a"], v["b"]))), 2 * v["a"]])


def test_dots_are_constants_by_whichever_way():
    for directions, op, way in ((2, "grad_stats", "M"), (1, "grad_dots", "P")):
        v = arrays(jnp.asarray, directions=directions)
        a, b, D = v["a"], v["b"], v["D"]
        assert choose_way("dots", ("M", "P"), *a.shape, b.shape[-1], directions=len(D)) == way
        for transform in (jax.grad, lambda dots: jax.jit(jax.grad(dots))):
            for x, dots in ((a, lambda x: gg.grad_dots(x, b, D)), (D, lambda x: gg.grad_dots(a, b, x))):  # noqa: B023
                with pytest.raises(TypeError, match=f"{op}: reads its inputs as constants: it has no gradient"):
                    transform(lambda x, dots=dots: dots(x).sum())(x)


# Errors

FOUND_BY_KERNELS = [
    (lambda v: gg.embedding_stats(v["ids"] + 7, v["b"], v["table"]), r"ids: expected 0 <= id < 7, got"),
    (lambda v: gg.softmax_stats(v["logits"], v["ids"] + 1), r"labels: expected 0 <= label < 7 .*, got 7 at row"),
    (lambda v: gg.gumbel_topk(v["mean"][0].at[2].set(jnp.nan), 2), r"scores: expected numbers, got NaN at index 2"),
    (lambda v: gg.gumbel_topk(v["mean"][0], 2, ids=v["ids"][0] * 0), r"ids: expected one score for each id, got two"),
    (lambda v: gg.gumbel_topk(v["mean"][0] * 0, 2, ids=v["ids"][0] * 0), r"ids: expected at least 2 different ones"),
    (lambda v: gg.trajectory_match(v["b"], v["x"], v["x"]), r"start: expected to differ from target"),
    (lambda v: gg.trajectory_match_grad(v["b"], v["x"], v["b"], v["x"]), r"mask: expected weights >= 0, got \d+"),
]


@pytest.mark.parametrize(("call", "message"), FOUND_BY_KERNELS, ids=[message[:30] for _, message in FOUND_BY_KERNELS])
def test_what_only_numbers_tell_is_an_error_of_the_run(call, message):
    v = arrays(jnp.asarray)
    with pytest.raises((IndexError, ValueError), match=message):
        call(v)
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(jax.jit(call)(v))


def test_shapes_are_errors_of_the_tracing():
    v = arrays(jnp.asarray)
    with pytest.raises(ValueError, match=r"^b: expected shape \(3, 5, 'p'\) like a"):
        jax.jit(gg.grad_norms)(v["a"], v["b"][:, :4])
    with pytest.raises(RuntimeError, match=r"^grad_stats: backend 'reference' cannot run inside"):
        jax.jit(lambda a, b: gg.grad_stats(a, b, backend="reference"))(v["a"], v["b"])


def test_a_stream_wants_numbers():
    with pytest.raises(TypeError, match=r"scores: expected an array with numbers, .* inside jax.jit"):
        jax.jit(lambda s, i: gg.GumbelTopK(2).update(s, i))(jnp.ones(3), jnp.arange(3))
