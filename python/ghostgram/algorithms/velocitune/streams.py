"""Streams as a mixture: sources that can only be read in order, such as streaming data sets of Hugging Face."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from numpy.typing import ArrayLike
from torch.utils.data import IterableDataset, get_worker_info

from ghostgram.algorithms.velocitune.draws import BUFFER, philox
from ghostgram.algorithms.velocitune.mixed import Collate, CollateMixture, Key, MixtureBatch
from ghostgram.algorithms.velocitune.sampler import Schedule
from ghostgram.algorithms.velocitune.versions import Exhausted, Slots

STOPPING = ("never", "first", "all")


class Source:
    """A stream that is read epoch after epoch, through a shuffle buffer if wanted.

    Args:
        name: Of its domain, for messages.
        number: Of its domain.
        data: What is iterated over; `set_epoch` is called before every epoch but the first, if it is there.
        seed: Of the buffer's order.
        buffer: Samples in the buffer; 0 for the stream's own order.
        exact: Whether states hold what is in the buffer.
    """

    def __init__(self, name: str, number: int, data: Iterable[Any], seed: int, buffer: int, exact: bool) -> None:
        self.name, self.number, self.data, self.seed, self.size, self.exact = name, number, data, seed, buffer, exact
        self.epoch, self.read, self.taken = 0, 0, 0
        self._buffer: list[Any] = []
        self._items: Iterator[Any] | None = None

    def take(self, again: bool) -> Any:
        """The next sample.

        Args:
            again: Whether another epoch may begin.

        Raises:
            Exhausted: The stream is at its end, and none may.
            ValueError: The stream is empty.
        """
        while len(self._buffer) <= self.size and self._fill(again):
            pass
        if not self._buffer:
            raise Exhausted(f"{self.name!r} is at the end of epoch {self.epoch}")
        place = 0
        if self.size:
            place = int(philox(self.seed, BUFFER, self.number, self.taken, 1)[0]) % len(self._buffer)
        self._buffer[place], self._buffer[-1] = self._buffer[-1], self._buffer[place]
        self.taken += 1
        return self._buffer.pop()

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands; with the buffer's samples if that is to be exact."""
        stream = self.data.state_dict() if hasattr(self.data, "state_dict") else None
        buffer = list(self._buffer) if self.exact else []
        return {"epoch": self.epoch, "read": self.read, "taken": self.taken, "stream": stream, "buffer": buffer}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state; says what that costs or loses."""
        self.epoch, self.read, self.taken = state["epoch"], state["read"], state["taken"]
        self._buffer, self._items = list(state["buffer"]), None
        if self.epoch:
            self._set_epoch()
        if self.size and not self.exact and self.taken:
            warnings.warn(
                f"up to {self.size} samples of {self.name!r}, in its shuffle buffer then, are lost: see exact",
                stacklevel=3,
            )
        if _shuffles_itself(self.data) and self.taken:
            warnings.warn(
                f"{self.name!r} has a shuffle buffer of its own, whose samples are lost: use shuffle_buffer and exact",
                stacklevel=3,
            )
        if state["stream"] is not None:
            self.data.load_state_dict(state["stream"])  # type: ignore[attr-defined]
        elif self.read:
            warnings.warn(f"{self.name!r} keeps no state: {self.read} samples are read to pass over them", stacklevel=3)
            self._items = iter(self.data)
            for _ in range(self.read):
                next(self._items)

    def _fill(self, again: bool) -> bool:
        """Reads one sample into the buffer; False at the end of an epoch after which there is none."""
        if self._items is None:
            self._items = iter(self.data)
        try:
            self._buffer.append(next(self._items))
        except StopIteration:
            if self.read == 0:
                raise ValueError(f"datasets: expected samples in {self.name!r}, got none") from None
            if not again or self._buffer:  # an epoch's last samples leave the buffer before the next one enters it
                return False
            self.epoch, self.read, self._items = self.epoch + 1, 0, None
            self._set_epoch()
            return True
        self.read += 1
        return True

    def _set_epoch(self) -> None:
        if hasattr(self.data, "set_epoch"):
            self.data.set_epoch(self.epoch)


class StreamMixture(IterableDataset[MixtureBatch]):
    """What `dynamic_interleave` makes: an iterable of `MixtureBatch`es whose weights may change at any batch.

    Args:
        sources: By domain.
        schedule: Of domains without sizes.
        rank: This process's.
        world: Number of processes.
        stopping: "never", "first" or "all".
        split: Whether sources hold this rank's share alone.
        lookahead: Batches fetched before they are trained on.
        collate: Of keyed samples.
    """

    def __init__(
        self,
        sources: list[Source],
        schedule: Schedule,
        rank: int,
        world: int,
        stopping: str,
        split: bool,
        lookahead: int,
        collate: CollateMixture,
    ) -> None:
        self.sources, self.schedule, self.rank, self.world = sources, schedule, rank, world
        self.stopping, self.split, self.lookahead, self.collate = stopping, split, lookahead, collate
        self._states: deque[tuple[int, list[dict[str, Any]]]] = deque(maxlen=lookahead + 2)
        self._remember()

    @property
    def lag(self) -> int:
        """Batches between the one after which weights are decided and the first one that they govern, less 1."""
        return self.lookahead

    def switch(self, weights: ArrayLike, after_batch: int) -> int:
        """Has other weights govern batches from `after_batch + 1 + lookahead` on, which is returned."""
        return self.schedule.switch(weights, after_batch + 1 + self.lag).first

    def __iter__(self) -> Iterator[MixtureBatch]:
        if get_worker_info() is not None:
            raise ValueError("num_workers: expected 0 for a mixture of streams, whose weights change while it is read")
        while True:
            started = all(source.epoch for k, source in enumerate(self.sources) if self.schedule.current.weights[k])
            if self.stopping == "all" and started:
                return
            try:
                slots = self.schedule.advance()
                keyed = self._read(slots)
            except Exhausted:
                return
            self._remember()
            yield self.collate(keyed)

    def state_dict(self, at_batch: int | None = None) -> dict[str, Any]:
        """What to go on from once batch `at_batch` has been trained on, None for the last one given.

        Under `split` every rank has a state of its own. It is as JSON-like as the sources' states, and with exact=True
        as their samples.

        Raises:
            ValueError: The batch has not been made, or is too far back.
        """
        at_batch = self._states[-1][0] - 1 if at_batch is None else at_batch
        for batch, states in self._states:
            if batch == at_batch + 1:
                return {"schedule": self.schedule.state_dict(at_batch), "sources": states}
        raise ValueError(f"at_batch: expected {self._states[0][0] - 1} to {self._states[-1][0] - 1}, got {at_batch}")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state.

        Warns of whatever is lost by it, which is what was in shuffle buffers, or slow.

        Raises:
            ValueError: The state is of another run.
        """
        self.schedule.load_state_dict(state["schedule"])
        for source, saved in zip(self.sources, state["sources"], strict=True):
            source.load_state_dict(saved)
        self._states.clear()
        self._states.append((self.schedule.next, list(state["sources"])))

    def _read(self, slots: Slots) -> list[tuple[Key, Any]]:
        """This rank's samples of a batch; the others' are read and passed over, unless sources are split."""
        keyed = []
        for position, domain in enumerate(slots.domains.tolist()):
            mine = position % self.world == self.rank
            if mine or not self.split:
                source = self.sources[domain]
                number, item = source.taken, source.take(self.stopping != "first")
                if mine:
                    keyed.append((Key(domain, number, slots.number, 0, slots.version), item))
        return keyed

    def _remember(self) -> None:
        self._states.append((self.schedule.next, [source.state_dict() for source in self.sources]))


def dynamic_interleave(
    datasets: Mapping[str, Iterable[Any]],
    weights: ArrayLike,
    global_batch: int,
    *,
    rank: int = 0,
    world: int = 1,
    seed: int = 0,
    quotas: str = "deadline",
    stopping: str = "never",
    split: bool = False,
    shuffle_buffer: int = 0,
    exact: bool = False,
    lookahead: int = 0,
    lengths: ArrayLike | None = None,
    collate_fn: Collate | None = None,
) -> StreamMixture:
    """A mixture of streams, whose weights may change at any batch: give it to `DataLoader(..., batch_size=None)`.

    Which domain every position belongs to is the `Schedule`'s, as for data sets with samples by number. Which sample
    it is, is the next of its stream. By default every rank reads all streams and keeps its own positions, so that ranks
    may change in number and end at the same batch; that is `world` times the reading. With `split`, sources are this
    rank's share, as `datasets.distributed.split_dataset_by_node` makes it: each is read once, and neither holds.

    Args:
        datasets: Iterables by domain; `state_dict`, `load_state_dict` and `set_epoch` are used where they have them.
        weights: (K,) shares of tokens.
        global_batch: Sequences of a batch over all ranks.
        rank: This process's.
        world: Number of processes.
        seed: In [0, 2^64).
        quotas: "deadline" or "multinomial".
        stopping: "never": streams begin again; "first": the mixture ends before the batch for which one would; "all":
            once all of those with weight have.
        split: Whether sources hold this rank's share alone.
        shuffle_buffer: Samples from which the next one is drawn, for each domain; 0 for the stream's order.
        exact: Whether states hold the samples in shuffle buffers; if not, they are lost on resuming, with a warning.
        lookahead: Batches that are fetched before they are trained on: 1 under accelerate.
        lengths: (K,) mean tokens of a sequence; None where equal.
        collate_fn: From a list of samples to what the model takes; None for torch's default.

    Raises:
        ValueError: An argument is out of range; or streams are split and are to stop, which ranks would not agree on.

    Cost:
        A copy of the streams' states with every batch.
    """
    if stopping not in STOPPING:
        raise ValueError(f"stopping: expected one of {list(STOPPING)}, got {stopping!r}")
    if split and stopping != "never":
        raise ValueError(f'stopping: expected "never" where split, since ranks would end apart, got {stopping!r}')
    if not 0 <= rank < world or global_batch % world:
        got = f"{rank}, {world} and {global_batch}"
        raise ValueError(f"rank, world, global_batch: expected 0 <= rank < world and a multiple of it, got {got}")
    if shuffle_buffer < 0 or lookahead < 0:
        raise ValueError(f"shuffle_buffer, lookahead: expected at least 0, got {shuffle_buffer} and {lookahead}")
    schedule = Schedule(
        dict.fromkeys(datasets), weights, global_batch, seed=seed, quotas=quotas, lengths=lengths, keep=lookahead + 2
    )
    streams = [Source(name, k, data, seed, shuffle_buffer, exact) for k, (name, data) in enumerate(datasets.items())]
    return StreamMixture(streams, schedule, rank, world, stopping, split, lookahead, CollateMixture(collate_fn))


def _shuffles_itself(data: Any) -> bool:
    """Whether a streaming data set of Hugging Face has a shuffle buffer somewhere in its chain of iterables."""
    link = getattr(data, "_ex_iterable", None)
    while link is not None:
        if "BufferShuffled" in type(link).__name__:
            return True
        link = getattr(link, "ex_iterable", None)
    return False
