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
    a, b = _arrays.layer(a, b)
    if D is None:
        return a, b, None, False
    return a, b, *_arrays.directions(D, a, (b.shape[-1], a.shape[-1]))


def outputs(
    a: Array, b: Array, D: Array | None, weight_grad: bool, norms: bool, backend: str = "auto"
) -> tuple[Array, Array, Array]:
    """The arrays that `compute` fills: (p, d), (B,), (B, K); what is not wanted has no element."""
    samples, d, p = a.shape[0], a.shape[-1], b.shape[-1]
    return (
        _arrays.sums(a, p, d) if weight_grad else _arrays.sums(a, 0, 0),
        _arrays.sums(a, samples if norms else 0),
        _arrays.sums(a, samples, 0 if D is None else D.shape[0]),
    )


def compute(
    a: Array, b: Array, D: Array | None, weight_grad: bool, norms: bool, backend: str = "auto"
) -> tuple[Array, Array, Array]:
    """weight_grad, norms^2 and dots of checked inputs."""
    out = outputs(a, b, D, weight_grad, norms, backend)
    wanted = out[0] if weight_grad else None, out[1] if norms else None, out[2]
    _dispatch.run("grad_stats", backend, *_arrays.readable(a, b, D), *wanted, False)
    return out


_torch.define(
    "grad_stats(Tensor a, Tensor b, Tensor? D, bool weight_grad, bool norms) -> (Tensor, Tensor, Tensor)",
    compute,
    outputs,
)
