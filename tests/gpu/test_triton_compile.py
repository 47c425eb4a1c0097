"""Every Triton kernel compiled for GPUs that need not be here: it spills nothing, fits, and uses matrix units or not.

`pytest -s tests/gpu/test_triton_compile.py` prints the table of docs/gpu.md.
"""

import importlib.util
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gpu import MACHINES, TRITON_OPS

TESTS = Path(__file__).parents[1]
ROOMS = [pytest.param(op, machine, id=f"{op}-{machine[1]}") for op in TRITON_OPS for machine in MACHINES]


@pytest.fixture(scope="module")
def compiled(request, tmp_path_factory):
    """Op -> what compile_triton.py printed, once it has; two ops at a time."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")

    def lines(op):
        folder = str(tmp_path_factory.mktemp(op))
        env = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": folder, "PYTHONPATH": str(TESTS)}
        command = [sys.executable, TESTS / "gpu" / "compile_triton.py", op, folder]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    wanted = [item.callspec.params["op"] for item in request.session.items if item.path == request.path]
    with ThreadPoolExecutor(2) as pool:
        yield {op: pool.submit(lines, op) for op in dict.fromkeys(wanted)}


@pytest.mark.parametrize(("op", "machine"), ROOMS)
def test_fits_and_spills_nothing(compiled, op, machine):
    backend, arch = machine
    _, shared_limit, instruction = MACHINES[machine]
    made = {name: found for of, name, found in compiled[op].result() if of == str(arch)}
    assert made, "nothing was built"
    for name, found in made.items():
        print(
            f"| {found['kernel']} | {backend} {arch} | {name} | {found['note']} | {found['warps']} | {found['stages']} "
            f"| {found['registers']} | {found['shared'] / 1024:.3g} | {len(found['matrix'])} {instruction} |"
        )
    for name, found in made.items():
        assert found["spilled"] == 0, name
        assert found["shared"] <= shared_limit, name
        assert set(found["matrix"]) == ({instruction} if found["expects matrix"] else set()), name
