"""`python -m benchmarks.gpu` runs unattended, on a card that is not here: its rehearsal leaves nothing to chance."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from extension import CUDA_OPS
from ghostgram import _dispatch
from gpu import TRITON_OPS

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def rehearsed(builder, tmp_path_factory):
    """What a rehearsal wrote."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    folder = tmp_path_factory.mktemp("rehearsal")
    command = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--out", folder]
    done = subprocess.run(
        [*command, "--simt", builder.simt_extension(*CUDA_OPS)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "rehearsal.json").read_text())


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_every_op_is_validated_and_timed(rehearsed, backend):
    here = {"cuda": CUDA_OPS, "triton": TRITON_OPS}[backend]
    rows = {row["part"]: row for row in rehearsed["gpu validate"]["rows"]}
    for op in _dispatch.OPS:
        row = rows[f"validate {op} {backend}"]
        assert ("absent" in row) == (op not in here)
        assert op not in here or row["cases"] > 0
    timed = {(row["part"], row["dtype"]) for row in rehearsed["gpu time"]["rows"] if row["backend"] == backend}
    assert timed == {(f"time {op}", dtype) for op in here for dtype in ("bfloat16", "float32")}


def test_rivals_compute_the_same(rehearsed):
    for row in rehearsed["gpu time"]["rows"]:
        assert row.get("difference", 0) < (1e-4 if row["dtype"] == "float32" else 0.1), row


def test_a_whole_step_is_timed(rehearsed):
    rows = rehearsed["gpu step"]["rows"]
    assert "absent" in rows[0] or {row["step"] for row in rows} >= {"plain", "In-Run Shapley"}
