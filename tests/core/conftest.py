"""The border of the kernels (tests/core/border) as a module of its own, built once."""

import importlib.util
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pybind11
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def border(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    module = tmp_path_factory.mktemp("border") / "border.so"
    sources = [
        ROOT / "tests/core/border/border.cpp",
        *(ROOT / f"csrc/core/{name}.cpp" for name in ("view", "xla_call")),
    ]
    includes = [ROOT / "tests/core/border", ROOT / "csrc", sysconfig.get_path("include"), pybind11.get_include()]
    flags = ["-std=c++20", "-O0", "-w", "-shared", "-fPIC", "-fvisibility=hidden", *(f"-I{path}" for path in includes)]
    subprocess.run(["g++", *flags, *sources, "-o", module], check=True)
    spec = importlib.util.spec_from_file_location("border", module)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found
