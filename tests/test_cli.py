"""`ghostgram doctor`: what it says agrees with the library, and it fails when a kernel is wrong."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from ghostgram import _C, _dispatch
from ghostgram.cli import doctor
from ghostgram.cli.app import app

FAST = ["doctor", "--seconds", "0.001"]


@pytest.fixture(autouse=True)
def small_memory(monkeypatch):
    measure = doctor.roofline.measure
    monkeypatch.setattr(doctor.roofline, "measure", lambda seconds, dtype: measure(seconds, dtype, 4 << 20))


def test_json_tells_what_the_library_says():
    result = CliRunner().invoke(app, [*FAST, "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.output)
    assert report["backends"] == {op: {b: _dispatch.why_not(op, b) for b in _dispatch.BACKENDS} for op in _dispatch.OPS}
    assert report["isa"] == _C.isa()
    assert report["isa"] in report["isas_built"]
    assert report["cuda"] == _C.cuda_state
    checked = {(check["op"], check["backend"]) for check in report["checks"]}
    assert {(op, "cpu") for op in _dispatch.OPS} <= checked
    assert all(0 < check["worst"] <= 1 and check["cases"] > 0 for check in report["checks"])
    assert all(rate > 0 for roof in report["roofs"].values() for rate in roof.values())


def test_tables_name_every_op_and_backend():
    result = CliRunner().invoke(app, FAST, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    for word in (*_dispatch.OPS, *_dispatch.BACKENDS, "ready", "right", "GFLOP/s"):
        assert word in result.output


def test_a_wrong_kernel_fails(monkeypatch):
    monkeypatch.setattr(doctor, "error_over_bound", lambda *_: {"dots": 0.5, "norms2": 1.01})
    result = CliRunner().invoke(app, FAST, env={"COLUMNS": "200"})
    assert result.exit_code == 1
    assert "WRONG" in result.output


@pytest.mark.parametrize("absent", ["typer", "rich"])
def test_without_its_packages_says_what_to_install(absent):
    hide = f"import sys; sys.modules['{absent}'] = None; from ghostgram.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", hide], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert absent in done.stderr
    assert "pip install ghostgram[report]" in done.stderr
