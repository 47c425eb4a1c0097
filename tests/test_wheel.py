"""The wheel serves a caller who has NumPy and nothing else."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent

CALL = """
import ghostgram as gg, numpy as np
rng = np.random.default_rng(0)
a, b, D = rng.standard_normal((5, 7, 11)), rng.standard_normal((5, 7, 13)), rng.standard_normal((2, 13, 11))
gradients = np.einsum("itp,itd->ipd", b, a)
stats = gg.grad_stats(a, b, D)
np.testing.assert_allclose(stats.weight_grad, gradients.sum(0), rtol=1e-12, atol=1e-12)
np.testing.assert_allclose(stats.norms, np.sqrt((gradients**2).sum((1, 2))), rtol=1e-12)
np.testing.assert_allclose(stats.dots, np.einsum("ipd,kpd->ik", gradients, D), rtol=1e-12, atol=1e-12)
print(gg.__file__)
"""


def run(*command: str | Path) -> str:
    """Runs a command outside the source tree; what it printed, or an error that shows it."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run([*map(str, command)], cwd="/", env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The interpreter of a new environment that holds the wheel and NumPy."""
    place = tmp_path_factory.mktemp("wheel")
    # CUDA kernels take minutes to build and are not called here; an own build folder is kept for the next run.
    settings = ("-C", "cmake.define.GHOSTGRAM_CUDA=off", "-C", f"build-dir={ROOT}/build/test-wheel")
    build = ("wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", place, *settings, ROOT)
    run(sys.executable, "-m", "pip", *build)
    run(sys.executable, "-m", "venv", place / "venv")
    interpreter = place / "venv/bin/python"
    (wheel,) = place.glob("*.whl")
    run(interpreter, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel)
    packages = Path(run(interpreter, "-c", "import sysconfig; print(sysconfig.get_path('platlib'))").strip())
    for part in Path(np.__file__).parent.parent.glob("numpy*"):  # linked, not downloaded: tests need no network
        (packages / part.name).symlink_to(part)
    return interpreter


def test_computes_with_numpy_alone(python):
    assert Path(run(python, "-c", CALL).strip()).is_relative_to(python.parent.parent)


@pytest.mark.parametrize("absent", ["torch", "jax", "triton", "typer"])
def test_brings_nothing_else(python, absent):
    assert run(python, "-c", f"import importlib.util as i; print(i.find_spec('{absent}'))").strip() == "None"


def test_contains_the_kernels_and_no_tests(python):
    listed = run(python, "-c", "import importlib.metadata as m; print(*m.files('ghostgram'), sep='\\n')").splitlines()
    assert any(name.startswith("ghostgram/_C.") and name.endswith(".so") for name in listed)
    assert "ghostgram/triton_kernels/grad_stats.py" in listed
    tops = {name.partition("/")[0] for name in listed if not name.startswith("..")}  # ..: the console script
    assert {re.sub(r"-[\d.]+(?=\.)", "", top) for top in tops} == {"ghostgram", "ghostgram.dist-info"}
