"""What nvcc makes of grad_stats_cuda.cu: no spills, tensor cores, wide copies. Needs nvcc and its binutils, no GPU.

`pytest -s` prints the table of docs/gpu.md.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
ARCHITECTURES = (80, 90, 100, 120)
KERNEL = re.compile(r"grad_stats_tileI(f|NS_3f16E|NS_4bf16E)(f|S\d_)NS_9TileShapeILi(\d+)E")
DTYPES = {"f": "float32", "NS_4bf16E": "bfloat16", "NS_3f16E": "float16"}
PRODUCTS = {"float32": "HMMA.1688.F32.TF32", "bfloat16": "HMMA.16816.F32.BF16", "float16": "HMMA.16816.F32"}

# Per multiprocessor: registers, and KiB of shared memory of which each block loses one.
REGISTERS, SHARED_KIB = 65536, {80: 164, 90: 228, 100: 228, 120: 100}
# By the kernel's tile: threads of a block, KiB of its pipeline, and of one float32 direction staged beside it.
TILES = {64: (128, 36, 18), 128: (256, 68, 68)}


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
CUOBJDUMP, NVDISASM = _tool("cuobjdump"), _tool("nvdisasm")
MISSING = [name for name, path in {"nvcc": NVCC, "cuobjdump": CUOBJDUMP, "nvdisasm": NVDISASM}.items() if not path]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}")


@dataclass
class Kernel:
    """One instantiation of the tile kernel in one cubin."""

    dtype: str
    directions: str
    tile: int
    registers: int
    stack: int
    local: int
    instructions: Counter[str]


def _compile(architecture: int, folder: Path) -> dict[str, Kernel]:
    cubin = folder / f"sm_{architecture}.cubin"
    flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", f"-arch=sm_{architecture}", f"-I{CSRC}", "-cubin"]
    source = CSRC / "grad_stats" / "grad_stats_cuda.cu"
    subprocess.run([str(NVCC), *flags, "-o", str(cubin), str(source)], check=True)
    path = os.pathsep.join([str(Path(str(NVDISASM)).parent), os.environ["PATH"]])  # cuobjdump calls nvdisasm
    dump = subprocess.run(
        [str(CUOBJDUMP), "--dump-resource-usage", "--dump-sass", str(cubin)],
        check=True, capture_output=True, text=True, env=os.environ | {"PATH": path},
    ).stdout  # fmt: skip
    kernels: dict[str, Kernel] = {}
    for name, registers, stack, local in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) \S+ LOCAL:(\d+)", dump):
        if match := KERNEL.search(name):
            dtype = DTYPES[match[1]]
            directions = "float32" if match[2] == "f" else dtype
            usage = (int(registers), int(stack), int(local))
            kernels[name] = Kernel(dtype, directions, int(match[3]), *usage, Counter())
    for section in re.split(r"\bFunction : ", dump)[1:]:
        name, _, body = section.partition("\n")
        if name.strip() in kernels:
            mnemonics = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9._]*)", body, re.MULTILINE)
            kernels[name.strip()].instructions.update(mnemonics)
    return kernels


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Kernel]]:
    folder = tmp_path_factory.mktemp("cubin")
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda architecture: list(_compile(architecture, folder).values()), ARCHITECTURES)
        return dict(zip(ARCHITECTURES, results, strict=True))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_registers_and_instructions(compiled: dict[int, list[Kernel]], architecture: int) -> None:
    kernels = compiled[architecture]
    print("\n| card | inputs | D | tile | registers | blocks by registers | by shared memory, K = 0 | K = 1 |")
    for k in sorted(kernels, key=lambda k: (k.dtype, k.tile, k.directions)):
        threads, pipeline, direction = TILES[k.tile]
        direction = direction if k.directions == "float32" else direction // 2
        shared = [SHARED_KIB[architecture] // (kib + 1) for kib in (pipeline, pipeline + direction)]
        print(
            f"| sm_{architecture} | {k.dtype} | {k.directions} | {k.tile} x {k.tile} | {k.registers} "
            f"| {REGISTERS // (-(-k.registers // 8) * 8 * threads)} | {shared[0]} | {shared[1]} |"
        )
        assert k.registers <= 255
        assert (k.stack, k.local) == (0, 0)
        assert not any(name.startswith(("LDL", "STL")) for name in k.instructions), "local memory is used"
        assert k.instructions[PRODUCTS[k.dtype]] > 0
        assert any(name.startswith("LDGSTS.E.BYPASS.128") for name in k.instructions)
        if k.dtype != "float32":
            assert k.instructions["LDSM.16.MT88.4"] > 0
    assert len(kernels) == 9, "2 half dtypes x 2 tiles x 2 dtypes of D, and float32's one"
