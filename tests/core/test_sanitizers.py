"""Every CPU kernel runs its cases without a fault that a sanitizer sees, and faults put in on purpose are noticed.

AddressSanitizer sees what is read or written beyond an array or, because core/workspace.h poisons the rest, beyond the
scratch asked for; UndefinedBehaviorSanitizer overflows and misaligned accesses; ThreadSanitizer races of whole kernels
on four threads of the pool. Left out of the ordinary run, and in that of `make sanitize`: instruction sets below the
machine's best, large cases, the bindings, and the random cases of test_fuzz.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from extension import RUNNABLE
from ghostgram import _dispatch

TESTS = Path(__file__).parents[1]
FLAGS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}
RUNTIMES = {"address": ["libasan.so", "libubsan.so", "libstdc++.so.6"], "thread": ["libtsan.so", "libstdc++.so.6"]}
# Python frees nothing at its end, and its own allocator would hide overruns. The pool alone works on several threads:
# OpenMP runtimes, which are not instrumented, look like races.
SETTINGS = {
    "ASAN_OPTIONS": "detect_leaks=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
    "PYTHONMALLOC": "malloc",
    "GHOSTGRAM_NUM_THREADS": "4",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONPATH": str(TESTS),
}
EVERY_DTYPE = "float32,float64,float16,bfloat16"
TILES = "core/gradient_tiles.h"

# What is noticed -> (sanitizer, op, edit of its kernel or of a header that it names third, words of the report).
FAULTS = {
    "a read past an input's end": (
        "address", "grad_stats",
        ("from += t * step_tokens * token;", "from += t * step_tokens * token + 1;", TILES),
        "READ of size",
    ),
    "a write past the scratch asked for": (
        "address", "embedding_stats",
        ("row_space.get<Acc>(cols_per_cut)", "row_space.get<Acc>(most(1, cols_per_cut) - 1)"),
        "WRITE of size",
    ),
    "scratch read before it is written": (
        "address", "affine_stats",
        ("std::memset(total(g, 0), 0, sizeof(Acc) * 2 * s.features);", ""),
        "beyond its bound",
    ),
    "a signed overflow": (
        "address", "embedding_stats",
        ("static_cast<uint64_t>(id) * 0x9E3779B97F4A7C15u", "static_cast<uint64_t>(id * 0x1E3779B97F4A7C15)"),
        "signed integer overflow",
    ),
    "a misaligned vector": (
        "address", "affine_stats",
        ("sum[0] += load(x + c) * load(y + c);", "sum[0] += load(x + c) * *reinterpret_cast<const vec<Acc> *>(y + c);"),
        "misaligned address",
    ),
    "a race of two tasks": (
        "thread", "grad_stats",
        ("static thread_local Workspace tile_space;", "static Workspace tile_space;", TILES),
        "data race",
    ),
}  # fmt: skip


def environment(sanitizer: str, library: Path, **more: str) -> dict[str, str]:
    """What a Python needs to run with an instrumented extension in the place of the installed one."""
    found = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in RUNTIMES[sanitizer]
    ]
    if missing := [name for name in found if not os.path.isabs(name)]:
        pytest.skip(f"g++ has no {', '.join(missing)}")
    return os.environ | SETTINGS | {"LD_PRELOAD": " ".join(found), "GHOSTGRAM_EXTENSION": str(library)} | more


def check_cases(env: dict[str, str], ops: str, dtypes: str, *large: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, TESTS / "check_cases.py", ops, dtypes, *large]
    return subprocess.run(command, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("sanitizer", FLAGS)
def test_kernels_are_clean(sanitizer, builder):
    env = environment(sanitizer, builder.extension(instrument=FLAGS[sanitizer]))
    done = check_cases(env, ",".join(_dispatch.OPS), EVERY_DTYPE)
    assert done.returncode == 0, done.stdout[-200:] + done.stderr[:6000]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed(fault, builder):
    sanitizer, op, edit, report = FAULTS[fault]
    source, *_ = [*edit[2:], op]
    env = environment(sanitizer, builder.extension(edits={source: edit[:2]}, instrument=FLAGS[sanitizer]))
    done = check_cases(env, op, "float32")
    assert done.returncode != 0
    assert report in done.stderr


@pytest.mark.long
@pytest.mark.parametrize("isa", RUNNABLE)
@pytest.mark.parametrize("sanitizer", FLAGS)
def test_everything_is_clean(sanitizer, isa, builder):
    library = builder.extension(isas=RUNNABLE, instrument=FLAGS[sanitizer], instrument_bindings=True)
    env = environment(sanitizer, library, GHOSTGRAM_ISA=isa)
    done = check_cases(env, ",".join(_dispatch.OPS), EVERY_DTYPE, "--large")
    assert done.returncode == 0, done.stdout[-200:] + done.stderr[:6000]
    random = [sys.executable, "-m", "pytest", "-p", "stand_in", "-s", TESTS / "test_fuzz.py", "-k", "with_reference"]
    done = subprocess.run(random, env=env, capture_output=True, text=True, cwd=TESTS.parent)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
