"""The wheel serves a caller who has NumPy and nothing else, holds what it should, and can be built from the sdist."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

import ghostgram as gg
from ghostgram import _C

ROOT = Path(__file__).parent.parent
MEGABYTES = 10
"""What a wheel may weigh, CUDA kernels for four architectures included; `make wheel` holds it to the same."""

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


def run(*command: str | Path, cwd: str | Path = "/") -> str:
    """Runs a command outside the source tree; what it printed, or an error that shows it."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    clean["PATH"] = f"{Path(sys.executable).parent}:{clean['PATH']}"
    done = subprocess.run([*map(str, command)], cwd=cwd, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel():
    """The wheel that `make setup` has built, and installed into the environment of these tests."""
    found = [*(ROOT / "build/wheel").glob("ghostgram-*.whl")]
    if not found:
        pytest.skip("no build/wheel/*.whl: `make setup` builds it")
    return found[0]


@pytest.fixture(scope="module")
def names(wheel):
    """The files in the wheel."""
    with zipfile.ZipFile(wheel) as files:
        return files.namelist()


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """The interpreter of a new environment that holds the wheel and NumPy."""
    place = tmp_path_factory.mktemp("wheel") / "venv"
    run(sys.executable, "-m", "venv", place)
    interpreter = place / "bin/python"
    run(interpreter, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel)
    packages = Path(run(interpreter, "-c", "import sysconfig; print(sysconfig.get_path('platlib'))").strip())
    for part in Path(np.__file__).parent.parent.glob("numpy*"):  # linked, not downloaded: tests need no network
        (packages / part.name).symlink_to(part)
    return interpreter


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The unpacked source distribution."""
    place = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", place, ROOT)
    with tarfile.open(next(place.glob("*.tar.gz"))) as files:
        files.extractall(place, filter="data")
    return next(path for path in place.iterdir() if path.is_dir())


def test_computes_with_numpy_alone(python):
    assert Path(run(python, "-c", CALL).strip()).is_relative_to(python.parent.parent)


@pytest.mark.parametrize("absent", ["torch", "jax", "triton", "typer"])
def test_brings_nothing_else(python, absent):
    assert run(python, "-c", f"import importlib.util as i; print(i.find_spec('{absent}'))").strip() == "None"


def test_contains_the_kernels_and_no_tests(names):
    libraries = sorted(name for name in names if ".so" in name)
    assert [re.sub(r"\.cpython\S+", "", name) for name in libraries] == [
        "ghostgram/_C",
        "ghostgram/lib/libghostgram.so.0",
    ]
    assert "ghostgram/triton_kernels/grad_stats.py" in names
    tops = {re.sub(r"-[\d.]+(?=\.)", "", name.partition("/")[0]) for name in names}
    assert tops == {"ghostgram", "ghostgram.dist-info"}


def test_weighs_no_more_than_its_budget(wheel):
    assert wheel.stat().st_size < MEGABYTES * 2**20


def test_says_what_is_in_it(wheel, names):
    folder = f"ghostgram-{importlib.metadata.version('ghostgram')}.dist-info"
    assert {f"{folder}/licenses/LICENSE", f"{folder}/licenses/licenses/pybind11.txt"} <= set(names)
    with zipfile.ZipFile(wheel) as files:
        bill = json.loads(files.read(f"{folder}/sboms/ghostgram.cdx.json"))
        binary = b"".join(files.read(name) for name in names if ".so" in name)
    assert bill["metadata"]["component"]["purl"] == f"pkg:pypi/ghostgram@{importlib.metadata.version('ghostgram')}"
    parts = {part["name"]: part["version"] for part in bill["components"]}
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", parts.pop("pybind11"))
    # What it names is what is linked in: the static runtime leaves its error names in the binary.
    assert list(parts) == (["CUDA Runtime"] if b"cudaErrorInvalidValue" in binary else [])


def test_needs_no_library_that_a_machine_may_lack(wheel):
    pytest.importorskip("auditwheel")
    said = " ".join(run(sys.executable, "-m", "auditwheel", "show", wheel).split())
    assert re.search(r'consistent with the following platform tag: "manylinux_\d_\d+_', said), said
    assert "external shared libraries are required" not in said, said


def test_sdist_has_all_that_a_build_reads(sdist):
    tracked = run("git", "ls-files", "csrc", "python", "triton_kernels", "licenses", cwd=ROOT).split()
    wanted = [*tracked, "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"]
    assert [name for name in wanted if not (sdist / name).exists()] == []
    assert not (sdist / "docs").exists()


@pytest.mark.long
def test_sdist_builds_without_cuda(sdist, tmp_path):
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path,
        "-C", "cmake.define.GHOSTGRAM_CUDA=off", sdist)  # fmt: skip
    assert next(tmp_path.glob("ghostgram-*.whl")).stat().st_size < MEGABYTES * 2**20


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
    state = run(python, "-c", "from ghostgram import _C; print(_C.cuda_state)").strip()
    assert said == f"ghostgram {gg.__version__}, {_C.isa()}, CUDA {state}"
