"""The card of simt.h: memory between guard pages as torch tensors, and settings that must not change a result."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from ghostgram.testing import layouts

ALLOCATOR = 16
"""Bytes to which allocators align at least; what a caller passes in may lie at any element."""


@dataclass(frozen=True)
class Settings:
    """What differs between cards, or between two runs on one."""

    seed: int
    """Of the order in which threads and blocks run."""
    shared_kib: int
    """Shared memory of a multiprocessor."""
    at_end: bool
    """Whether buffers end at a guard page, and so begin at any element; or else begin at one, well aligned."""


class Card:
    """A card for one `with` block: what it allocates is freed at the end, and a write beside a buffer is an error."""

    def __init__(self, library: Path, settings: Settings) -> None:
        self._library, self._settings = ctypes.CDLL(str(library)), settings
        self._library.simt_configure.argtypes = [ctypes.c_uint64, ctypes.c_int64]
        self._library.simt_allocate.argtypes = [ctypes.c_int64, ctypes.c_bool, ctypes.c_int64]
        self._library.simt_allocate.restype = ctypes.c_void_p
        self._library.simt_free.argtypes = [ctypes.c_void_p]
        self._library.simt_free.restype = ctypes.c_bool
        self._library.simt_error.restype = ctypes.c_char_p
        self._addresses: list[int] = []

    def __enter__(self) -> Card:
        self._library.simt_configure(self._settings.seed, self._settings.shared_kib << 10)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, traceback: TracebackType | None) -> None:
        untouched = [self._library.simt_free(address) for address in self._addresses]
        self._addresses.clear()
        if kind is None and not all(untouched):
            raise AssertionError("a write beside a buffer")

    def empty(self, shape: tuple[int, ...], dtype: str, alignment: int = ALLOCATOR) -> torch.Tensor:
        """Poisoned memory, all bits one: NaN in every floating format, -1 in every integer one."""
        kind, count = getattr(torch, dtype), int(np.prod(shape, dtype=np.int64))
        if count == 0:
            return torch.empty(shape, dtype=kind)
        size = count * kind.itemsize
        address = self._library.simt_allocate(size, self._settings.at_end, alignment)
        self._addresses.append(address)
        return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=kind).view(shape)

    def array(self, values: np.ndarray, dtype: str, layout: layouts.Layout) -> torch.Tensor:
        """A `layouts.Make`: the memory that the values span in their layout, gaps included, and nothing around it."""
        laid = layouts.lay_out(values, layout)
        if not laid.size:
            return torch.empty(laid.shape, dtype=getattr(torch, dtype))
        first, end = np.lib.array_utils.byte_bounds(laid)
        span = np.frombuffer((ctypes.c_char * (end - first)).from_address(first), laid.dtype)
        own = self.empty((span.size,), dtype, getattr(torch, dtype).itemsize)
        own.copy_(torch.from_numpy(span.copy()))
        offset = (laid.__array_interface__["data"][0] - first) // laid.itemsize
        return own.as_strided(laid.shape, [stride // laid.itemsize for stride in laid.strides], offset)

    def call(self, name: str, *args: Any) -> int:
        """Calls a C function of the library, tensors as the addresses of their memory."""
        function: Callable[..., int] = getattr(self._library, name)
        return function(*(ctypes.c_void_p(x.data_ptr()) if isinstance(x, torch.Tensor) else x for x in args))

    @property
    def error(self) -> str:
        """What was wrong with the last launch; empty when nothing was."""
        return bytes(self._library.simt_error()).decode()
