"""Front door for inner products of per-sample gradients with directions: by tiles, or by scores of tokens."""

from __future__ import annotations

from ghostgram import _arrays, _dispatch, _xla
from ghostgram._arrays import Array
from ghostgram.ops import _torch
from ghostgram.ops.cost_model import choose_way


def grad_dots(a: Array, b: Array, D: Array, *, backend: str = "auto") -> Array:
    r"""Inner products of the per-sample weight gradients of a linear layer with given directions.

    For inputs `a` and output gradients `b` of a layer `y = x W^T`,

        dots_ik = <sum_t b_it a_it^T, D_k> = sum_t b_it . (D_k a_it).

    With backend "auto" a cost model chooses between forming the gradients tile by tile (the left form) and scoring
    tokens by the array's own matrix product (the right one). The tiles give the same bits for any number of threads;
    the matrix product is as reproducible as the array's library makes it. Any named backend takes the tiles.

    Inputs are read as constants: the result carries no autograd history.

    Args:
        a: (B, d) or (B, ..., d) layer inputs; float32, bfloat16, float16 or float64. Middle axes are tokens.
        b: (B, p) or (B, ..., p) gradients of the loss at the layer's output, of a's dtype.
        D: (K, p, d) directions, or (p, d) for one; of a's dtype or the result's.
        backend: "auto", "cpu", "cuda", "triton" or "reference".

    Returns:
        (B, K), or (B,) for a single direction; of the caller's type, float32 (float64 for float64 inputs).

    Raises:
        TypeError: An argument is no array, of another framework than a, or of an unsupported dtype.
        ValueError: Shapes do not fit; the message names the argument, what was expected and what came.
        RuntimeError: The backend asked for is not available here; the message says why.

    Cost:
        The cheaper of 2 B T d p + 2 K B d p FLOPs (tiles) and K 2 B T d p (scores, which need B T min(d, p) floats of
        scratch); reads a, b and D once.

    Source:
        Token scores are the factorised dot product of In-Run Data Shapley (arXiv 2406.11011, section 4.2); the tiles
        are this library's design.
    """
    kind = _arrays.same_framework(a=a, b=b, D=D)
    a, b = _arrays.layer(a, b)
    samples, tokens, d = a.shape
    p = b.shape[-1]
    D, single = _arrays.directions(D, a, (p, d))
    device = _arrays.device_type(a)
    ways = _dispatch.runnable({"M": "grad_stats"}, backend, device)
    # A matrix product of half types rounds to them.
    wide = _arrays.dtype_name(a) == _arrays.dtype_name(D) == _arrays.sum_dtype(a)
    if backend == "auto" and device == "cpu" and wide:
        ways = (*ways, "P")
    if choose_way("dots", ways, samples, tokens, d, p, directions=D.shape[0]) == "P":
        scores = _xla.constant("grad_dots", _token_scores) if kind == "jax" else _token_scores
        dots = scores(a, b, D)
    else:
        dots = _torch.call("grad_stats", a, b, D, False, False, backend)[2]
    return dots[:, 0] if single else dots


def _token_scores(a: Array, b: Array, D: Array) -> Array:
    """sum_t b_it . (D_k a_it), by way of the smaller of b D_k and a D_k^T."""
    if _arrays.is_torch(a):
        a, b, D = a.detach(), b.detach(), D.detach()
    samples, tokens, d = a.shape
    p = b.shape[-1]
    across, other = (b, a) if d <= p else (a, b)
    rows, columns = across.reshape(samples * tokens, across.shape[-1]), []
    for k in range(D.shape[0]):
        scored = rows @ (D[k] if d <= p else D[k].T)
        columns.append((scored.reshape(other.shape) * other).sum((1, 2))[:, None])
    return _arrays.concatenate(columns, 1)
