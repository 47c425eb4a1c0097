"""The roofs: measured in the right units, and the percentage taken of the one that binds."""

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from ghostgram.testing import roofline
from ghostgram.testing.roofline import Roofs, percent_of_roof

ROOFS = Roofs(flops=100.0, read=20.0, copy=10.0, triad=15.0)


@pytest.mark.parametrize(
    ("flops", "moved", "percent"),
    [(100, 0, 50), (100, 20, 50), (100, 40, 100), (0, 10, 25)],
    ids=["only flops", "both at the ridge", "memory binds", "only memory"],
)
def test_the_higher_roof_binds(flops, moved, percent):
    assert percent_of_roof(flops, moved, 2.0, ROOFS) == pytest.approx(percent)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_measured_rates_are_per_second(dtype):
    roofs = roofline.measure(0.02, dtype, 8 << 20)
    assert 1e8 < roofs.flops < 1e14
    assert all(1e8 < rate < 1e13 for rate in (roofs.read, roofs.copy, roofs.triad))


@pytest.mark.skipif(platform.machine() != "x86_64" or not shutil.which("g++"), reason="no g++ for x86-64")
def test_the_compiler_keeps_every_chain(tmp_path):
    # A chain that it finds to stand still, or to equal another, is not computed: the roof would read too high.
    sources = Path(__file__).parents[1] / "csrc"
    flags = ["-std=c++20", "-O3", "-w", "-DGG_ISA=baseline", f"-I{sources}", "-S", "-o", tmp_path / "roofs.s"]
    subprocess.run(["g++", *flags, sources / "roofs/roofs_cpu.cpp"], check=True)
    body = re.search(r"^\w*multiply_add_chainsId\w*:\n(.*?)\.size", (tmp_path / "roofs.s").read_text(), re.S | re.M)
    assert body is not None
    assert len(re.findall(r"\bmulpd\b", body[1])) == 10
