"""grad_stats in Triton, compiled for GPUs that need not be here: it uses their matrix units and spills no register.

Compilation happens in a process of its own, because a process that runs Triton's interpreter cannot compile: this file,
run as a script, prints its findings as JSON.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

# backend, architecture -> lanes of a warp, bytes of shared memory per block, matrix instruction
MACHINES = {
    ("cuda", 80): (32, 163 << 10, "HMMA"),
    ("cuda", 90): (32, 227 << 10, "HGMMA"),
    ("cuda", 100): (32, 227 << 10, "UTCHMMA"),
    ("cuda", 120): (32, 99 << 10, "HMMA"),
    ("hip", "gfx942"): (64, 64 << 10, "v_mfma"),
    ("hip", "gfx950"): (64, 160 << 10, "v_mfma"),
}
PLAIN = {(120, "fp32")}  # no matrix instruction: exact float32 products are faster there than three TF32 ones
DTYPES = {"fp32": 4, "bf16": 2, "fp16": 2}
BUILDS = [
    (backend, arch, dtype, directions, aligned)
    for backend, arch in MACHINES
    for dtype in DTYPES
    for directions in (0, 1, 2)
    for aligned in (True, False)
    # One direction is the common call; float16 is as bfloat16 but for a modifier of the matrix instruction.
    if directions == 1 or (aligned and dtype != "fp16")
    if aligned or dtype != "fp16"
]


def _id(arch, dtype, directions, aligned):
    return f"{arch}-{dtype}-K{directions}-{'aligned' if aligned else 'unaligned'}"


def _compile(kernel, target, pointers, constants, shape, aligned=True):
    """Compiles as the launcher would, for pointers, strides and feature sizes that are multiples of 16 if `aligned`."""
    import triton
    from triton.compiler import ASTSource

    names = kernel.arg_names
    kinds = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    odd = {"samples", "samples_per_span", "tokens", "directions", "tiles"}
    multiples = [name in pointers or (aligned and name not in odd) for name in names]
    attributes = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if multiples[i] and kinds[name] != "constexpr"
    }
    source = ASTSource(fn=kernel, signature=kinds, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options={"num_warps": shape[0], "num_stages": shape[1]})


def _resources(compiled, backend, folder):
    """Registers per thread, bytes of stack (what spills), bytes of shared memory, and matrix instructions."""
    import triton

    shared = compiled.metadata.shared
    if backend == "hip":
        text = compiled.asm["amdgcn"]
        registers, spilled, stack = (
            int(re.findall(rf"\.{name}:\s+(\d+)", text)[-1])
            for name in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
        )
        return registers, spilled + stack, shared, re.findall(r"\b(v_mfma)", text)
    cubin = Path(folder, "kernel.cubin")
    cubin.write_bytes(compiled.asm["cubin"])
    tools = triton.knobs.nvidia

    def output(tool, *options):
        return subprocess.run([tool.path, *options, cubin], capture_output=True, text=True, check=True).stdout

    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", output(tools.cuobjdump, "--dump-resource-usage")))
    matrix = re.findall(r"\b(HMMA|HGMMA|UTCHMMA)\b", output(tools.nvdisasm, "-c"))
    return int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"]), shared, matrix


def main(folder):
    from triton.backends.compiler import GPUTarget

    from ghostgram.triton_kernels import grad_stats as kernels

    found = {}
    for backend, arch, dtype, directions, aligned in BUILDS:
        shape = kernels.launch_shape(backend, arch, DTYPES[dtype], directions, aligned)
        pointers = dict.fromkeys(("D", "weight_grad", "partials"), "*fp32") | dict.fromkeys("ab", f"*{dtype}")
        if dtype == "fp16":
            pointers["D"] = "*fp16"  # the other dtype that the contract allows
        constants = {
            "ROWS": shape.rows, "COLS": shape.cols, "TOKENS": shape.tokens, "PRECISION": shape.precision,
            "ACCUMULATE": True, "KEEP_DIRECTION": directions == 1, "UPCAST": False,
        } | ({} if directions else {"D": None})  # fmt: skip
        target = GPUTarget(backend, arch, MACHINES[backend, arch][0])
        launch = shape.warps, shape.stages
        compiled = _compile(kernels.grad_stats_tiles, target, pointers, constants, launch, aligned)
        found[_id(arch, dtype, directions, aligned)] = (shape[:5], *_resources(compiled, backend, folder))
    for backend, arch in MACHINES:
        constants = {"TILES": kernels.SUM_TILES, "COLUMNS": kernels.SUM_COLUMNS}
        pointers = dict.fromkeys(("partials", "norms2", "dots"), "*fp32")
        target = GPUTarget(backend, arch, MACHINES[backend, arch][0])
        found[f"{arch}-sum"] = _resources(
            _compile(kernels.sum_tiles, target, pointers, constants, (4, 1)), backend, folder
        )
    print(json.dumps(found))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    folder = str(tmp_path_factory.mktemp("compiled"))
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": folder}
    done = subprocess.run([sys.executable, __file__, folder], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("backend", "arch", "dtype", "directions", "aligned"), BUILDS)
def test_fills_the_machine_and_spills_nothing(found, backend, arch, dtype, directions, aligned):
    shape, registers, spilled, shared, matrix = found[_id(arch, dtype, directions, aligned)]
    _, shared_limit, instruction = MACHINES[backend, arch]
    rows, cols, tokens, warps, stages = shape
    print(
        f"| {backend} {arch} | {dtype}{'' if aligned else ', unaligned'} | {directions} | {rows} x {cols} x {tokens} "
        f"| {warps} | {stages} | {registers} | {spilled} | {shared / 1024:.0f} | {len(matrix)} {instruction} |"
    )
    assert spilled == 0
    assert shared <= shared_limit
    assert set(matrix) == (set() if (arch, dtype) in PLAIN else {instruction})


@pytest.mark.parametrize("arch", [arch for _, arch in MACHINES])
def test_the_sum_over_tiles_spills_nothing(found, arch):
    assert found[f"{arch}-sum"][1] == 0


if __name__ == "__main__":
    main(sys.argv[1])
