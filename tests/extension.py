"""Builds the sources of csrc, edited or instrumented, into an extension module that can stand in for ghostgram._C."""

import itertools
import os
import platform
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from ghostgram import _C

SOURCES = Path(__file__).parents[1] / "csrc"
SIMT = Path(__file__).parent / "simt"
ISA_FLAGS = {
    isa: flags.split()
    for isa, flags in re.findall(
        r'set\(GHOSTGRAM_FLAGS_(\w+) "?([^")]*)"?\)', (SOURCES / "cmake/rooms.cmake").read_text()
    )
}
"""Instruction set -> the compiler's flags for it."""
RUNNABLE = _C.isas[: _C.isas.index(_C.isa()) + 1]
"""The instruction sets of this build that this processor has, the best one last."""

CUDA_OPS = sorted(source.parent.name for source in SOURCES.glob("*/*_cuda.cu"))
"""The ops that have a CUDA kernel."""
CUDA_BINDINGS = [f"-DGG_CUDA_{op}" for op in CUDA_OPS]
# Undefined behaviour traps, and the shim turns the trap into a failed launch. No contraction: two ways to the same
# number must give the same bits, whatever the host's instruction set.
SIMT_FLAGS = [
    *("-ffp-contract=off", "-fno-gnu-unique", f"-I{SIMT}"),
    *("-fsanitize=alignment,bounds,shift,signed-integer-overflow,null", "-fsanitize-undefined-trap-on-error"),
]

Edit = tuple[str, str]
"""(old text, which must occur exactly once; new text)"""


class Builder:
    """Compiles with g++ into one folder; equal object files are made once, so that builds share what they can."""

    def __init__(self, folder: Path) -> None:
        self._pybind11 = pytest.importorskip("pybind11").get_include()
        if shutil.which("g++") is None or platform.system() != "Linux":
            pytest.skip("no g++ on Linux to compile kernels with")
        self._folder, self._numbers = folder, itertools.count()
        self._compilers = ThreadPoolExecutor(os.cpu_count())
        self._objects: dict[tuple[str, ...], Future[Path]] = {}

    def extension(
        self,
        *,
        isas: Sequence[str] = RUNNABLE[-1:],
        edits: Mapping[str, Edit] | None = None,
        instrument: Sequence[str] = (),
        instrument_bindings: bool = False,
    ) -> Path:
        """A module of all rooms for some instruction sets; calls of the others would fail.

        Args:
            isas: The instruction sets to compile kernels for.
            edits: Room -> an edit of its CPU kernel; or header below csrc -> an edit that all who include it see.
            instrument: Flags for kernels and core, and for the linker.
            instrument_bindings: Whether *_bind.cpp gets these flags too: they take most of the time to compile.
        """
        bindings = instrument if instrument_bindings else ()
        sources = [(source, *instrument) for source in sorted(SOURCES.glob("core/*.cpp")) if "cuda" not in source.name]
        # Small cases are most of what tests have, and what threads do to each other shall show in them.
        shared = ("-DGG_SHARE_ALL_WORK", *CUDA_BINDINGS, *bindings)
        sources += [(source, *shared) for source in sorted(SOURCES.glob("*/*_bind.cpp"))]
        sources += [(source, *shared[:1], *instrument) for source in sorted(SOURCES.glob("*/*_c.cpp"))]
        names = ", ".join(f'"{isa}"' for isa in isas)
        sources.append((SOURCES / "module.cpp", f"-DGHOSTGRAM_ISAS={names}"))
        sources.append((SOURCES / "library.cpp", '-DGHOSTGRAM_CUDA_STATE="off"', *instrument))
        headers = {header: self._edited_header(header, edit) for header, edit in (edits or {}).items() if "/" in header}
        for kernel in sorted(SOURCES.glob("*/*_cpu.cpp")):
            source = self._edited(kernel, (edits or {}).get(kernel.parent.name))
            included = [f"-I{folder}" for name, folder in headers.items() if f'"{name}"' in kernel.read_text()]
            for isa in isas:
                options = ["-O1", "-ffp-contract=fast", f"-DGG_ISA={isa}", *ISA_FLAGS[isa], *included]
                sources.append((source, *options, *instrument))
        return self._linked(sources, instrument)

    def simt_extension(
        self, *ops: str, edit: tuple[str, Edit] | None = None, optimize: str = "-O1", instrument: Sequence[str] = ()
    ) -> Path:
        """A module whose CUDA kernels of some ops run on the card of tests/simt; calls of other kernels would fail.

        Args:
            ops: The ops, which must have CUDA kernels.
            edit: A source or header below csrc, and an edit of it.
            optimize: How to compile the kernels.
            instrument: Flags for kernels and shim, and for the linker.
        """
        kernels, changed = [SOURCES / op / f"{op}_cuda.cu" for op in ops], []
        if edit is not None:
            folder = self._edited_header(*edit)
            changed = [f"-I{folder}"]
            kernels = [folder / edit[0] if kernel == SOURCES / edit[0] else kernel for kernel in kernels]
        sources = [(source,) for source in sorted(SOURCES.glob("core/*.cpp")) if "cuda" not in source.name]
        doors = sorted([*SOURCES.glob("*/*_bind.cpp"), *SOURCES.glob("*/*_c.cpp")])
        sources += [(source, *CUDA_BINDINGS) for source in doors]
        sources.append((SOURCES / "module.cpp", '-DGHOSTGRAM_ISAS="none"', "-DGG_CUDA"))
        sources += [(SOURCES / "library.cpp", '-DGHOSTGRAM_CUDA_STATE="on"'), (SIMT / "cuda_workspace.cpp",)]
        sources.append((SIMT / "simt.cpp", "-O1", "-fvisibility=default", *SIMT_FLAGS, *instrument))
        sources += [(kernel, "-xc++", *SIMT_FLAGS, *changed, optimize, *instrument) for kernel in kernels]
        return self._linked(sources, instrument)

    def simt_library(self, source: Path) -> Path:
        """Kernels of a test's own as a library for ctypes."""
        flags = ("-O1", "-fvisibility=default", *SIMT_FLAGS)
        return self._linked([(source, *flags), (SIMT / "simt.cpp", *flags)], ())

    def _linked(self, sources: Sequence[tuple[Path | str, ...]], instrument: Sequence[str]) -> Path:
        objects = [self._object(*source) for source in sources]
        done = [each.result() for each in objects]
        library = self._folder / f"extension_{next(self._numbers)}.so"
        subprocess.run(["g++", "-shared", "-o", library, *done, *instrument, "-pthread", "-ldl"], check=True)
        return library

    def _edited(self, source: Path, edit: Edit | None) -> Path:
        if edit is None:
            return source
        changed = self._folder / f"{source.stem}_{next(self._numbers)}.cpp"
        changed.write_text(_edited_text(source, edit))
        return changed

    def _edited_header(self, header: str, edit: Edit) -> Path:
        """A folder that has the edited header, or another source below csrc, under its name there."""
        folder = self._folder / f"edited_{next(self._numbers)}"
        (folder / header).parent.mkdir(parents=True)
        (folder / header).write_text(_edited_text(SOURCES / header, edit))
        return folder

    def _object(self, source: Path, *flags: str) -> Future[Path]:
        key = (str(source), *flags)
        if key not in self._objects:
            output = self._folder / f"{source.stem}_{next(self._numbers)}.o"
            self._objects[key] = self._compilers.submit(self._compile, source, output, flags)
        return self._objects[key]

    def _compile(self, source: Path, output: Path, flags: Sequence[str]) -> Path:
        includes = [f"-I{path}" for path in (SOURCES, self._pybind11, sysconfig.get_path("include"))]
        options = ["-std=c++20", "-w", "-g1", "-fPIC", "-fvisibility=hidden", *flags, *includes]
        subprocess.run(["g++", *options, "-c", source, "-o", output], check=True)
        return output


def _edited_text(source: Path, edit: Edit) -> str:
    text = source.read_text()
    assert text.count(edit[0]) == 1, f"{source.name}: {edit[0]!r} occurs {text.count(edit[0])} times"
    return text.replace(*edit)
