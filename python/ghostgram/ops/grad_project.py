"""Front doors of grad_project: random projections of per-sample gradients that are never formed."""

from __future__ import annotations

from ghostgram import _arrays, _dispatch
from ghostgram._arrays import Array
from ghostgram.ops import _torch


def grad_project(
    a: Array,
    b: Array,
    P_out: Array | int,
    P_in: Array | int,
    *,
    distribution: str = "rademacher",
    seed: int = 0,
    layer: int = 0,
    backend: str = "auto",
) -> Array:
    r"""Kronecker projection of the per-sample weight gradients of a linear layer.

    For a layer `y = x W^T` with inputs `a` and output gradients `b`, sample i has the weight gradient
    `G_i = sum_t b_it a_it^T`. Its projection

        out_i = P_out G_i P_in^T = sum_t (P_out b_it) (P_in a_it)^T

    takes tokens to few features before any product of two of them: no G_i exists. Random matrices have independent
    entries of mean 0 and variance 1 / k, so that `sum(out_i * out_j)` estimates `<G_i, G_j>` without bias, with a
    variance of at most 2 (1/k_out + 1/k_in + 2/(k_out k_in)) ||G_i||^2 ||G_j||^2. The same seed and layer give the same
    matrices in every call and on every backend.

    Inputs are read as constants: the result carries no autograd history.

    Args:
        a: (B, d) or (B, ..., d) layer inputs; float32, bfloat16, float16 or float64. Middle axes are tokens.
        b: (B, p) or (B, ..., p) gradients of the loss at the layer's output, of a's dtype.
        P_out: (k_out, p), of a's dtype or the result's; or the number of rows of a random one.
        P_in: (k_in, d), of a's dtype or the result's; or the number of rows of a random one.
        distribution: Of a random matrix's entries: "rademacher" (signs, the smaller variance) or "gaussian".
        seed: 0 <= seed < 2^63.
        layer: Which layer of a model this is, 0 <= layer < 2^32: layers have independent matrices.
        backend: "auto", "cpu", "cuda", "triton" or "reference".

    Returns:
        (B, k_out, k_in) of the caller's type, float32 (float64 for float64 inputs).

    Raises:
        TypeError: An argument is no array, of another framework than a, or of an unsupported dtype.
        ValueError: Shapes do not fit; the message names the argument, what was expected and what came.
        RuntimeError: The backend asked for is not available here; the message says why.

    Cost:
        2 B T (d k_in + p k_out + k_in k_out) FLOPs; reads a and b once, keeps B T (k_in + k_out) projected features.

    Source:
        LoGra (arXiv 2405.13954). Random words are Philox4x32-10 (Salmon et al., SC 2011).
    """
    matrices = {name: x for name, x in (("P_out", P_out), ("P_in", P_in)) if not isinstance(x, int)}
    _arrays.same_framework(a=a, b=b, **matrices)
    a, b = _arrays.layer(a, b)
    sizes = [
        _rows(name, P, a, features)
        for name, P, features in (("P_out", P_out, b.shape[-1]), ("P_in", P_in, a.shape[-1]))
    ]
    if distribution not in ("rademacher", "gaussian"):
        raise ValueError(f"distribution: expected 'rademacher' or 'gaussian', got {distribution!r}")
    _check_stream(seed, layer)
    given = (matrices.get("P_out"), matrices.get("P_in"))
    return _torch.call("grad_project", a, b, *given, *sizes, distribution, seed, layer, backend)


def grad_sketch(
    a: Array, b: Array, size: int, *, nonzeros: int = 1, seed: int = 0, layer: int = 0, backend: str = "auto"
) -> Array:
    r"""Sparse random projection (count sketch) of the per-sample weight gradients of a linear layer.

    With `G_i = sum_t b_it a_it^T` as for `grad_project`, every entry of G_i is added, under a random sign, to one
    random bucket in each of `nonzeros` equal parts of `size` buckets:

        out_i[h] = sum_{r,c,j: h_j(r,c) = h} s_j(r,c) G_i[r,c] / sqrt(nonzeros).

    So `out_i . out_j` estimates `<G_i, G_j>` without bias, with a variance of at most
    (||G_i||^2 ||G_j||^2 + <G_i, G_j>^2) / size. Sketches of several layers, each with its number as `layer`, add up to
    one of the model's whole gradient. The same seed and layer hash alike in every call and on every backend.

    Inputs are read as constants: the result carries no autograd history.

    Args:
        a: (B, d) or (B, ..., d) layer inputs; float32, bfloat16, float16 or float64. Middle axes are tokens.
        b: (B, p) or (B, ..., p) gradients of the loss at the layer's output, of a's dtype.
        size: Buckets, fewer than 2^31.
        nonzeros: Buckets of every entry, 1 <= nonzeros <= size. More of them keep sparse gradients apart, at a price.
        seed: 0 <= seed < 2^63.
        layer: Which layer of a model this is, 0 <= layer < 2^32: layers hash independently.
        backend: "auto", "cpu", "cuda", "triton" or "reference".

    Returns:
        (B, size) of the caller's type, float32 (float64 for float64 inputs).

    Raises:
        TypeError: An argument is no array, of another framework than a, or of an unsupported dtype.
        ValueError: Shapes or options do not fit; the message names the argument, what was expected and what came.
        RuntimeError: The backend asked for is not available here; the message says why.

    Cost:
        B d p (2 T + nonzeros) FLOPs and d p nonzeros hashes; reads a and b once. A tile of G_i lives in registers.

    Source:
        Kane and Nelson, "Sparser Johnson-Lindenstrauss transforms" (J. ACM 2014), the block construction; for
        gradients, GraSS (arXiv 2505.18976). Random words are Philox4x32-10 (Salmon et al., SC 2011).
    """
    _arrays.same_framework(a=a, b=b)
    a, b = _arrays.layer(a, b)
    if not 1 <= size < 2**31:
        raise ValueError(f"size: expected 1 <= size < 2^31, got {size}")
    if not 1 <= nonzeros <= size:
        raise ValueError(f"nonzeros: expected 1 <= nonzeros <= size = {size}, got {nonzeros}")
    _check_stream(seed, layer)
    return _torch.call("grad_sketch", a, b, size, nonzeros, seed, layer, backend)


def _rows(name: str, P: Array | int, like: Array, features: int) -> int:
    """The rows of a matrix that is given, or of the random one asked for; or a clear error."""
    if isinstance(P, int):
        if P < 1:
            raise ValueError(f"{name}: expected a matrix or a positive number of rows, got {P}")
        return P
    if P.ndim != 2 or P.shape[1] != features:
        raise ValueError(f"{name}: expected shape (k, {features}), got {tuple(P.shape)}")
    if _arrays.dtype_name(P) not in (_arrays.dtype_name(like), _arrays.sum_dtype(like)):
        expected = f"{_arrays.dtype_name(like)} or {_arrays.sum_dtype(like)}"
        raise TypeError(f"{name}: expected {expected}, got {_arrays.dtype_name(P)}")
    return int(P.shape[0])


def _check_stream(seed: int, layer: int) -> None:
    for name, x, bits in (("seed", seed, 63), ("layer", layer, 32)):
        if not 0 <= x < 2**bits:
            raise ValueError(f"{name}: expected 0 <= {name} < 2^{bits}, got {x}")


def outputs(
    a: Array,
    b: Array,
    P_out: Array | None,
    P_in: Array | None,
    k_out: int,
    k_in: int,
    distribution: str,
    seed: int,
    layer: int,
    backend: str = "auto",
) -> Array:
    """The array that `compute` fills: (B, k_out, k_in)."""
    return _arrays.sums(a, a.shape[0], k_out, k_in)


def compute(
    a: Array,
    b: Array,
    P_out: Array | None,
    P_in: Array | None,
    k_out: int,
    k_in: int,
    distribution: str,
    seed: int,
    layer: int,
    backend: str = "auto",
) -> Array:
    """Kronecker projections of checked inputs' gradients."""
    out = outputs(a, b, P_out, P_in, k_out, k_in, distribution, seed, layer, backend)
    _dispatch.run("grad_project", backend, *_arrays.readable(a, b, P_out, P_in), out, distribution, 0, seed, layer)
    return out


def sketch_outputs(a: Array, b: Array, size: int, nonzeros: int, seed: int, layer: int, backend: str = "auto") -> Array:
    """The array that `compute_sketch` fills: (B, size)."""
    return _arrays.sums(a, a.shape[0], size)


def compute_sketch(a: Array, b: Array, size: int, nonzeros: int, seed: int, layer: int, backend: str = "auto") -> Array:
    """Sparse projections of checked inputs' gradients."""
    out = sketch_outputs(a, b, size, nonzeros, seed, layer, backend)
    a, b = _arrays.readable(a, b)
    _dispatch.run("grad_project", backend, a, b, None, None, out, "sparse", nonzeros, seed, layer)
    return out


_torch.define(
    "grad_project(Tensor a, Tensor b, Tensor? P_out, Tensor? P_in, int k_out, int k_in, str distribution, int seed, "
    "int layer) -> Tensor",
    compute,
    outputs,
)
_torch.define(
    "grad_sketch(Tensor a, Tensor b, int size, int nonzeros, int seed, int layer) -> Tensor",
    compute_sketch,
    sketch_outputs,
)
