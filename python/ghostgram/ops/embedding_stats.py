"""Front door of embedding_stats: per-sample norms and directional dots of an embedding table's gradient."""

from __future__ import annotations

from typing import NamedTuple

from ghostgram import _arrays, _dispatch
from ghostgram._arrays import Array
from ghostgram.ops import _torch


class EmbeddingStats(NamedTuple):
    """What `embedding_stats` returns."""

    norms: Array
    """(B,): Frobenius norm of each sample's gradient."""
    dots: Array | None
    """(B, K), or (B,) for a single (V, E) direction, or None without directions."""


def embedding_stats(
    ids: Array, b: Array, D: Array | None = None, *, padding_idx: int | None = None, backend: str = "auto"
) -> EmbeddingStats:
    r"""Statistics of the per-sample gradients of an embedding table, without the table.

    For `y_it = table[ids_it]` with output gradients `b`, row v of sample i's gradient G_i is the sum of b_it over the
    tokens with ids_it = v, and every other row is zero:

        norms_i = sqrt(sum_v ||sum_{t: ids_it = v} b_it||^2),    dots_ik = <G_i, D_k> = sum_t <b_it, D_k[ids_it]>.

    Norms are exact for repeated tokens. Inputs are read as constants: the results carry no autograd history.

    Args:
        ids: (B,) or (B, ...) row numbers, int32 or int64; may be expanded over samples.
        b: (B, E) or (B, ..., E) gradients of the loss at the embedding's output; float32, bfloat16, float16 or float64.
        D: (K, V, E) directions, or (V, E) for one; of b's dtype or the result's.
        padding_idx: Tokens with this id contribute nothing, as in `torch.nn.Embedding`.
        backend: "auto", "cpu", "cuda", "triton" or "reference".

    Returns:
        An `EmbeddingStats` of arrays of the caller's type, float32 (float64 for a float64 b).

    Raises:
        TypeError: An argument is no array, of another framework than ids, or of an unsupported dtype.
        ValueError: Shapes do not fit; the message names the argument, what was expected and what came.
        IndexError: An id is negative, or beyond V when D is given; the message names sample and token. On a GPU, which
            an error would have to wait for, such an id makes the results of its sample NaN instead.
        RuntimeError: The backend asked for is not available here; the message says why.

    Cost:
        B T E (3 + 2K) FLOPs; reads ids and b once, and of D the rows looked up, once per sample.

    Source:
        Exact ghost norms of embeddings group equal tokens as Opacus does; summing the groups' rows in place is ours.
    """
    ids, b, D, single = checked(ids, b, D, padding_idx)
    padding = -1 if padding_idx is None else padding_idx
    norms2, dots = _torch.call("embedding_stats", ids, b, D, padding, True, backend)
    norms = norms2**0.5
    if D is None:
        return EmbeddingStats(norms, None)
    return EmbeddingStats(norms, dots[:, 0] if single else dots)


def checked(ids: Array, b: Array, D: Array | None, padding_idx: int | None) -> tuple[Array, Array, Array | None, bool]:
    """(B,T), (B,T,E), (K,V,E), and whether D came as a single (V,E); or a clear error."""
    _arrays.same_framework(ids=ids, b=b, D=D)
    if _arrays.dtype_name(ids) not in ("int32", "int64"):
        raise TypeError(f"ids: expected int32 or int64, got {_arrays.dtype_name(ids)}")
    _arrays.floating(b, "b")
    if ids.ndim < 1 or tuple(b.shape[:-1]) != tuple(ids.shape):
        raise ValueError(f"b: expected shape {(*ids.shape, 'E')} like ids, got {tuple(b.shape)}")
    if padding_idx is not None and padding_idx < 0:
        raise ValueError(f"padding_idx: expected None or a row number, got {padding_idx}")
    b = _arrays.samples_first(b, "b")
    if ids.ndim != 2:  # an expanded (B, T) must stay a view
        ids = ids.reshape(b.shape[:2])
    if D is None:
        return ids, b, None, False
    rows = D.shape[-2] if D.ndim >= 2 else 0
    return ids, b, *_arrays.directions(D, b, (rows, b.shape[-1]))


def outputs(
    ids: Array, b: Array, D: Array | None, padding_idx: int, norms: bool, backend: str = "auto"
) -> tuple[Array, Array]:
    """The arrays that `compute` fills: (B,), (B, K); norms that are not wanted have no element."""
    samples = ids.shape[0]
    return _arrays.sums(b, samples if norms else 0), _arrays.sums(b, samples, 0 if D is None else D.shape[0])


def compute(
    ids: Array, b: Array, D: Array | None, padding_idx: int, norms: bool, backend: str = "auto"
) -> tuple[Array, Array]:
    """norms^2 and dots of checked inputs."""
    out = outputs(ids, b, D, padding_idx, norms, backend)
    b, D = _arrays.readable(b, D)
    _dispatch.run("embedding_stats", backend, ids, b, D, out[0] if norms else None, out[1], padding_idx)
    return out


_torch.define(
    "embedding_stats(Tensor ids, Tensor b, Tensor? D, int padding_idx, bool norms) -> (Tensor, Tensor)",
    compute,
    outputs,
)
