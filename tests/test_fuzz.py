"""Every op agrees with the float64 reference on random cases, its inputs lying in memory in any way a caller's might.

Random cases are those of the op's case file with other sizes, so a new op is tested by its case file alone. `make fuzz`
tries many more, and others every time.
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


def sizes_like(known):
    """A size near the smallest known, or one of those known: tile edges, lengths that are cut."""
    return st.integers(min(known), min(known) + 40) | st.sampled_from(sorted(known))


@st.composite
def cases_like(draw, op):
    """A case of an op with some sizes changed, and whatever else it says left together as it is.

    Where its Case refuses the new sizes, or where they would take too long, it is the case as it was.
    """
    known = cases_of(op).CASES
    case = draw(st.sampled_from(known))
    changes = {}
    for field in dataclasses.fields(case):
        value, values = getattr(case, field.name), [getattr(other, field.name) for other in known]
        if type(value) is int and draw(st.booleans()):
            changes[field.name] = draw(sizes_like({x for x in values if type(x) is int}))
        elif isinstance(value, tuple) and all(type(x) is int for x in value) and draw(st.booleans()):
            parts = {x for other in values if other for x in other}
            changes[field.name] = tuple(draw(sizes_like(parts)) for _ in value)
    try:
        changed = dataclasses.replace(case, **changes)
    except ValueError:
        return case
    return changed if changed.flops <= MOST_FLOPS and changed.bytes("float32") <= MOST_BYTES else case


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
    """The same values lying as a kernel cannot read them, made readable as a front door does it, and read-only."""
    if isinstance(x, list):
        return [through_a_front_door(each, how) for each in x]
    if getattr(x, "ndim", 0) == 0:
        return x
    repeat = x.repeat_interleave if _arrays.is_torch(x) else x.repeat
    if how == "inner stride 2":
        x = repeat(2, -1)[..., ::2]
    elif how == "a byte off" and not _arrays.is_torch(x):
        off = np.empty(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
        off[...] = x
        x = off
    readable = _arrays.unit_inner_stride(x)
    if not _arrays.is_torch(x):
        assert readable.flags.aligned
        readable.flags.writeable = False
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

    try:
        values = cases.inputs(case, dtype, data.draw(st.integers(0, 99), label="seed"))
    except (IndexError, ValueError):  # no such values exist, as class numbers where there is no class
        assume(False)
    expected = cases.run(case, cases.arrays(case, values, layouts.numpy_array, "float64"), "reference")
    made = cases.arrays(case, values, make, dtype)
    for name in list(made)[: _dispatch.OPS[op].inputs]:  # what follows the inputs is written to
        lies = data.draw(st.sampled_from(("readable", "readable", "inner stride 2", "a byte off")))
        made[name] = through_a_front_door(made[name], lies)
    worst = compare(cases.run(case, made, "cpu"), expected, cases.scales(case, values), cases.bound(case, dtype))
    assert max(worst.values()) <= 1, (case, worst)


@pytest.mark.parametrize("op", _dispatch.OPS)
@settings(max_examples=150, derandomize=True, deadline=None)
@given(data=st.data())
def test_agrees_with_reference(op, data):
    agrees(op, data)


@pytest.mark.long
@pytest.mark.parametrize("op", _dispatch.OPS)
@settings(max_examples=3000, deadline=None)
@given(data=st.data())
def test_agrees_with_reference_at_length(op, data):
    agrees(op, data)


WITHOUT_SHRINKING = f"""
from hypothesis import Phase, settings
settings.register_profile("no shrinking", phases=[Phase.generate])
settings.load_profile("no shrinking")
import sys, pytest
sys.exit(pytest.main(["-p", "stand_in", {__file__!r}, "-k", "with_reference and grad_stats"]))
"""


def test_a_kernel_that_ignores_strides_is_noticed(builder):
    edit = ("from += t * step_tokens * token;", "from += t * step_tokens * s.d;")
    library = builder.extension(edits={"core/gradient_tiles.h": edit})
    env = os.environ | {"GHOSTGRAM_EXTENSION": str(library), "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", WITHOUT_SHRINKING], env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert "1 failed" in done.stdout
