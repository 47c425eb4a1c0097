"""Every primitive from NumPy and from JAX where torch cannot be imported, and the same numbers from both."""

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys


class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(name)


sys.meta_path.insert(0, NoTorch())
sys.path.insert(0, sys.argv[1])

import jax
import jax.numpy as jnp
import numpy as np

import ghostgram as gg
from doors import EVERY, arrays, results

called = set()
primitives = sorted(name for name in gg.__all__ if name[0].islower() and name not in gg._METHODS)
for name in primitives:
    front = getattr(gg, name)
    setattr(gg, name, lambda *args, name=name, front=front, **options: called.add(name) or front(*args, **options))

v, w = arrays(), arrays(jnp.asarray)
for door, call in EVERY.items():
    expected = results(call(v))
    for run in (call, jax.jit(call)):
        for x, y in zip(results(run(w)), expected, strict=True):
            assert isinstance(x, jax.Array) and np.array_equal(x, y), door
assert sorted(called) == primitives, called

stream = gg.GumbelTopK(3, seed=1)
jax_stream = gg.GumbelTopK(3, seed=1)
for i in range(0, 15, 5):
    scores, ids = v["mean"].ravel()[i : i + 5], v["unique"].ravel()[i : i + 5]
    stream.update(scores, ids)
    jax_stream.update(jnp.asarray(scores), jnp.asarray(ids))
for x, y in zip(jax_stream.result(), stream.result(), strict=True):
    assert isinstance(x, jax.Array) and np.array_equal(x, y.astype(x.dtype))
assert "torch" not in sys.modules
"""


def test_every_primitive_without_torch():
    tests = str(Path(__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", PROGRAM, tests], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
