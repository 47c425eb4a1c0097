"""same_bits.py OPS [--large]: prints every case of which a result depends on how many threads it had, or on whose."""

import os
import sys

if "GHOSTGRAM_EXTENSION" in os.environ:
    import stand_in  # noqa: F401

from ghostgram import _C, _arrays
from ghostgram.testing import layouts
from ghostgram.testing.compare import cases_of


def bits(op, case, dtype, values, threads):
    """Every output's bytes, by name; widened to float64, which keeps different values different."""
    _C.set_num_threads(threads)
    made = cases_of(op).arrays(case, values, layouts.torch_array, dtype)
    return {name: _arrays.to_float64(x).tobytes() for name, x in cases_of(op).run(case, made, "cpu").items()}


ops, *large = sys.argv[1:]
ROOMS = [
    (op, case, dtype)
    for op in ops.split(",")
    for case in cases_of(op).CASES + (cases_of(op).LARGE if large else [])
    for dtype in cases_of(op).DTYPES
]
expected = {}
for whose in ("our pool", "OpenMP"):
    if whose == "OpenMP":  # for good: borrowed threads are never given back
        assert _C.borrow_openmp(), "torch brought no OpenMP runtime"
    for op, case, dtype in ROOMS:
        values = cases_of(op).inputs(case, dtype)
        once = expected.setdefault((op, case, dtype), bits(op, case, dtype, values, 1))
        for threads in (2, 4):
            for name, found in bits(op, case, dtype, values, threads).items():
                if found != once[name]:
                    print(f"{op} {case.id} {dtype}: {name} differs on {threads} threads of {whose}")
