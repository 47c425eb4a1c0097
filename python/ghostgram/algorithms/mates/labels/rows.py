"""The rows of a label stage: which documents a unit of work holds, what it is made from, and its table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ghostgram.algorithms.mates.files.identity import digest_of_bytes, digest_of_documents
from ghostgram.algorithms.mates.labels.backend import Influence, LabelBackend
from ghostgram.algorithms.mates.labels.optimizer_state import OptimizerView, listed
from ghostgram.algorithms.mates.labels.reference import Reference
from ghostgram.algorithms.mates.labels.table import PREFIX
from ghostgram.algorithms.mates.labels.task import Task
from ghostgram.training.snapshot import state_tensors, tensors_digest

if TYPE_CHECKING:
    import pyarrow as pa

AUDIT = "audit"
"""The unit that holds the audited documents."""


class Rows:
    """Documents to label, and the references that give their columns.

    Args:
        documents: A pyarrow.Table with doc_id and text.
        references: The references.
        task: Encodes texts.
        chunk: Documents of a unit.

    Raises:
        ValueError: Not as described.
    """

    def __init__(self, documents: pa.Table, references: Sequence[Reference], task: Task, chunk: int) -> None:
        if missing := [name for name in ("doc_id", "text") if name not in documents.column_names]:
            raise ValueError(f"documents: expected columns doc_id and text, {listed(missing)} missing")
        self.ids: list[bytes] = documents["doc_id"].to_pylist()
        self.texts: list[str] = documents["text"].to_pylist()
        if not self.ids:
            raise ValueError("documents: expected at least one, got none")
        if wrong := [repr(i) for i in self.ids if not isinstance(i, bytes) or len(i) != 16]:
            raise ValueError(f"documents: expected a doc_id of 16 bytes, got {listed(wrong)}")
        if len(set(self.ids)) < len(self.ids):
            raise ValueError(f"documents: expected each doc_id once, got {len(self.ids)} of {len(set(self.ids))}")
        names = [r.name for r in references]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"references: expected some, each of a name of its own, got {names}")
        if chunk < 1:
            raise ValueError(f"chunk: expected at least 1 document, got {chunk}")
        self.references, self.task, self.chunk = list(references), task, chunk
        self.by_id = sorted(range(len(self.ids)), key=self.ids.__getitem__)
        """The documents in an order that knows nothing of what they say: audits take the first."""

    def units(self, audited: int) -> dict[str, list[int]]:
        """Every unit's documents: those audited in one, all others in chunks, in the order in which they were given."""
        first = self.by_id[:audited]
        others = sorted(self.by_id[audited:])
        chunks = range(0, len(others), self.chunk)
        units = {f"{n:06d}": others[i : i + self.chunk] for n, i in enumerate(chunks)}
        return units if not first else {AUDIT: first} | units

    def input(self, rows: Sequence[int]) -> str:
        """What a unit of these documents is made from, beside `inputs`."""
        return digest_of_bytes(b"".join(self.ids[i] for i in rows))

    def encoded(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The documents' tokens and targets."""
        return self.task.encode([self.texts[i] for i in rows])

    def labelled(self, rows: Sequence[int], backend: LabelBackend, audited: bool) -> pa.Table:
        """The table of some documents, as a backend labels them."""
        ids, mask = self.encoded(rows)
        return self.table(rows, backend.influence(ids, mask), mask, backend.name, audited)

    def table(self, rows: Sequence[int], influence: Influence, mask: Tensor, backend: str, audited: bool) -> pa.Table:
        """The rows of labelled documents.

        Raises:
            ValueError: An influence is not finite; the documents are named.
        """
        import pyarrow as pa

        self.check(rows, influence)

        def float32(values: Tensor) -> pa.Array:
            return pa.array(values.numpy().astype(np.float32))

        n = len(rows)
        targets = mask * torch.arange(mask.shape[1])
        lengths = torch.where(mask.any(1), targets.amax(1) + 1, 0)
        columns: dict[str, Any] = {
            "doc_id": pa.array([self.ids[i] for i in rows], pa.binary(16)),
            "start": pa.array(np.zeros(n, np.int32)),
            "length": pa.array(lengths.numpy().astype(np.int32)),
        }
        columns |= {PREFIX + r.name: float32(influence.values[:, k]) for k, r in enumerate(self.references)}
        columns |= {"grad_norm": float32(influence.norms), "clip": float32(influence.clip)}
        columns |= {"own_loss": float32(influence.own_loss), "backend": pa.array([backend] * n, pa.string())}
        columns["is_audit"] = pa.array([audited] * n)
        return pa.table(columns)

    def check(self, rows: Sequence[int], influence: Influence) -> None:
        """Raises ValueError, naming documents, unless all influences and losses are finite."""
        broken = ~(influence.values.isfinite().all(1) & influence.own_loss.isfinite())
        if wrong := [self.ids[rows[int(i)]].hex() for i in broken.nonzero()]:
            raise ValueError(f"documents: influence or loss of {listed(wrong)} is not finite")

    def in_order(self, table: pa.Table) -> pa.Table:
        """A table of all documents, in the order in which they were given."""
        at = {doc: row for row, doc in enumerate(table["doc_id"].to_pylist())}
        return table.take([at[doc] for doc in self.ids]).combine_chunks()

    def inputs(self, view: OptimizerView) -> dict[str, str]:
        """Digests of everything that labels are made from; the task is known by what it makes of some documents."""
        ids, mask = self.encoded(range(min(64, len(self.ids))))
        parts = view.ranks.of_all(tensors_digest(state_tensors(view.model, view.optimizer)))
        references = {f"reference.{r.name}": tensors_digest({"ids": r.ids, "mask": r.mask}) for r in self.references}
        return references | {
            "checkpoint": parts[0] if not view.ranks.sharded else digest_of_bytes("".join(parts).encode()),
            "documents": digest_of_documents(self.ids, self.texts),
            "task": tensors_digest({"ids": ids, "mask": mask}),
        }
