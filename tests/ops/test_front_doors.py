"""What every front door promises: any array type in and the same type out, clear errors, torch sees what it calls."""

import subprocess
import sys
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ghostgram as gg
from doors import ADAM, DOORS, arrays, results

FRAMEWORKS = {"torch": torch.from_numpy, "numpy": np.asarray, "jax": jnp.asarray}


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("door", DOORS)
def test_every_framework_gives_the_same_numbers_and_its_own_type(door, framework):
    make = FRAMEWORKS[framework]
    kind = type(make(np.zeros(1)))
    expected = results(DOORS[door](arrays(dtype=np.float64)))
    for got, truth in zip(results(DOORS[door](arrays(make))), expected, strict=True):
        assert type(got) is kind
        assert str(got.dtype).endswith("float32")
        np.testing.assert_allclose(np.asarray(got), truth, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("door", DOORS)
def test_the_reference_backend_agrees(door, monkeypatch):
    expected = results(DOORS[door](arrays(dtype=np.float64)))
    for name in {door.partition(" ")[0] for door in DOORS}:
        front = getattr(gg, name)
        monkeypatch.setattr(gg, name, partial(front, backend="reference"))
    for got, truth in zip(results(DOORS[door](arrays(dtype=np.float64))), expected, strict=True):
        np.testing.assert_allclose(got, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("door", DOORS)
def test_compiles_in_one_graph(door):
    inputs = arrays(torch.from_numpy)
    compiled = torch.compile(DOORS[door], fullgraph=True, backend="aot_eager")
    for got, eager in zip(results(compiled(inputs)), results(DOORS[door](inputs)), strict=True):
        assert torch.equal(got, eager)


def test_the_first_call_may_be_compiled():
    """Even where ghostgram was imported before torch, so that no op is registered yet."""
    program = """
import ghostgram, torch
a, b = torch.ones(2, 3, 4), torch.ones(2, 3, 5)
norms = torch.compile(ghostgram.grad_norms, fullgraph=True, backend="aot_eager")(a, b)
assert torch.equal(norms, ghostgram.grad_norms(a, b))
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def op_samples():
    """Inputs of every torch op, the rarer forms too."""
    v = arrays(torch.from_numpy)
    half = {name: x.bfloat16() for name, x in v.items() if x.is_floating_point()}
    x, one, totals = v["x"] + 3, torch.tensor(1.5), torch.tensor([1.0, 2.0, 3.0, 0.0]).double()
    return {
        "grad_stats": [
            (v["a"], v["b"], v["D"], True, True, "auto"),
            (half["a"], half["b"], None, False, True, "auto"),
        ],
        "grad_gram": [
            (v["a"], v["b"], None, None, False, "auto"),
            (v["a"], v["b"], None, None, True, "auto"),
            (half["a"], half["b"], half["a2"], half["b2"], False, "auto"),
        ],
        "grad_norms": [(v["a"], v["b"], "G", "auto"), (half["a"], half["b"], "M", "auto")],
        "embedding_stats": [
            (v["ids"], v["b"], v["table"], 2, True, "auto"),
            (v["ids"], half["b"], None, -1, False, "auto"),
        ],
        "affine_stats": [
            (v["b"], v["x"], v["mean"], v["rstd"], v["row"], v["row"], False, True, "auto"),
            (v["b"], v["x"], v["groups"], v["groups"], v["channels"], None, True, True, "auto"),
            (half["b"], None, None, None, None, v["row"], False, False, "auto"),
        ],
        "gumbel_topk": [
            (v["mean"].flatten(), None, 4, 1, 0.5, "auto"),
            (half["mean"].flatten(), torch.arange(15) * -(2**59), 99, -1, 1.0, "auto"),
        ],
        "grad_project": [
            (v["a"], v["b"], v["P_out"], None, 5, 3, "rademacher", 1, 0, "auto"),
            (half["a"], half["b"], None, v["P_in"], 2, 7, "gaussian", 0, 4, "auto"),
        ],
        "grad_sketch": [(v["a"], v["b"], 9, 2, 1, 0, "auto"), (half["a"], half["b"], 5, 1, 0, 3, "auto")],
        "softmax_stats": [
            (v["logits"], v["ids"], 3, "auto"),
            (half["logits"], v["ids"].long(), -100, "auto"),
            (half["logits"], v["soft"], -100, "auto"),
        ],
        "trajectory_match": [
            (
                [v["b"].clone().requires_grad_(), v["row"]],
                [v["x"], v["row"] - 1],
                [x, 2 * v["row"]],
                None,
                None,
                7,
                "auto",
            ),
            ([half["b"]], [half["x"]], [half["a"][..., :4].clone()], None, [2.0], 0, "auto"),
            ([v["b"]], [v["x"]], [x], [v["x"] > 0], None, 0, "auto"),
        ],
        "trajectory_match_grad": [
            ([v["a"], v["row"]], [v["a"] + 1, v["row"] - 1], [2 * v["a"], 2 * v["row"]], None, None, 7, "auto"),
            (
                [half["x"]],
                [half["a"][..., :4].clone()],
                [half["b"].clone()],
                None,
                None,
                0,
                "auto",
            ),
        ],
        "trajectory_match_backward": [
            ([v["b"], v["row"]], [v["x"], 2 * v["row"]], None, one.requires_grad_(), totals, [0.5, 1.0], 0, "auto"),
            ([half["x"]], None, [v["x"] > 0], torch.tensor(1.0), totals, None, 3, "auto"),
        ],
        "adam_dots": [
            (v["a"], v["b"], v["clip"], v["m"], v["v"], v["D"], list(ADAM), "auto"),
            (half["a"], half["b"], v["clip"], half["m"], half["v"], v["D"], list(ADAM), "auto"),
        ],
    }


@pytest.mark.parametrize("op", op_samples())
def test_opcheck(op):
    for args in op_samples()[op]:
        torch.library.opcheck(getattr(torch.ops.ghostgram, op).default, args)


def test_a_result_has_no_gradient():
    v = arrays(torch.from_numpy)
    with pytest.raises(RuntimeError, match="it has no gradient"):
        torch.ops.ghostgram.grad_gram(v["a"].requires_grad_(), v["b"], None, None, True, "auto").sum().backward()


def adam(inputs, **changed):
    """adam_dots with some of its arguments changed."""
    usual = {name: inputs[name] for name in ("a", "b", "clip", "m", "v")}
    usual |= {"directions": inputs["D"], "scalars": ADAM}
    return gg.adam_dots(**usual | changed)


ERRORS = [
    (lambda v: gg.grad_norms(v["a"], v["b"][:, :4]), ValueError, r"^b: expected shape \(3, 5, 'p'\) like a"),
    (lambda v: gg.grad_norms(v["a"].astype(int), v["b"]), TypeError, r"^a: expected float32"),
    (lambda v: gg.grad_norms(v["a"], v["b"].astype(np.float64)), TypeError, r"^b: expected float32 like a"),
    (lambda v: gg.grad_norms(v["a"], torch.from_numpy(v["b"])), TypeError, r"^b: expected a numpy array like a"),
    (lambda v: gg.grad_norms([1.0], v["b"]), TypeError, r"^a: expected a torch, NumPy, JAX or CuPy array"),
    (lambda v: gg.grad_norms(v["a"][0, 0], v["b"][0, 0]), ValueError, r"^a: expected \(B, features\)"),
    (lambda v: gg.grad_norms(v["a"], v["b"], backend="gpu"), ValueError, r"^backend: expected one of"),
    (lambda v: gg.grad_norms(v["a"], v["b"], backend="cuda"), RuntimeError, r"backend 'cuda' is not available"),
    (lambda v: gg.grad_dots(v["a"], v["b"], v["D"][:, :3]), ValueError, r"^D: expected shape \(K, 4, 6\) or \(4, 6\)"),
    (lambda v: gg.grad_dots(v["a"], v["b"], v["D"].astype(int)), TypeError, r"^D: expected float32"),
    (lambda v: gg.grad_gram(v["a"], v["b"], v["a2"]), ValueError, r"^b2: expected an array, because a2 is given"),
    (lambda v: gg.grad_gram(v["a"], v["b"], b2=v["b2"]), ValueError, r"^a2: expected an array, because b2 is given"),
    (lambda v: gg.grad_gram(v["a"], v["b"], v["a2"], v["b2"][:1]), ValueError, r"^b2: expected shape \(2, 6, 'p'\)"),
    (lambda v: gg.grad_gram(v["a"], v["b"], v["a2"][..., :3], v["b2"]), ValueError, r"^a2: expected 6 features like a"),
    (
        lambda v: gg.grad_gram(v["a"], v["b"], v["a2"].astype(np.float64), v["b2"].astype(np.float64)),
        TypeError,
        r"^a2: expected float32 like a",
    ),
    (lambda v: gg.embedding_stats(v["a"], v["b"]), TypeError, r"^ids: expected int32 or int64"),
    (lambda v: gg.embedding_stats(v["ids"][:2], v["b"]), ValueError, r"^b: expected shape \(2, 5, 'E'\) like ids"),
    (lambda v: gg.embedding_stats(v["ids"], v["b"], v["D"]), ValueError, r"^D: expected shape \(K, 4, 4\)"),
    (lambda v: gg.embedding_stats(v["ids"], v["b"], padding_idx=-1), ValueError, r"^padding_idx: expected None"),
    (lambda v: gg.embedding_stats(v["ids"] - 9, v["b"]), IndexError, r"^ids: expected 0 <= id, got -\d at sample 0"),
    (lambda v: gg.embedding_stats(v["ids"] + 7, v["b"], v["table"]), IndexError, r"^ids: expected 0 <= id < 7, got"),
    (lambda v: gg.affine_stats(v["b"], v["x"][:2]), ValueError, r"^x: expected shape \(3, 5, 4\) like b"),
    (lambda v: gg.affine_stats(v["b"], v["x"].astype(np.float16)), TypeError, r"^x: expected float32 like b"),
    (lambda v: gg.affine_stats(v["b"], v["x"], v["mean"][:2]), ValueError, r"^mean: expected shape \(3, 5\)"),
    (lambda v: gg.affine_stats(v["b"], v["x"], rstd=v["rstd"].astype(float)), TypeError, r"^rstd: expected float32"),
    (lambda v: gg.affine_stats(v["b"], rstd=v["rstd"]), ValueError, r"^rstd: expected None without x"),
    (lambda v: gg.affine_stats(v["b"], D_bias=v["row"][:, :3]), ValueError, r"^D_bias: expected shape \(K, 4\)"),
    (
        lambda v: gg.affine_stats(v["b"], v["x"], v["mean"][:, :3], channels_first=True),
        ValueError,
        r"^mean: expected shape \(3, G\), G dividing 5 channels, got \(3, 3\)",
    ),
    (
        lambda v: gg.affine_stats(v["b"], v["x"], v["groups"], v["mean"], channels_first=True),
        ValueError,
        r"^rstd: expected shape \(3, 1\) like mean, got \(3, 5\)",
    ),
    (lambda v: gg.affine_stats(v["b"], D_bias=v["row"], channels_first=True), ValueError, r"^D_bias: .*\(K, 5\)"),
    (lambda v: gg.affine_stats(v["b"][0, 0], channels_first=True), ValueError, r"^b: expected \(B, channels\) or"),
    (lambda v: gg.grad_project(v["a"], v["b"], v["P_in"], 3), ValueError, r"^P_out: expected shape \(k, 4\), got"),
    (lambda v: gg.grad_project(v["a"], v["b"], 3, v["P_in"].astype(float)), TypeError, r"^P_in: expected float32 or"),
    (lambda v: gg.grad_project(v["a"], v["b"], 3, 0), ValueError, r"^P_in: expected a matrix or a positive number"),
    (lambda v: gg.grad_project(v["a"], v["b"], 3, "3"), TypeError, r"^P_in: expected a torch, NumPy, JAX or CuPy"),
    (lambda v: gg.grad_project(v["a"], v["b"], 3, 2, distribution="x"), ValueError, r"^distribution: expected 'rad"),
    (lambda v: gg.grad_sketch(v["a"], v["b"], 0), ValueError, r"^size: expected 1 <= size"),
    (lambda v: gg.grad_sketch(v["a"], v["b"], 4, nonzeros=5), ValueError, r"^nonzeros: expected 1 <= nonzeros <= size"),
    (lambda v: gg.grad_sketch(v["a"], v["b"], 4, seed=-1), ValueError, r"^seed: expected 0 <= seed < 2\^63, got -1"),
    (lambda v: gg.grad_sketch(v["a"], v["b"], 4, layer=2**32), ValueError, r"^layer: expected 0 <= layer < 2\^32"),
    (lambda v: gg.softmax_stats(v["ids"], v["ids"]), TypeError, r"^logits: expected float32"),
    (lambda v: gg.softmax_stats(v["logits"], v["ids"][:, :4]), ValueError, r"^labels: expected shape \(3, 5\) like"),
    (lambda v: gg.el2n(v["logits"], v["ids"].astype(np.int16)), TypeError, r"^labels: expected int32 or int64"),
    (lambda v: gg.softmax_stats(v["logits"], v["soft"][..., :6]), ValueError, r"^labels: expected distributions of"),
    (lambda v: gg.el2n(v["logits"], v["soft"].astype(float)), TypeError, r"^labels: .* or float32 distributions"),
    (lambda v: gg.softmax_stats(v["logits"], v["ids"] + 1), IndexError, r"^labels: expected 0 <= label < 7 .*, got 7"),
    (lambda v: gg.el2n(v["logits"][0, 0, 0:1].reshape(()), v["ids"]), ValueError, r"^logits: expected \(\.\.\., C\)"),
    (lambda v: adam(v, clip=v["clip"][:2]), ValueError, r"^clip: expected shape \(3,\), got \(2,\)"),
    (lambda v: adam(v, clip=v["clip"].astype(float)), TypeError, r"^clip: expected float32, got float64"),
    (lambda v: adam(v, m=v["m"].T), ValueError, r"^m: expected shape \(4, 6\), got \(6, 4\)"),
    (lambda v: adam(v, m=v["m"].astype(np.float16)), TypeError, r"^m: expected float32 or float32, got float16"),
    (lambda v: adam(v, v=v["v"].astype(float)), TypeError, r"^v: expected float32 like m, got float64"),
    (lambda v: adam(v, directions=v["D"][:, :3]), ValueError, r"^directions: expected shape \(K, 4, 6\) or \(4, 6\)"),
    (lambda v: adam(v, scalars=ADAM[:5]), ValueError, r"^scalars: expected eta, beta1, .* and bc2, got 5 numbers"),
    (lambda v: adam(v, scalars=(1, 1, 0.9, 1, 1, 1)), ValueError, r"^scalars: expected 0 <= beta1 < 1, got 1"),
    (lambda v: adam(v, scalars=(1, 0, 0, 0, 1, 1)), ValueError, r"^scalars: expected 0 < eps <= 1, got 0"),
    (lambda v: adam(v, scalars=(np.nan, 0, 0, 1, 1, 1)), ValueError, r"^scalars: expected a finite eta, got nan"),
]


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS, ids=[message[:40] for _, _, message in ERRORS])
def test_errors_name_the_argument(call, kind, message):
    with pytest.raises(kind, match=message):
        call(arrays())


SIZES = st.fixed_dictionaries(
    {"samples": st.integers(1, 6), "tokens": st.integers(1, 40), "d": st.integers(1, 40), "p": st.integers(1, 40)}
)
properties = settings(max_examples=25, deadline=None)


def close(got, expected, scale):
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * float(np.max(scale, initial=0)) + 1e-30)


def sizes_of_gradients(v):
    """(B,) norms of sum_t |b_it| |a_it|^T: what rounding errors are relative to, however much of G_i cancels."""
    return np.linalg.norm(np.abs(v["b"]).swapaxes(1, 2) @ np.abs(v["a"]), axis=(1, 2)).astype(np.float64)


@properties
@given(sizes=SIZES, seed=st.integers(0, 99))
def test_gram_is_symmetric_positive_and_its_diagonal_the_squared_norms(sizes, seed):
    v = arrays(**sizes, seed=seed)
    gram, norms = gg.grad_gram(v["a"], v["b"]), gg.grad_norms(v["a"], v["b"])
    assert np.array_equal(gram, gram.T)
    assert np.linalg.eigvalsh(gram.astype(np.float64)).min() >= -1e-5 * np.sum(sizes_of_gradients(v) ** 2)
    close(np.diag(gram), norms**2, sizes_of_gradients(v) ** 2)
    close(gg.grad_stats(v["a"], v["b"]).norms ** 2, norms**2, sizes_of_gradients(v) ** 2)


@properties
@given(sizes=SIZES, seed=st.integers(0, 99))
def test_dots_are_linear_and_agree_with_the_gradient_they_sum_to(sizes, seed):
    v = arrays(**sizes, seed=seed)
    first, second = v["D"]
    stats = gg.grad_stats(v["a"], v["b"])
    dots = gg.grad_dots(v["a"], v["b"], v["D"])
    scale = sizes_of_gradients(v)[:, None] * np.linalg.norm(v["D"], axis=(1, 2))
    close(gg.grad_dots(v["a"], v["b"], first - 2 * second), dots[:, 0] - 2 * dots[:, 1], 3 * scale)
    close(gg.grad_stats(v["a"], v["b"], v["D"]).dots, dots, scale)
    total = np.sum(stats.weight_grad.astype(np.float64) ** 2)
    close(gg.grad_dots(v["a"], v["b"], stats.weight_grad).sum(), total, np.sum(sizes_of_gradients(v)) ** 2)


@properties
@given(sizes=SIZES, seed=st.integers(0, 99))
def test_samples_permute(sizes, seed):
    v = arrays(**sizes, seed=seed)
    order = np.random.default_rng(seed).permutation(sizes["samples"])
    moved = v | {name: v[name][order] for name in ("a", "b", "x", "mean", "rstd", "ids")}
    assert np.array_equal(gg.grad_norms(moved["a"], moved["b"]), gg.grad_norms(v["a"], v["b"])[order])
    gram = gg.grad_gram(v["a"], v["b"])
    close(gg.grad_gram(moved["a"], moved["b"]), gram[order][:, order], sizes_of_gradients(v) ** 2)
    assert np.array_equal(DOORS["embedding_stats"](moved).norms, DOORS["embedding_stats"](v).norms[order])
    assert np.array_equal(DOORS["affine_stats"](moved).weight_dots, DOORS["affine_stats"](v).weight_dots[order])


@properties
@given(sizes=SIZES, split=st.integers(1, 4), seed=st.integers(0, 99))
def test_middle_axes_are_tokens(sizes, split, seed):
    sizes = sizes | {"tokens": sizes["tokens"] * split}
    v = arrays(**sizes, seed=seed)
    per_token = ("a", "b", "x", "mean", "rstd", "ids", "logits", "soft")
    cut = v | {n: v[n].reshape(sizes["samples"], split, -1, *v[n].shape[2:]) for n in per_token}
    for door, call in DOORS.items():
        if door not in ("grad_gram of two", "affine_stats channels first"):
            for whole, parts in zip(results(call(v)), results(call(cut)), strict=True):
                assert np.array_equal(whole.ravel(), parts.ravel())


@properties
@given(sizes=SIZES, split=st.integers(1, 4), seed=st.integers(0, 99))
def test_axes_after_the_channels_are_space(sizes, split, seed):
    v = arrays(**sizes | {"p": sizes["p"] * split}, seed=seed)
    whole = DOORS["affine_stats channels first"](v)
    cut = v | {name: v[name].reshape(*v[name].shape[:2], split, -1) for name in ("b", "x")}
    for flat, parts in zip(whole, DOORS["affine_stats channels first"](cut), strict=True):
        assert np.array_equal(flat, parts)
    scale = np.abs(v["b"]).sum(2) * np.linalg.norm(v["channels"])
    turned = gg.affine_stats(v["b"].swapaxes(1, 2), D_bias=v["channels"])
    close(whole.bias_dots, turned.bias_dots, scale)


def test_embedding_takes_expanded_ids_and_a_padding_row():
    v = arrays()
    once = np.array([[1, 2, 2, 5, 1]])
    expanded = np.broadcast_to(once, (3, 5))
    assert np.array_equal(gg.embedding_stats(expanded, v["b"]).norms, gg.embedding_stats(expanded.copy(), v["b"]).norms)
    padded = gg.embedding_stats(expanded, v["b"], padding_idx=2).norms
    rows = np.stack([v["b"][:, [0, 4]].sum(1), v["b"][:, 3]], 1)
    close(padded, np.linalg.norm(rows, axis=(1, 2)), padded)
