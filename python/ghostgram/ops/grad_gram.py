"""Front door of grad_gram: inner products of per-sample gradients with each other."""

from __future__ import annotations

from ghostgram import _arrays, _dispatch
from ghostgram._arrays import Array
from ghostgram.ops import _torch
from ghostgram.ops.cost_model import DIRECTIONS_AT_ONCE, choose_way


def grad_gram(a: Array, b: Array, a2: Array | None = None, b2: Array | None = None, *, backend: str = "auto") -> Array:
    r"""Gram matrix of the per-sample weight gradients of a linear layer.

    For inputs `a` and output gradients `b` of a layer `y = x W^T`, and a second batch of both (the same one if not
    given),

        gram_ij = <sum_t b_it a_it^T, sum_s b2_js a2_js^T> = sum_{t,s} (a_it . a2_js) (b_it . b2_js).

    A cost model chooses between products of tokens (no gradient is formed, no T x T2 matrix stored) and materialising
    up to 16 gradients of the second side at a time; both are exact.

    Inputs are read as constants: the result carries no autograd history.

    Args:
        a: (B, d) or (B, ..., d) layer inputs; float32, bfloat16, float16 or float64. Middle axes are tokens.
        b: (B, p) or (B, ..., p) gradients of the loss at the layer's output, of a's dtype.
        a2: (B2, d) or (B2, ..., d), of a's dtype; another number of tokens is fine. None: a and b themselves.
        b2: (B2, p) or (B2, ..., p), of a's dtype; given if and only if a2 is.
        backend: "auto", "cpu", "cuda", "triton" or "reference".

    Returns:
        (B, B2), or (B, B) and exactly symmetric without a second batch; of the caller's type, float32 (float64 for
        float64 inputs).

    Raises:
        TypeError: An argument is no array, of another framework than a, or of an unsupported dtype.
        ValueError: Shapes do not fit; the message names the argument, what was expected and what came.
        RuntimeError: The backend asked for is not available here; the message says why.

    Cost:
        The cheaper of 2 B T B2 T2 (d + p) FLOPs (tokens; half without a second batch) and, materialised,
        2 d p (B2 T2 + ceil(B2 / 16) B T + B B2) with 16 d p floats of scratch.

    Source:
        Products of tokens are the ghost inner product of In-Run Data Shapley (arXiv 2406.11011, section 4.2).
    """
    _arrays.same_framework(a=a, b=b, a2=a2, b2=b2)
    a, b = _arrays.layer(a, b)
    d, p = a.shape[-1], b.shape[-1]
    second = None
    right, right_b = a, b
    if a2 is not None or b2 is not None:
        right, right_b = a2, b2 = _second_side(a, b, a2, b2)
        second = (right.shape[0], right.shape[1])
    ways = _dispatch.runnable({"G": "grad_gram", "M": "grad_stats"}, backend, _arrays.device_type(a))
    # Without a second sample there is nothing to materialise.
    if right.shape[0] and choose_way("gram", ways, a.shape[0], a.shape[1], d, p, second=second) == "M":
        return _materialised(a, b, right, right_b, backend, symmetric=second is None)
    return _torch.call("grad_gram", a, b, a2, b2, False, backend)


def _second_side(a: Array, b: Array, a2: Array | None, b2: Array | None) -> tuple[Array, Array]:
    for name, x, other in (("a2", a2, "b2"), ("b2", b2, "a2")):
        if x is None:
            raise ValueError(f"{name}: expected an array, because {other} is given, got None")
    a2, b2 = _arrays.layer(a2, b2, "a2", "b2")
    for name, x, like_name, like in (("a2", a2, "a", a), ("b2", b2, "b", b)):
        if _arrays.dtype_name(x) != _arrays.dtype_name(like):
            expected = f"{_arrays.dtype_name(like)} like {like_name}"
            raise TypeError(f"{name}: expected {expected}, got {_arrays.dtype_name(x)}")
        if x.shape[-1] != like.shape[-1]:
            raise ValueError(f"{name}: expected {like.shape[-1]} features like {like_name}, got {x.shape[-1]}")
    return a2, b2


def _materialised(a: Array, b: Array, a2: Array, b2: Array, backend: str, *, symmetric: bool) -> Array:
    """The second side's gradients, some at a time, as directions of grad_stats; symmetric halves mirrored."""
    columns = []
    for first in range(0, a2.shape[0], DIRECTIONS_AT_ONCE):
        chunk = range(first, min(first + DIRECTIONS_AT_ONCE, a2.shape[0]))
        gradients = [
            _torch.call("grad_stats", a2[j : j + 1], b2[j : j + 1], None, True, False, backend)[0][None] for j in chunk
        ]
        directions = _arrays.concatenate(gradients, 0)
        columns.append(_torch.call("grad_stats", a, b, directions, False, False, backend)[2])
    gram = _arrays.concatenate(columns, 1)
    return _arrays.mirrored(gram) if symmetric else gram


def outputs(a: Array, b: Array, a2: Array | None, b2: Array | None, diagonal: bool, backend: str = "auto") -> Array:
    """The array that `compute` fills: (B, B2), or (B,) for the diagonal."""
    samples, others = a.shape[0], (a if a2 is None else a2).shape[0]
    return _arrays.sums(a, samples) if diagonal else _arrays.sums(a, samples, others)


def compute(a: Array, b: Array, a2: Array | None, b2: Array | None, diagonal: bool, backend: str = "auto") -> Array:
    """Inner products of checked inputs' gradients."""
    out = outputs(a, b, a2, b2, diagonal, backend)
    _dispatch.run("grad_gram", backend, *_arrays.readable(a, b, a2, b2), out)
    return out


_torch.define(
    "grad_gram(Tensor a, Tensor b, Tensor? a2, Tensor? b2, bool diagonal) -> Tensor",
    compute,
    outputs,
)
