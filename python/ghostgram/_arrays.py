"""The array types that come in and go out: torch, NumPy, JAX, CuPy, told apart without importing any of them."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import numpy as np

from ghostgram import _xla

Array = Any
"""A torch, NumPy, JAX or CuPy array."""

_HALVES = ("bfloat16", "float16")
_NAMES: dict[Any, str] = {}
"""Dtypes met so far: to spell one out takes longer than a small kernel."""


def traced() -> bool:
    """Whether torch.compile is tracing the caller, and so must not be shown a cache."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.compiler.is_dynamo_compiling()


def is_torch(x: Array) -> bool:
    """Whether x is a torch tensor."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def framework(x: Array, name: str) -> str:
    """One of "torch", "numpy", "jax" and "cupy"; a TypeError that names the argument for anything else."""
    if is_torch(x):
        return "torch"
    if isinstance(x, np.ndarray):
        return "numpy"
    root = type(x).__module__.partition(".")[0]
    if root in ("jax", "jaxlib") or isinstance(x, _xla.Traced):
        return "jax"
    if root == "cupy":
        return "cupy"
    raise TypeError(f"{name}: expected a torch, NumPy, JAX or CuPy array, got {type(x).__module__}.{type(x).__name__}")


def first(x: Array) -> Array:
    """The array itself, or the first one of a list."""
    return x[0] if isinstance(x, (list, tuple)) else x


def same_framework(**arrays: Array | None) -> str:
    """The one framework of all arrays given; a TypeError that names the odd one out."""
    first, kind = "", ""
    for name, x in arrays.items():
        if x is None:
            continue
        found = framework(x, name)
        if not kind:
            first, kind = name, found
        elif found != kind:
            raise TypeError(f"{name}: expected a {kind} array like {first}, got a {found} one")
    return kind


def dtype_name(x: Array) -> str:
    """Such as "float32" or "bfloat16": the same words for every framework."""
    return _name(x.dtype)


def _name(dtype: Any) -> str:
    name = _NAMES.get(dtype)
    if name is None:
        _NAMES[dtype] = name = str(dtype).removeprefix("torch.")
    return name


_name._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see `_dispatch.constant`: no guard on what was met


def sum_dtype(x: Array) -> str:
    """The dtype of sums over x: float64 for float64, float32 for float32, bfloat16 and float16."""
    return "float64" if dtype_name(x) == "float64" else "float32"


def device_type(x: Array) -> str:
    """Such as "cpu" or "cuda"."""
    if is_torch(x):
        return "cpu" if x.is_cpu else str(x.device.type)
    if isinstance(x, np.ndarray):
        return "cpu"
    kind = framework(x, "array")
    if kind == "jax":
        platform = _xla.platform(x)
        return "cuda" if platform == "gpu" else platform
    return "cuda" if kind == "cupy" else "cpu"


def empty(like: Array, shape: tuple[int, ...], dtype: str) -> Array:
    """An output beside `like`: same framework and device. JAX arrays are immutable, so theirs is a NumPy one.

    Where XLA makes the outputs, it is a stand-in for one.
    """
    if is_torch(like):
        torch_dtype = getattr(sys.modules["torch"], dtype)
        if shape and like.dtype == torch_dtype:
            return like.new_empty(*shape)  # in two thirds of the time that a tuple and a dtype take to be understood
        return like.new_empty(shape, dtype=torch_dtype)
    if isinstance(like, np.ndarray):
        return np.empty(shape, dtype)
    if isinstance(like, _xla.Traced):
        return _xla.Traced(shape, dtype)
    if framework(like, "array") == "cupy":
        with like.device:  # or it would lie on the current one
            return sys.modules["cupy"].empty(shape, dtype)
    return np.empty(shape, dtype)


def returned(result: Any) -> Any:
    """Finished outputs for a caller with JAX arrays; for all others they are what `empty` gave."""
    if isinstance(result, (list, tuple)):
        return type(result)(map(returned, result))
    return sys.modules["jax"].numpy.asarray(result)


def known(x: Array) -> bool:
    """Whether an output's numbers can be asked for. If not, XLA's handler raises what is to be raised."""
    return not isinstance(x, _xla.Traced)


def sums(like: Array, *shape: int) -> Array:
    """An output beside `like` for sums over it."""
    if is_torch(like) and shape and dtype_name(like) in ("float32", "float64"):
        return like.new_empty(*shape)
    return empty(like, shape, sum_dtype(like))


def concatenate(parts: list[Array], axis: int) -> Array:
    """Arrays of one framework joined along an axis."""
    kind = framework(parts[0], "parts")
    module = sys.modules["jax"].numpy if kind == "jax" else sys.modules[kind]
    return module.concatenate(parts, axis)


def mirrored(x: Array) -> Array:
    """A square matrix with its lower triangle replaced by the mirror of its upper one."""
    kind = framework(x, "x")
    module = sys.modules["jax"].numpy if kind == "jax" else sys.modules[kind]
    return module.triu(x) + module.triu(x, 1).T


def roots(squares: Array) -> Array:
    """Square roots, in place; rounding may have left a square that should be 0 a little below it."""
    if is_torch(squares):
        return squares.clamp_(0).sqrt_()
    if isinstance(squares, _xla.Traced):
        numpy = sys.modules["jax"].numpy
        squares.value = numpy.sqrt(numpy.maximum(squares.value, 0))
        return squares
    squares.clip(0, out=squares)
    squares **= 0.5
    return squares


def to_float64(x: Array) -> Any:
    """A float64 (or, for integers, int64) NumPy copy of any array or list of them, for the reference backend."""
    if isinstance(x, list):
        return [to_float64(y) for y in x]
    kind = framework(x, "array")
    if kind == "torch":
        x = x.detach().cpu()
        x = (x.double() if x.is_floating_point() else x.long()).numpy()
    elif kind == "cupy":
        x = x.get()
    values: np.ndarray = np.asarray(x)
    return values.astype(np.int64) if np.issubdtype(values.dtype, np.integer) else values.astype(np.float64)


def assign(out: Array, values: Any) -> None:
    """Writes NumPy values into an output of any framework, or a list of them into a list of outputs."""
    if isinstance(out, list):
        for x, y in zip(out, values, strict=True):
            assign(x, y)
    elif is_torch(out):
        out.copy_(sys.modules["torch"].from_numpy(values))
    elif isinstance(out, np.ndarray):
        out[...] = values
    else:
        out.set(values.astype(out.dtype))


def unit_inner_stride(x: Array) -> Array:
    """The array itself when its last axis is contiguous in memory, else a contiguous copy; what a kernel can read."""
    if is_torch(x):
        x = x.resolve_neg()  # a lazily negated view: its memory has the other sign
        return x if x.stride(-1) == 1 or x.shape[-1] <= 1 or not x.numel() else x.contiguous()
    if isinstance(x, np.ndarray):
        flags = x.flags
        if flags.c_contiguous and flags.aligned:
            return x
        if x.size == 0 or (x.strides[-1] == x.itemsize and all(s % x.itemsize == 0 for s in x.strides)):
            return x if x.flags.aligned else x.copy()
        return np.ascontiguousarray(x)
    kernels_can_read = framework(x, "array") != "cupy" or not x.size or x.strides[-1:] == (x.itemsize,)
    return x if kernels_can_read else _cupy_copy(x)


def readable(*arrays: Array | None) -> list[Array | None]:
    """Every array as `unit_inner_stride` gives it; absent ones stay absent."""
    if is_torch(arrays[0]):  # most are contiguous, and a call costs as much as to see it
        return [x if x is None or (x.is_contiguous() and not x.is_neg()) else unit_inner_stride(x) for x in arrays]
    return [x if x is None else unit_inner_stride(x) for x in arrays]


def contiguous(x: Array) -> Array:
    """The array itself when its elements lie in C order, one after the other, else a copy in which they do."""
    if is_torch(x):
        # Asked first, because a list of parameters is contiguous and both calls would cost more than reading it.
        return x if x.is_contiguous() and not x.is_neg() else x.resolve_neg().contiguous()
    if isinstance(x, np.ndarray):
        return x if x.flags.c_contiguous else np.ascontiguousarray(x)
    return x if framework(x, "array") != "cupy" or x.flags.c_contiguous else _cupy_copy(x)


def _cupy_copy(x: Array) -> Array:
    """In C order, and on the array's own device: CuPy allocates on the current one."""
    with x.device:
        return sys.modules["cupy"].ascontiguousarray(x)


def samples_first(x: Array, name: str) -> Array:
    """Any (B, ..., features) as (B, T, features): no middle axis is T = 1, several are flattened into one."""
    if x.ndim < 2:
        raise ValueError(f"{name}: expected (B, features) or (B, ..., features), got shape {tuple(x.shape)}")
    if x.ndim != 3:
        tokens = 1
        for n in x.shape[1:-1]:
            tokens *= n
        x = x.reshape(x.shape[0], tokens, x.shape[-1])
    return x


def channels_first(x: Array, name: str) -> Array:
    """Any (B, C, ...) as (B, C, S): no further axis is S = 1, several are flattened into one."""
    if x.ndim < 2:
        raise ValueError(f"{name}: expected (B, channels) or (B, channels, ...), got shape {tuple(x.shape)}")
    if x.ndim != 3:
        space = 1
        for n in x.shape[2:]:
            space *= n
        x = x.reshape(x.shape[0], x.shape[1], space)
    return x


def ids_64(ids: Array, name: str) -> Array:
    """Ids as int64 that a kernel can read: int32 is widened, and uint64 keeps its bit pattern."""
    if dtype_name(ids) not in ("int32", "int64", "uint64"):
        raise TypeError(f"{name}: expected int32, int64 or uint64, got {dtype_name(ids)}")
    if is_torch(ids):
        int64 = sys.modules["torch"].int64
        return unit_inner_stride(ids.to(int64) if dtype_name(ids) == "int32" else ids.view(int64))
    if framework(ids, name) == "jax":  # whose own int64 exists only where it is enabled
        if _xla.traced(ids):
            return _xla.converted(ids, "int64") if dtype_name(ids) == "int32" else ids.view("int64")
        ids = np.asarray(ids)
    return unit_inner_stride(ids.astype("int64") if dtype_name(ids) == "int32" else ids.view("int64"))


def ids_back(ids: Array, dtype: str) -> Array:
    """What `ids_64` made of ids, in the dtype they came in."""
    if is_torch(ids):
        torch_dtype = getattr(sys.modules["torch"], dtype)
        return ids.to(torch_dtype) if dtype == "int32" else ids.view(torch_dtype)
    return ids.astype("int32") if dtype == "int32" else ids.view(dtype)


def from_numpy(values: np.ndarray, kind: str) -> Array:
    """A NumPy array as one of the framework `kind`, as `framework` names them; on the CPU where there is a choice."""
    if kind == "numpy":
        return values
    module = importlib.import_module("jax.numpy" if kind == "jax" else kind)
    return module.from_numpy(values) if kind == "torch" else module.asarray(values)


def to_numpy(x: Array) -> Any:
    """The same numbers in NumPy: waits for a GPU, copies nothing on the CPU."""
    if is_torch(x):
        return x.cpu().numpy()
    return x.get() if framework(x, "array") == "cupy" else np.asarray(x)


def jax_numbers(x: Array, name: str) -> Any:
    """A JAX array in NumPy, for what needs its numbers now: on the CPU a view."""
    if isinstance(x, sys.modules["jax"].core.Tracer):
        raise TypeError(f"{name}: expected an array with numbers, got a traced one: a stream cannot run inside jax.jit")
    return np.asarray(x)


def in_framework(x: Array, kind: str) -> Array:
    """The array itself where it is one of the framework `kind`, else a copy of it that is."""
    return x if framework(x, "array") == kind else from_numpy(to_numpy(x), kind)


def moved(x: Array, like: Array) -> Array:
    """The array itself where it is of like's framework and on its device, else a copy that is."""
    kind = framework(like, "array")
    if framework(x, "array") == kind and (kind == "numpy" or x.device == like.device):
        return x
    values = to_numpy(x)
    if kind == "torch":
        return from_numpy(values, kind).to(like.device)
    if kind == "cupy":
        with like.device:
            return from_numpy(values, kind)
    return values


def copied(x: Array) -> Array:
    """The same numbers in memory of their own."""
    return x.clone() if is_torch(x) else x.copy()


def floating(x: Array, name: str) -> None:
    """Raises unless x has one of the dtypes the kernels read."""
    if dtype_name(x) not in ("float32", "float64", *_HALVES):
        raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {dtype_name(x)}")


def layer(a: Array, b: Array, a_name: str = "a", b_name: str = "b") -> tuple[Array, Array]:
    """A layer's inputs and output gradients as (B, T, d) and (B, T, p), or an error that names the argument."""
    floating(a, a_name)
    if b.dtype != a.dtype:
        floating(b, b_name)
        raise TypeError(f"{b_name}: expected {dtype_name(a)} like {a_name}, got {dtype_name(b)}")
    if a.shape[:-1] != b.shape[:-1]:
        raise ValueError(f"{b_name}: expected shape {(*a.shape[:-1], 'p')} like {a_name}, got {tuple(b.shape)}")
    return samples_first(a, a_name), samples_first(b, b_name)


def directions(D: Array, like: Array, shape: tuple[int, ...], name: str = "D") -> tuple[Array, bool]:
    """K directions as (K, *shape), and whether D came as a single one; of like's dtype or that of its sums."""
    if D.ndim not in (len(shape), len(shape) + 1) or tuple(D.shape[D.ndim - len(shape) :]) != shape:
        text = ", ".join(map(str, shape))
        raise ValueError(f"{name}: expected shape (K, {text}) or ({text}), got {tuple(D.shape)}")
    if dtype_name(D) not in (dtype_name(like), sum_dtype(like)):
        raise TypeError(f"{name}: expected {dtype_name(like)} or {sum_dtype(like)}, got {dtype_name(D)}")
    single = D.ndim == len(shape)
    return D[None] if single else D, single
