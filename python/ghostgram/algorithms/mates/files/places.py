"""Folders of whole files: on a local disk, or below any URI that fsspec knows."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ghostgram._files import sweep, whole_file


def plain(path: str | Path) -> str:
    """A path as it is written below: a local one without its file://."""
    return str(path).removeprefix("file://")


def remote(path: str) -> tuple[Any, str] | None:
    """fsspec's file system and the path in it, of a URI; None for a local path.

    Raises:
        ImportError: fsspec, or what it needs for this kind of URI, is not installed.
    """
    if "://" not in path:
        return None
    try:
        from fsspec.core import url_to_fs
    except ImportError as why:
        raise ImportError(f"{path}: URIs need fsspec: pip install fsspec, and what it names for this one") from why
    filesystem, inside = url_to_fs(path)
    return filesystem, inside


def opened(path: str) -> BinaryIO:
    """A file, open for reading bytes: local, or of any URI that fsspec knows."""
    if (where := remote(path)) is None:
        return Path(path).open("rb")
    file: BinaryIO = where[0].open(where[1], "rb")
    return file


class Place:
    """A folder whose files are written whole or not at all.

    Locally that is a temporary file, fsync, rename, and fsync of the folder; elsewhere one atomic put, which is what
    object stores offer. Files are small enough to be held in memory.

    Args:
        folder: A local path, or a URI such as s3://bucket/run.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = plain(folder).rstrip("/")
        self._remote = remote(self.folder)

    def __truediv__(self, name: str) -> str:
        """The full name of a file, for messages."""
        return f"{self.folder}/{name}"

    def write(self, name: str, data: bytes) -> None:
        """Writes a file, folders above it included; one of that name is replaced."""
        if self._remote is None:
            with whole_file(Path(self / name)) as temporary:
                temporary.write_bytes(data)
        else:
            filesystem, inside = self._remote
            filesystem.makedirs(f"{inside}/{name}".rpartition("/")[0], exist_ok=True)
            filesystem.pipe_file(f"{inside}/{name}", data)

    def read(self, name: str) -> bytes | None:
        """A file's contents; None where there is no such file."""
        try:
            if self._remote is None:
                return Path(self / name).read_bytes()
            filesystem, inside = self._remote
            data: bytes = filesystem.cat_file(f"{inside}/{name}")
            return data
        except FileNotFoundError:
            return None

    def names(self, below: str, suffix: str) -> list[str]:
        """The files of a folder below this one that end in `suffix`, sorted, without the suffix."""
        if self._remote is None:
            local = Path(self / below)
            found = [path.name for path in local.iterdir()] if local.is_dir() else []
        else:
            filesystem, inside = self._remote
            there = f"{inside}/{below}"
            listed = filesystem.ls(there, detail=False, refresh=True) if filesystem.isdir(there) else []
            found = [path.rpartition("/")[2] for path in listed]
        return sorted(name.removesuffix(suffix) for name in found if name.endswith(suffix) and name[0] != ".")

    def sweep(self) -> None:
        """Deletes what killed processes left; nothing else may be writing here."""
        if self._remote is None:
            sweep(Path(self.folder))

    def write_tree(self, folder: Path) -> None:
        """Writes all files of a local folder, each whole."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.write(path.relative_to(folder).as_posix(), path.read_bytes())

    @contextmanager
    def tree(self) -> Iterator[Path]:
        """A local folder with the files of this one: itself, or a copy that lasts as long as the context."""
        if self._remote is None:
            yield Path(self.folder)
            return
        filesystem, inside = self._remote
        with tempfile.TemporaryDirectory() as copy:
            for path in filesystem.find(inside, refresh=True):
                local = Path(copy, path.removeprefix(f"{inside}/"))
                local.parent.mkdir(parents=True, exist_ok=True)
                local.write_bytes(filesystem.cat_file(path))
            yield Path(copy)
