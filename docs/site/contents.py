"""The table of contents: patterns of pages become the pages that are there, each in the first place that names it."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import Files


@event_priority(-100)  # when all pages are known, those that other hooks make too
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Fills in `nav`."""
    left = sorted(file.src_uri for file in files.documentation_pages())
    config.nav = _filled(config.nav, left)
    return files


def _filled(entry: Any, left: list[str]) -> list[Any]:
    """What an entry of `nav` stands for; takes its pages out of those that are left. A place without pages vanishes."""
    if isinstance(entry, list):
        return [found for part in entry for found in _filled(part, left)]
    if isinstance(entry, dict):
        (title, part), *_ = entry.items()
        found = _filled(part, left)
        return [{title: found[0] if isinstance(part, str) else found}] if found else []
    pages = [page for page in left if fnmatchcase(page, entry)]
    left[:] = [page for page in left if page not in pages]
    return pages
