"""What nvcc makes of every CUDA kernel: no spills, no local memory, the instructions it is said to use.

Needs nvcc and its binutils, no GPU. `pytest -s tests/gpu/test_machine_code.py` prints the table of docs/gpu.md.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from extension import CUDA_OPS, SOURCES
from gpu import Kernel, spec_of

ARCHITECTURES = (80, 90, 100, 120)
# Of a multiprocessor: registers, threads, and KiB of shared memory, of which each block loses one.
REGISTERS, THREADS, SHARED_KIB = (
    65536,
    {80: 2048, 90: 2048, 100: 2048, 120: 1536},
    {80: 164, 90: 228, 100: 228, 120: 100},
)
MOST_SHARED_KIB = {80: 163, 90: 227, 100: 227, 120: 99}
"""That one block may have."""


def _tool(name: str) -> str | None:
    """A CUDA binary on PATH, or where its PyPI package puts it."""
    if found := shutil.which(name):
        return found
    try:
        files = importlib.metadata.files(f"nvidia-cuda-{name}") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((str(f.locate()) for f in files if f.name == name), None)


NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc")
TOOLS = {
    "nvcc": NVCC, "cuobjdump": _tool("cuobjdump"), "nvdisasm": _tool("nvdisasm"), "c++filt": shutil.which("c++filt"),
}  # fmt: skip
MISSING = [name for name, path in TOOLS.items() if not path]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}")


@dataclass
class Code:
    """One kernel in one cubin."""

    name: str
    """Demangled, with its template and function parameters."""
    registers: int
    stack: int
    local: int
    instructions: Counter[str]

    @property
    def title(self) -> str:
        """The name without its parameters and namespaces."""
        return re.sub(r"\(anonymous namespace\)::|gg::|^void ", "", self.name).partition("(")[0]

    def blocks(self, kernel: Kernel, shared: int, architecture: int) -> int:
        """How many blocks a multiprocessor holds."""
        by_registers = REGISTERS // (-(-self.registers // 8) * 8 * kernel.threads)
        by_shared = (SHARED_KIB[architecture] << 10) // (shared + 1024)
        return min(by_registers, by_shared, THREADS[architecture] // kernel.threads, 32)


def _compile(op: str, architecture: int, folder: Path) -> list[Code]:
    cubin = folder / f"{op}_{architecture}.cubin"
    flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", f"-arch=sm_{architecture}", f"-I{SOURCES}", "-cubin"]
    subprocess.run([str(NVCC), *flags, "-o", cubin, SOURCES / op / f"{op}_cuda.cu"], check=True)
    path = os.pathsep.join([str(Path(str(TOOLS["nvdisasm"])).parent), os.environ["PATH"]])  # cuobjdump calls nvdisasm
    command = [str(TOOLS["cuobjdump"]), "--dump-resource-usage", "--dump-sass", cubin]
    dump = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | {"PATH": path}).stdout
    usages = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) \S+ LOCAL:(\d+)", dump)
    mangled = "\n".join(name for name, *_ in usages)
    names = subprocess.run([str(TOOLS["c++filt"])], input=mangled, check=True, capture_output=True, text=True).stdout
    codes = {
        usage[0]: Code(name, *map(int, usage[1:]), Counter())
        for usage, name in zip(usages, names.splitlines(), strict=True)
    }
    for section in re.split(r"\bFunction : ", dump)[1:]:
        name, _, body = section.partition("\n")
        mnemonics = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9._]*)", body, re.MULTILINE)
        codes[name.strip()].instructions.update(mnemonics)
    return list(codes.values())


@pytest.fixture(scope="module")
def compiled(request, tmp_path_factory) -> Iterator[dict[tuple[str, int], Future[list[Code]]]]:
    """All that this session asks for, two compilers at a time."""
    folder = tmp_path_factory.mktemp("cubin")
    wanted = [item.callspec.params for item in request.session.items if item.path == request.path]
    with ThreadPoolExecutor(2) as pool:
        yield {(p["op"], p["architecture"]): pool.submit(_compile, p["op"], p["architecture"], folder) for p in wanted}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("op", CUDA_OPS)
def test_registers_and_instructions(compiled, op, architecture):
    codes, kernels = compiled[op, architecture].result(), spec_of(op).CUDA.kernels
    found: Counter[str] = Counter()
    for code in sorted(codes, key=lambda code: code.name):
        matching = [kernel for kernel in kernels if re.search(kernel.name, code.name)]
        assert len(matching) == 1, f"{len(matching)} descriptions of {code.name}"
        kernel = matching[0]
        found[kernel.name] += 1
        fitting = [n for n in kernel.shared if n <= MOST_SHARED_KIB[architecture] << 10]
        blocks = ", ".join(f"{code.blocks(kernel, n, architecture)} ({n / 1024:.3g} KiB)" for n in fitting)
        print(f"| {code.title} | sm_{architecture} | {kernel.threads} | {code.registers} | {blocks} |")
        assert (code.stack, code.local) == (0, 0), f"{code.title} uses the stack or local memory"
        assert not any(name.startswith(("LDL", "STL")) for name in code.instructions), f"{code.title} spills"
        assert code.blocks(kernel, fitting[0], architecture) >= 1, f"{code.title} fits no multiprocessor"
        for instruction in kernel.instructions:
            used = any(name.startswith(instruction) for name in code.instructions)
            assert used, f"{code.title} has no {instruction} among {sorted(code.instructions)}"
    assert found == {kernel.name: kernel.count for kernel in kernels}
