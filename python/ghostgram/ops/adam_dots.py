"""Front door of adam_dots: first-order influence through AdamW's own nonlinear step, no per-sample gradient stored."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ghostgram import _arrays, _dispatch
from ghostgram._arrays import Array
from ghostgram.ops import _torch


def adam_dots(
    a: Array,
    b: Array,
    clip: Array,
    m: Array,
    v: Array,
    directions: Array,
    scalars: Sequence[float],
    *,
    backend: str = "auto",
) -> Array:
    r"""Dots of directions with what AdamW's next step would change by if it were taken on one sample alone.

    For a layer `y = x W^T` with inputs `a` and output gradients `b`, sample i has the clipped weight gradient
    `g_i = clip_i sum_t b_it a_it^T`. With the optimizer's moments m and v and its next step

        step(g) = -eta (m' / bc1) / (sqrt(v' / bc2) + eps),
        m' = beta1 m + (1 - beta1) g,    v' = beta2 v + (1 - beta2) g^2,

    elementwise (weight decay is in both steps and drops out), the results are

        out_ir = <D_r, step(g_i) - step(0)>.

    The difference is computed without cancellation: it keeps its digits where g is small beside the moments, and is 0
    where g is. With D_r the gradient of a loss L_r at the weights after step(0), -out is the influence of the sample on
    L_r, exact in the optimizer and to first order in L_r. Inputs are read as constants: the results carry no autograd
    history.

    The step is not linear in g, so everything that belongs to one weight must be there at once. A weight that a model
    uses several times (a tied one) takes its uses one after the other along the token axis:
    `adam_dots(concatenate([a1, a2], 1), concatenate([b1, b2], 1), ...)`; for an embedding table that is also the
    head's weight, the table's use has the gradients of its outputs as `a` and one-hot rows as `b`. Gradients g (B, n)
    that are already formed, as of a bias or a normalisation's scale, are a layer with one output:
    `adam_dots(g, ones((B, 1)), clip, m[None], v[None], directions[:, None], scalars)`.

    Args:
        a: (B, d) or (B, ..., d) layer inputs; float32, bfloat16, float16 or float64. Middle axes are tokens.
        b: (B, p) or (B, ..., p) gradients of each sample's own loss at the layer's output, of a's dtype.
        clip: (B,) factor of each sample's gradient, min(1, C / |g_i|) over all parameters; of the result's dtype.
        m: (p, d) first moment, of a's dtype or the result's.
        v: (p, d) second moment, >= 0, of m's dtype.
        directions: (R, p, d) directions D, or (p, d) for one; of a's dtype or the result's.
        scalars: eta, beta1, beta2, eps, bc1 and bc2 of the step to come: the learning rate; 0 <= beta1, beta2 < 1;
            0 < eps <= 1; and 1 - beta1^n and 1 - beta2^n where it would be the n-th.
        backend: "auto", "cpu", "cuda", "triton" or "reference".

    Returns:
        (B, R), or (B,) for a single direction, of the caller's type: float32 (float64 for float64 inputs).

    Raises:
        TypeError: An argument is no array, of another framework than a, or of an unsupported dtype.
        ValueError: Shapes do not fit or a scalar is out of range; the message names the argument, what was expected
            and what came.
        RuntimeError: The backend asked for is not available here; the message says why.

    Cost:
        (2 T + 18 + 2 R) B d p FLOPs, with one root and one division among the 18; reads a, b, m, v and the directions
        once. An inner axis that is not contiguous costs a copy.

    Source:
        MATES (arXiv 2406.06046) asks for this change by a real optimizer step per sample; the closed form and the
        contraction without stored gradients are of this library.
    """
    a, b, clip, m, v, directions, single = checked(a, b, clip, m, v, directions)
    out = _torch.call("adam_dots", a, b, clip, m, v, directions, checked_scalars(scalars), backend)
    return out[:, 0] if single else out


def checked(
    a: Array, b: Array, clip: Array, m: Array, v: Array, directions: Array
) -> tuple[Array, Array, Array, Array, Array, Array, bool]:
    """(B,T,d), (B,T,p), (B,), (p,d), (p,d), (R,p,d), and whether directions came as one (p,d); or a clear error."""
    _arrays.same_framework(a=a, b=b, clip=clip, m=m, v=v, directions=directions)
    a, b = _arrays.layer(a, b)
    shape, sums = (b.shape[-1], a.shape[-1]), _arrays.sum_dtype(a)
    if tuple(clip.shape) != (a.shape[0],):
        raise ValueError(f"clip: expected shape ({a.shape[0]},), got {tuple(clip.shape)}")
    if _arrays.dtype_name(clip) != sums:
        raise TypeError(f"clip: expected {sums}, got {_arrays.dtype_name(clip)}")
    for name, moment in (("m", m), ("v", v)):
        if tuple(moment.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(moment.shape)}")
    if (dtype := _arrays.dtype_name(m)) not in (_arrays.dtype_name(a), sums):
        raise TypeError(f"m: expected {_arrays.dtype_name(a)} or {sums}, got {dtype}")
    if _arrays.dtype_name(v) != _arrays.dtype_name(m):
        raise TypeError(f"v: expected {_arrays.dtype_name(m)} like m, got {_arrays.dtype_name(v)}")
    directions, single = _arrays.directions(directions, a, shape, "directions")
    return a, b, clip, m, v, directions, single


def checked_scalars(scalars: Sequence[float]) -> list[float]:
    """The six as floats, or an error that names the one out of range."""
    found = [float(x) for x in scalars]
    if len(found) != 6:
        raise ValueError(f"scalars: expected eta, beta1, beta2, eps, bc1 and bc2, got {len(found)} numbers")
    eta, beta1, beta2, eps, bc1, bc2 = found
    if not math.isfinite(eta):
        raise ValueError(f"scalars: expected a finite eta, got {eta}")
    for name, value in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= value < 1:
            raise ValueError(f"scalars: expected 0 <= {name} < 1, got {value}")
    for name, value in (("eps", eps), ("bc1", bc1), ("bc2", bc2)):
        if not 0 < value <= 1:
            raise ValueError(f"scalars: expected 0 < {name} <= 1, got {value}")
    return found


def outputs(
    a: Array, b: Array, clip: Array, m: Array, v: Array, directions: Array, scalars: list[float], backend: str = "auto"
) -> Array:
    """The (B, R) array that `compute` fills."""
    return _arrays.sums(a, a.shape[0], directions.shape[0])


def compute(
    a: Array, b: Array, clip: Array, m: Array, v: Array, directions: Array, scalars: list[float], backend: str = "auto"
) -> Array:
    """Dots of checked inputs."""
    out = outputs(a, b, clip, m, v, directions, scalars, backend)
    a, b, m, v, directions = _arrays.readable(a, b, m, v, directions)
    _dispatch.run("adam_dots", backend, a, b, _arrays.contiguous(clip), m, v, directions, out, *scalars)
    return out


_torch.define(
    "adam_dots(Tensor a, Tensor b, Tensor clip, Tensor m, Tensor v, Tensor directions, float[] scalars) -> Tensor",
    compute,
    outputs,
)
