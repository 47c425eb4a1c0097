"""The plan of the house: one stem in every tree, imports along the arrows only, kernels that see no Python."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ghostgram import _dispatch

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "python/ghostgram"

OF_EVERY_OP = [
    *("csrc/{op}/{op}.h", "csrc/{op}/{op}_cpu.cpp", "csrc/{op}/{op}_bind.cpp", "csrc/{op}/{op}_c.cpp"),
    *("python/ghostgram/reference/{op}.py", "python/ghostgram/ops/{op}.py", "python/ghostgram/testing/cases/{op}.py"),
    "docs/ops/{op}.md",
]
NOT_A_ROOM = {"core", "cmake", "include"}
NOT_AN_OP = {
    "roofs": "a probe of the machine: it computes nothing that a reference could check",
    "roots": "what the front door of norms does to its result, on the CPU",
}

ARROWS = {  # what each part of the package may import of ours; "" is ghostgram/__init__.py
    "": {"ops", "algorithms"},
    "__main__": set(),
    "integrations": {"integrations", "algorithms"},
    "algorithms": {"algorithms", "training", "taps", "ops", "_arrays", "_files"},
    "training": {"training", "taps"},
    "taps": {"taps", "ops", "_arrays"},
    "ops": {"ops", "_dispatch", "_arrays", "_xla", "_C"},
    "_dispatch": {"_arrays", "_xla"},  # reference, triton_kernels and _C follow by name, when they are called
    "reference": set(),
    "triton_kernels": set(),
    "_C": set(),
    "_arrays": {"_xla"},
    "_xla": set(),  # _C follows by name
    "_files": set(),
    "data": {"data", "_files"},
    "report": {"report", "_files"},
    "testing": {"testing", "reference", "_dispatch", "_arrays", "_C"},
    "cli": {"cli", "algorithms", "data", "report", "testing", "_dispatch", "_C", "_files"},
}

MAY_KNOW_PYTHON = re.compile(r"\w+/\w+_bind\.cpp|module\.cpp|core/(view|bind|xla_call|cuda_workspace)\.(h|cpp)")
BANNED = re.compile(r"\b(TO" + "DO|FIX" + "ME|NotImplemented" + "Error)\\b")


def part_of(module: str) -> str:
    """ghostgram.ops.grad_stats -> ops."""
    return [*module.split("."), ""][1]


def cell_of(module: str) -> str | None:
    """The room or the algorithm that a module belongs to, if any: cells of one part do not know each other."""
    part, name = [*module.split("."), "", ""][1:3]
    is_cell = name in _dispatch.OPS if part == "ops" else part == "algorithms" and name.strip("_") != ""
    return f"{part}.{name}" if is_cell else None


def imports(source: str, module: str, is_package: bool) -> set[str]:
    """The modules of ghostgram that a source file imports, anywhere in it, relative imports resolved."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: len(module.split(".")) + is_package - node.level] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            from_tree = base in ("ghostgram", "ghostgram.ops", "ghostgram.algorithms")  # the names may be modules
            found |= {f"{base}.{alias.name}" for alias in node.names} if from_tree else {base}
    ours = {name for name in found if name.split(".")[0] == "ghostgram"}
    # `from ghostgram import InRunShapley` imports no part but the package itself.
    return {name if part_of(name) in ARROWS else "ghostgram" for name in ours}


def against_the_arrows(source: str, module: str, is_package: bool = False) -> list[str]:
    """Every import of a module of the package that the plan does not allow."""
    wrong = []
    for target in sorted(imports(source, module, is_package)):
        cells = cell_of(module), cell_of(target)
        neighbours = all(cells) and cells[0] != cells[1] and part_of(module) == part_of(target)
        if part_of(target) not in ARROWS[part_of(module)] or neighbours:
            wrong.append(f"{module} imports {target}")
    return wrong


def modules() -> list[tuple[Path, str]]:
    """All source files of the package with their module names."""
    trees = [(PACKAGE, "ghostgram"), (ROOT / "triton_kernels", "ghostgram.triton_kernels")]
    return [
        (path, ".".join([name, *path.relative_to(tree).with_suffix("").parts]).removesuffix(".__init__"))
        for tree, name in trees
        for path in sorted(tree.rglob("*.py"))
    ]


@pytest.mark.parametrize(("path", "module"), [pytest.param(path, module, id=module) for path, module in modules()])
def test_imports_follow_the_arrows(path, module):
    assert part_of(module) in ARROWS, f"{module}: a new part of the package needs its line in ARROWS"
    assert against_the_arrows(path.read_text(), module, path.stem == "__init__") == []


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("import ghostgram.taps", "ghostgram.ops.grad_stats"),
        ("from ghostgram import _dispatch", "ghostgram.reference.grad_stats"),
        ("def f():\n    from ..algorithms.pad import pad", "ghostgram.taps.linear"),
        ("from . import engine", "ghostgram.data.text.engine"),
        ("from ghostgram import grad_stats", "ghostgram.taps.linear"),
        ("from ghostgram.algorithms import mates", "ghostgram.algorithms.pad"),
        ("from .mates import scores", "ghostgram.algorithms.pad"),
        ("from ghostgram.ops.grad_stats import compute", "ghostgram.ops.other_op"),
        ("from ghostgram.ops import grad_stats", "ghostgram.ops.other_op"),
    ],
)
def test_the_checker_sees_violations(source, module, monkeypatch):
    monkeypatch.setitem(_dispatch.OPS, "other_op", _dispatch.Op(1, 1))
    monkeypatch.setitem(ARROWS, "data", {"_files"})
    assert len(against_the_arrows(source, module)) == 1


def test_the_checker_lets_arrows_pass():
    source = "import numpy\nfrom ghostgram import _arrays, _dispatch\nfrom . import _torch\nfrom ._torch import call"
    assert against_the_arrows(source, "ghostgram.ops.grad_stats") == []
    assert (
        against_the_arrows("from ghostgram.ops import grad_stats", "ghostgram.algorithms.mates.selection.select") == []
    )
    assert imports(source, "ghostgram.ops.grad_stats", False) == {
        *("ghostgram._arrays", "ghostgram._dispatch", "ghostgram.ops._torch")
    }


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_examples_use_the_public_face(path):
    private = [name for name in imports(path.read_text(), "example", False) if part_of(name).startswith("_")]
    assert private == []


@pytest.mark.parametrize("op", _dispatch.OPS)
def test_an_op_has_one_stem_in_every_tree(op):
    assert [path for path in (pattern.format(op=op) for pattern in OF_EVERY_OP) if not (ROOT / path).exists()] == []


def test_every_room_is_an_op():
    rooms = {path.name for path in (ROOT / "csrc").iterdir() if path.is_dir()} - NOT_A_ROOM
    assert rooms == {*_dispatch.OPS, *NOT_AN_OP}
    for tree in (PACKAGE / "reference", PACKAGE / "testing/cases", ROOT / "triton_kernels", ROOT / "docs/ops"):
        stems = {path.stem for path in tree.iterdir() if path.is_file() and not path.name.startswith("_")}
        assert stems <= set(_dispatch.OPS), tree


IMPORT_WITHOUT_TORCH = """
import sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NoTorch())
import {module}
"""


@pytest.mark.parametrize(
    ("module", "works"),
    [("ghostgram", True), ("ghostgram.algorithms.mates.influence.curve", True), ("ghostgram.taps", False)],
)
def test_the_package_imports_without_torch(module, works):
    done = subprocess.run([sys.executable, "-c", IMPORT_WITHOUT_TORCH.format(module=module)], capture_output=True)
    assert (done.returncode == 0) == works, done.stderr.decode()


def includes(path: Path) -> set[str]:
    """What a C++ source includes, itself."""
    return set(re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE))


def reached(path: Path) -> set[str]:
    """What a C++ source includes, directly or through our own headers."""
    seen: set[str] = set()
    ahead = includes(path)
    while ahead:
        name = ahead.pop()
        if name not in seen:
            seen.add(name)
            ahead |= includes(ROOT / "csrc" / name) if (ROOT / "csrc" / name).exists() else set()
    return seen


def knows_python(names: set[str]) -> bool:
    return any(name == "Python.h" or name.startswith("pybind11/") for name in names)


CPP = sorted(path for kind in ("h", "cpp", "cu", "cuh") for path in (ROOT / "csrc").rglob(f"*.{kind}"))
KERNELS = [
    path for path in CPP if re.search(r"_(cpu\.cpp|cuda\.cu|\w+\.cuh)$", path.name) and path.parent.name != "core"
]


def cpp_id(path: Path) -> str:
    return str(path.relative_to(ROOT / "csrc"))


@pytest.mark.parametrize("path", KERNELS, ids=cpp_id)
def test_kernels_see_their_own_contract_and_the_plinth(path):
    room = path.parent.name
    ours = {name for name in includes(path) if (ROOT / "csrc" / name).exists()}
    parts = re.compile(rf"core/.*|{room}/{room}(\.h|_\w+\.cuh)")  # parts of a room's own kernels among them
    assert [name for name in ours if not parts.fullmatch(name)] == []
    assert f"{room}/{room}.h" in ours
    assert not knows_python(reached(path))


@pytest.mark.parametrize("path", CPP, ids=cpp_id)
def test_python_stays_at_the_border(path):
    assert knows_python(includes(path)) <= bool(MAY_KNOW_PYTHON.fullmatch(cpp_id(path)))
    if path.suffix != ".cu" and not MAY_KNOW_PYTHON.fullmatch(cpp_id(path)):
        assert not knows_python(reached(path))


def test_the_include_reader_sees_python():
    assert knows_python(reached(ROOT / "csrc/module.cpp"))
    assert knows_python(reached(ROOT / "csrc/grad_stats/grad_stats_bind.cpp"))


def test_nothing_is_left_for_later():
    trees = ("csrc", "python", "triton_kernels", "tests", "benchmarks", "examples", "docs")
    files = [path for tree in trees for path in (ROOT / tree).rglob("*") if path.suffix != ".pyc" and path.is_file()]
    files += [path for path in ROOT.iterdir() if path.is_file() and path.suffix in ("", ".md", ".toml", ".txt")]
    left = {str(path.relative_to(ROOT)): BANNED.findall(path.read_text(errors="replace")) for path in files}
    assert {name: words for name, words in left.items() if words} == {}
    assert BANNED.search("# TO" + "DO: this pattern finds what it looks for")
