"""check_cases.py OPS DTYPES [--large]: runs the stand-in's CPU kernels on the cases of some ops, joined by commas.

Stops at the first case that exceeds an error bound. The last line printed names the case that was running.
"""

import sys

import stand_in  # noqa: F401
from ghostgram.testing import layouts
from ghostgram.testing.compare import cases_of, error_over_bound

ops, dtypes, *large = sys.argv[1:]
for op in ops.split(","):
    cases = cases_of(op)
    for case in cases.CASES + (cases.LARGE if large else []):
        for dtype in [dtype for dtype in dtypes.split(",") if dtype in cases.DTYPES]:
            print(op, case.id, dtype, flush=True)
            make = layouts.torch_array if dtype == "bfloat16" else layouts.numpy_array
            for output, error in error_over_bound(op, case, dtype, "cpu", make).items():
                if not error <= 1:
                    sys.exit(f"{output} is beyond its bound, by a factor of {error:.3g}")
