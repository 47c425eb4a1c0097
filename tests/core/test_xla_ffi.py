"""Calls of XLA on their way to a kernel: nothing is copied, batches, streams and memory of a card, versions."""

import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ghostgram import _xla

ROOT = Path(__file__).parents[2]


def test_the_interface_is_written_down_as_jaxlib_has_it():
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    source = ROOT / "tests/core/xla_ffi/layout.cpp"
    includes = [f"-I{ROOT / 'csrc'}", f"-I{jax.ffi.include_dir()}"]
    subprocess.run(["g++", "-std=c++20", "-fsyntax-only", *includes, source], check=True)


@pytest.mark.parametrize(("xla", "answer"), [(-1, 1), (1, 1), (2, 2), (3, 3), (4, 3)])
def test_the_newest_version_that_both_know(border, xla, answer):
    for module in (border.cpu, border.cuda):
        assert border.version_for(module.probe_xla, xla) == (0, answer)


@pytest.fixture
def probe(border, monkeypatch):
    """probe(x, option) -> where the kernel found x, with how many samples, and the option."""
    monkeypatch.setitem(sys.modules, "ghostgram._C", border)
    _xla._target.cache_clear()

    def compute(x, option):
        out = _xla.Traced((3,), "int64")
        _xla.run("probe", ("cpu",), (x, None, out, option), 2, 1)
        return out

    with jax.enable_x64(True):
        yield lambda x, option=0: _xla.through(compute, (x, option))
    _xla._target.cache_clear()


def test_kernels_read_where_the_caller_has_the_numbers(border, probe):
    """At the very address, for NumPy, for JAX outside jit and inside it; JAX aligns to 64 bytes at least."""
    values, found = np.arange(6, dtype=np.float32).reshape(2, 3), np.empty(3, np.int64)
    border.cpu.probe(values, None, found, 5)
    assert found.tolist() == [values.ctypes.data, 2, 5]
    x = jnp.asarray(values) + 1
    address = x.unsafe_buffer_pointer()
    assert address % 64 == 0
    border.cpu.probe(np.asarray(x), None, found, 5)
    assert found.tolist() == [address, 2, 5]
    assert jax.jit(lambda x: probe(x, 6))(x).tolist() == [address, 2, 6]


def test_a_batch_is_read_in_place_too(probe):
    x = jnp.zeros((4, 2, 3), jnp.float32)
    found = jax.jit(jax.vmap(lambda x: probe(x, 1)))(x)
    assert found.tolist() == [[x.unsafe_buffer_pointer() + 24 * i, 2, 1] for i in range(4)]


def test_what_the_kernel_found_wrong_is_an_error(probe):
    with pytest.raises(jax.errors.JaxRuntimeError, match="option: expected at least 0, got -1"):
        jax.block_until_ready(jax.jit(lambda x: probe(x, -1))(jnp.zeros((2, 3))))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"x: expected a contiguous matrix, got float64 \(2\)"):
        jax.block_until_ready(jax.jit(probe)(jnp.zeros(2)))
    with pytest.raises(jax.errors.JaxRuntimeError, match="got XLA's type 2"):
        jax.block_until_ready(jax.jit(probe)(jnp.zeros((2, 3), jnp.int8)))


def test_a_card_is_given_streams_and_memory_of_xla(border):
    """Results are NaN before the launch: what is wrong only the card knows, and no error can be raised for it."""
    message, found, events = border.call_of_xla(border.cuda.probe_xla, 2, 0, True)
    assert message == ""
    assert [found[1], found[4], found[3] - found[0]] == [2, 2, 24]
    once = ["allocate 102", "launch in 4096 on 7", "free 102"]
    assert events == ["fill 48 on 7", *once, *once]


def test_failures_of_a_card_are_errors_of_xla(border):
    message, found, events = border.call_of_xla(border.cuda.probe_xla, 2, 719, True)
    assert (message, found, events[-1]) == ("probe: it failed", [-1] * 6, "free 102")
    assert border.state()[2] == 0
    assert border.call_of_xla(border.cuda.probe_xla, 1, 0, False)[::2] == ("no memory", ["fill 24 on 7"])
