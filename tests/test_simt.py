"""The CPU shim for CUDA sources notices what it promises to (tests/simt/simt.h), and its primitives are right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from extension import SIMT
from simt.card import Card, Settings

FAULTS = {
    1: "deadlock",
    2: "different instructions",
    3: "misaligned source",
    4: "outside of shared memory",
    5: "memory fault",
    6: "memory fault",
    7: "misaligned vector",
    8: "a shuffle from a lane that is not there",
    9: "a read past the caches of shared memory",
    12: "the same instruction in different places",
}
OTHER_STREAM, TOO_MUCH_SHARED = 10, 11


@pytest.fixture(scope="module")
def library(builder) -> Path:
    return builder.simt_library(SIMT / "faults_simt.cpp")


def launch(library: Path, which: int, seed: int = 1) -> tuple[np.ndarray, str]:
    """64 numbers, 0 to 63, after a kernel of two warps; and what was wrong with it."""
    with Card(library, Settings(seed, 100, at_end=True)) as card:
        data = card.empty((64,), "float32")
        data[:] = torch.arange(64)
        card.call("simt_fault", which, data)
        return data.numpy().copy(), card.error


def test_right_kernel_runs(library):
    for seed in range(5):
        data, error = launch(library, 0, seed)
        assert error == ""
        np.testing.assert_array_equal(data, np.roll(np.arange(64.0), -1).reshape(2, 32).sum(1).repeat(32))


@pytest.mark.parametrize("which", FAULTS)
def test_fault_fails_the_launch(library, which):
    assert FAULTS[which] in launch(library, which)[1]
    assert launch(library, 0)[1] == ""


def test_launches_no_card_accepts(library):
    assert "another stream" in launch(library, OTHER_STREAM)[1]
    assert "more shared memory" in launch(library, TOO_MUCH_SHARED)[1]


PRIMITIVES = {
    "shuffle_down": lambda x: np.concatenate([x[:, 5:], x[:, -5:]], 1),
    "shuffle_xor": lambda x: x[:, np.arange(32) ^ 9],
    "broadcast": lambda x: x[:, (np.arange(32) * 7) % 32],
    "vote": lambda x: np.broadcast_to(((x % 3 == 0)[:, :20] @ 2.0 ** np.arange(20))[:, None], x.shape),
    "max_over_warp": lambda x: np.broadcast_to(x[:, :31].max(1, keepdims=True), x.shape),
    "merge_over_warp": lambda x: np.broadcast_to(x @ 2.0 ** np.bitwise_count(np.arange(32))[:, None], x.shape),
    "atomic_add": lambda x: np.full_like(x, x.sum()),
    "atomic_max": lambda x: np.full_like(x, x.max()),
    "atomic_min": lambda x: np.full_like(x, x.min()),
    "atomic_swap_if": lambda x: np.full_like(x, 1),
    "vectors": lambda x: x.reshape(-1, 4)[:, ::-1].reshape(x.shape),
    "narrow": lambda x: 1 + np.stack([2 * np.round(x[0] / 2) / 256, 2 * np.round(x[1] / 2) / 2048]),
    "dimensions": lambda x: x * 0 + 64 * 1000 + 1,
}


@pytest.mark.parametrize("name", PRIMITIVES)
def test_primitive(library, name):
    numbers = np.arange(64.0).reshape(2, 32)
    for seed in range(3):
        data, error = launch(library, 100 + list(PRIMITIVES).index(name), seed)
        assert error == ""
        np.testing.assert_array_equal(data, PRIMITIVES[name](numbers).ravel())
