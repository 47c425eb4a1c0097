"""Every op agrees with the float64 reference on random cases, its inputs lying in memory in any way a caller's might.

Random cases are made of the sizes and the choices that the op's case file knows, so a new op is tested by its case file
alone. `make fuzz` tries many more, and others every time.
"""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ghostgram import _arrays, _dispatch
from ghostgram.testing import layouts
from ghostgram.testing.compare import cases_of, compare

MOST_FLOPS = 1e7
MOST_BYTES = 4e6


def values_like(known):
    """Values for one field of a case: any small size where sizes are known, otherwise one of those known."""
    if all(isinstance(x, tuple) or x is None for x in known) and any(known):
        sizes = st.tuples(*(values_like([x[i] for x in known if x]) for i in range(len(next(filter(None, known))))))
        return st.none() | sizes if None in known else sizes
    if all(type(x) is int for x in known) and min(known) >= 0:
        return st.integers(0, 40) | st.sampled_from(sorted(known))
    return st.sampled_from(sorted(known, key=repr))


@st.composite
def cases_like(draw, op):
    """A case of an op; combinations that its Case refuses with a ValueError, and slow ones, are left out."""
    known = cases_of(op).CASES
    names = [field.name for field in dataclasses.fields(known[0])]
    drawn = {name: draw(values_like({getattr(case, name) for case in known})) for name in names}
    try:
        case = type(known[0])(**drawn)
    except ValueError:
        assume(False)
    assume(case.flops <= MOST_FLOPS and case.bytes("float32") <= MOST_BYTES)
    return case


def placements(axes, may_reverse):
    """Any order of axes in memory, the last one innermost; gaps, and for NumPy negative strides, in all the others."""
    signs = st.sampled_from((1, -1) if may_reverse else (1,))
    outer = st.lists(st.builds(int.__mul__, signs, st.integers(1, 3)), min_size=axes - 1, max_size=axes - 1)
    return st.builds(
        lambda order, steps, offset: layouts.Placement((*order, axes - 1), (*steps, 1), offset),
        st.permutations(range(axes - 1)),
        outer,
        st.integers(0, 5),
    )


def through_a_front_door(x, how):
    """The same values lying as a kernel cannot read them, made readable as a front door does it."""
    if how == "inner stride 2":
        repeat = x.repeat_interleave if _arrays.is_torch(x) else x.repeat
        x = repeat(2, -1)[..., ::2]
    elif how == "a byte off":
        off = np.empty(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
        off[...] = x
        x = off
    readable = _arrays.unit_inner_stride(x)
    assert _arrays.is_torch(x) or readable.flags.aligned
    return readable


def agrees(op, data):
    cases = cases_of(op)
    case = data.draw(cases_like(op))
    dtype = data.draw(st.sampled_from(cases.DTYPES))
    numpy = dtype != "bfloat16" and data.draw(st.booleans(), label="numpy")
    make_laid_out = layouts.numpy_array if numpy else layouts.torch_array

    def make(values, dtype, layout):
        if layout == "contiguous" and values.ndim:
            layout = data.draw(placements(values.ndim, may_reverse=numpy))
        return make_laid_out(values, dtype, layout)

    values = cases.inputs(case, dtype, data.draw(st.integers(0, 99), label="seed"))
    expected = cases.run(case, cases.arrays(case, values, layouts.numpy_array, "float64"), "reference")
    made = cases.arrays(case, values, make, dtype)
    for name in list(made)[: _dispatch.OPS[op].inputs]:  # what follows the inputs is written to
        if made[name] is not None and made[name].ndim:
            lies = ("readable", "readable", "inner stride 2") + (("a byte off",) if numpy else ())
            made[name] = through_a_front_door(made[name], data.draw(st.sampled_from(lies)))
            if numpy:
                made[name].flags.writeable = False
    worst = compare(cases.run(case, made, "cpu"), expected, cases.scales(case, values), cases.bound(case, dtype))
    assert max(worst.values()) <= 1, (case, worst)


@pytest.mark.parametrize("op", _dispatch.OPS)
@settings(max_examples=40, derandomize=True, deadline=None)
@given(data=st.data())
def test_agrees_with_reference(op, data):
    agrees(op, data)


@pytest.mark.long
@pytest.mark.parametrize("op", _dispatch.OPS)
@settings(max_examples=3000, deadline=None)
@given(data=st.data())
def test_agrees_with_reference_at_length(op, data):
    agrees(op, data)


def test_a_kernel_that_ignores_strides_is_noticed(builder):
    library = builder.extension(edits={"grad_stats": ("from + t * s.a_token + col", "from + t * s.d + col")})
    env = os.environ | {"GHOSTGRAM_EXTENSION": str(library), "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-m", "pytest", "-p", "stand_in", __file__, "-k", "reference and grad_stats"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert "1 failed" in done.stdout
