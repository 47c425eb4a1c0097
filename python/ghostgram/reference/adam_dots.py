"""adam_dots by definition: every per-sample gradient and its change of AdamW's step is formed in float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]


def run(
    a: F64, b: F64, clip: F64, m: F64, v: F64, D: F64, out: F64,
    eta: float, beta1: float, beta2: float, eps: float, bc1: float, bc2: float,
) -> None:  # fmt: skip
    """Writes <D_r, step(g_i) - step(0)> for g_i = clip_i b_i^T a_i into out."""
    for i in range(a.shape[0]):
        change = change_of_step(clip[i] * (b[i].T @ a[i]), m, v, eta, beta1, beta2, eps, bc1, bc2)
        out[i] = np.sum(change * D, axis=(1, 2))


def change_of_step(
    g: F64, m: F64, v: F64, eta: float, beta1: float, beta2: float, eps: float, bc1: float, bc2: float
) -> F64:
    """step(g) - step(0), elementwise and without cancellation, in the dtype of its inputs.

    The root of the second moment grows from r0 to r by h^2 / (r + r0), where h is the gradient's part of it. `hypot`
    takes gradients whose square is out of range.
    """
    h, r0 = np.abs(g) * np.sqrt((1 - beta2) / bc2), np.sqrt(v) * np.sqrt(beta2 / bc2)
    r = np.hypot(h, r0)
    growth = h * np.divide(h, r + r0, out=np.zeros_like(h), where=h > 0)
    change: F64 = -eta * ((1 - beta1) * g / bc1 - beta1 * m / bc1 * growth / (r0 + eps)) / (r + eps)
    return change
