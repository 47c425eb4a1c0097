"""Builds a kernel's CUDA source with the host compiler, and lends device buffers with guard pages to tests."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

HERE = Path(__file__).parent
SOURCES = HERE.parent.parent / "csrc"

# Undefined behaviour traps, and the shim turns the trap into a failed launch. No contraction: staged and unstaged reads
# of the same number must give the same bits, whatever the host's instruction set.
FLAGS = [
    *("-std=c++20", "-fPIC", "-g0", "-ffp-contract=off", "-Wno-unknown-pragmas"),
    *("-fsanitize=alignment,bounds,shift,signed-integer-overflow,null", "-fsanitize-undefined-trap-on-error"),
]


def compiler() -> str | None:
    """The host's g++, or what CXX names."""
    return shutil.which(os.environ.get("CXX", "g++"))


def _compile(arguments: Sequence[str], include: Sequence[Path], output: Path) -> Path:
    folders = [f"-I{folder}" for folder in include]
    subprocess.run([compiler() or "g++", *FLAGS, *arguments, *folders, "-o", str(output)], check=True)
    return output


def build_engine(to: Path) -> Path:
    """Compiles simt.cpp, the part that all ops and all their variants share."""
    return _compile(["-O1", "-c", str(HERE / "simt.cpp")], [HERE], to / "simt.o")


def build(op: str, engine: Path, to: Path, sources: Path = SOURCES, optimize: str = "-O1") -> Shim:
    """Compiles <op>_simt.cpp with the sources of csrc (or a changed copy of them)."""
    files = [str(HERE / f"{op}_simt.cpp"), str(engine)]
    return Shim(_compile(["-shared", optimize, *files], [HERE, sources], to / f"lib{op}_simt.so"))


class Shim:
    """A loaded library of simt.cpp and one op."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.simt_configure.argtypes = [ctypes.c_uint64, ctypes.c_int64]
        self.library.simt_allocate.argtypes = [ctypes.c_int64, ctypes.c_bool]
        self.library.simt_allocate.restype = ctypes.c_void_p
        self.library.simt_free.argtypes = [ctypes.c_void_p]
        self.library.simt_free.restype = ctypes.c_bool
        self.library.simt_error.restype = ctypes.c_char_p

    def configure(self, seed: int, shared_per_multiprocessor: int) -> None:
        """Sets the order in which fibers run, and the size of the card's shared memory."""
        self.library.simt_configure(seed, shared_per_multiprocessor)

    @property
    def error(self) -> str:
        """What was wrong with the last launch; empty when nothing was."""
        return bytes(self.library.simt_error()).decode()


class Buffers:
    """Device buffers of one launch, ending (or beginning) at a guard page and poisoned with NaN bits."""

    def __init__(self, shim: Shim, at_end: bool) -> None:
        self.shim, self.at_end = shim, at_end
        self._addresses: list[int] = []

    def __enter__(self) -> Buffers:
        return self

    def __exit__(self, *_: object) -> None:
        untouched = [bool(self.shim.library.simt_free(address)) for address in self._addresses]
        assert all(untouched), "a kernel wrote next to a buffer"

    def empty(self, count: int, dtype: str) -> NDArray[np.generic]:
        """A poisoned vector."""
        bytes_ = count * np.dtype(dtype).itemsize
        address = self.shim.library.simt_allocate(bytes_, self.at_end)
        self._addresses.append(address)
        return np.frombuffer((ctypes.c_char * bytes_).from_address(address), dtype) if bytes_ else np.empty(0, dtype)

    def copy(self, view: NDArray[np.float64], dtype: str) -> tuple[int, Sequence[int]]:
        """The memory that a view spans, gaps included, in another dtype: its address and its strides in elements."""
        if not view.size:
            return 0, [0] * view.ndim
        first, end = np.lib.array_utils.byte_bounds(view)
        span = np.frombuffer((ctypes.c_char * (end - first)).from_address(first), np.float64)
        device = self.empty(span.size, {"bfloat16": "uint16"}.get(dtype, dtype))
        if dtype == "bfloat16":
            device[:] = (span.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        else:
            device[:] = span.astype(dtype)
        return device.ctypes.data, [stride // view.itemsize for stride in view.strides]
