"""The thread pool loses no task and has no race, by ThreadSanitizer's word; a race put in on purpose is noticed."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run_stress(folder: Path, pool: str) -> subprocess.CompletedProcess[str]:
    """Builds the pool from this source with ThreadSanitizer, and runs the stress program on it."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    (folder / "parallel.cpp").write_text(pool)
    sources = [folder / "parallel.cpp", ROOT / "tests/core/parallel_stress.cpp"]
    flags = ["-std=c++20", "-O1", "-g", "-fsanitize=thread", "-I", ROOT / "csrc", "-pthread", "-ldl"]
    subprocess.run([compiler, *sources, *flags, "-o", folder / "stress"], check=True)
    return subprocess.run([folder / "stress"], capture_output=True, text=True, timeout=120, check=False)


def test_the_pool_has_no_race(tmp_path):
    result = run_stress(tmp_path, (ROOT / "csrc/core/parallel.cpp").read_text())
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout == "0 mistakes\n"


def test_a_race_is_noticed(tmp_path):
    pool = (ROOT / "csrc/core/parallel.cpp").read_text()
    waits = "working_.load(std::memory_order_acquire) != 0"
    assert pool.count(waits) == 1
    assert run_stress(tmp_path, pool.replace(waits, "false")).returncode != 0  # the caller does not wait for helpers
