"""Every op on every backend agrees with the float64 reference on every case, within the derived bound."""

import pytest

from ghostgram import _dispatch
from ghostgram.testing import layouts
from ghostgram.testing.compare import cases_of, error_over_bound

ROOMS = [
    pytest.param(op, backend, case, dtype, id=f"{op}-{backend}-{dtype}-{case.id}")
    for op in _dispatch.OPS
    for backend in _dispatch.BACKENDS
    if backend != "reference"
    for case in cases_of(op).CASES + (cases_of(op).LARGE if backend != "triton" else [])
    for dtype in cases_of(op).DTYPES
    if backend == "cpu" or dtype != "float64"
]


@pytest.mark.parametrize(("op", "backend", "case", "dtype"), ROOMS)
def test_agrees_with_reference(op, backend, case, dtype, available):
    available(op, backend)
    worst = error_over_bound(op, case, dtype, backend, layouts.array_for(backend))
    assert max(worst.values()) <= 1, worst
