"""Front door of affine_stats: scale and shift gradients of normalisation layers, and biases."""

from __future__ import annotations

from typing import NamedTuple

from ghostgram import _arrays, _dispatch
from ghostgram._arrays import Array
from ghostgram.ops import _torch


class AffineStats(NamedTuple):
    """What `affine_stats` returns; the weight's are None without x, dots are None without their directions."""

    weight_grad: Array | None
    """(F,): sum over samples and tokens of b * xhat."""
    bias_grad: Array
    """(F,): sum over samples and tokens of b."""
    weight_norms: Array | None
    """(B,): norm of each sample's weight gradient."""
    bias_norms: Array
    """(B,): norm of each sample's bias gradient."""
    weight_dots: Array | None
    """(B, K), or (B,) for a single (F,) direction."""
    bias_dots: Array | None
    """(B, K), or (B,) for a single (F,) direction."""


def affine_stats(
    b: Array,
    x: Array | None = None,
    mean: Array | None = None,
    rstd: Array | None = None,
    D_weight: Array | None = None,
    D_bias: Array | None = None,
    *,
    backend: str = "auto",
) -> AffineStats:
    r"""Statistics of the per-sample gradients of a scale and a shift, from one read of b and x.

    For `y = weight * xhat + bias`, `xhat = (x - mean) * rstd`, with output gradients `b`, sample i has the gradients

        W_i = sum_t b_it * xhat_it  (weight),    V_i = sum_t b_it  (bias),

    whose sums over samples, norms and inner products with directions are returned. mean and rstd give LayerNorm, rstd
    alone RMSNorm, neither a plain scale, and no x a bias. Inputs are read as constants: the results carry no autograd
    history.

    Args:
        b: (B, F) or (B, ..., F) gradients of the loss at the layer's output; float32, bfloat16, float16 or float64.
        x: The layer's input, of b's shape and dtype; None for a bias alone.
        mean: b's shape without F, what is subtracted from x per token; None for 0. Float32 (float64 for a float64 b).
        rstd: b's shape without F, what x is then multiplied by per token; None for 1. Of mean's dtype.
        D_weight: (K, F) directions of the weight, or (F,) for one; of mean's dtype. Needs x.
        D_bias: (K, F) directions of the bias, or (F,) for one; of mean's dtype.
        backend: "auto", "cpu", "cuda", "triton" or "reference".

    Returns:
        An `AffineStats` of arrays of the caller's type, float32 (float64 for a float64 b).

    Raises:
        TypeError: An argument is no array, of another framework than b, or of an unsupported dtype.
        ValueError: Shapes do not fit; the message names the argument, what was expected and what came.
        RuntimeError: The backend asked for is not available here; the message says why.

    Cost:
        5 B T F FLOPs (B T F without x) + 4 (1 + K) B F; reads b and x once, which bounds it.

    Source:
        Ghost clipping of normalisation layers as in Opacus and BackPACK, which store the (B, F) gradients.
    """
    _arrays.same_framework(b=b, x=x, mean=mean, rstd=rstd, D_weight=D_weight, D_bias=D_bias)
    _arrays.floating(b, "b")
    tokens, features = tuple(b.shape[:-1]), b.shape[-1:]
    b = _arrays.samples_first(b, "b")
    if x is not None:
        if _arrays.dtype_name(x) != _arrays.dtype_name(b):
            raise TypeError(f"x: expected {_arrays.dtype_name(b)} like b, got {_arrays.dtype_name(x)}")
        if tuple(x.shape) != (*tokens, *features):
            raise ValueError(f"x: expected shape {(*tokens, *features)} like b, got {tuple(x.shape)}")
        x = _arrays.samples_first(x, "x")
    needs_x = {"mean": mean, "rstd": rstd, "D_weight": D_weight}
    for name, given in needs_x.items():
        if given is not None and x is None:
            raise ValueError(f"{name}: expected None without x, got {name} of shape {tuple(given.shape)}")
    mean, rstd = _token_scalars(mean, "mean", b, tokens), _token_scalars(rstd, "rstd", b, tokens)
    D_weight, single_weight = _directions(D_weight, "D_weight", b)
    D_bias, single_bias = _directions(D_bias, "D_bias", b)

    weight_grad, bias_grad, weight_norms2, bias_norms2, weight_dots, bias_dots = _torch.call(
        "affine_stats", b, x, mean, rstd, D_weight, D_bias, True, backend
    )
    return AffineStats(
        weight_grad if x is not None else None,
        bias_grad,
        weight_norms2**0.5 if x is not None else None,
        bias_norms2**0.5,
        None if D_weight is None else weight_dots[:, 0] if single_weight else weight_dots,
        None if D_bias is None else bias_dots[:, 0] if single_bias else bias_dots,
    )


def _token_scalars(x: Array | None, name: str, b: Array, tokens: tuple[int, ...]) -> Array | None:
    if x is None:
        return None
    if _arrays.dtype_name(x) != _arrays.sum_dtype(b):
        raise TypeError(f"{name}: expected {_arrays.sum_dtype(b)}, got {_arrays.dtype_name(x)}")
    if tuple(x.shape) != tokens:
        raise ValueError(f"{name}: expected shape {tokens}, b's without its last axis, got {tuple(x.shape)}")
    return x.reshape(b.shape[:2])


def _directions(D: Array | None, name: str, b: Array) -> tuple[Array | None, bool]:
    if D is None:
        return None, False
    if _arrays.dtype_name(D) != _arrays.sum_dtype(b):
        raise TypeError(f"{name}: expected {_arrays.sum_dtype(b)}, got {_arrays.dtype_name(D)}")
    return _arrays.directions(D, b, (b.shape[-1],), name)


def outputs(
    b: Array,
    x: Array | None,
    mean: Array | None,
    rstd: Array | None,
    D_weight: Array | None,
    D_bias: Array | None,
    norms: bool,
    backend: str,
) -> tuple[Array, ...]:
    """The arrays that `compute` fills, weight before bias: (F,), (B,), (B, K) of each; no element where not wanted."""
    samples, _, features = b.shape
    weight = x is not None
    shapes = (
        (features if weight else 0,),
        (features,),
        (samples if norms and weight else 0,),
        (samples if norms else 0,),
        (samples, 0 if D_weight is None else D_weight.shape[0]),
        (samples, 0 if D_bias is None else D_bias.shape[0]),
    )
    return tuple(_arrays.empty(b, shape, _arrays.sum_dtype(b)) for shape in shapes)


def compute(
    b: Array,
    x: Array | None,
    mean: Array | None,
    rstd: Array | None,
    D_weight: Array | None,
    D_bias: Array | None,
    norms: bool,
    backend: str,
) -> tuple[Array, ...]:
    """Gradients, norms^2 and dots of checked inputs."""
    out = outputs(b, x, mean, rstd, D_weight, D_bias, norms, backend)
    weight = x is not None
    wanted = (weight, True, norms and weight, norms, weight, True)
    inputs = (None if y is None else _arrays.unit_inner_stride(y) for y in (b, x, mean, rstd, D_weight, D_bias))
    given = (y if use else None for y, use in zip(out, wanted, strict=True))
    _dispatch.run("affine_stats", backend, *inputs, *given)
    return out


_torch.define(
    "affine_stats(Tensor b, Tensor? x, Tensor? mean, Tensor? rstd, Tensor? D_weight, Tensor? D_bias, bool norms, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    compute,
    outputs,
)
