"""The cases notice broken kernels: every seeded mutant of a CPU kernel must disagree with the reference somewhere.

A mutant is one textual edit of a kernel's source, compiled for the instruction set of this machine and linked with the
rooms' real bindings into a module of its own; `check_kernel.py` runs it through the comparison of test_rooms. The
unedited kernel, built the same way, must pass: a harness that fails everything would catch every mutant.
"""

import platform
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ghostgram import _C

SOURCES = Path(__file__).parents[2] / "csrc"
FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"],
}
MUTANTS = {
    "grad_stats": {
        "blocks of tokens forget the earlier ones": ("acc[r][v] = t ? load(", "acc[r][v] = false ? load("),
        "a norm keeps its last tile alone": ("sums[0] += sum_tile_row(squares)", "sums[0] = sum_tile_row(squares)"),
        "accumulate is ignored": ("pass > 0 || s.accumulate", "pass > 0"),
        "every direction is the first": ("k * s.D_direction + row * s.D_row", "row * s.D_row"),
    },
    "grad_gram": {
        "pairs of different samples count twice": ("same && i == j ? twice : 1) * double(sum", "twice) * double(sum"),
        "tiles on the diagonal are skipped": ("same ? most(first, k) : first", "same ? most(first, k + 1) : first"),
        "features beyond whole vectors are dropped": ("if (s * lanes<Acc> < n)", "if (false)"),
        "the first piece of a long sample is lost": ("int64_t piece = 0; piece <", "int64_t piece = 1; piece <"),
        "nothing is mirrored": ("if (s.symmetric && !s.diagonal)", "if (false)"),
    },
    "embedding_stats": {
        "repeated tokens count again": ("link[slots[slot]].first = false;", ""),
        "padding contributes": ("id != s.padding_idx || s.padding_idx < 0", "true"),
        "all samples use the first one's ids": ("chained == s.samples ? i : 0", "0"),
        "products beyond whole vectors are dropped": ("rest += x[c] * widen(y[c]);", ""),
    },
    "affine_stats": {
        "the mean is subtracted after scaling": (
            "(load_wide(x[k] + c) - mean[k]) * rstd[k]",
            "(load_wide(x[k] + c) * rstd[k] - mean[k])",
        ),
        "tokens that are no four are dropped": ("for (; t < last; ++t)", "for (; false; ++t)"),
        "a cut of tokens is lost": ("int64_t cut = 1; cut < cuts", "int64_t cut = 2; cut < cuts"),
        "the bias gradient reads the weight's sums": ("finish_grad(s.bias, s.features,", "finish_grad(s.bias, 0,"),
    },
    "trajectory_match": {
        "one scalar too many is dropped": ("least(s.first - scalars, size)", "least(s.first - scalars + 1, size)"),
        "a chunk ends with its first tensor": ("places[t].begin < end; ++t)", "places[t].begin < begin + 1; ++t)"),
        "scalars beyond whole vectors are dropped": ("if (i < to) {", "if (false) {"),
        "weights of tensors do not reach num": ("to.num += weight * x.num", "to.num += x.num"),
        "a gradient is not masked": ("mask == Mask::real ? g * m : g", "g"),
        "gradients of dropped scalars are not written": ("(what & gradients) && kept > from", "false"),
    },
}
EDITS = {(op, "unedited"): None for op in MUTANTS} | {
    (op, name): edit for op, edits in MUTANTS.items() for name, edit in edits.items()
}

MODULE = """
#include <pybind11/pybind11.h>
namespace gg {{
{declarations}
}}
PYBIND11_MODULE(mutant, m) {{
  auto cpu = m.def_submodule("cpu"), cuda = m.def_submodule("cuda");
{calls}
}}
"""


def compiled(source: Path, into: Path, *flags: str) -> Path:
    pybind11 = pytest.importorskip("pybind11")
    includes = [f"-I{path}" for path in (SOURCES, pybind11.get_include(), sysconfig.get_path("include"))]
    built = into / f"{source.stem}.o"
    options = ["-std=c++20", "-w", "-fPIC", "-fvisibility=hidden", *includes, *flags]
    subprocess.run(["g++", *options, "-c", source, "-o", built], check=True)
    return built


@pytest.fixture(scope="module")
def caught(tmp_path_factory):
    """(op, mutant) -> what check_kernel.py complained of."""
    if shutil.which("g++") is None or platform.system() != "Linux":
        pytest.skip("mutants: no g++ on Linux to compile them")
    root = tmp_path_factory.mktemp("mutants")
    module = root / "module.cpp"
    declarations = "\n".join(f"void bind_{op}(pybind11::module_ &, pybind11::module_ &);" for op in MUTANTS)
    calls = "\n".join(f"  gg::bind_{op}(cpu, cuda);" for op in MUTANTS)
    module.write_text(MODULE.format(declarations=declarations, calls=calls))
    binds = [SOURCES / op / f"{op}_bind.cpp" for op in MUTANTS]
    core = [SOURCES / "core" / f"{name}.cpp" for name in ("parallel", "isa", "view")]

    with ThreadPoolExecutor(2) as pool:
        shared = list(pool.map(lambda source: compiled(source, root), [module, *binds, *core]))
        kernels = dict(zip(EDITS, pool.map(lambda at: kernel(root, *at), enumerate(EDITS)), strict=True))
        return dict(zip(EDITS, pool.map(lambda key: verdict(key, kernels, shared), EDITS), strict=True))


def kernel(root: Path, number: int, key: tuple[str, str]) -> Path:
    """The object file of one kernel, its edit applied to text that occurs exactly once."""
    op, text = key[0], (SOURCES / key[0] / f"{key[0]}_cpu.cpp").read_text()
    if EDITS[key]:
        old, new = EDITS[key]
        assert text.count(old) == 1, f"{key}: {old!r} occurs {text.count(old)} times"
        text = text.replace(old, new)
    source = root / f"{op}_{number}.cpp"
    source.write_text(text)
    return compiled(source, root, "-O1", "-ffp-contract=fast", f"-DGG_ISA={_C.isa()}", *FLAGS[_C.isa()])


def verdict(key: tuple[str, str], kernels: dict[tuple[str, str], Path], shared: list[Path]) -> str:
    """Links one kernel with the bindings and unedited kernels of the other rooms, and compares it on all its cases."""
    library = kernels[key].with_suffix(".so")
    others = [kernels[op, "unedited"] for op in MUTANTS if op != key[0]]
    subprocess.run(["g++", "-shared", "-o", library, kernels[key], *others, *shared, "-pthread"], check=True)
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("check_kernel.py"), library, key[0]], capture_output=True, text=True
    )
    return done.stderr


@pytest.mark.parametrize("key", [pytest.param(key, id="-".join(key)) for key in EDITS])
def test_only_mutants_are_caught(key, caught):
    if key[1] == "unedited":
        assert caught[key] == ""
    else:
        assert "beyond its bound" in caught[key]
