"""Files outside docs/ that pages link to, or name in backticks, become pages of the site; links lead there.

So the same Markdown works on the site, which is whole without a network, and where the repository is browsed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
ALWAYS = ("CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md")
RESULTS = "benchmarks/results/*.md"
LANGUAGES = {
    **{".py": "python", ".toml": "toml", ".sh": "bash"},
    **{".c": "c", ".h": "cpp", ".cpp": "cpp", ".cu": "cpp", ".cuh": "cpp"},
}
ABOVE = ("", "python/ghostgram", "python/ghostgram/algorithms", "csrc")  # what paths in the text are relative to

FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<=\]\()(?P<link>[^)#:\s]+)(?P<anchor>(?:#[^)\s]*)?)(?=\))")
MENTION = re.compile(rf"(?<![\[`])`(?P<path>[\w./]+\.(?:md|{'|'.join(suffix[1:] for suffix in LANGUAGES)}))`(?![\]`])")
PAGE_OF_CODE = """---
search:
  exclude: true
---

# {path}

````{language}
{text}````
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds a page for every file outside docs/ that can be reached from the pages by links and mentions."""
    waiting = [file for file in files.documentation_pages() if not file.generated_by]
    outside = [*ALWAYS, *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob(RESULTS)))]
    seen: set[str] = set()
    while waiting or outside:
        while outside:
            if (path := outside.pop()) not in seen:
                seen.add(path)
                file = File.generated(config, page_of(path), content=_content(path))
                files.append(file)
                waiting += [file] if path.endswith(".md") else []
        if waiting:
            file = waiting.pop()
            found = _targets(file.content_string, path_of(file.src_uri))
            outside += [path for path in found if page_of(path).startswith("repository/")]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Makes links of what a page names in backticks, and leads links out of docs/ to the pages made for them."""
    here = page.file.src_uri
    if here.startswith("repository/") and not path_of(here).endswith(".md"):
        return markdown

    def lead(path: str) -> str | None:
        if files.get_file_from_path(page_of(path)) is None:
            return None
        return os.path.relpath(page_of(path), os.path.dirname(here) or ".")

    def link(match: re.Match[str]) -> str:
        path = resolve(match["link"], path_of(here), ("",))
        target = path and lead(path)
        return f"{target}{match['anchor']}" if target else match[0]

    def mention(match: re.Match[str]) -> str:
        path = resolve(match["path"], path_of(here), ABOVE)
        target = path and path != path_of(here) and lead(path)
        return f"[{match[0]}]({target})" if target else match[0]

    return outside_fences(markdown, lambda text: MENTION.sub(mention, LINK.sub(link, text)))


def page_of(path: str) -> str:
    """The page that shows a file of the repository: docs/taps.md -> taps.md, csrc/x.h -> repository/csrc/x.h.md."""
    if path.startswith("docs/") and path.endswith(".md"):
        return path.removeprefix("docs/")
    return f"repository/{path}" if path.endswith(".md") else f"repository/{path}.md"


def path_of(page: str) -> str:
    """The file of the repository that a page shows: the inverse of `page_of`."""
    if not page.startswith("repository/"):
        return f"docs/{page}"
    path = page.removeprefix("repository/")
    return path if (ROOT / path).is_file() else path.removesuffix(".md")


def resolve(name: str, page: str, above: tuple[str, ...]) -> str | None:
    """The file, by its path from the root, that a file of the repository names; None where there is none."""
    for folder in (os.path.dirname(page), *above):
        path = os.path.normpath(os.path.join(folder, name))
        if not path.startswith("..") and (ROOT / path).is_file():
            return path
    return None


def outside_fences(markdown: str, change: Callable[[str], str]) -> str:
    """The text with its parts outside fenced code changed."""
    parts, end = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [change(markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, change(markdown[end:])])


def _targets(markdown: str, page: str) -> set[str]:
    text = FENCE.sub("", markdown)
    links = {resolve(match["link"], page, ("",)) for match in LINK.finditer(text)}
    mentions = {resolve(match["path"], page, ABOVE) for match in MENTION.finditer(text)}
    return {path for path in links | mentions if path}


def _content(path: str) -> str:
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".md"):
        return text
    return PAGE_OF_CODE.format(path=path, language=LANGUAGES.get(Path(path).suffix, "text"), text=text)
