"""The keys of gumbel_topk have the same bits on every card: no compiler fuses a product with a sum on their way.

Needs nvcc or triton, no GPU. Run as a script, it prints what Triton makes of the kernel for each machine.
"""

import importlib.util
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from extension import SOURCES
from gpu import MACHINES, spec_of
from gpu.test_machine_code import NVCC

TESTS = Path(__file__).parents[1]
# Of core/log.h, as PTX writes them.
CONSTANTS = {
    "0d" + struct.pack(">d", float(text)).hex().upper()
    for text in re.findall(r"\d\.\d{17,20}e-\d\d", (SOURCES / "core/log.h").read_text())
}


def test_there_are_constants_to_look_for():
    assert len(CONSTANTS) == 9


def complaint(ptx: str) -> str:
    """What is wrong with the arithmetic of some PTX; a division is one correctly rounded instruction there."""
    if unknown := CONSTANTS - set(re.findall(r"0d[0-9A-F]{16}", ptx)):
        return f"constants are missing: {unknown}"
    for operation in ("mul.rn.f64", "div.rn.f64"):
        if operation not in ptx:
            return f"no {operation}"
    return "fma.rn.f64" * ("fma.rn.f64" in ptx)


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_cuda(tmp_path):
    ptx, source = tmp_path / "kernel.ptx", SOURCES / "gumbel_topk/gumbel_topk_cuda.cu"
    flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-arch=compute_80", f"-I{SOURCES}", "-ptx"]
    subprocess.run([str(NVCC), *flags, "-o", ptx, source], check=True)
    # This kernel alone has no bounds, which may be fused.
    kernels = [
        text for text in re.split(r"(?=\.entry )", ptx.read_text()) if "gumbel_topk_sample" in text.split("(")[0]
    ]
    assert len(kernels) == 4
    assert [complaint(text) for text in kernels] == [""] * 4


def main() -> None:
    from ghostgram.triton_kernels import gumbel_topk as kernels
    from gpu.compile_triton import GPUTarget, compile

    for (backend, arch), (lanes, _, _) in MACHINES.items():
        build = spec_of("gumbel_topk").TRITON.builds(backend, arch)[0]
        compiled = compile(build, kernels, GPUTarget(backend, arch, lanes))
        print(json.dumps([str(arch), compiled.asm["ptx" if backend == "cuda" else "amdgcn"]]))


@pytest.fixture(scope="module")
def assembly(tmp_path_factory):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    cache = str(tmp_path_factory.mktemp("triton"))
    env = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache, "PYTHONPATH": str(TESTS)}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(map(json.loads, done.stdout.splitlines()))


@pytest.mark.parametrize(("backend", "arch"), MACHINES)
def test_triton(assembly, backend, arch):
    text = assembly[str(arch)]
    if backend == "cuda":
        assert complaint(text) == ""
        return
    divisions = len(re.findall(r"\bv_div_fixup_f64", text))  # each is five fused steps that round once in the end
    assert divisions > 0
    assert len(re.findall(r"\bv_fmac?_f64", text)) == 5 * divisions


if __name__ == "__main__":
    main()
