"""Every front door on CuPy arrays, by protocol alone: a stand-in for CuPy, and the card of tests/simt under it."""

import os
import subprocess
import sys
from pathlib import Path

from extension import CUDA_OPS

PROGRAM = """
import stand_in  # the extension first
import stand_in_cupy
import numpy as np

from doors import EVERY, arrays, results

for door, call in EVERY.items():
    expected = results(call(arrays(dtype=np.float64))) if door != "gumbel_topk" else results(call(arrays()))
    stand_in_cupy.asked.clear()
    for x, y in zip(results(call(arrays(stand_in_cupy.Array))), expected, strict=True):
        assert isinstance(x, stand_in_cupy.Array), (door, type(x))
        np.testing.assert_allclose(x.values, y, rtol=2e-5, atol=2e-5, err_msg=door)
    assert set(stand_in_cupy.asked) == {stand_in_cupy.STREAM}, door
print("all doors")
"""


def test_every_front_door_takes_arrays_that_speak_dlpack_on_a_card(builder):
    tests = Path(__file__).parents[1]
    env = os.environ | {"GHOSTGRAM_EXTENSION": str(builder.simt_extension(*CUDA_OPS)), "PYTHONPATH": str(tests)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "all doors\n"), done.stderr
