"""grad_stats by definition: every per-sample gradient is formed, one at a time, in float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]


def run(
    a: F64, b: F64, D: F64 | None, weight_grad: F64 | None, norms2: F64 | None, dots: F64 | None, accumulate: bool
) -> None:
    """Writes sum_i G_i, ||G_i||^2 and <G_i, D_k> for G_i = b_i^T a_i into the outputs given."""
    if weight_grad is not None and not accumulate:
        weight_grad[...] = 0
    for i in range(a.shape[0]):
        gradient = b[i].T @ a[i]
        if weight_grad is not None:
            weight_grad += gradient
        if norms2 is not None:
            norms2[i] = np.sum(gradient * gradient)
        if D is not None and dots is not None:
            dots[i] = np.sum(gradient * D, axis=(1, 2))
