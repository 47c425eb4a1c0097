"""Every front door on CuPy arrays, by protocol alone: a stand-in for CuPy, and the card of tests/simt under it."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

from doors import EVERY, arrays, results
from extension import CUDA_OPS

PROGRAM = """
import stand_in  # the extension first
import stand_in_cupy
import ctypes
import os
import pickle
import sys

import numpy as np

from doors import EVERY, arrays, results

card = ctypes.CDLL(os.environ["GHOSTGRAM_EXTENSION"])
card.simt_configure(ctypes.c_uint64(1), ctypes.c_int64(228 << 10))  # a seed of the schedule, shared memory
for door, expected in pickle.load(sys.stdin.buffer).items():
    stand_in_cupy.asked.clear()
    for x, y in zip(results(EVERY[door](arrays(stand_in_cupy.Array))), expected, strict=True):
        assert isinstance(x, stand_in_cupy.Array), (door, type(x))
        np.testing.assert_allclose(x.values, y, rtol=2e-5, atol=2e-5, err_msg=door)
    assert set(stand_in_cupy.asked) == {stand_in_cupy.STREAM}, door
print("all doors")
"""


def test_every_front_door_takes_arrays_that_speak_dlpack_on_a_card(builder):
    env = os.environ | {
        "GHOSTGRAM_EXTENSION": str(builder.simt_extension(*CUDA_OPS)),
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    expected = {door: results(call(arrays())) for door, call in EVERY.items()}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, input=pickle.dumps(expected), capture_output=True)
    assert (done.returncode, done.stdout) == (0, b"all doors\n"), done.stderr.decode()
