"""affine_stats by definition: normalised inputs and both per-sample gradients are formed in float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]


def run(
    b: F64,
    x: F64 | None,
    mean: F64 | None,
    rstd: F64 | None,
    D_weight: F64 | None,
    D_bias: F64 | None,
    weight_grad: F64 | None,
    bias_grad: F64 | None,
    weight_norms2: F64 | None,
    bias_norms2: F64 | None,
    weight_dots: F64 | None,
    bias_dots: F64 | None,
    channels_first: bool,
) -> None:
    """Writes sums, squared norms and dots of W_i = sum_t b_it * xhat_it and V_i = sum_t b_it into the outputs given."""
    tokens = 2 if channels_first else 1
    if x is not None:
        if channels_first:  # statistics of groups, for each of their channels
            mean, rstd = (None if y is None else y.repeat(b.shape[1] // y.shape[1], axis=1) for y in (mean, rstd))
        xhat = x - (0 if mean is None else mean[..., None])
        xhat = xhat * (1 if rstd is None else rstd[..., None])
        _statistics(np.sum(b * xhat, axis=tokens), D_weight, weight_grad, weight_norms2, weight_dots)
    _statistics(np.sum(b, axis=tokens), D_bias, bias_grad, bias_norms2, bias_dots)


def _statistics(rows: F64, D: F64 | None, grad: F64 | None, norms2: F64 | None, dots: F64 | None) -> None:
    if grad is not None:
        grad[...] = rows.sum(0)
    if norms2 is not None:
        norms2[...] = np.sum(rows * rows, axis=1)
    if D is not None and dots is not None:
        dots[...] = rows @ D.T
