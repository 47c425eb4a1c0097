"""Every op gives the same bits on 1, 2 and 4 threads, of our pool and of torch's OpenMP; a dependence is noticed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ghostgram import _dispatch

HERE = Path(__file__).parent


def differences(library: Path, ops: str, *large: str) -> str:
    """In a process of its own: OpenMP threads, once borrowed, are never given back.

    By a build that shares all work: the installed one leaves small work, and so most cases, to the calling thread.
    """
    env = {"GHOSTGRAM_EXTENSION": str(library), "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, HERE / "same_bits.py", ops, *large]
    return subprocess.run(command, env=os.environ | env, capture_output=True, text=True, check=True).stdout


def test_same_bits_for_any_number_of_threads(builder):
    assert differences(builder.extension(), ",".join(_dispatch.OPS)) == ""


@pytest.mark.long
def test_same_bits_of_large_cases(builder):
    assert differences(builder.extension(), ",".join(_dispatch.OPS), "--large") == ""


def test_a_dependence_on_threads_is_noticed(builder):
    cuts = ("ceil_div(wanted_tasks, most(1, groups_per_wave))", "ceil_div(4 * num_threads(), most(1, groups_per_wave))")
    library = builder.extension(edits={"core/gradient_tiles.h": cuts})
    found = differences(library, "grad_stats")
    for threads in ("on 2 threads of our pool", "on 4 threads of OpenMP"):
        assert threads in found
