"""embedding_stats by definition: every sample's table of gradients is built row by row, in float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]


def run(ids: I64, b: F64, D: F64 | None, norms2: F64 | None, dots: F64 | None, padding_idx: int) -> None:
    """Writes ||G_i||^2 and <G_i, D_k>, where row v of G_i is the sum of b_it over tokens with id_it = v."""
    allowed = (ids >= 0) & ((ids < (D.shape[1] if D is not None else np.inf)) | (ids == padding_idx))
    if not allowed.all():
        i, t = np.argwhere(~allowed)[0]
        raise IndexError(
            f"ids: expected 0 <= id{f' < {D.shape[1]}' if D is not None else ''}, got {ids[i, t]} at "
            f"sample {i}, token {t}"
        )
    for i in range(ids.shape[0]):
        counted = ids[i] != padding_idx
        rows, where = np.unique(ids[i][counted], return_inverse=True)
        gradient = np.zeros((len(rows), b.shape[2]))
        np.add.at(gradient, where, b[i][counted])
        if norms2 is not None:
            norms2[i] = np.sum(gradient * gradient)
        if D is not None and dots is not None:
            dots[i] = np.sum(gradient * D[:, rows], axis=(1, 2))
