"""grad_gram by definition: every per-sample gradient is formed in float64, then all inner products are taken."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]


def run(a: F64, b: F64, a2: F64 | None, b2: F64 | None, out: F64) -> None:
    """Writes <G_i, G'_j> into a (B, B2) output, or ||G_i||^2 into a (B,) one, for G_i = b_i^T a_i."""
    first = _gradients(a, b)
    if out.ndim == 1:
        out[...] = np.sum(first * first, axis=1)
    else:
        out[...] = first @ (first if a2 is None or b2 is None else _gradients(a2, b2)).T


def _gradients(a: F64, b: F64) -> F64:
    gradients: F64 = b.swapaxes(1, 2) @ a
    return gradients.reshape(a.shape[0], b.shape[2] * a.shape[2])
