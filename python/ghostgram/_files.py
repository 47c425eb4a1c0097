"""Files and folders that are seen either whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

TORN = ".tmp"
"""How the name of a temporary file or folder ends; one that is found was left by a process that was killed."""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a temporary file beside `path` to write to, and renames it there; on failure nothing is left behind.

    Contents reach the disk before the name does, and the name before this returns, so what was written survives a
    power cut as well as a kill.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-", suffix=TORN)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)  # mkstemp makes files that only their owner may read
        _to_disk(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink()
        raise
    _to_disk(path.parent)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Gives a temporary folder beside `path` to fill, and renames it there; on failure nothing is left behind.

    As for `whole_file`, contents reach the disk before the name does, and the name before this returns.

    Raises:
        OSError: `path` is a folder that is not empty, or a file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-", suffix=TORN))
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp makes folders that only their owner may enter
        for each in [*temporary.rglob("*"), temporary]:
            _to_disk(each)
        temporary.replace(path)
    except BaseException:
        shutil.rmtree(temporary)
        raise
    _to_disk(path.parent)


def sweep(folder: Path) -> None:
    """Deletes what killed processes have left in a folder and those below; nothing else may be writing there."""
    for torn in list(folder.rglob(f".*{TORN}")):
        if torn.is_dir():
            shutil.rmtree(torn)
        else:
            torn.unlink(missing_ok=True)  # with a torn folder, perhaps


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Writes a UTF-8 file, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_arrays(path: Path, **arrays: Any) -> None:
    """Writes an .npz, whole or not at all."""
    with whole_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)
