"""Builds the checkout for the card at hand without a package index: cmake, nvcc, and whichever pybind11 is there."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "gpu"


def missing() -> list[str]:
    """What this machine lacks for a run on its GPU, in words."""
    lacks = [f"{name} (a program)" for name in ("cmake", "c++") if shutil.which(name) is None]
    lacks += [f"{name} (a package)" for name in ("torch", "numpy") if importlib.util.find_spec(name) is None]
    if not lacks:
        import torch

        if not torch.cuda.is_available():
            lacks.append("a CUDA device that torch sees")
    return lacks


def build() -> Path:
    """Compiles what has changed; returns the folder to import ghostgram from."""
    import torch

    pybind11 = ["-Dpybind11_DIR=" + str(Path(__file__).parent / "pybind11"),
                "-DPYBIND11_HEADERS=" + str(Path(torch.__file__).parent / "include")]  # fmt: skip
    if importlib.util.find_spec("pybind11") is not None:
        import pybind11 as installed

        pybind11 = ["-Dpybind11_DIR=" + installed.get_cmake_dir()]
    major, minor = torch.cuda.get_device_capability()
    cuda = os.environ.get("CUDACXX") or shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    subprocess.run(
        ["cmake", "-S", ROOT, "-B", BUILD, "-DCMAKE_BUILD_TYPE=Release", f"-DPython_EXECUTABLE={sys.executable}",
         f"-DGHOSTGRAM_CUDA_ARCHITECTURES={major}{minor}-real", *pybind11,
         *(["-G", "Ninja"] if shutil.which("ninja") else [])],
        env=os.environ | ({"CUDACXX": cuda} if Path(cuda).exists() else {}), check=True,
    )  # fmt: skip
    subprocess.run(["cmake", "--build", BUILD, "--parallel", str(os.cpu_count())], check=True)
    site = BUILD / "site"
    shutil.rmtree(site, ignore_errors=True)
    shutil.copytree(ROOT / "python" / "ghostgram", site / "ghostgram")
    shutil.copytree(ROOT / "triton_kernels", site / "ghostgram" / "triton_kernels")
    subprocess.run(["cmake", "--install", BUILD, "--prefix", site], check=True)
    found = dict(re.findall(r'^(name|version) = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    metadata = site / "{name}-{version}.dist-info".format(**found) / "METADATA"  # ghostgram asks for its version
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".format(**found))
    return site
