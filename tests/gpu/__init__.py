"""What the tests of GPU kernels want to know of an op: tests/gpu/<op>.py says it, and says nothing twice.

A module `gpu.<op>` has CUDA, a `Cuda`, where there is a csrc/<op>/<op>_cuda.cu, and TRITON, a `Triton`, where there is
a triton_kernels/<op>.py. All cases of testing/cases/<op>.py run anyway, as far as emulation is fast enough for them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from extension import Edit
from ghostgram.testing.compare import cases_of

DTYPES = ("float32", "bfloat16", "float16")
TRITON_OPS = sorted(path.stem for path in (Path(__file__).parents[2] / "triton_kernels").glob("[a-z]*.py"))
"""The ops that have a Triton kernel."""
MACHINES: dict[tuple[str, int | str], tuple[int, int, str]] = {
    ("cuda", 80): (32, 163 << 10, "HMMA"),
    ("cuda", 90): (32, 227 << 10, "HGMMA"),
    ("cuda", 100): (32, 227 << 10, "UTCHMMA"),
    ("cuda", 120): (32, 99 << 10, "HMMA"),
    ("hip", "gfx942"): (64, 64 << 10, "v_mfma"),
    ("hip", "gfx950"): (64, 160 << 10, "v_mfma"),
}
"""What Triton compiles for: (backend, architecture) -> lanes of a warp, a block's shared memory, matrix instruction."""
Check = Callable[[Callable[..., Any]], None]
"""Gets a `layouts.Make` and fails with an AssertionError. Where it runs, the backend "cuda" or "triton" works."""


def flops(case: Any) -> float:
    """What an emulator has to do, unless an op knows it better."""
    return float(case.flops)


@dataclass(frozen=True)
class Mutant:
    """A fault put into one place of one source."""

    old: str
    """Occurs exactly once in the source."""
    new: str
    file: str = ""
    """Below csrc (CUDA alone); the op's own kernel where empty."""
    dtype: str = "float32"
    """Of the inputs that must show it."""

    def edit(self, own: str) -> tuple[str, Edit]:
        """The file and the edit of it."""
        return self.file or own, (self.old, self.new)


@dataclass(frozen=True)
class Kernel:
    """What nvcc must make of a __global__ function, or of some of its instantiations."""

    name: str
    """A regular expression, searched for in the demangled name; every kernel must be found by exactly one."""
    count: int
    """How many instantiations it finds."""
    threads: int
    """Of a block."""
    shared: Sequence[int] = (0,)
    """Bytes of dynamic shared memory for a block, in each of the cases worth a column of the table."""
    instructions: Sequence[str] = ()
    """Beginnings of SASS mnemonics that must occur: what the kernel is said to use."""


@dataclass(frozen=True)
class Cuda:
    """An op's CUDA side."""

    kernels: Sequence[Kernel]
    mutants: Mapping[str, Mutant]
    showing: Sequence[Any]
    """The cases on which the mutants run until one fails, those that show most first. Unedited, all pass."""
    cases: Sequence[Any] = ()
    """Beyond the shared ones: sizes that matter to this kernel alone."""
    variants: Mapping[str, Mutant] = field(default_factory=dict)
    """Edits that no result may depend on, as of sizes that no case reaches: with them too, all `showing` cases pass."""
    work: Callable[[Any], float] = flops
    work_limit: float = 2e7
    """Cases of more `work` are left out, by name: emulation does some 1e8 a second."""
    dtypes: Sequence[str] = DTYPES
    """That it takes; float64 must be refused by name where it is not among them."""
    checks: Mapping[str, Check] = field(default_factory=dict)


@dataclass(frozen=True)
class Build:
    """One compilation of a Triton kernel, as its launcher would do it."""

    id: str
    """Names it among the op's builds of one machine."""
    kernel: str
    """Its name in triton_kernels/<op>.py."""
    signature: Mapping[str, str | tuple[str, ...]]
    """Types by argument, such as "*fp32" or "i64", or several of a tuple's; "i32" where it is not named."""
    constants: Mapping[str, Any]
    """tl.constexpr arguments, and those that are None."""
    warps: int = 4
    stages: int = 1
    multiples: Sequence[str] = ()
    """Integer arguments that are multiples of 16; pointers are."""
    matrix: bool = False
    """Whether the matrix units of the machine must be used; else they must not."""
    note: str = ""
    """What the table says of it, such as the tile."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What else the launcher says to the compiler."""


@dataclass(frozen=True)
class Triton:
    """An op's Triton side."""

    mutants: Mapping[str, Mutant]
    showing: Sequence[Any]
    builds: Callable[[str, int | str], Sequence[Build]]
    """(backend, architecture) -> what is compiled for that machine; it may import triton."""
    cases: Sequence[Any] = ()
    work: Callable[[Any], float] = flops
    work_limit: float = 1e7
    """Cases of more `work` are left out: the interpreter does some 1e7 a second, its tiles being small."""
    dtypes: Sequence[str] = DTYPES
    checks: Mapping[str, Check] = field(default_factory=dict)


def spec_of(op: str) -> Any:
    """The module of an op."""
    return importlib.import_module(f"gpu.{op}")


def cases_of_spec(op: str, spec: Any) -> list[Any]:
    """All cases that are small enough to emulate, each once."""
    cases = cases_of(op)
    every = dict.fromkeys([*cases.CASES, *cases.LARGE, *spec.cases, *spec.showing])
    return [case for case in every if spec.work(case) <= spec.work_limit]
