"""core/exp.h is as exact as it says, and gives the same bits on every instruction set that has fused multiply-adds."""

import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from extension import ISA_FLAGS, RUNNABLE

ROOT = Path(__file__).parents[2]


@cache
def printed(folder: Path, isa: str) -> list[str]:
    """What exp_error.cpp prints when it is compiled for an instruction set."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    built = folder / f"exp_error_{isa}"
    options = ["-std=c++20", "-O2", "-w", "-ffp-contract=fast", f"-DGG_ISA={isa}", "-I", ROOT / "csrc", *ISA_FLAGS[isa]]
    subprocess.run([compiler, *options, ROOT / "tests/core/exp_error.cpp", "-o", built], check=True)
    return subprocess.run([built], capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("exp")


@pytest.mark.parametrize("isa", RUNNABLE)
def test_it_is_within_the_error_it_states(folder, isa):
    for line in printed(folder, isa)[:3]:
        worst, stated = map(float, line.split())
        assert 0.4 < worst <= stated, line
    assert printed(folder, isa)[3] == "1 1"


@pytest.mark.skipif("avx512" not in RUNNABLE, reason="exp: this machine has no AVX-512 to compare AVX2 with")
def test_avx2_and_avx512_give_the_same_bits(folder):
    assert printed(folder, "avx2")[-1] == printed(folder, "avx512")[-1]
