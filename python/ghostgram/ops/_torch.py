"""The ops as `torch.ops.ghostgram.*`, so that torch sees what it calls: fake tensors, torch.compile, opcheck.

An op file calls `define` when it is imported, torch or no torch. Nothing is registered before torch is there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from ghostgram import _arrays, _dispatch, _xla

Autograd = Callable[[Callable[..., Any]], Callable[..., Any]]
"""below -> the op with a gradient, where `below(*args)` computes the op unseen by autograd."""

_defined: dict[str, tuple[str, Callable[..., Any], Callable[..., Any], Autograd | None, bool]] = {}
_registered: dict[str, Any] = {}
_libraries: list[Any] = []  # a torch Library takes its ops with it when it dies


def define(
    schema: str,
    compute: Callable[..., Any],
    outputs: Callable[..., Any],
    autograd: Autograd | None = None,
    *,
    waits: bool = False,
) -> None:
    """Declares an op: its torch schema, the function that computes it, and the one that only allocates its results.

    Every op's last argument is `backend`, which the schema that is given lacks.
    Without `autograd` the op reads its inputs as constants, and a backward through its results is an error. An op that
    `waits` for the GPU, to raise what only that knows, is kept out of the CUDA graphs that torch.compile makes.
    """
    schema = schema.replace(") ->", ", str backend='auto') ->")  # a default is not handed to Python, which takes time
    _defined[schema.partition("(")[0]] = (schema, compute, outputs, autograd, waits)
    if "torch" in sys.modules:
        register()


def register() -> None:
    """Registers every op defined so far with torch. Called on import of an op, or before the first torch call."""
    import torch

    from ghostgram import _C

    _C.borrow_openmp()  # the kernels' threads are torch's own then, and as many as torch uses
    if not _libraries:
        _libraries.append(torch.library.Library("ghostgram", "DEF"))  # type: ignore[no-untyped-call]
    for name, (schema, compute, outputs, autograd, waits) in _defined.items():
        if name in _registered:
            continue
        library = _libraries[0]
        library.define(schema, tags=(torch.Tag.cudagraph_unsafe,) if waits else ())
        library.impl(name, compute, "CompositeExplicitAutograd")
        torch.library.register_fake(f"ghostgram::{name}", outputs, lib=library)
        _registered[name] = op = getattr(torch.ops.ghostgram, name).default
        # register_autograd flattens its arguments by pytree, which costs more than a small op.
        through_autograd = (autograd or _no_gradient(name))(_below_autograd(op))
        library.impl(name, through_autograd, "Autograd")
        if not autograd and "Tensor[]" not in schema:
            for device in ("CPU", "CUDA"):
                shortcut = _at_once(device, op._schema, compute, through_autograd)
                library.impl(name, shortcut, f"Autograd{device}", with_keyset=True)


@_dispatch.constant
def _ensure_registered(name: str) -> None:
    """On its own, because the first call of all may be one that torch.compile traces."""
    if name not in _registered:
        register()


def call(name: str, *args: Any) -> Any:
    """Runs the op `name`: through torch.ops for torch tensors, directly for every other array type."""
    like = _arrays.first(args[0])
    if _arrays.is_torch(like):
        _ensure_registered(name)
        return _registered[name](*args)
    compute = _defined[name][1]
    return call_jax(compute, *args) if _arrays.framework(like, "array") == "jax" else compute(*args)


def call_jax(compute: Callable[..., Any], *args: Any) -> Any:
    """Runs an op's function on JAX arrays: now on those of a CPU, which it reads in place, and else through XLA."""
    if any(map(_xla.traced, _xla.arrays(args))):
        return _xla.through(compute, args)
    return _arrays.returned(compute(*args))


def _at_once(
    device: str, schema: Any, compute: Callable[..., Any], otherwise: Callable[..., Any]
) -> Callable[..., Any]:
    """`compute` itself, where nothing between autograd and it has a say: to dispatch again would cost what it costs.

    The dispatcher's set of keys says so exactly: it is that of plain tensors of the device, without a mode (fake
    tensors, tracing, functorch), a subclass, or a view that is negated lazily.
    """
    import torch

    key, keys = torch._C.DispatchKey, torch._C.DispatchKeySet
    plain = (keys(getattr(key, device)) | keys(getattr(key, f"Autograd{device}"))).raw_repr()
    tensors = sum("Tensor" in str(argument.type) for argument in schema.arguments)  # they come first
    grad_enabled = torch.is_grad_enabled

    def op(found: Any, *args: Any) -> Any:
        if found.raw_repr() == plain:
            if not grad_enabled():
                return compute(*args)
            for x in args[:tensors]:
                if x is not None and x.requires_grad:
                    break
            else:
                return compute(*args)
        return otherwise(*args)

    return op


def _below_autograd(op: Callable[..., Any]) -> Callable[..., Any]:
    import torch

    def below(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return below


def _no_gradient(name: str) -> Autograd:
    """A gradient that is an error when it is asked for, not when the op is called."""
    import torch

    class Constant(torch.autograd.Function):
        @staticmethod
        def forward(_ctx: Any, _differentiable: Any, below: Callable[..., Any], args: tuple[Any, ...]) -> Any:
            return below(*args)

        @staticmethod
        def backward(_ctx: Any, *_: Any) -> Any:
            raise RuntimeError(f"ghostgram::{name} reads its inputs as constants: it has no gradient")

    def wants_gradient(x: Any) -> bool:
        return x.requires_grad if isinstance(x, torch.Tensor) else isinstance(x, list) and any(map(wants_gradient, x))

    def with_error(below: Callable[..., Any]) -> Callable[..., Any]:
        def op(*args: Any) -> Any:
            if torch.is_grad_enabled() and any(map(wants_gradient, args)):
                tensors = (y for x in args for y in (x if isinstance(x, list) else [x]))
                return Constant.apply(next(filter(wants_gradient, tensors)), below, args)  # type: ignore[no-untyped-call]
            return below(*args)

        return op

    return with_error
