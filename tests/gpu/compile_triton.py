"""compile_triton.py OP FOLDER: compiles an op's Triton kernels for machines that need not be here.

A process of its own, because one that runs Triton's interpreter cannot compile. Prints a line of JSON for each build:
machine, the build's name, what the table says of it, and what came out.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gpu import MACHINES, Build, spec_of


def compile(build: Build, module: Any, target: GPUTarget) -> Any:
    """Compiles as the launcher would."""
    kernel = getattr(module, build.kernel)
    names = kernel.arg_names
    kinds = {n: "constexpr" if n in build.constants else build.signature.get(n, "i32") for n in names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if str(kinds[name]).startswith("*") or name in build.multiples
    }
    source = ASTSource(fn=kernel, signature=kinds, constexprs=dict(build.constants), attrs=attributes)
    options = {"num_warps": build.warps, "num_stages": build.stages, **build.options}
    return triton.compile(source, target=target, options=options)


def resources(compiled: Any, backend: str, folder: str) -> dict[str, Any]:
    """Registers per thread, bytes of stack (what spills), bytes of shared memory, and matrix instructions."""
    found: dict[str, Any] = {"shared": compiled.metadata.shared}
    if backend == "hip":
        text = compiled.asm["amdgcn"]
        registers, spilled, stack = (
            int(re.findall(rf"\.{name}:\s+(\d+)", text)[-1])
            for name in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
        )
        return found | {
            "registers": registers, "spilled": spilled + stack, "matrix": re.findall(r"\b(v_mfma)", text)
        }  # fmt: skip
    cubin = Path(folder, "kernel.cubin")
    cubin.write_bytes(compiled.asm["cubin"])
    tools = triton.knobs.nvidia

    def output(tool: Any, *options: str) -> str:
        return subprocess.run([tool.path, *options, cubin], capture_output=True, text=True, check=True).stdout

    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", output(tools.cuobjdump, "--dump-resource-usage")))
    return found | {
        "registers": int(usage["REG"]),
        "spilled": int(usage["STACK"]) + int(usage["LOCAL"]),
        "matrix": re.findall(r"\b(HMMA|HGMMA|UTCHMMA)\b", output(tools.nvdisasm, "-c")),
    }


def main() -> None:
    op, folder = sys.argv[1:]
    module = importlib.import_module(f"ghostgram.triton_kernels.{op}")
    for (backend, arch), (lanes, _, _) in MACHINES.items():
        for build in spec_of(op).TRITON.builds(backend, arch):
            made = resources(compile(build, module, GPUTarget(backend, arch, lanes)), backend, folder)
            shape = {"kernel": build.kernel, "note": build.note, "warps": build.warps, "stages": build.stages}
            print(json.dumps([str(arch), build.id, shape | made | {"expects matrix": build.matrix}]), flush=True)


if __name__ == "__main__":
    main()
