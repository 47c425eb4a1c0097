"""Expert trajectories on disk: a mapped array of weights, what it holds, and which of its rows are finished.

    experts.bin    [expert, kept epoch, P], little-endian float32 or float16
    header.json    parameters, kept epochs, recipe, seed, digests of the data; sealed
    done.jsonl     a sealed line for each finished (expert, epoch), with the digest of its bytes
    training/      while experts train: a checkpoint and a lock for each group

Rows are written first, recorded next, and only then passed by a checkpoint: docs/algorithms/pad_experts.md.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SCHEMA = 1
DTYPES = {"float32": "<f4", "float16": "<f2"}
ROWS, HEADER, LOG = "experts.bin", "header.json", "done.jsonl"


class StoreError(ValueError):
    """A store is missing, damaged, unfinished or of something else; the message names the place."""


@dataclass(frozen=True)
class Line:
    """What is known of a finished (expert, epoch)."""

    expert: int
    epoch: int
    digest: str
    """BLAKE2b-128 of the row's bytes; of an epoch that is not kept, of what its bytes would be."""
    loss: float | None
    """Mean over the batches of the epoch, each at the weights before its step; None at epoch 0."""
    accuracy: float | None
    """What the header's `accuracy` says: on the validation set, or on the epoch's training batches."""
    rounding: float
    """||stored - trained|| / ||trained||: 0 in float32."""


class Store:
    """Finished expert trajectories, read row by row: the file is mapped and never loaded whole.

    `store[expert, epoch]` gives the weights of a kept epoch: (P,) float32, read-only, no copy of a float32 store.

    Attributes:
        folder: Where it lies.
        header: What it says of itself: `docs/algorithms/pad_experts.md` lists the fields.
        experts: How many.
        epochs: The kept ones, ascending. 0 holds initial weights, epoch e those after e epochs of training.
        accuracy: (experts, epochs + 1) float64 of every epoch, kept or not; NaN where nothing was measured.
        loss: The same of the training loss.
    """

    def __init__(self, folder: str | Path, header: dict[str, Any], lines: Mapping[tuple[int, int], Line], check: bool):
        self.folder, self.header = Path(folder), header
        self.experts, self.epochs = int(header["experts"]), tuple(header["kept"])
        self._lines, self._check = lines, check
        self._seen: set[tuple[int, int]] = set()
        self._rows = mapped(self.folder, header)
        self.loss, self.accuracy = self._curve("loss"), self._curve("accuracy")

    @classmethod
    def open(cls, folder: str | Path, expect: Mapping[str, Any] | None = None, check: bool = True) -> Store:
        """Opens a store for reading.

        Args:
            folder: Where `record` put it.
            expect: What the header has to say, as far as the caller cares, such as {"dataset": digest}.
            check: Compare the digest of every row when it is first read.

        Raises:
            StoreError: There is none, its header is damaged or says something else, a line of its log is damaged, the
                file of rows has another size, or an expert is not finished.
        """
        folder = Path(folder)
        header = read_header(folder)
        if header is None:
            raise StoreError(f"{folder / HEADER}: does not exist")
        differs(folder, expect or {}, header)
        lines = read_log(folder)
        for expert in range(header["experts"]):
            for epoch in range(header["epochs"] + 1):
                if (expert, epoch) not in lines:
                    raise StoreError(
                        f"{folder}: expert {expert}, epoch {epoch} is not recorded: record() with the same arguments "
                        "goes on where it stopped"
                    )
        return cls(folder, header, lines, check)

    def __getitem__(self, place: tuple[int, int]) -> NDArray[np.float32]:
        expert, epoch = place
        if not 0 <= expert < self.experts:
            raise IndexError(f"expert: expected 0 to {self.experts - 1}, got {expert}")
        if epoch not in self.epochs:
            raise IndexError(f"epoch: expected a kept one ({shown(self.epochs)}), got {epoch}")
        row = self._rows[expert, self.epochs.index(epoch)]
        if self._check and place not in self._seen:
            if (found := digest(row)) != (line := self._lines[place]).digest:
                raise StoreError(
                    f"{self.folder / ROWS}: expert {expert}, epoch {epoch}: expected bytes of digest {line.digest}, "
                    f"got {found}"
                )
            self._seen.add((expert, epoch))
        weights: NDArray[np.float32] = np.asarray(row, np.float32)
        return weights

    def _curve(self, name: str) -> NDArray[np.float64]:
        values = np.full((self.experts, self.header["epochs"] + 1), math.nan)
        for (expert, epoch), line in self._lines.items():
            if (value := getattr(line, name)) is not None:
                values[expert, epoch] = value
        return values


def mapped(folder: Path, header: Mapping[str, Any]) -> NDArray[Any]:
    """The rows, [expert, kept epoch, P], mapped for reading.

    Raises:
        StoreError: The file is missing or of another size.
    """
    path, expected = folder / ROWS, size(header)
    found = path.stat().st_size if path.exists() else "no file"
    if found != expected:
        raise StoreError(f"{path}: expected {expected} bytes, got {found}")
    shape = (header["experts"], len(header["kept"]), header["parameters"])
    return np.memmap(path, DTYPES[header["dtype"]], "r", shape=shape)


def size(header: Mapping[str, Any]) -> int:
    """Bytes of the rows."""
    scalars: int = header["experts"] * len(header["kept"]) * header["parameters"]
    return scalars * np.dtype(DTYPES[header["dtype"]]).itemsize


def digest(row: NDArray[Any]) -> str:
    """BLAKE2b-128 of the bytes of an array, as 32 hexadecimal digits."""
    return hashlib.blake2b(np.ascontiguousarray(row).data, digest_size=16).hexdigest()


def read_header(folder: Path) -> dict[str, Any] | None:
    """The header of a store; None where there is none.

    Raises:
        StoreError: It is damaged, or of another schema.
    """
    path = folder / HEADER
    if not path.exists():
        return None
    header = unsealed(path.read_text())
    if header is None:
        raise StoreError(f"{path}: damaged: its contents do not match its seal")
    differs(folder, {"schema": SCHEMA}, header)
    return header


def read_log(folder: Path) -> dict[tuple[int, int], Line]:
    """The finished (expert, epoch); of several lines for one the last. An end without a newline was torn: no line yet.

    Raises:
        StoreError: A line is damaged.
    """
    path = folder / LOG
    *whole, _ = path.read_text(errors="replace").split("\n") if path.exists() else [""]
    lines = {}
    for number, text in enumerate(whole, 1):
        if (record := unsealed(text)) is None:
            raise StoreError(f"{path}: line {number}: damaged: its contents do not match its seal")
        line = Line(**record)
        lines[line.expert, line.epoch] = line
    return lines


def written(line: Line) -> str:
    """A line as it stands in the log."""
    return sealed(asdict(line)) + "\n"


def sealed(record: Mapping[str, Any], indent: int | None = None) -> str:
    """JSON with a digest of itself: what was cut or edited is recognised."""
    return json.dumps({**record, "seal": _seal(record)}, indent=indent, allow_nan=False)


def unsealed(text: str) -> dict[str, Any] | None:
    """What was sealed; None if it is no longer that."""
    try:
        record = json.loads(text)
        seal = record.pop("seal")
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return record if seal == _seal(record) else None


def _seal(record: Mapping[str, Any]) -> str:
    text = json.dumps(record, sort_keys=True, allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def differs(folder: Path, expected: Mapping[str, Any], header: Mapping[str, Any]) -> None:
    """Refuses a header that does not say what it should.

    Raises:
        StoreError: The first field that differs, with both values.
    """
    for name, value in json.loads(json.dumps(dict(expected))).items():
        if header.get(name) != value:
            raise StoreError(f"{folder / HEADER}: {name}: expected {shown(value)}, got {shown(header.get(name))}")


def shown(value: Any) -> str:
    """A value in a message, of which a long one keeps both ends."""
    text = ", ".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else repr(value)
    return text if len(text) <= 200 else f"{text[:100]} ... {text[-100:]}"
