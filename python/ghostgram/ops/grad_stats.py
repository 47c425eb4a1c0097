"""Front door of grad_stats: weight gradient, per-sample norms and directional dots from one pass."""

from __future__ import annotations

from typing import NamedTuple

from ghostgram import _arrays, _dispatch
from ghostgram._arrays import Array
from ghostgram.ops import _torch


class GradStats(NamedTuple):
    """What `grad_stats` returns."""

    weight_grad: Array
    """(p, d): sum over samples of b_i^T a_i."""
    norms: Array
    """(B,): Frobenius norm of each sample's gradient."""
    dots: Array | None
    """(B, K), or (B,) for a single (p, d) direction, or None without directions."""


def grad_stats(a: Array, b: Array, D: Array | None = None, *, backend: str = "auto") -> GradStats:
    r"""Statistics of the per-sample weight gradients of a linear layer, without storing any of them.

    For a layer `y = x W^T` with inputs `a` and output gradients `b`, sample i has the weight gradient
    `G_i = sum_t b_it a_it^T`. One pass over its tiles gives

        weight_grad = sum_i G_i,    norms_i = ||G_i||_F,    dots_ik = <G_i, D_k>.

    Inputs are read as constants: the results carry no autograd history.

    Args:
        a: (B, d) or (B, ..., d) layer inputs; float32, bfloat16, float16 or float64. Middle axes are tokens.
        b: (B, p) or (B, ..., p) gradients of the loss at the layer's output, of a's dtype.
        D: (K, p, d) directions, or (p, d) for one; of a's dtype or the result's.
        backend: "auto", "cpu", "cuda", "triton" or "reference".

    Returns:
        A `GradStats` of arrays of the caller's type, float32 (float64 for float64 inputs).

    Raises:
        TypeError: An argument is no array, of another framework than a, or of an unsupported dtype.
        ValueError: Shapes do not fit; the message names the argument, what was expected and what came.
        RuntimeError: The backend asked for is not available here; the message says why.

    Cost:
        2 B T d p FLOPs for the gradient, + (2 + 2K) B d p for norms and dots; reads a, b and D once and writes
        weight_grad once. An inner axis that is not contiguous costs a copy.

    Source:
        design of this library; the contraction of In-Run Data Shapley (arXiv 2406.11011, section 4.2) generalised to
        arbitrary directions.
    """
    a, b, D, single = checked(a, b, D)
    weight_grad, norms2, dots = _torch.call("grad_stats", a, b, D, True, True, backend)
    norms = norms2**0.5
    if D is None:
        return GradStats(weight_grad, norms, None)
    return GradStats(weight_grad, norms, dots[:, 0] if single else dots)


def checked(a: Array, b: Array, D: Array | None) -> tuple[Array, Array, Array | None, bool]:
    """(B,T,d), (B,T,p), (K,p,d), and whether D came as a single (p,d); or a clear error."""
    _arrays.same_framework(a=a, b=b, D=D)
    for name, x in (("a", a), ("b", b)):
        _arrays.floating(x, name)
    if _arrays.dtype_name(b) != _arrays.dtype_name(a):
        raise TypeError(f"b: expected {_arrays.dtype_name(a)} like a, got {_arrays.dtype_name(b)}")
    if tuple(a.shape[:-1]) != tuple(b.shape[:-1]):
        raise ValueError(f"b: expected shape {(*a.shape[:-1], 'p')} like a, got {tuple(b.shape)}")
    a, b = _arrays.samples_first(a, "a"), _arrays.samples_first(b, "b")
    if D is None:
        return a, b, None, False
    p, d = b.shape[-1], a.shape[-1]
    if D.ndim not in (2, 3) or tuple(D.shape[-2:]) != (p, d):
        raise ValueError(f"D: expected shape (K, {p}, {d}) or ({p}, {d}), got {tuple(D.shape)}")
    if _arrays.dtype_name(D) not in (_arrays.dtype_name(a), _arrays.sum_dtype(a)):
        raise TypeError(f"D: expected {_arrays.dtype_name(a)} or {_arrays.sum_dtype(a)}, got {_arrays.dtype_name(D)}")
    single = D.ndim == 2
    return a, b, D[None] if single else D, single


def outputs(
    a: Array, b: Array, D: Array | None, weight_grad: bool, norms: bool, backend: str
) -> tuple[Array, Array, Array]:
    """The arrays that `compute` fills: (p, d), (B,), (B, K); what is not wanted has no element."""
    dtype = _arrays.sum_dtype(a)
    samples, d, p = a.shape[0], a.shape[-1], b.shape[-1]
    return (
        _arrays.empty(a, (p, d) if weight_grad else (0, 0), dtype),
        _arrays.empty(a, (samples,) if norms else (0,), dtype),
        _arrays.empty(a, (samples, 0 if D is None else D.shape[0]), dtype),
    )


def compute(
    a: Array, b: Array, D: Array | None, weight_grad: bool, norms: bool, backend: str
) -> tuple[Array, Array, Array]:
    """weight_grad, norms^2 and dots of checked inputs."""
    out = outputs(a, b, D, weight_grad, norms, backend)
    a, b, D = (None if x is None else _arrays.unit_inner_stride(x) for x in (a, b, D))
    _dispatch.run(
        "grad_stats", backend, a, b, D, out[0] if weight_grad else None, out[1] if norms else None, out[2], False
    )
    return out


_torch.define(
    "grad_stats(Tensor a, Tensor b, Tensor? D, bool weight_grad, bool norms, str backend) -> (Tensor, Tensor, Tensor)",
    compute,
    outputs,
)
