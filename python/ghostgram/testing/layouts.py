"""Test values in every dtype, and the same values lying in memory in ways a caller's might."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ghostgram import _arrays

F64 = NDArray[np.float64]
Values = dict[str, Any]
"""Inputs of a case by name: float64 arrays, None where the case has none."""


class Placement(NamedTuple):
    """A layout of any number of axes, drawn at random by property tests; what lies between the elements is NaN."""

    order: tuple[int, ...]
    """The axes as they lie in memory, outermost first."""
    steps: tuple[int, ...]
    """Along each axis, how far apart in memory neighbours lie; negative steps run backwards (NumPy alone can)."""
    offset: int
    """Elements before the first."""


Layout = str | Placement
Make = Callable[[F64, str, Layout], Any]
"""(values, dtype, layout) -> an array of some framework."""
UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
"""Unit roundoff by dtype."""
ITEM = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of an element by dtype."""


def rounded(x: F64, dtype: str) -> F64:
    """Each value to the nearest one that `dtype` represents."""
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
        even = ((bits >> 16) & 1) + 0x7FFF
        return ((bits + even) & 0xFFFF0000).astype(np.uint32).view(np.float32).astype(np.float64)
    return x.astype(dtype).astype(np.float64)


def absolute(values: Values) -> Values:
    """The absolute values of what is there."""
    return {name: None if x is None else np.abs(x) for name, x in values.items()}


def lay_out(x: NDArray[np.generic], layout: Layout) -> NDArray[np.generic]:
    """The values of x (samples, tokens, features) under a layout, inner stride 1 in all those with a name.

    "contiguous"; "sliced": a window of a larger array in every axis; "transposed": tokens outermost in memory;
    "expanded": one sample seen B times through stride 0 (the values must already be equal); or a `Placement`.
    """
    if layout == "contiguous":
        return x
    filler = np.nan if x.dtype.kind == "f" else -(2**31)
    if isinstance(layout, Placement):
        extents = [x.shape[axis] * abs(layout.steps[axis]) for axis in layout.order]
        memory = np.full(layout.offset + math.prod(extents), filler, x.dtype)[layout.offset :].reshape(extents)
        window = memory.transpose(np.argsort(layout.order))[tuple(slice(None, None, step) for step in layout.steps)]
    elif layout == "sliced":
        around = np.full([n + 3 for n in x.shape], filler, x.dtype)
        window = around[tuple(slice(1, 1 + n) for n in x.shape)]
    elif layout == "transposed":
        window = np.empty((x.shape[1], x.shape[0], *x.shape[2:]), x.dtype).swapaxes(0, 1)
    elif layout == "expanded":
        return np.broadcast_to(x[:1].copy(), x.shape)
    else:
        raise ValueError(f"layout: expected contiguous, sliced, transposed or expanded, got {layout!r}")
    window[...] = x
    return window


def torch_array(values: F64, dtype: str, layout: Layout, device: str = "cpu") -> Any:
    """A torch tensor of these values, whose memory lies on the device in the same layout."""
    import torch

    laid = lay_out(values, layout)
    memory = _memory(laid)
    offset = (laid.__array_interface__["data"][0] - memory.__array_interface__["data"][0]) // laid.itemsize
    strides = [s // laid.itemsize for s in laid.strides]
    own = torch.from_numpy(memory).to(device, getattr(torch, dtype), copy=True)  # outputs too are made here
    return own.as_strided(laid.shape, strides, offset)


def array_for(backend: str) -> Make:
    """How to make the arrays that a backend reads: on the GPU for cuda and triton, where there is one."""
    import torch

    on_gpu = backend in ("cuda", "triton") and torch.cuda.is_available()
    return partial(torch_array, device="cuda") if on_gpu else torch_array


def numpy_array(values: F64, dtype: str, layout: Layout) -> Any:
    """A NumPy array of these values; NumPy has no bfloat16."""
    return lay_out(values.astype(dtype), layout)


def _memory(x: NDArray[np.generic]) -> NDArray[np.generic]:
    """All the memory that x is a view of, flat."""
    base = x
    while isinstance(base.base, np.ndarray):
        base = base.base
    return base.ravel(order="K")


def poisoned(like: Any, shape: tuple[int, ...] | None = None) -> Any:
    """An output full of NaN, in like's framework, dtype and (unless given) shape."""
    shape = tuple(like.shape) if shape is None else shape
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(like, torch.Tensor):
        return like.new_full(shape, float("nan"))
    return np.full(shape, np.nan, like.dtype)


def poisoned_sums(like: Any, shape: tuple[int, ...]) -> Any:
    """An output full of NaN in like's framework and the dtype of sums over it."""
    if _arrays.is_torch(like):
        return like.new_full(shape, float("nan"), dtype=getattr(sys.modules["torch"], _arrays.sum_dtype(like)))
    return np.full(shape, np.nan, _arrays.sum_dtype(like))
