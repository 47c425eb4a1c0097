"""Importing this puts a stand-in for CuPy into sys.modules: arrays in host memory that say they lie on a card.

They speak `__dlpack__`, `__dlpack_device__` and `__cuda_array_interface__`, and no buffer protocol, as CuPy does. On an
extension of tests/simt, whose card has the CPU's memory, every front door runs on them. Nothing may be copied to the
host (`get`), nor copied at all by `ascontiguousarray`: what the doors' tests pass in is contiguous.
"""

import ctypes
import sys
from types import SimpleNamespace

import numpy as np

CUDA = 2
STREAM = 0x5EED
CODES = {"i": 0, "u": 1, "f": 2, "b": 6}
asked: list[int] = []
"""The streams that arrays were asked to be ready on."""


class _Managed(ctypes.Structure):
    """DLPack's "dltensor", field by field."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32 * 2),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)


class Device:
    """The one card, which is always current."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def _wrapped(x):
    return Array(x) if isinstance(x, np.ndarray) or (isinstance(x, np.generic) and x.ndim == 0) else x


def _plain(x):
    return x.values if isinstance(x, Array) else x


class Array:
    """A NumPy array behind another face."""

    __module__ = "cupy"
    device = Device()

    def __init__(self, values):
        self.values, self.lent = np.asarray(values), []

    def __getattr__(self, name):
        found = getattr(self.values, name)
        if not callable(found) or name in ("dtype",):
            return _wrapped(found)
        return lambda *args, **options: _wrapped(
            found(*map(_plain, args), **{name: _plain(option) for name, option in options.items()})
        )

    def __getitem__(self, key):
        return Array(self.values[key])

    def __setitem__(self, key, value):
        self.values[key] = _plain(value)

    def __int__(self):
        return int(self.values)

    def __dlpack_device__(self):
        return CUDA, 0

    @property
    def __cuda_array_interface__(self):
        return self.values.__array_interface__ | {"version": 3, "stream": STREAM}

    def __dlpack__(self, *, stream, max_version=None):
        asked.append(stream)
        x, axes = self.values, ctypes.c_int64 * max(self.values.ndim, 1)
        shape, strides = axes(*x.shape), axes(*(stride // x.itemsize for stride in x.strides))
        managed = _Managed(
            *(x.ctypes.data, (ctypes.c_int32 * 2)(CUDA, 0), x.ndim, CODES[x.dtype.kind], 8 * x.itemsize, 1),
            *(shape, strides, 0, None, None),
        )
        self.lent.append(managed)
        return _new_capsule(ctypes.addressof(managed), b"dltensor", None)

    def get(self):
        raise AssertionError("a copy to the host")


def _operator(name):
    return lambda self, other: _wrapped(getattr(self.values, name)(_plain(other)))


for _name in ("add", "radd", "sub", "mul", "rmul", "pow", "gt", "ne", "ipow"):
    setattr(Array, f"__{_name}__", _operator(f"__{_name}__"))


def _no_copy(_):
    raise AssertionError("a copy of an array that could be read in place")


sys.modules["cupy"] = SimpleNamespace(
    ndarray=Array,
    empty=lambda shape, dtype: Array(np.empty(shape, dtype)),
    asarray=Array,
    ascontiguousarray=_no_copy,
    concatenate=lambda parts, axis: Array(np.concatenate([x.values for x in parts], axis)),
    triu=lambda x, k=0: Array(np.triu(x.values, k)),
)
