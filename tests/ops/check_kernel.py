"""check_kernel.py LIBRARY OP: prints the first case on which the module's CPU kernel exceeds an error bound, if any."""

import importlib.util
import os
import sys

import ghostgram._C as extension
from ghostgram.testing import layouts
from ghostgram.testing.compare import cases_of, error_over_bound

library, op = sys.argv[1:]
sys.setdlopenflags(os.RTLD_LAZY)  # kernels of other instruction sets are missing, and never called
spec = importlib.util.spec_from_file_location("mutant", library)
mutant = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mutant)
setattr(extension.cpu, op, getattr(mutant.cpu, op))


def complain(dtype, make):
    for case in cases_of(op).CASES:
        for output, error in error_over_bound(op, case, dtype, "cpu", make).items():
            if not error <= 1:
                sys.exit(f"{case.id} {dtype}: {output} is beyond its bound, by a factor of {error:.3g}")


complain("float32", layouts.numpy_array)
complain("bfloat16", layouts.torch_array)  # after float32, which needs no torch and catches nearly all
