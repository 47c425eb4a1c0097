"""Test values in every dtype, and the same values lying in memory in ways a caller's might."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]


def rounded(x: F64, dtype: str) -> F64:
    """Each value to the nearest one that `dtype` represents."""
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
        even = ((bits >> 16) & 1) + 0x7FFF
        return ((bits + even) & 0xFFFF0000).astype(np.uint32).view(np.float32).astype(np.float64)
    return x.astype(dtype).astype(np.float64)


def lay_out(x: NDArray[np.generic], layout: str) -> NDArray[np.generic]:
    """The values of x (samples, tokens, features) under a layout, inner stride 1 in all of them.

    "contiguous"; "sliced": a window of a larger array in every axis; "transposed": tokens outermost in memory;
    "expanded": one sample seen B times through stride 0 (the values must already be equal).
    """
    if layout == "contiguous":
        return x
    if layout == "sliced":
        around = np.full([n + 3 for n in x.shape], np.nan, x.dtype)
        window = around[tuple(slice(1, 1 + n) for n in x.shape)]
    elif layout == "transposed":
        window = np.empty((x.shape[1], x.shape[0], *x.shape[2:]), x.dtype).swapaxes(0, 1)
    elif layout == "expanded":
        return np.broadcast_to(x[:1].copy(), x.shape)
    else:
        raise ValueError(f"layout: expected contiguous, sliced, transposed or expanded, got {layout!r}")
    window[...] = x
    return window
