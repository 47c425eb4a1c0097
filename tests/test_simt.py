"""The CPU shim for CUDA sources notices what it promises to notice (tests/simt/simt.h)."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest

from simt import shim

pytestmark = pytest.mark.skipif(shim.compiler() is None, reason="no C++ compiler to build the CPU shim with")

FAULTS = {
    1: "deadlock",
    2: "different instructions",
    3: "misaligned source",
    4: "outside of shared memory",
    5: "memory fault",
    6: "memory fault",
}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> shim.Shim:
    folder: Path = tmp_path_factory.mktemp("faults")
    return shim.build("faults", shim.build_engine(folder), folder)


def _launch(library: shim.Shim, which: int, seed: int = 1) -> np.ndarray | None:
    library.configure(seed, 0)
    with shim.Buffers(library, at_end=True) as buffers:
        data = buffers.empty(64, "float32")
        data[:] = np.arange(64)
        failed = library.library.simt_fault(which, ctypes.c_void_p(data.ctypes.data))
        return None if failed else data.copy()


def test_right_kernel_runs(library: shim.Shim) -> None:
    for seed in range(5):
        shifted = np.roll(np.arange(64.0), -1).reshape(2, 32)
        np.testing.assert_array_equal(_launch(library, 0, seed), shifted.sum(1).repeat(32))


@pytest.mark.parametrize("which", FAULTS)
def test_fault_fails_the_launch(library: shim.Shim, which: int) -> None:
    assert _launch(library, which) is None
    assert FAULTS[which] in library.error
    assert _launch(library, 0) is not None
