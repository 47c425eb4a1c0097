"""Every page of the documentation is reached from the README, and no page names one that is not there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")] + sorted(
    ROOT.glob("docs/**/*.md")
)
LINK = re.compile(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)")
MENTION = re.compile(r"`((?:docs|benchmarks)/[^`\s]*\.md|docs/[^`\s]*/|CONTRIBUTING\.md)`")


def named_by(page):
    """The files that a page links to, or names by their path; `<op>` stands for every op."""
    text = page.read_text()
    links = [page.parent / link for link in LINK.findall(text)]
    mentions = [path for name in MENTION.findall(text) for path in mentioned(name)]
    return {path.resolve() for path in links + mentions}


def mentioned(name):
    if name.endswith("/"):
        return sorted((ROOT / name).glob("*.md")) or [ROOT / name]
    if "<" in name:
        return sorted(ROOT.glob(re.sub(r"<\w+>", "*", name))) or [ROOT / name]
    return [ROOT / name]


SOURCE = re.compile(r"`((?:[\w.]+/)+[\w.]+\.(?:py|h|cpp|cuh?|toml))`")
ABOVE = [ROOT / folder for folder in ("", "python/ghostgram", "python/ghostgram/algorithms", "csrc")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_names_sources_that_are_there(page):
    names = SOURCE.findall(page.read_text())
    assert [name for name in names if not any((folder / name).is_file() for folder in (page.parent, *ABOVE))] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_names_files_that_are_there(page):
    assert [str(path) for path in sorted(named_by(page)) if not path.exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_lists_begin_after_a_blank_line(page):
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    hidden = re.findall(r"^(?![-*] |\d+\. | |\n).+\n(?:[-*]|\d+\.) .*", prose, re.MULTILINE)
    assert hidden == []  # on the site they would be no lists


@pytest.mark.parametrize("name", ["in_run_shapley", "selection", "mates", "pad", "velocitune"])
def test_a_method_says_when_to_use_it_what_it_costs_and_what_goes_wrong(name):
    headings = re.findall(r"^## (.*)", (ROOT / f"docs/algorithms/{name}.md").read_text(), re.MULTILINE)
    assert {"When to use it", "Cost", "Pitfalls"} <= {*headings}


@pytest.mark.parametrize("name", ["index", "quickstart"])
def test_snippets_run_as_they_stand(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / f"docs/{name}.md").read_text()
    names: dict[str, object] = {}
    for block in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        line = text.count("\n", 0, block.start(1))
        exec(compile("\n" * line + block[1], f"docs/{name}.md", "exec"), names)
    assert name == "index" or "shapley" in names


def test_every_page_is_reached_from_the_readme():
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page not in reached and page.suffix == ".md" and page.exists():
            reached.add(page)
            waiting += named_by(page)
    assert [str(page.relative_to(ROOT)) for page in PAGES if page not in reached] == []
