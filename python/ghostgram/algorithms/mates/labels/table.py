"""Labels as they are read: a table, what it was made from, and where it lies. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ghostgram.algorithms.mates.files.store import Stage

if TYPE_CHECKING:
    import pyarrow as pa

PREFIX = "influence_"


@dataclass(frozen=True)
class Labels:
    """What documents would do to the references."""

    table: pa.Table
    """A row for each document, from `label` in the order in which they were given: doc_id; start and length of the
    span that was read, in tokens; influence_<reference>, grad_norm, clip and own_loss float32; backend; is_audit."""
    manifest: dict[str, Any]
    """What they were made from and how: digests, base_loss and null_gain by reference, audit, backend, FLOPs."""
    folder: str | None
    """Where they lie, named by what they were made from; None if they were not to be kept."""

    @classmethod
    def read(cls, stage: Stage) -> Labels:
        """Those of a complete "label" stage, audited documents last.

        Raises:
            StoreError: It is not complete, or damaged.
        """
        manifest = stage.require()
        return cls(stage.read(), manifest, stage.folder)

    @property
    def references(self) -> list[str]:
        """The references' names, in the order of the columns."""
        return [name.removeprefix(PREFIX) for name in self.table.column_names if name.startswith(PREFIX)]

    @property
    def influence(self) -> NDArray[np.float64]:
        """(n, R) nats per reference token, higher is better."""
        return np.stack([self.table[PREFIX + name].to_numpy() for name in self.references], 1).astype(np.float64)

    @property
    def ids(self) -> list[bytes]:
        """The documents' identities."""
        return self.table["doc_id"].to_pylist()  # type: ignore[no-any-return]
