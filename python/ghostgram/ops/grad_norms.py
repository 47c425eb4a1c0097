"""Front door for per-sample gradient norms alone: by tiles of the gradients, or by products of tokens."""

from __future__ import annotations

from ghostgram import _C, _arrays, _dispatch
from ghostgram._arrays import Array
from ghostgram.ops import _torch
from ghostgram.ops.cost_model import choose_way


def grad_norms(a: Array, b: Array, *, backend: str = "auto") -> Array:
    r"""Frobenius norms of the per-sample weight gradients of a linear layer.

    For inputs `a` and output gradients `b` of a layer `y = x W^T`, `norms_i = ||sum_t b_it a_it^T||_F`. A cost model
    chooses between forming the gradients tile by tile and summing products of tokens; both are exact.

    Inputs are read as constants: the result carries no autograd history.

    Args:
        a: (B, d) or (B, ..., d) layer inputs; float32, bfloat16, float16 or float64. Middle axes are tokens.
        b: (B, p) or (B, ..., p) gradients of the loss at the layer's output, of a's dtype.
        backend: "auto", "cpu", "cuda", "triton" or "reference".

    Returns:
        (B,) norms of the caller's type, float32 (float64 for float64 inputs).

    Raises:
        TypeError: An argument is no array, of another framework than a, or of an unsupported dtype.
        ValueError: Shapes do not fit; the message names the argument, what was expected and what came.
        RuntimeError: The backend asked for is not available here; the message says why.

    Cost:
        The cheaper of 2 B T d p + 2 B d p FLOPs (tiles) and B T^2 (d + p) (tokens); reads a and b once.

    Source:
        Token products are the ghost norm of Li et al. (arXiv 2110.05679); the tiles are this library's design.
    """
    _arrays.same_framework(a=a, b=b)
    a, b = _arrays.layer(a, b)
    samples, tokens, d = a.shape
    ways = _dispatch.runnable({"M": "grad_stats", "G": "grad_gram"}, backend, _arrays.device_type(a))
    return _torch.call("grad_norms", a, b, choose_way("norms", ways, samples, tokens, d, b.shape[-1]), backend)


def outputs(a: Array, b: Array, way: str, backend: str = "auto") -> Array:
    """The array that `compute` returns: (B,)."""
    return _arrays.sums(a, a.shape[0])


def compute(a: Array, b: Array, way: str, backend: str = "auto") -> Array:
    """Norms of checked inputs by the way "G" or "M", roots included: an op of torch's own costs more than they do."""
    norms = outputs(a, b, way)
    a, b = _arrays.readable(a, b)
    if way == "G":
        _dispatch.run("grad_gram", backend, a, b, None, None, norms)
    else:
        _dispatch.run("grad_stats", backend, a, b, None, None, norms, None, False)
    if _arrays.device_type(norms) != "cpu":
        return _arrays.roots(norms)
    _C.cpu.roots(norms)
    return norms


_torch.define("grad_norms(Tensor a, Tensor b, str way) -> Tensor", compute, outputs)
