"""Philox gives its published vectors and the logarithm is within its bound, whatever the instruction set."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from extension import ISA_FLAGS, RUNNABLE
from ghostgram.reference.gumbel_topk import philox4x32_10

ROOT = Path(__file__).parents[2]
# Random123's kat_vectors: counter and key, then the words.
KNOWN = {
    "00000000 00000000 00000000 00000000 00000000 00000000": "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    "ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff": "408f276d 41c83b0e a20bc7c6 6d5451fd",
    "243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0": "d16cfe09 94fdcceb 5001e420 24126ea1",
}


def words(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize("isa", RUNNABLE)
def test_kernels_noise(isa, tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    program = tmp_path / "noise"
    flags = ["-std=c++20", "-O2", "-ffp-contract=fast", f"-DGG_ISA={isa}", *ISA_FLAGS[isa], "-I", ROOT / "csrc"]
    subprocess.run(["g++", *flags, ROOT / "tests/core/noise.cpp", "-o", program], check=True)
    printed = subprocess.run([program], input="\n".join(KNOWN), capture_output=True, text=True, check=True).stdout
    *found, worst = printed.splitlines()
    assert [words(line) for line in found] == [words(text) for text in KNOWN.values()]
    assert 0.5 <= float(worst) < 1


@pytest.mark.parametrize("given", KNOWN)
def test_reference_noise(given):
    *counter, key0, key1 = words(given)
    lanes = tuple(np.array([word], np.uint64) for word in counter)
    assert [int(word[0]) for word in philox4x32_10(lanes, key1 << 32 | key0)] == words(KNOWN[given])
