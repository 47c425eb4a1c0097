"""A mixture of datasets whose weights change while it is read, and the torch loaders of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch.utils.data import Dataset

from ghostgram.algorithms.velocitune.feeds import MixtureBatchSampler, MixtureIterable, MixtureLoader, unchanged
from ghostgram.algorithms.velocitune.mixed import Collate, CollateMixture, Key, MixedDataset, MixtureBatch
from ghostgram.algorithms.velocitune.sampler import Schedule
from ghostgram.algorithms.velocitune.shared import ENDED, RUN, START, SharedRequests
from ghostgram.algorithms.velocitune.versions import F64, Slots

OURS = {"batch_size", "shuffle", "sampler", "batch_sampler", "drop_last", "dataset"}
"""Options of torch's DataLoader that the mixture decides."""


@runtime_checkable
class Controller(Protocol):
    """What decides weights while a run goes on."""

    @property
    def weights(self) -> F64:
        """(K,) shares of tokens now."""

    def attach(self, mixture: DynamicMixture) -> None:
        """Takes the mixture whose `switch` it calls."""


class DynamicMixture:
    """A mixture of datasets whose weights may change at any batch, the same for any ranks, workers and restarts.

    Args:
        datasets: Map-style datasets by domain; the order is part of the run.
        weights: (K,) shares of tokens, or by domain; a `Controller`, which is attached; or a `Schedule`, a replay.
        global_batch: Sequences of a batch over all ranks; None for a `Schedule`, which knows.
        rank: This process's.
        world: Number of processes.
        seed: As in `Schedule`, like quotas, cap, on_cap and lengths. Of no meaning for a `Schedule`.
        quotas: "deadline" or "multinomial".
        cap: Epochs that a domain may be drawn for.
        on_cap: "mask", "stop", "error" or "repeat".
        lengths: (K,) mean tokens of a sequence.
        accumulation: Micro-batches that a rank's part of a batch is split into, in order.
        uneven: Whether ranks and micro-batches may differ in size by one.
        lookahead: Batches that are fetched before they are trained on, beside a loader's workers: 1 under accelerate.

    Raises:
        TypeError: A dataset has no length or cannot be indexed.
        ValueError: An argument is out of range; the batch cannot be dealt out evenly.

    Cost:
        That of `Schedule`, once in every process and once in every worker of an iterable.
    """

    def __init__(
        self,
        datasets: Mapping[str, Dataset[Any]],
        weights: ArrayLike | Mapping[str, float] | Controller | Schedule,
        global_batch: int | None = None,
        *,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        quotas: str = "deadline",
        cap: float | None = None,
        on_cap: str = "mask",
        lengths: ArrayLike | None = None,
        accumulation: int = 1,
        uneven: bool = False,
        lookahead: int = 0,
    ) -> None:
        if not 0 <= rank < world:
            raise ValueError(f"rank: expected 0 <= rank < world, got {rank} of {world}")
        if accumulation < 1 or lookahead < 0:
            raise ValueError(
                f"accumulation, lookahead: expected at least 1 and at least 0, got {accumulation} and {lookahead}"
            )
        self.datasets, self.rank, self.world = dict(datasets), rank, world
        self.accumulation, self.uneven, self.lookahead = accumulation, uneven, lookahead
        sizes = {name: _length(name, dataset) for name, dataset in self.datasets.items()}
        if isinstance(weights, Schedule):
            self.schedule = _of_these(weights, sizes, global_batch)
        else:
            if global_batch is None:
                raise ValueError("global_batch: expected a number of sequences, got None")
            shares = weights.weights if isinstance(weights, Controller) else _in_order(weights, sizes)
            self.schedule = Schedule(
                sizes, shares, global_batch, seed=seed, quotas=quotas, cap=cap, on_cap=on_cap, lengths=lengths
            )
        for request in self.schedule.asked:
            self._check_even(request.batch)
        self.read_ahead = 0
        """Micro-batches that a loader's workers have in hand beyond the one it gives."""
        self.returned = self.schedule.next - 1
        """The last batch that a loader of this mixture has given whole, -1 for none."""
        self.run = 0
        """Counts iterations and loaded states, so that older iterators do not go on."""
        self.shared: SharedRequests | None = None
        self.written = 0
        """Changes of weights that `shared` holds and the schedule here knows of."""
        self._told = True  # whether loaders tell what they give: torch's own, made by others, do not
        if isinstance(weights, Controller):
            weights.attach(self)

    @property
    def lag(self) -> int:
        """Batches between the one after which weights are decided and the first one that they govern, less 1."""
        return -(-self.read_ahead // self.accumulation) + self.lookahead

    def switch(
        self,
        weights: ArrayLike | Mapping[str, float],
        after_batch: int,
        *,
        at: int | None = None,
        global_batch: int | None = None,
        lengths: ArrayLike | None = None,
    ) -> int:
        """Has other weights govern batches from `after_batch + 1 + lag` on: those before are under way already.

        Every rank must call it alike.

        Args:
            weights: (K,) shares of tokens, or by domain.
            after_batch: The last batch trained on.
            at: A later batch from which they are to govern.
            global_batch: Sequences of a batch from then on; None as before.
            lengths: (K,) mean tokens of a sequence from then on; None as before.

        Returns:
            The first batch that the weights govern.

        Raises:
            ValueError: `at` is too early, a later batch has been given, or weights do not fit.
        """
        earliest = after_batch + 1 + self.lag
        if after_batch < self.returned - self.lookahead:
            raise ValueError(f"after_batch: expected {self.returned - self.lookahead} at least, got {after_batch}")
        if at is not None and at < earliest:
            raise ValueError(
                f"at: expected batch {earliest} or a later one, got {at}: {self.lag} batches are under way already"
            )
        if global_batch is not None:
            self._check_even(global_batch)
        shares, first = _in_order(weights, self.datasets), earliest if at is None else at
        if self.shared is not None and self.shared.full:
            raise ValueError(f"switches: expected at most {self.shared.capacity} in one iterable, got another one")
        request = self.schedule.switch(shares, first, batch=global_batch, lengths=lengths)
        if self.shared is not None:
            self.shared.write(request)
            self.written += 1
        return first

    def batch_sampler(self, read_ahead: int = 0) -> MixtureBatchSampler:
        """Batches of `Key`s for a loader of `MixedDataset`.

        Args:
            read_ahead: Batches that the loader asks for beyond the one it gives: num_workers * prefetch_factor.
        """
        self._reads_ahead(read_ahead)
        self.shared, self._told = None, False
        return MixtureBatchSampler(self)

    def iterable(
        self, collate_fn: Collate | None = None, *, read_ahead: int = 0, switches: int = 1 << 14
    ) -> MixtureIterable:
        """Batches made inside the workers of a loader, for `DataLoader(..., batch_size=None)`.

        Args:
            collate_fn: From a list of samples to what the model takes; None for torch's default.
            read_ahead: As in `batch_sampler`.
            switches: Changes of weights that there is room for, 8 (3 + 2 K) bytes each.
        """
        self._reads_ahead(read_ahead)
        self._share(switches)
        self._told = False
        return MixtureIterable(self, CollateMixture(collate_fn))

    def loader(
        self,
        *,
        style: str = "map",
        collate_fn: Collate | None = None,
        num_workers: int = 0,
        prefetch_factor: int | None = None,
        **options: Any,
    ) -> MixtureLoader:
        """A torch DataLoader of `MixtureBatch`es, without end unless the cap ends it.

        Every iteration goes on after the last batch that was given. Each batch's version is compared with this
        process's own history.

        Args:
            style: "map": this process makes the batches' ids and workers read samples; "iterable": workers do both.
            collate_fn: From a list of samples to what the model takes; None for torch's default.
            num_workers: Worker processes.
            prefetch_factor: Batches that each of them has in hand; None for 2.
            **options: Others of `torch.utils.data.DataLoader`.

        Raises:
            ValueError: An option is the mixture's to decide, or `style` is another word.
        """
        if wrong := sorted(OURS & set(options)) + ["in_order=False"] * (not options.get("in_order", True)):
            raise ValueError(f"options: expected none that the mixture decides, got {wrong}")
        ahead = num_workers * (2 if prefetch_factor is None else prefetch_factor)
        # A loader draws the seed of its workers: from its own generator, so that training's does not notice.
        options.setdefault("generator", torch.Generator().manual_seed(self.schedule.seed))
        options |= {"num_workers": num_workers, "prefetch_factor": prefetch_factor}
        if style == "iterable":
            source: Any = self.iterable(collate_fn, read_ahead=ahead)
            self._told = True
            return MixtureLoader(self, source, batch_size=None, collate_fn=unchanged, **options)
        if style != "map":
            raise ValueError(f'style: expected "map" or "iterable", got {style!r}')
        sampler, mixed = self.batch_sampler(ahead), MixedDataset(list(self.datasets.values()))
        self._told = True
        return MixtureLoader(self, mixed, batch_sampler=sampler, collate_fn=CollateMixture(collate_fn), **options)

    def state_dict(self, at_batch: int | None = None) -> dict[str, Any]:
        """What to go on from once batch `at_batch` has been trained on, the same on every rank; JSON can hold it.

        Args:
            at_batch: The last batch trained on; None for the last one that a loader of this mixture has given whole.

        Raises:
            ValueError: The batch has not been made, or is too far back: more than the lag and one. Or none is named and
                the loader is not one of `loader`, which would have told.
        """
        if at_batch is None and not self._told:
            raise ValueError("at_batch: expected the last batch trained on, which this loader does not tell, got None")
        at_batch = self.returned if at_batch is None else at_batch
        self._advance_to(at_batch)
        return {"schedule": self.schedule.state_dict(at_batch), "hashes": self._hashes()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state, whatever the number of ranks, workers and micro-batches was.

        Weights, batch size and lengths are the state's. Iterators that are under way end with an error.

        Raises:
            ValueError: The state is of other domains, or their contents have changed; nothing is changed then.
        """
        hashes = self._hashes()
        for name, known in state["hashes"].items():
            if None not in (known, mine := hashes.get(name)) and known != mine:
                raise ValueError(f"state: expected the contents of {name!r} to be as saved, {known}, got {mine}")
        for saved in [*state["schedule"]["history"][-1:], *state["schedule"]["asked"]]:
            self._check_even(saved["batch"])
        self.schedule.load_state_dict(state["schedule"])
        self.returned = self.schedule.next - 1
        self.run += 1
        if self.shared is not None:
            self.shared.head[RUN] = ENDED
            self._share(self.shared.capacity)

    # For loaders ---------------------------------------------------------------------------------------------------

    def keys(self, schedule: Schedule, slots: Slots) -> list[list[Key]]:
        """This rank's samples of a global batch, by micro-batch.

        Args:
            schedule: Which sample of its domain the next draw of each domain is.
            slots: The domains of the batch's places, over all ranks.
        """
        part = slots.part(self.rank, self.world)
        pairs = np.stack([part.domains, schedule.samples(part)], axis=1)
        return [
            [Key(domain, sample, slots.number, micro, slots.version) for domain, sample in rows.tolist()]
            for micro, rows in enumerate(np.array_split(pairs, self.accumulation))
        ]

    def received(self, batch: MixtureBatch) -> None:
        """Takes note of a batch that a loader gives.

        Raises:
            RuntimeError: It is not the next one, or was drawn by other weights than this process knows of.
        """
        expected = self.returned + 1
        self._advance_to(batch.number)
        version = self.schedule.version_of(batch.number)
        if (batch.number, batch.version) != (expected, version):
            raise RuntimeError(
                f"batch: expected number {expected} of version {version}, got {batch.number} of version {batch.version}"
            )
        if batch.micro == self.accumulation - 1:
            self.returned = batch.number

    def begin(self) -> None:
        """Goes back to the last batch that was given: an iteration begins after it."""
        self.schedule.rewind(self.returned)
        self.run += 1
        if self.shared is not None:
            self.shared.head[START], self.shared.head[RUN] = self.schedule.next, self.run

    def _share(self, capacity: int) -> None:
        self.shared, self.written = SharedRequests(len(self.datasets), capacity), 0
        self.shared.head[START], self.shared.head[RUN] = self.schedule.next, self.run

    def _advance_to(self, batch: int) -> None:
        """Makes batches up to this one where workers have made them: integers alone, no samples."""
        while self.shared is not None and self.schedule.next <= batch:
            self.schedule.advance()

    def _reads_ahead(self, batches: int) -> None:
        if batches < 0:
            raise ValueError(f"read_ahead: expected at least 0, got {batches}")
        self.read_ahead = batches
        self.schedule.keep(self.lag + 2)

    def _check_even(self, batch: int) -> None:
        dealt = self.world * self.accumulation
        if batch < dealt or (batch % dealt and not self.uneven):
            raise ValueError(
                f"global_batch: expected a multiple of {self.world} ranks times {self.accumulation} micro-batches"
                f"{', or more than it' if self.uneven else ' (or uneven=True)'}, got {batch}"
            )

    def _hashes(self) -> dict[str, str | None]:
        found = {}
        for name, dataset in self.datasets.items():
            hashed = getattr(dataset, "fingerprint", None) or getattr(dataset, "_fingerprint", None)
            found[name] = hashed if isinstance(hashed, str) else None
        return found


def _length(name: str, dataset: Any) -> int:
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(
            f"datasets: expected map-style ones, with a length and items by number, got {type(dataset).__name__} for "
            f"{name!r}; of streams make a dynamic_interleave"
        )
    return len(dataset)


def _in_order(weights: ArrayLike | Mapping[str, float], names: Mapping[str, Any]) -> ArrayLike:
    """Weights in the order of domains."""
    if not isinstance(weights, Mapping):
        return weights
    if set(weights) != set(names):
        raise ValueError(f"weights: expected one of each of {list(names)}, got {list(weights)}")
    return [weights[name] for name in names]


def _of_these(schedule: Schedule, sizes: Mapping[str, int], global_batch: int | None) -> Schedule:
    theirs = dict(zip(schedule.domains, schedule.sizes, strict=True))
    if list(theirs.items()) != list(sizes.items()) or global_batch is not None:
        expected = f"a schedule of {dict(sizes)} and None"
        raise ValueError(f"weights, global_batch: expected {expected}, got one of {theirs} and {global_batch}")
    return schedule
