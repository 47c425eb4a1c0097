"""Writing a store: rows, then what says that they are finished, then the checkpoint that goes on from them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ghostgram._files import TORN, whole_file, write_arrays
from ghostgram.algorithms.pad.experts import store
from ghostgram.algorithms.pad.experts.store import HEADER, LOG, ROWS, Line, StoreError

ENVIRONMENT = ("version", "torch", "device", "threads")
"""Fields of a header that change no formula, but may change the last bits."""

F32 = NDArray[np.float32]


@contextmanager
def held(path: Path, wait: bool = True) -> Iterator[bool]:
    """Holds a file's lock, which its process cannot outlive; gives whether it is ours, False only without `wait`."""
    import fcntl

    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


class Recorder:
    """The writing side of a store. Several processes may write to one, each to experts of its own.

    Args:
        folder: Where the store is, or is to be.
        header: What it says of itself. One that is there has to say the same; where only the environment differs, that
            is warned of.

    Raises:
        StoreError: The folder holds a store of something else, or a damaged one.
    """

    def __init__(self, folder: Path, header: Mapping[str, Any]) -> None:
        self.folder, self.header = folder, header
        self._had: dict[tuple[int, int], Line] = {}
        folder.mkdir(parents=True, exist_ok=True)
        with held(folder / LOG):
            self._sweep(HEADER)
            found = store.read_header(folder)
            if found is None and store.read_log(folder):
                raise StoreError(f"{folder / HEADER}: does not exist, but {LOG} says that experts are finished")
            if found is None:
                with whole_file(folder / HEADER) as temporary:
                    temporary.write_text(store.sealed(header, indent=1) + "\n", encoding="utf-8")
            else:
                self._compare(found)
            with open(folder / ROWS, "ab") as rows:  # which a kill may have left empty
                if rows.tell() == 0:
                    rows.truncate(store.size(header))
            store.mapped(folder, header)

    def _compare(self, found: Mapping[str, Any]) -> None:
        lasting = {name: value for name, value in self.header.items() if name not in ENVIRONMENT}
        store.differs(self.folder, lasting, found)
        for name in ENVIRONMENT:
            if found.get(name) != self.header[name]:
                warnings.warn(
                    f"{self.folder}: begun with {name} {found.get(name)}, now {self.header[name]}: what is trained now "
                    "may differ in its last bits from an undisturbed run",
                    stacklevel=4,
                )

    def write(self, rows: Mapping[tuple[int, int], NDArray[Any]], lines: Iterable[Line]) -> None:
        """Puts rows into the file and, once they are on the disk, lines into the log; those it has are not repeated.

        Args:
            rows: (P,) weights by expert and kept epoch, of the store's dtype.
            lines: What is finished with them.
        """
        width, kept = self.header["parameters"], self.header["kept"]
        with open(self.folder / ROWS, "r+b") as file:
            for (expert, epoch), row in rows.items():
                file.seek((expert * len(kept) + kept.index(epoch)) * width * row.itemsize)
                file.write(row.tobytes())  # not through a map: a full disk is an error here, and a signal there
            _to_disk(file)
        new = [line for line in lines if self._had.get((line.expert, line.epoch)) != line]
        with held(self.folder / LOG), open(self.folder / LOG, "r+b") as log:
            _cut_torn_end(log)
            log.write("".join(map(store.written, new)).encode())
            _to_disk(log)
        self._had.update({(line.expert, line.epoch): line for line in new})

    def unsound(self, experts: Iterable[int], until: int) -> dict[tuple[int, int], bool]:
        """The (expert, epoch) up to an epoch whose rows are not what the log says, and whether it says anything."""
        rows, kept = store.mapped(self.folder, self.header), self.header["kept"]

        def sound(expert: int, epoch: int) -> bool:
            line = self._had.get((expert, epoch))
            if line is None or epoch not in kept:
                return line is not None
            return store.digest(rows[expert, kept.index(epoch)]) == line.digest

        places = [(expert, epoch) for expert in experts for epoch in range(until + 1)]
        return {place: place in self._had for place in places if not sound(*place)}

    # -------------------------------------------------------------------------- what a group of experts goes on from

    @contextmanager
    def taken(self, first: int, wait: bool) -> Iterator[bool]:
        """Keeps other processes from the group whose first expert this is; gives False where one has it.

        `finish` deletes the lock's file under those that wait for it; whoever gets a deleted one finds nothing to do.
        """
        with held(self._at(first, "lock"), wait) as ours:
            if ours:
                self._sweep(self._at(first, "npz").name)
                self._had = store.read_log(self.folder)
            yield ours

    def checkpoint(self, first: int) -> tuple[int, F32] | None:
        """The epoch and the (experts, P) weights that a group was left at."""
        path = self._at(first, "npz")
        if not path.exists():
            return None
        with np.load(path) as saved:
            return int(saved["epoch"]), saved["weights"]

    def save(self, first: int, epoch: int, weights: F32) -> None:
        """Writes a group's checkpoint, whole or not at all."""
        write_arrays(self._at(first, "npz"), epoch=epoch, weights=weights)

    def finish(self, first: int) -> None:
        """Deletes what only training needed."""
        for kind in ("npz", "lock"):
            self._at(first, kind).unlink(missing_ok=True)

    def _at(self, first: int, kind: str) -> Path:
        return self.folder / f"training-{first:04d}.{kind}"

    def _sweep(self, name: str) -> None:
        for torn in self.folder.glob(f".{name}-*{TORN}"):
            torn.unlink()


def _cut_torn_end(log: BinaryIO) -> None:
    """Cuts off a line that its process could not end, and stands at the end."""
    if log.seek(0, os.SEEK_END):
        log.seek(-1, os.SEEK_END)
        if log.read(1) != b"\n":
            log.seek(0)
            log.truncate(log.read().rfind(b"\n") + 1)
    log.seek(0, os.SEEK_END)


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
