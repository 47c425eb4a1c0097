"""Weights asked for while worker processes run, in memory that they share: appended to, never changed."""

from __future__ import annotations

import numpy as np
import torch

from ghostgram.algorithms.velocitune.versions import I64, Request

COUNT, START, RUN = 0, 1, 2
"""Columns of the first row: requests written, the batch to begin with, and the number of the run since it was made."""

ENDED = -1
"""In place of the run's number: nothing that was begun may go on."""


class SharedRequests:
    """Requests that a main process writes and its workers read.

    A request is written whole before the count that makes it seen, and before a worker is told to make a batch that it
    governs: loaders tell workers through queues, so what was written before is read after.

    Args:
        domains: Number of domains.
        capacity: Requests that there is room for.
    """

    def __init__(self, domains: int, capacity: int) -> None:
        self._rows = torch.zeros(1 + capacity, 3 + 2 * domains, dtype=torch.int64)
        self._rows.share_memory_()  # type: ignore[no-untyped-call]
        self._domains, self.capacity = domains, capacity

    @property
    def head(self) -> I64:
        """(3 + 2 K,) the first row, as shared memory."""
        row: I64 = self._rows.numpy()[0]
        return row

    @property
    def full(self) -> bool:
        """Whether there is no room for another request."""
        return int(self.head[COUNT]) == self.capacity

    def write(self, request: Request) -> None:
        """Appends a request; there must be room for it."""
        count = int(self.head[COUNT])
        row: I64 = self._rows.numpy()[1 + count]
        row[:3] = request.first, request.batch, request.lengths is not None
        row[3 : 3 + self._domains] = request.weights
        row[3 + self._domains :] = np.array(request.lengths or [0.0] * self._domains).view(np.int64)
        self.head[COUNT] = count + 1

    def read(self, since: int) -> list[Request]:
        """The requests written after the first `since` ones."""
        found = []
        for row in self._rows.numpy()[1 + since : 1 + int(self.head[COUNT])]:
            first, batch, has_lengths = row[:3].tolist()
            lengths = tuple(row[3 + self._domains :].view(np.float64).tolist()) if has_lengths else None
            found.append(Request(first, tuple(row[3 : 3 + self._domains].tolist()), batch, lengths))
        return found
