"""The site is built without a warning, is whole without a network, and shows every public name and measured row."""

import json
import os
import re
import subprocess
import sys
from html import unescape
from pathlib import Path
from urllib.parse import unquote

import pytest

from test_docstrings import public

ROOT = Path(__file__).parents[1]
LEADS = re.compile(r'<(?:a|link|script|img)\b[^>]*?\b(?:href|src)="?([^"\s>]+)')
IDS = re.compile(r'\bid="?([^"\s>]+)')


def build(config, site):
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", config, "--site-dir", site],
        capture_output=True,
        text=True,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT / "mkdocs.yml", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {path: path.read_text() for path in site.rglob("*.html")}


def test_every_link_leads_somewhere(site, pages):
    ids = {path: {unescape(found) for found in IDS.findall(text)} for path, text in pages.items()}
    wrong = []
    for path, text in pages.items():
        for lead in map(unescape, LEADS.findall(text)):
            name, _, anchor = lead.partition("#")
            if path.name == "404.html" or re.match(r"\w+:", lead):
                continue
            target = (path.parent / unquote(name.partition("?")[0])).resolve() if name else path
            if not target.is_file() or (anchor and unquote(anchor) not in ids[target]):
                wrong.append(f"{path.relative_to(site)}: {lead}")
    assert wrong == []
    assert len(pages) > 50


def test_nothing_is_fetched_from_elsewhere(pages):
    outside = re.compile(r'<(?:link|script|img)\b[^>]*"https?:[^>]*>')
    assert {found for text in pages.values() for found in outside.findall(text)} == set()


def test_every_public_name_is_in_the_reference(pages):
    ids = {found for path, text in pages.items() if path.parent.name == "api" for found in IDS.findall(text)}
    assert [param.id for param in public() if param.id not in ids] == []


def test_every_command_is_in_the_reference(site):
    from typer.main import get_command

    from ghostgram.cli.app import app

    text = (site / "api/command_line.html").read_text()
    assert [name for name in get_command(app).commands if f"ghostgram {name}" not in text] == []


def test_every_measured_row_is_in_the_tables(site):
    files = [json.loads(path.read_text()) for path in sorted((ROOT / "benchmarks/results").rglob("*.json"))]
    entries = [(name, entry) for file in files for name, entry in file.items() if "rows" in entry]
    rows = [row for name, entry in entries if name != "peers" for row in entry["rows"]]
    text = (site / "benchmarks.html").read_text()
    assert text.count("<tr>") - text.count("<thead>") == len(rows) > 0
    op = next(row for row in rows if "gflops" in row)
    cells = re.findall(r"<td[^>]*>([^<]*)", text)
    assert {op["shape"], f"{op['gflops']:.3g}", f"{op['gbytes']:.3g}", f"{op['percent_of_roof']:.3g}"} <= {*cells}


@pytest.mark.parametrize(
    ("text", "sayings"),
    [
        ("[one](index.md#two) [two](two.md)", ("'index.md#two', but there is no", "'two.md', but the target")),
        ("::: ghostgram.no_such_name", ("ghostgram.no_such_name could not be found",)),
    ],
)
def test_what_is_broken_fails(tmp_path, text, sayings):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/index.md").write_text(text)
    config = f"INHERIT: {ROOT}/mkdocs.yml\ndocs_dir: docs\nhooks: []\nnav: []\nextra_css: []\n"
    (tmp_path / "mkdocs.yml").write_text(config)
    done = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert done.returncode != 0
    assert [each for each in sayings if each not in done.stderr] == []
