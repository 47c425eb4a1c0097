"""What torch's DataLoader reads of a mixture: a batch sampler or an iterable, and the loader that checks either."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from ghostgram.algorithms.velocitune.mixed import CollateMixture, Key, MixedDataset, MixtureBatch
from ghostgram.algorithms.velocitune.sampler import Schedule
from ghostgram.algorithms.velocitune.shared import RUN, START
from ghostgram.algorithms.velocitune.versions import Exhausted, Slots

if TYPE_CHECKING:
    from ghostgram.algorithms.velocitune.loader import DynamicMixture


class MixtureBatchSampler(Sampler[list[Key]]):
    """Batches of keys without end, made as they are asked for; a rank's own part of each global batch.

    Args:
        mixture: Whose schedule is advanced.
    """

    def __init__(self, mixture: DynamicMixture) -> None:
        self.mixture = mixture

    def __iter__(self) -> Iterator[list[Key]]:
        mixture, run = self.mixture, self.mixture.run
        while True:
            if mixture.run != run:
                raise RuntimeError("this iteration has ended: another one has begun, or a state was loaded")
            try:
                slots = mixture.schedule.advance()
            except Exhausted:
                return
            yield from mixture.keys(mixture.schedule, slots)


class MixtureIterable(IterableDataset[MixtureBatch]):
    """Batches without end, made where they are read: worker i of n makes every n-th (micro-)batch from the i-th on.

    Every worker makes the schedule of all batches, which is integers, and reads the samples of its own.

    Args:
        mixture: Whose schedule is copied, at the batch after the last that was given.
        collate: Of keyed samples.
    """

    def __init__(self, mixture: DynamicMixture, collate: CollateMixture) -> None:
        self.mixture, self.collate = mixture, collate

    def __iter__(self) -> Iterator[MixtureBatch]:
        worker, mixture = get_worker_info(), self.mixture
        me, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        mixed = MixedDataset(list(mixture.datasets.values()))
        turns = cycle(range(workers))  # a micro-batch each
        for schedule, slots in self._batches():
            mine = [micro for micro in range(mixture.accumulation) if next(turns) == me]
            keys = mixture.keys(schedule, slots) if mine else []
            for micro in mine:
                yield self.collate(mixed.__getitems__(keys[micro]))

    def _batches(self) -> Iterator[tuple[Schedule, Slots]]:
        """Every batch in order, its samples not yet looked up."""
        mixture, shared = self.mixture, self.mixture.shared
        if shared is None:
            raise RuntimeError("this iterable has ended: a batch sampler has been made of the same mixture")
        schedule, seen = mixture.schedule.copy(), mixture.written
        start, run = max(int(shared.head[START]), schedule.next), int(shared.head[RUN])
        while True:
            if int(shared.head[RUN]) != run:
                raise RuntimeError("this iteration has ended: another one has begun, or a state was loaded")
            for request in shared.read(seen):
                schedule.ask(request)
                seen += 1
            try:
                slots = schedule.advance()
            except Exhausted:
                return
            if slots.number >= start:
                yield schedule, slots


class MixtureLoader(DataLoader[Any]):
    """A DataLoader that goes on where it was left and checks the version of every batch that it gives.

    Args:
        mixture: Whose batches they are.
        dataset: Its `MixedDataset`, or its iterable.
        **options: Of `torch.utils.data.DataLoader`.
    """

    def __init__(self, mixture: DynamicMixture, dataset: Dataset[Any], **options: Any) -> None:
        self.mixture = mixture
        super().__init__(dataset, **options)

    def __iter__(self) -> Iterator[MixtureBatch]:  # type: ignore[override]
        self.mixture.begin()
        return self._received(super().__iter__())

    def _received(self, batches: Iterator[MixtureBatch]) -> Iterator[MixtureBatch]:
        for batch in batches:
            self.mixture.received(batch)
            yield batch


def unchanged(batch: MixtureBatch) -> MixtureBatch:
    """The collate function of batches that are whole already."""
    return batch
