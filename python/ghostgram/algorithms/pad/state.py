"""How far a distillation has come, on disk: a checkpoint that is whole or absent, a log that survives a torn tail."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ghostgram._files import whole_file, write_atomically
from ghostgram.training.ranks import rank_and_size

CHECKPOINT, LOG = "checkpoint.pt", "log.jsonl"
_FORMAT = 1


class ChangedError(ValueError):
    """A run was begun with other settings or data than it is to go on with."""


@dataclass
class DistilledState:
    """What is being learned, with everything that the next iteration depends on."""

    images: Tensor
    """(n, C, H, W)"""
    label_logits: Tensor
    """(n, classes) logits, or (n,) int64 classes where labels are hard."""
    beta: Tensor
    """()"""
    momenta: dict[str, Tensor]
    """By name of what is learned, like it."""
    iteration: int = 0
    """How many are done."""
    tried: int = 0
    skipped: int = 0
    """Matches, and those left out because of their loss."""
    skipped_in_a_row: int = 0
    best: dict[str, Any] = field(default_factory=dict)
    """iteration, accuracies, images, label_logits and beta of the iterate that validation likes best; {} before any."""

    @classmethod
    def new(cls, images: Tensor, label_logits: Tensor, beta: float, learns_labels: bool) -> DistilledState:
        """The state before the first iteration."""
        step = torch.tensor(beta, dtype=images.dtype, device=images.device)
        learned = {"images": images, "beta": step, **({"label_logits": label_logits} if learns_labels else {})}
        momenta = {name: torch.zeros_like(value) for name, value in learned.items()}
        return cls(images.clone(), label_logits.clone(), step, momenta)

    def save(self, folder: Path, made_from: Mapping[str, Any]) -> None:
        """Writes the checkpoint, whole or not at all."""
        with whole_file(folder / CHECKPOINT) as temporary:
            torch.save(
                {"format": _FORMAT, "made_from": json.dumps(made_from), **vars(self)}, temporary
            )  # tensors and plain values alone: it is read without unpickling anything else

    @classmethod
    def load(
        cls, folder: Path, made_from: Mapping[str, Any], allow_changes: Collection[str], device: torch.device
    ) -> DistilledState | None:
        """The checkpoint of a folder, None where there is none yet.

        Raises:
            ChangedError: It is of a run with other settings or data; the message names what differs, beside its values.
        """
        if not (folder / CHECKPOINT).exists():
            return None
        saved = torch.load(folder / CHECKPOINT, map_location=device, weights_only=True)
        if saved.pop("format") != _FORMAT:
            raise ChangedError(f"{folder / CHECKPOINT}: written by another version of this library")
        refuse_changes(json.loads(saved.pop("made_from")), made_from, allow_changes, folder)
        return cls(**saved)


def refuse_changes(
    before: Mapping[str, Any], now: Mapping[str, Any], allow_changes: Collection[str], folder: Path
) -> None:
    """Raises ChangedError where values differ, except those whose names are allowed to."""
    now = json.loads(json.dumps(now))  # as they would be read
    changed = [n for n in {**before, **now} if before.get(n) != now.get(n) and n not in allow_changes]
    if changed:
        told = "; ".join(f"{name}: {before.get(name)!r} before, {now.get(name)!r} now" for name in changed)
        raise ChangedError(
            f"{folder}: begun with something else: {told}. Use another folder, or allow_changes={changed}"
        )


class RunLog:
    """A line of JSON for every iteration and every validation of a run; what lies behind a checkpoint is cut off.

    A "step" row has the iteration it did, from 0; a "validation" row how many were done before it.

    Args:
        folder: Of the run.
        iteration: How many iterations the run goes on from.

    Raises:
        ValueError: Lines of iterations before that are missing.
    """

    def __init__(self, folder: Path, iteration: int) -> None:
        self._path = folder / LOG
        rows = read_log(folder)
        kept = [r for r in rows if r["iteration"] < iteration + (r["kind"] == "validation")]
        if [r["iteration"] for r in kept if r["kind"] == "step"] != list(range(iteration)):
            raise ValueError(f"{self._path}: expected a line for each of {iteration} iterations, some are missing")
        write_atomically(self._path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (open as long as this object is)

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds a row."""
        self._file.write(json.dumps(row) + "\n")

    def to_disk(self) -> None:
        """Returns once all rows are there: before the checkpoint that counts on them."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._file.close()


def leads() -> bool:
    """Whether this process is the one that writes files."""
    return rank_and_size()[0] == 0


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's log; of a run that was killed, those that were written whole."""
    path = folder / LOG
    lines = path.read_text("utf-8").split("\n") if path.exists() else [""]
    return [json.loads(line) for line in lines[:-1]]
