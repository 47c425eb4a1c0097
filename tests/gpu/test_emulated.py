"""CUDA and Triton kernels without a GPU: they agree with the float64 reference, and the cases catch mistakes.

CUDA sources run on the CPU under tests/simt, thread by thread; Triton kernels in Triton's interpreter. What is special
about an op is in tests/gpu/<op>.py, what runs in tests/gpu/emulate.py.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from extension import CUDA_OPS
from ghostgram import _dispatch
from ghostgram.testing import layouts
from ghostgram.testing.compare import cases_of
from gpu import TRITON_OPS, cases_of_spec, spec_of

TESTS = Path(__file__).parents[1]
UNEDITED = "unedited"
SIDES = {"cuda": CUDA_OPS, "triton": TRITON_OPS}
SPECS = {(op, side): getattr(spec_of(op), side.upper()) for side, ops in SIDES.items() for op in ops}

CASES = [
    pytest.param(op, side, f"{case.id}-{dtype}", id=f"{op}-{side}-{case.id}-{dtype}")
    for (op, side), spec in SPECS.items()
    for case in cases_of_spec(op, spec)
    for dtype in spec.dtypes
]
CHECKS = [
    pytest.param(op, side, name, id=f"{op}-{side}-{name}")
    for (op, side), spec in SPECS.items()
    for name in [*([] if "float64" in spec.dtypes else ["float64 is refused"]), *spec.checks]
]
VARIANTS = {room: {UNEDITED: None} | dict(getattr(spec, "variants", {})) for room, spec in SPECS.items()}
MUTANTS = [
    pytest.param(op, side, name, id=f"{op}-{side}-{name}")
    for (op, side), spec in SPECS.items()
    for name in [*VARIANTS[op, side], *spec.mutants]
]


def cuda_builds(builder, op, _folder) -> Iterable[tuple[str, str, Path]]:
    spec = SPECS[op, "cuda"]
    edited = {**VARIANTS[op, "cuda"], **spec.mutants}
    edits = {name: m and m.edit(f"{op}/{op}_cuda.cu") for name, m in edited.items()}
    with ThreadPoolExecutor() as pool:
        whole = pool.submit(builder.simt_extension, op)
        mutants = pool.map(lambda edit: builder.simt_extension(op, edit=edit, optimize="-O0"), edits.values())
        yield "cases", "", whole.result()
        yield from (("mutant", name, path) for name, path in zip(edits, mutants, strict=True))


def triton_builds(_builder, op, folder) -> Iterable[tuple[str, str, Path]]:
    original = TESTS.parent / "triton_kernels" / f"{op}.py"
    text = original.read_text()
    yield "cases", "", original
    yield "mutant", UNEDITED, original
    for number, (name, mutant) in enumerate(SPECS[op, "triton"].mutants.items()):
        assert text.count(mutant.old) == 1, f"{mutant.old!r} occurs {text.count(mutant.old)} times"
        path = folder / f"{op}_mutant{number}.py"
        path.write_text(text.replace(mutant.old, mutant.new))
        yield "mutant", name, path


@pytest.fixture(scope="session")
def complaints(request, builder, tmp_path_factory):
    """complaints(op, side) -> what emulate.py said, by name. All that this session asks for is run by two at a time."""
    folder = tmp_path_factory.mktemp("emulated")
    wanted = [item.callspec.params for item in request.session.items if "complaints" in item.fixturenames]
    rooms = dict.fromkeys((params["op"], params["side"]) for params in wanted)

    def emulate(room: tuple[str, str]) -> tuple[dict[str, str], str]:
        op, side = room
        builds = (cuda_builds if side == "cuda" else triton_builds)(builder, op, folder)
        env = os.environ | {"PYTHONPATH": str(TESTS), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, TESTS / "gpu" / "emulate.py", side, op]
        with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
            with subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=output, stderr=errors, env=env, text=True
            ) as child:
                assert child.stdin is not None
                with suppress(BrokenPipeError), child.stdin:  # a child that has died has said why
                    for build in builds:
                        print(*build, sep="\t", file=child.stdin, flush=True)
            output.seek(0)
            errors.seek(0)
            return dict(map(json.loads, output)), errors.read()

    with ThreadPoolExecutor(2) as pool:
        running = {room: pool.submit(emulate, room) for room in rooms if _reason(*room) is None}

        def said(op: str, side: str, name: str) -> str:
            if reason := _reason(op, side):
                pytest.skip(reason)
            found, errors = running[op, side].result()
            assert name in found, f"emulate.py ended before {name!r}:\n{errors}"
            return found[name]

        yield said


def _reason(_op: str, side: str) -> str | None:
    return "triton is not installed" if side == "triton" and importlib.util.find_spec("triton") is None else None


@pytest.mark.parametrize(("op", "side", "name"), CASES)
def test_agrees_with_reference(complaints, op, side, name):
    assert complaints(op, side, name) == ""


@pytest.mark.parametrize(("op", "side", "name"), CHECKS)
def test_of_its_own(complaints, op, side, name):
    assert complaints(op, side, name) == ""


@pytest.mark.parametrize(("op", "side", "name"), MUTANTS)
def test_only_mutants_are_caught(complaints, op, side, name):
    if name in VARIANTS[op, side]:
        assert complaints(op, side, name) == ""
    else:
        assert complaints(op, side, name) != ""


@pytest.mark.parametrize("side", SIDES)
def test_every_op_has_cases_and_mutants(side):
    """`pytest -s` prints the table of docs/gpu.md."""
    print(f"\n| op, {side} | cases x dtypes | other checks | faults |")
    for op in _dispatch.OPS:
        spec = SPECS[op, side]
        cases = len(cases_of_spec(op, spec)) * len(spec.dtypes)
        others = sum(room == (op, side) for room in (param.values[:2] for param in CHECKS))
        others += len(VARIANTS[op, side])
        print(f"| `{op}` | {cases} | {others} | {len(spec.mutants)} |")
        assert cases >= 50
        assert len(spec.mutants) >= 4


@pytest.mark.parametrize("op", CUDA_OPS)
def test_binding_wants_device_memory(op, monkeypatch):
    """Needs a build with CUDA, but no device: everything is checked before the first CUDA call."""
    extension = pytest.importorskip("ghostgram._C")
    if extension.cuda_state != "on":
        pytest.skip(f"CUDA is {extension.cuda_state}")
    cases, case = cases_of(op), SPECS[op, "cuda"].showing[0]
    monkeypatch.setattr(_dispatch, "choose", lambda _op, backend, _device: backend)
    monkeypatch.setattr(_dispatch, "_runner", _dispatch._runner.__wrapped__)  # which would remember that choice
    with pytest.raises(ValueError, match="expected CUDA memory"):
        cases.run(case, cases.arrays(case, cases.inputs(case, "float32"), layouts.numpy_array, "float32"), "cuda")
