"""The wheel serves a caller who has NumPy and nothing else."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import ghostgram as gg
from ghostgram import _C

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
    assert [name for name in listed if "libghostgram" in name] == ["ghostgram/lib/libghostgram.so.0"]
    assert "ghostgram/triton_kernels/grad_stats.py" in listed
    tops = {name.partition("/")[0] for name in listed if not name.startswith("..")}  # ..: the console script
    assert {re.sub(r"-[\d.]+(?=\.)", "", top) for top in tops} == {"ghostgram", "ghostgram.dist-info"}


@pytest.fixture(scope="module")
def examples(python, tmp_path_factory):
    """The programs of examples/c, built against the wheel by what it says of itself."""
    build, cmake = tmp_path_factory.mktemp("c"), [sys.executable, "-m", "cmake"]
    package = run(python, "-m", "ghostgram", "--cmakedir").strip()
    run(*cmake, "-S", ROOT / "examples/c", "-B", build, f"-Dghostgram_DIR={package}", "-DCMAKE_BUILD_TYPE=Release")
    run(*cmake, "--build", build)
    return build


def test_c_calls_the_library_of_the_wheel(examples):
    a, b, D = (np.sin(step * np.arange(1, n + 1)).astype("f") for step, n in ((0.7, 120), (1.3, 60), (0.4, 32)))
    gradients = np.einsum("itp,itd->ipd", b.reshape(5, 3, 4), a.reshape(5, 3, 8), dtype="d")
    _, *rows, first, refused = run(examples / "sample_norms").splitlines()
    norms, dots = np.sqrt((gradients**2).sum((1, 2))), np.einsum("ipd,pd->i", gradients, D.reshape(4, 8))
    np.testing.assert_allclose([[float(x) for x in row.split()] for row in rows], np.c_[:5, norms, dots], atol=3e-6)
    assert float(first.split()[-1]) == pytest.approx(gradients.sum(0)[0, 0], abs=3e-6)
    assert refused == (
        "refused: ghostgram_grad_stats: weight_grad_row: expected at least 8, so that rows do not overlap, got 7"
    )


def test_cpp_draws_what_python_draws(examples, python):
    ids = np.arange(1_000_000)
    top = gg.GumbelTopK(5, seed=2024, temperature=0.5)
    top.update((ids % 1000 / 250).astype("f"), ids)
    drawn, said = run(examples / "draw").splitlines()
    assert drawn == f"1000000 documents, 5 drawn, best first: {' '.join(map(str, top.result()[0]))}"
    assert said == f"ghostgram {gg.__version__}, {_C.isa()}, CUDA off, because GHOSTGRAM_CUDA=off"
