"""Does a backend agree with the reference on a case? One answer for tests, benchmarks and `ghostgram doctor`."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import numpy as np

from ghostgram import _arrays
from ghostgram.testing import layouts


def cases_of(op: str) -> ModuleType:
    """The case file of an op."""
    return importlib.import_module(f"ghostgram.testing.cases.{op}")


def error_over_bound(
    op: str, case: Any, dtype: str, backend: str, make: layouts.Make = layouts.numpy_array, seed: int = 0
) -> dict[str, float]:
    """For every output of the op, its largest error in units of the bound that the case file derives: pass is <= 1.

    NaN where the reference has none, and any element never written, come out as infinity.
    """
    cases = cases_of(op)
    values = cases.inputs(case, dtype, seed)
    exact = cases.arrays(case, values, layouts.numpy_array, "float64")
    expected = cases.run(case, exact, "reference")
    computed = cases.run(case, cases.arrays(case, values, make, dtype), backend)
    return compare(computed, expected, cases.scales(case, values), cases.bound(case, dtype))


def compare(
    computed: dict[str, Any],
    expected: dict[str, Any],
    scales: dict[str, layouts.F64],
    bound: float | dict[str, float],
) -> dict[str, float]:
    """The largest |computed - expected| / (bound * scale) of each output; the bound may differ by output."""
    worst = {}
    bounds = bound if isinstance(bound, dict) else dict.fromkeys(expected, bound)
    for name, truth in expected.items():
        error = np.abs(_arrays.to_float64(computed[name]) - _arrays.to_float64(truth))
        allowed = np.broadcast_to(bounds[name] * scales[name], error.shape)
        ratio = np.divide(error, allowed, out=np.where(error == 0, 0.0, np.inf), where=allowed > 0)
        worst[name] = float(np.nan_to_num(ratio, nan=np.inf).max(initial=0.0))
    return worst
