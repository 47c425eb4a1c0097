"""The ops inside `jax.jit`: arrays of a call that is being traced, and the one XLA call that an op becomes there.

A traced array has a shape and no numbers yet. `through` runs an op's `compute` on stand-ins for such arrays; where that
asks `_dispatch.run` for a kernel, `run` asks XLA instead (csrc/core/xla_call.h) and fills the stand-ins it was given as
outputs with traced arrays.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

import numpy as np


class Traced:
    """A stand-in for a JAX array: its shape and dtype, and the array once there is one.

    An output is made without a value, or with the one that the kernel shall find in its memory. Parts of an output are
    outputs of their own, as an XLA call has no memory in common with another.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any, value: Any = None):
        self.shape, self.dtype, self.value = tuple(shape), np.dtype(dtype), value

    @property
    def ndim(self) -> int:
        """How many axes it has."""
        return len(self.shape)

    def __getitem__(self, part: slice) -> Traced:
        with wide():
            value = None if self.value is None else self.value[part]
        return Traced((len(range(self.shape[0])[part]), *self.shape[1:]), self.dtype, value)

    def __setitem__(self, _: Any, value: Any) -> None:
        """Replaces all of it, by a number or by another one."""
        if isinstance(value, Traced):
            self.value = value.value
        else:
            import jax.numpy as jnp

            self.value = converted(jnp.full(self.shape, value, jnp.float32), self.dtype)


def traced(x: Any) -> bool:
    """Whether a JAX array is not for us to read: it is traced, or its numbers lie on a GPU or on several devices."""
    import jax

    return isinstance(x, jax.core.Tracer) or len(x.devices()) > 1 or platform(x) != "cpu"


def arrays(args: Iterable[Any]) -> Iterator[Any]:
    """The JAX arrays among arguments, and in lists among them."""
    import jax

    for x in args:
        if isinstance(x, list):
            yield from arrays(x)
        elif isinstance(x, jax.Array):
            yield x


def platform(x: Any) -> str:
    """Where a JAX array lies, or a traced one most likely will."""
    import jax

    return str(jax.default_backend() if isinstance(x, jax.core.Tracer) else next(iter(x.devices())).platform)


def through(compute: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """What `compute` gives for arguments of which some are traced, as JAX arrays of dtypes that JAX has here."""
    import jax

    def stand_in(x: Any) -> Any:
        if isinstance(x, (list, tuple)):
            return [stand_in(y) for y in x]
        if isinstance(x, np.ndarray):  # ids with numbers, widened beside scores without
            x = converted(x, x.dtype)
        return Traced(x.shape, x.dtype, x) if isinstance(x, jax.Array) else x

    def array(x: Any) -> Any:
        if isinstance(x, (list, tuple)):
            return type(x)(map(array, x))
        dtype = jax.dtypes.canonicalize_dtype(x.dtype)
        if x.value is None:  # an output that was not wanted, and has no elements
            return jax.numpy.zeros(x.shape, dtype)
        return x.value if x.dtype == dtype else converted(x.value, dtype)

    return array(compute(*map(stand_in, args)))


def wide() -> Any:
    """Where JAX holds int64 and float64, which elsewhere it takes for 32 bits unless `jax_enable_x64` is set."""
    import jax
    import jax.experimental

    enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64  # the latter before 0.8
    return enable_x64(True)


def converted(x: Any, dtype: Any) -> Any:
    """x in another dtype, which may be one of 64 bits."""
    import jax

    with wide():
        return jax.lax.convert_element_type(jax.numpy.asarray(x), dtype)


def run(op: str, backends: tuple[str, ...], args: tuple[Any, ...], inputs: int, outputs: int) -> None:
    """Makes `op` one XLA call: `args` are `inputs` arguments, then `outputs` ones, whose values it sets, then options.

    Any of `backends` may run it: those for the devices that the call is compiled for.
    """
    import jax

    arguments, options = args[: inputs + outputs], args[inputs + outputs :]
    layout: list[str] = []
    given: list[Any] = []
    made: list[Traced] = []
    aliases: dict[int, int] = {}
    for i, argument in enumerate(arguments):
        letters = ""
        for x in _arrays_of(argument):
            if i < inputs or x.value is not None:
                given.append(x.value)
            if i < inputs:
                letters += "i"
                continue
            letters += "o" if x.value is None else "a"
            if x.value is not None:
                aliases[len(given) - 1] = len(made)
            made.append(x)
        layout.append(letters)

    attributes = {f"o{i}": _attribute(x) for i, x in enumerate(options) if x is not None}
    attributes |= {"layout": ",".join(layout), "rank": np.int64(given[0].ndim)}
    call = jax.ffi.ffi_call(
        _target(op, backends),
        tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in made),
        # What has a value is an output's memory too, and must have all of the batch.
        vmap_method="broadcast_all" if aliases else "expand_dims",
        input_output_aliases=aliases,
    )

    with wide():
        values = constant(op, lambda *arrays: call(*arrays, **attributes))(*given)
    for x, value in zip(made, values, strict=True):
        x.value = value


def constant(op: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of JAX arrays whose results are constants: a gradient through them is an error that names `op`."""
    import jax

    def no_gradient(*_: Any) -> Any:
        raise TypeError(f"{op}: reads its inputs as constants: it has no gradient")

    found = jax.custom_vjp(function)
    found.defvjp(lambda *arrays: (function(*arrays), None), no_gradient)
    return found  # type: ignore[no-any-return]


def _arrays_of(argument: Any) -> Iterator[Traced]:
    if isinstance(argument, list):
        yield from argument
    elif argument is not None:
        yield argument


def _attribute(option: Any) -> Any:
    """In the widths that csrc/core/xla_call.cpp reads."""
    if isinstance(option, str):
        return option
    if isinstance(option, list):
        return np.array(option, np.float64)
    return np.float64(option) if isinstance(option, float) else np.int64(option)


@cache
def _target(op: str, backends: tuple[str, ...]) -> str:
    """The name under which XLA knows an op, for each platform that a backend of it runs on."""
    import jax.ffi

    name = "_".join(("ghostgram", op, *backends))
    extension = importlib.import_module("ghostgram._C")
    for backend in backends:
        handler = getattr(getattr(extension, backend), f"{op}_xla")
        jax.ffi.register_ffi_target(name, handler, platform={"cpu": "cpu", "cuda": "CUDA"}[backend])
    return name
