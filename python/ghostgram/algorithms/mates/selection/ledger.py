"""Which documents were planned and which trained on: append-only, in files that are whole or absent."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from ghostgram._files import sweep, whole_file
from ghostgram.algorithms.mates.selection import ids as id_sets
from ghostgram.algorithms.mates.selection.plan import Plan

_PART = re.compile(r"stage-(\d{5})-(planned|consumed)-(\d{12})-(\d{12})\.parquet")


class Ledger:
    """A folder of parquet files with the columns doc_id, stage and state ("planned" or "consumed").

    A plan is entered whole; the trainer then reports how far it has come, and that beginning of the plan is entered as
    consumed. Documents that were planned and never trained on stay eligible. Every file holds one range of positions of
    one stage's plan, which its name says, so that entering anything again changes nothing, and a process may be killed
    at any moment. One process writes at a time.

    Args:
        folder: Where the files are or will be.
        reuse: In how many stages a document may be trained on.

    Raises:
        ValueError: `reuse` is less than 1.
    """

    def __init__(self, folder: str | Path, reuse: int = 1):
        if reuse < 1:
            raise ValueError(f"reuse: expected at least 1, got {reuse}")
        self.folder, self.reuse = Path(folder), reuse

    def plan(self, plan: Plan, stage: int) -> None:
        """Enters the documents of a stage's plan.

        Raises:
            ValueError: The stage has another plan already.
        """
        ids = plan.table["doc_id"].combine_chunks()
        known = self._parts(stage, "planned")
        if known:
            if not self._ids(known[0][2]).equals(ids):
                raise ValueError(f"plan: expected the plan that stage {stage} has in {self.folder}, got another one")
            return
        self._write(stage, "planned", 0, ids)

    def consume(self, stage: int, position: int) -> None:
        """Enters the first `position` documents of the stage's plan as trained on. Less than before changes nothing.

        Raises:
            ValueError: The stage has no plan, or fewer documents.
        """
        planned = self._parts(stage, "planned")
        if not planned:
            raise ValueError(f"stage: expected one with a plan in {self.folder}, got {stage}")
        _, stop, path = planned[0]
        if not 0 <= position <= stop:
            raise ValueError(f"position: expected 0 to {stop}, the documents of stage {stage}, got {position}")
        done = self.consumed(stage)
        if position > done:
            self._write(stage, "consumed", done, self._ids(path)[done:position])

    def consumed(self, stage: int) -> int:
        """How many documents of the stage's plan were trained on: a beginning of it."""
        return max((stop for _, stop, _ in self._parts(stage, "consumed")), default=0)

    def spent(self, before: int) -> id_sets.IdSet | None:
        """The documents that stages before this one have used up, or None if there are none.

        What the stage itself has consumed is left out, so that its plan can be drawn again and is the same.

        Cost:
            Memory of about 40 bytes for each document ever trained on.
        """
        used: list[Any] = []
        for stage in range(before):
            held = [id_sets.words(self._ids(path)) for _, _, path in self._parts(stage, "consumed")]
            used += [id_sets.distinct(np.concatenate(held))[0]] if held else []
        if not used:
            return None
        ids, stages = id_sets.distinct(np.concatenate(used))
        ids = ids[stages >= self.reuse]
        return id_sets.IdSet(ids) if len(ids) else None

    def _parts(self, stage: int, state: str) -> list[tuple[int, int, Path]]:
        """First position, end and path of the files of a stage, in order."""
        paths = self.folder.glob(f"stage-{stage:05d}-{state}-*.parquet")
        found = [(_PART.fullmatch(path.name), path) for path in paths]
        return sorted((int(name[3]), int(name[4]), path) for name, path in found if name)

    def _ids(self, path: Path) -> Any:
        import pyarrow.parquet as pq

        return pq.read_table(path, columns=["doc_id"])["doc_id"].combine_chunks()

    def _write(self, stage: int, state: str, start: int, ids: Any) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        sweep(self.folder)
        n = len(ids)
        table = pa.table(
            {
                "doc_id": ids,
                "stage": pa.array(np.full(n, stage, np.int32)),
                "state": pa.array([state] * n, pa.string()),
            }
        )
        with whole_file(self.folder / f"stage-{stage:05d}-{state}-{start:012d}-{start + n:012d}.parquet") as temporary:
            pq.write_table(table, temporary)
