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
    channels_first: bool = False,
    backend: str = "auto",
) -> AffineStats:
    r"""Statistics of the per-sample gradients of a scale and a shift, from one read of b and x.

    For `y = weight * xhat + bias`, `xhat = (x - mean) * rstd`, with output gradients `b`, sample i has the gradients

        W_i = sum_t b_it * xhat_it  (weight),    V_i = sum_t b_it  (bias),

    whose sums over samples, norms and inner products with directions are returned. mean and rstd give LayerNorm, rstd
    alone RMSNorm, neither a plain scale, and no x a bias. With `channels_first` the features are axis 1, as images have
    them, every further axis is summed over, and mean and rstd belong to groups of neighbouring channels: one group is
    GroupNorm(1), as many as there are channels InstanceNorm. Inputs are read as constants: the results carry no
    autograd history.

    Args:
        b: (B, F) or (B, ..., F) gradients at the layer's output, with `channels_first` (B, F) or (B, F, ...);
            float32, bfloat16, float16 or float64.
        x: The layer's input, of b's shape and dtype; None for a bias alone.
        mean: b's shape without F, what is subtracted from x per token; with `channels_first` (B, G), per group of F / G
            channels. None for 0. Float32 (float64 for a float64 b).
        rstd: What x is then multiplied by, of mean's shape and dtype; None for 1.
        D_weight: (K, F) directions of the weight, or (F,) for one; of mean's dtype. Needs x.
        D_bias: (K, F) directions of the bias, or (F,) for one; of mean's dtype.
        channels_first: Whether F is axis 1 of b and x instead of the last one.
        backend: "auto", "cpu", "cuda", "triton" or "reference".

    Returns:
        An `AffineStats` of arrays of the caller's type, float32 (float64 for a float64 b).

    Raises:
        TypeError: An argument is no array, of another framework than b, or of an unsupported dtype.
        ValueError: Shapes do not fit; the message names the argument, what was expected and what came.
        RuntimeError: The backend asked for is not available here; the message says why.

    Cost:
        5 B T F FLOPs (4 B T F channels first, B T F without x) + 4 (1 + K) B F; reads b and x once, which bounds it.

    Source:
        Ghost clipping of normalisation layers as in Opacus and BackPACK, which store the (B, F) gradients.
    """
    _arrays.same_framework(b=b, x=x, mean=mean, rstd=rstd, D_weight=D_weight, D_bias=D_bias)
    _arrays.floating(b, "b")
    shape, flatten = tuple(b.shape), _arrays.channels_first if channels_first else _arrays.samples_first
    b = flatten(b, "b")
    if x is not None:
        if _arrays.dtype_name(x) != _arrays.dtype_name(b):
            raise TypeError(f"x: expected {_arrays.dtype_name(b)} like b, got {_arrays.dtype_name(x)}")
        if tuple(x.shape) != shape:
            raise ValueError(f"x: expected shape {shape} like b, got {tuple(x.shape)}")
        x = flatten(x, "x")
    needs_x = {"mean": mean, "rstd": rstd, "D_weight": D_weight}
    for name, given in needs_x.items():
        if given is not None and x is None:
            raise ValueError(f"{name}: expected None without x, got {name} of shape {tuple(given.shape)}")
    if mean is not None and rstd is not None and tuple(rstd.shape) != tuple(mean.shape):
        raise ValueError(f"rstd: expected shape {tuple(mean.shape)} like mean, got {tuple(rstd.shape)}")
    for name, given in (("mean", mean), ("rstd", rstd)):
        if given is not None:
            _check_statistic(given, name, b, shape, channels_first)
    if not channels_first:
        mean, rstd = (None if y is None else y.reshape(b.shape[:2]) for y in (mean, rstd))
    features = b.shape[1 if channels_first else 2]
    D_weight, single_weight = _directions(D_weight, "D_weight", b, features)
    D_bias, single_bias = _directions(D_bias, "D_bias", b, features)

    weight_grad, bias_grad, weight_norms2, bias_norms2, weight_dots, bias_dots = _torch.call(
        "affine_stats", b, x, mean, rstd, D_weight, D_bias, channels_first, True, backend
    )
    return AffineStats(
        weight_grad if x is not None else None,
        bias_grad,
        weight_norms2**0.5 if x is not None else None,
        bias_norms2**0.5,
        None if D_weight is None else weight_dots[:, 0] if single_weight else weight_dots,
        None if D_bias is None else bias_dots[:, 0] if single_bias else bias_dots,
    )


def _check_statistic(y: Array, name: str, b: Array, shape: tuple[int, ...], channels_first: bool) -> None:
    """Raises unless y, a mean or rstd, fits the b of this shape."""
    if _arrays.dtype_name(y) != _arrays.sum_dtype(b):
        raise TypeError(f"{name}: expected {_arrays.sum_dtype(b)}, got {_arrays.dtype_name(y)}")
    if not channels_first:
        if tuple(y.shape) != shape[:-1]:
            raise ValueError(f"{name}: expected shape {shape[:-1]}, b's without its last axis, got {tuple(y.shape)}")
    elif y.ndim != 2 or y.shape[0] != shape[0] or y.shape[1] < 1 or shape[1] % y.shape[1]:
        raise ValueError(
            f"{name}: expected shape ({shape[0]}, G), G dividing {shape[1]} channels, got {tuple(y.shape)}"
        )


def _directions(D: Array | None, name: str, b: Array, features: int) -> tuple[Array | None, bool]:
    if D is None:
        return None, False
    if _arrays.dtype_name(D) != _arrays.sum_dtype(b):
        raise TypeError(f"{name}: expected {_arrays.sum_dtype(b)}, got {_arrays.dtype_name(D)}")
    return _arrays.directions(D, b, (features,), name)


def outputs(
    b: Array,
    x: Array | None,
    mean: Array | None,
    rstd: Array | None,
    D_weight: Array | None,
    D_bias: Array | None,
    channels_first: bool,
    norms: bool,
    backend: str = "auto",
) -> tuple[Array, ...]:
    """The arrays that `compute` fills, weight before bias: (F,), (B,), (B, K) of each; no element where not wanted."""
    samples, features = b.shape[0], b.shape[1 if channels_first else 2]
    weight = x is not None
    shapes = (
        (features if weight else 0,),
        (features,),
        (samples if norms and weight else 0,),
        (samples if norms else 0,),
        (samples, 0 if D_weight is None else D_weight.shape[0]),
        (samples, 0 if D_bias is None else D_bias.shape[0]),
    )
    return tuple([_arrays.sums(b, *shape) for shape in shapes])


def compute(
    b: Array,
    x: Array | None,
    mean: Array | None,
    rstd: Array | None,
    D_weight: Array | None,
    D_bias: Array | None,
    channels_first: bool,
    norms: bool,
    backend: str = "auto",
) -> tuple[Array, ...]:
    """Gradients, norms^2 and dots of checked inputs."""
    out = outputs(b, x, mean, rstd, D_weight, D_bias, channels_first, norms, backend)
    weight = x is not None
    wanted = (weight, True, norms and weight, norms, weight, True)
    inputs = _arrays.readable(b, x, mean, rstd, D_weight, D_bias)
    given = [y if use else None for y, use in zip(out, wanted, strict=True)]
    _dispatch.run("affine_stats", backend, *inputs, *given, channels_first)
    return out


_torch.define(
    "affine_stats(Tensor b, Tensor? x, Tensor? mean, Tensor? rstd, Tensor? D_weight, Tensor? D_bias, "
    "bool channels_first, bool norms) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    compute,
    outputs,
)
