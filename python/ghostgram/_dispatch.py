"""From an op's name and a backend's to the code that runs it, and to the reason when there is none.

Every backend of an op has the same positional signature: inputs, outputs (allocated by the caller), options.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from ghostgram import _arrays, _xla

BACKENDS = ("reference", "cpu", "cuda", "triton")


@dataclass(frozen=True)
class Op:
    """How many leading arguments of an op are inputs, and how many of the next are outputs."""

    inputs: int
    outputs: int


OPS = {
    "grad_stats": Op(inputs=3, outputs=3),
    "grad_gram": Op(inputs=4, outputs=1),
    "embedding_stats": Op(inputs=3, outputs=2),
    "affine_stats": Op(inputs=6, outputs=6),
    "gumbel_topk": Op(inputs=2, outputs=5),
    "grad_project": Op(inputs=4, outputs=1),
    "softmax_stats": Op(inputs=2, outputs=5),
    "trajectory_match": Op(inputs=5, outputs=3),
    "adam_dots": Op(inputs=6, outputs=1),
}


def _module(name: str) -> Any:
    return importlib.import_module(name)


def _extension() -> Any:
    return _module("ghostgram._C")


def _missing_kernel(op: str, backend: str) -> str | None:
    if backend == "reference":
        found = importlib.util.find_spec(f"ghostgram.reference.{op}") is not None
    elif backend == "triton":
        found = importlib.util.find_spec(f"ghostgram.triton_kernels.{op}") is not None
    else:
        found = hasattr(getattr(_extension(), backend), op)
    if found:
        return None
    if backend == "cuda" and _extension().cuda_state != "on":
        return f"CUDA is {_extension().cuda_state}"
    return f"{op} has no {backend} kernel"


@cache
def why_not(op: str, backend: str) -> str | None:
    """The reason why `backend` cannot run `op` here, or None when it can."""
    if op not in OPS:
        raise ValueError(f"op: expected one of {sorted(OPS)}, got {op!r}")
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {('auto', *BACKENDS)}, got {backend!r}")
    if reason := _missing_kernel(op, backend):
        return reason
    if backend == "cuda" and not _extension().cuda.device_count():
        return "built, but no CUDA device or driver is here"
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if not (_interpreted() or _gpu()):
            return "no GPU is here (TRITON_INTERPRET=1 runs it slowly on the CPU)"
    return None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _gpu() -> bool:
    return bool(importlib.util.find_spec("torch") and _module("torch").cuda.is_available())


def _candidates(device: str) -> tuple[str, ...]:
    """What "auto" means on a device, best first."""
    return ("cpu",) if device == "cpu" else ("cuda", "triton")


def constant(function: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a function that torch.compile shall run instead of trace, its result being a constant of the graph.

    This is torch.compiler.assume_constant_result, for modules that are imported before torch is.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant
def runnable(ops: dict[str, str], backend: str, device: str) -> tuple[str, ...]:
    """The keys of the ops that `backend` can run here; all of them where it can run none, for the error to name."""
    return _runnable(tuple(ops.items()), backend, device)


@cache
def _runnable(ops: tuple[tuple[str, str], ...], backend: str, device: str) -> tuple[str, ...]:
    names = _candidates(device) if backend == "auto" else (backend,)
    able = tuple(key for key, op in ops if any(why_not(op, name) is None for name in names))
    return able or tuple(key for key, _ in ops)


@cache
def choose(op: str, backend: str, device: str) -> str:
    """The backend that will run `op` on arrays of this device type; an error that says why none can."""
    if backend == "auto":
        candidates = _candidates(device)
        for name in candidates:
            if why_not(op, name) is None:
                return name
        raise RuntimeError(
            f"{op}: no backend for {device} arrays: " + "; ".join(f"{c}: {why_not(op, c)}" for c in candidates)
        )
    if reason := why_not(op, backend):
        raise RuntimeError(f"{op}: backend {backend!r} is not available: {reason}")
    runs_on = {"cpu": ("cpu",), "cuda": ("cuda",), "triton": ("cpu", "cuda") if _interpreted() else ("cuda",)}
    if device not in runs_on.get(backend, (device,)):
        raise ValueError(f"{op}: backend {backend!r} runs on {' or '.join(runs_on[backend])} arrays, got {device} ones")
    return backend


def run(op: str, backend: str, *args: Any) -> None:
    """Runs `op` on (*inputs, *outputs, *options); `backend` may be "auto"."""
    like = args[0]
    if isinstance(like, np.ndarray):
        return _runner(op, backend, "cpu")(*args)
    like = _arrays.first(like)
    if isinstance(like, _xla.Traced):
        return _xla.run(op, _compiled(op, backend), args, OPS[op].inputs, OPS[op].outputs)
    _runner(op, backend, _arrays.device_type(like))(*args)


@cache
def _compiled(op: str, backend: str) -> tuple[str, ...]:
    """The backends that XLA may call for `op`; with "auto" it takes the one for the device that it compiles for."""
    if backend in ("reference", "triton"):
        raise RuntimeError(f"{op}: backend {backend!r} cannot run inside jax.jit, nor on JAX arrays of a GPU")
    names = ("cpu", "cuda") if backend == "auto" else (backend,)
    found = tuple(name for name in names if why_not(op, name) is None)
    if not found:
        raise RuntimeError(f"{op}: backend {backend!r} is not available: {why_not(op, backend)}")
    return found


@cache
def _runner(op: str, backend: str, device: str) -> Callable[..., None]:
    backend = choose(op, backend, device)
    if backend == "cpu":
        return getattr(_extension().cpu, op)  # type: ignore[no-any-return]
    if backend == "triton":
        return _module(f"ghostgram.triton_kernels.{op}").run  # type: ignore[no-any-return]
    if backend == "cuda":
        return _with_workspace(getattr(_extension().cuda, op), getattr(_extension().cuda, f"{op}_workspace"))
    return _through_numpy(_module(f"ghostgram.reference.{op}").run, OPS[op])


def _with_workspace(kernel: Callable[..., None], workspace_bytes: Callable[..., int]) -> Callable[..., None]:
    """A CUDA kernel allocates nothing: its scratch comes from the caller's framework, on the caller's stream."""

    def launch(*args: Any) -> None:
        words = -(-workspace_bytes(*args) // 4)
        kernel(*args, _arrays.empty(_arrays.first(args[0]), (max(words, 1),), "float32"))

    return launch


def _through_numpy(reference: Callable[..., None], op: Op) -> Callable[..., None]:
    """The reference knows float64 NumPy alone: converts what goes in, copies back what comes out."""

    def convert(*args: Any) -> None:
        arrays, options = args[: op.inputs + op.outputs], args[op.inputs + op.outputs :]
        copies = [None if x is None else _arrays.to_float64(x) for x in arrays]
        reference(*copies, *options)
        for out, values in zip(arrays[op.inputs :], copies[op.inputs :], strict=True):
            if out is not None and values is not None:
                _arrays.assign(out, values)

    return convert
