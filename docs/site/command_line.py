"""The page of the command line, written from the commands themselves."""

from __future__ import annotations

import subprocess
import sys

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

WRITE = [sys.executable, "-m", "typer", "ghostgram.cli.app", "utils", "docs", "--name", "ghostgram"]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the page."""
    done = subprocess.run([*WRITE, "--title", "Command line"], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the page of the command line could not be written:\n{done.stderr}")
    files.append(File.generated(config, "api/command_line.md", content=done.stdout))
    return files
