"""Text domains that are here already: the interpreter's own sources, and the headers of an installed torch."""

import ast
import importlib.util
import json
import pydoc_data.topics
import sys
import sysconfig
from functools import cache
from pathlib import Path

import numpy as np

from .._files import write_atomically
from .packages import DomainUnavailable, cache_folder

# Installed packages, tests, and tables of characters.
_SKIPPED = {"site-packages", "test", "tests", "idle_test", "lib2to3", "pydoc_data", "encodings"}
_SHORTEST_DOCSTRING = 200
_MOST_HEADER_BYTES = 6_000_000  # of 24 MB: headers repeat themselves


def python_code() -> list[str]:
    """Modules of the standard library, docstrings cut out."""
    return _standard_library()["code"]


def tech_docs() -> list[str]:
    """Those docstrings and the language reference."""
    return [*pydoc_data.topics.topics.values(), *_standard_library()["docstrings"]]


@cache
def _standard_library() -> dict[str, list[str]]:
    """Code and docstrings apart, so that no text is in two domains; parsing takes seconds and is kept in the cache."""
    release = f"{sys.implementation.cache_tag}.{sys.version_info.micro}"
    cached = cache_folder() / f"standard-library-{release}.json"
    if not cached.exists():
        root = Path(sysconfig.get_path("stdlib"))
        files = [path for path in sorted(root.rglob("*.py")) if not _SKIPPED & set(path.relative_to(root).parts)]
        if not files:
            raise DomainUnavailable(f"python_code and tech_docs: no sources of the standard library under {root}")
        pairs = [_code_and_docstrings(path.read_text("utf-8", "replace")) for path in files]
        library = {"code": [code for code, _ in pairs], "docstrings": [text for _, texts in pairs for text in texts]}
        write_atomically(cached, json.dumps(library))
    return dict(json.loads(cached.read_text("utf-8")))


def _code_and_docstrings(source: str) -> tuple[str, list[str]]:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # templates and deliberately broken sources are shipped too
        return "", []
    docstrings, docstring_lines = [], set[int]()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if text := ast.get_docstring(node):
            docstring_lines.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
            if len(text) >= _SHORTEST_DOCSTRING:
                docstrings.append(text)
    lines = source.split("\n")  # as ast counts them; splitlines() would also break at form feeds
    return "\n".join(line for number, line in enumerate(lines, 1) if number not in docstring_lines), docstrings


def cpp_headers() -> list[str]:
    """C++ headers that come with torch."""
    torch = importlib.util.find_spec("torch")  # found, not imported
    if torch is None or torch.origin is None:
        raise DomainUnavailable("cpp_headers: torch, whose headers these are, is not installed")
    include = Path(torch.origin).parent / "include"
    # ATen/ops is generated: thousands of files alike.
    files = [path for path in sorted(include.rglob("*.h")) if "ops" not in path.parts]
    if not files:
        raise DomainUnavailable(f"cpp_headers: this torch comes without headers ({include})")
    shuffled = [files[i] for i in np.random.default_rng(0).permutation(len(files))]
    total = np.cumsum([path.stat().st_size for path in shuffled])
    return [path.read_text("utf-8", "replace") for path in shuffled[: int((total <= _MOST_HEADER_BYTES).sum())]]
