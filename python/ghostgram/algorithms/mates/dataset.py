"""The documents of plans, one after another, as a training loop reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from ghostgram._files import whole_file
from ghostgram.algorithms.mates.files.pool import Pool
from ghostgram.algorithms.mates.selection.plan import Plan
from ghostgram.training.ranks import rank_and_size

TEXTS = "texts.arrow"


class PlanExhausted(RuntimeError):
    """Training has come to the end of its plan, and there is no next one."""


def write_texts(plan: Plan, pool: Pool, path: Path) -> None:
    """Writes a plan's documents in training order: an Arrow file with doc_id and text, which readers map into memory.

    Cost:
        One pass over the shards that the plan draws from; memory for the text of the plan.
    """
    import pyarrow as pa

    shards, rows = plan.table["shard"].to_numpy(), plan.table["row"].to_numpy()
    order = np.lexsort((rows, shards))
    parts = []
    for number in np.unique(shards):
        wanted, start = np.sort(rows[shards == number]), 0
        for table in pool.documents(pool.shards[number]):
            inside = wanted[(wanted >= start) & (wanted < start + len(table))] - start
            parts.append(table.select(["doc_id", "text"]).take(inside))
            start += len(table)
    back = np.empty(len(order), np.int64)
    back[order] = np.arange(len(order))
    texts = pa.concat_tables(parts).take(back) if parts else pa.table({"doc_id": [], "text": []})
    if texts["doc_id"].combine_chunks() != plan.table["doc_id"].combine_chunks():
        raise ValueError("plan: expected the documents of this pool, got others")
    with whole_file(path) as temporary, pa.ipc.new_file(str(temporary), texts.schema) as writer:
        writer.write_table(texts, max_chunksize=1024)


class PlanDataset(IterableDataset[Any]):
    """Plans' documents in training order, without end: when a new plan is there, the next document is its first.

    What was trained on is told by the number of documents: batches that a loader has read ahead from an old plan are
    that plan's, whenever they are trained on.

    Args:
        item: What becomes of a document: from its text to what the loader's collate function takes.
        shared: Whether the processes of torch.distributed share the documents out, of every so many one each. Without,
            all of them read everything, for a trainer that shares out what was read.

    Raises:
        PlanExhausted: (while iterating) The last plan is at its end.
        ValueError: (while iterating) The loader has worker processes: they could not be told of new plans.
    """

    def __init__(self, item: Callable[[str], Any], *, shared: bool = False) -> None:
        self.item, self.shared = item, shared
        self._plans: list[tuple[int, int, str]] = []  # (stage, documents read before it, file)
        self._read = 0

    @property
    def has_plan(self) -> bool:
        """Whether there is anything to read."""
        return bool(self._plans)

    @property
    def read(self) -> int:
        """How many documents have been read in all, by this process or by others that share them."""
        return self._read

    def switch(self, stage: int, path: str | Path) -> None:
        """Reads the file that `write_texts` wrote for a stage, from the next document on.

        Args:
            stage: The number of the stage.
            path: That file.
        """
        self._plans.append((stage, self._read, str(path)))

    def position(self, documents: int) -> dict[int, int]:
        """How far each stage's plan has been trained on after so many documents in all."""
        starts = [start for _, start, _ in self._plans] + [self._read]
        return {
            stage: min(documents, end) - start
            for (stage, start, _), end in zip(self._plans, starts[1:], strict=True)
            if documents > start
        }

    def state_dict(self, documents: int) -> dict[str, Any]:
        """What to go on from when so many documents have been trained on; what was read ahead is read again."""
        return {"plans": list(self._plans), "read": documents}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        self._plans, self._read = [tuple(each) for each in state["plans"]], int(state["read"])

    def __iter__(self) -> Iterator[Any]:
        if get_worker_info() is not None:
            raise ValueError("num_workers: expected 0 for a PlanDataset, whose plans change while it is read")
        rank, size = rank_and_size() if self.shared else (0, 1)
        texts = self._texts()
        while True:
            together = [next(texts) for _ in range(size)]  # all count what anyone reads
            yield self.item(together[rank])

    def _texts(self) -> Iterator[str]:
        """The documents of the plans, counting them."""
        current, table = "", None
        while True:
            if not self._plans:
                raise PlanExhausted("a PlanDataset was read before it was given a plan: call switch first")
            # Read again after a checkpoint, documents that had been read ahead come before the last plan's.
            stage, start, path = next(plan for plan in reversed(self._plans) if plan[1] <= self._read)
            if path != current:
                current, table = path, _mapped(path)
            assert table is not None
            if self._read - start >= len(table):
                raise PlanExhausted(
                    f"all {len(table)} documents of stage {stage}'s plan have been read: give plans more tokens, or "
                    "stages fewer steps"
                )
            text = table["text"][self._read - start].as_py()
            self._read += 1
            yield text


def _mapped(path: str) -> Any:
    import pyarrow as pa

    return pa.ipc.open_file(pa.memory_map(path)).read_all()
