"""The schedule of a run: which samples of which domains every batch holds, whatever the ranks, workers and restarts."""

from __future__ import annotations

import math
import warnings
from bisect import insort
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ghostgram.algorithms.velocitune.draws import BATCH, Draws, shuffled
from ghostgram.algorithms.velocitune.quotas import (
    EarliestDeadline,
    carried,
    integer_weights,
    multinomial,
    sequence_weights,
)
from ghostgram.algorithms.velocitune.state import FORMAT, Place, of_json, to_json
from ghostgram.algorithms.velocitune.versions import I64, Exhausted, Request, Slots, Version

QUOTAS = ("deadline", "multinomial")
ON_CAP = ("mask", "stop", "error", "repeat")


class Schedule:
    """Which samples every global batch holds: a function of seed, sizes and the weights asked for, and nothing else.

    Batches are made in order. Every process, and every worker of a loader, that is told the same weights makes the
    same batches without a word between them; how many there are changes nothing.

    Args:
        sizes: Samples by domain, in the order that weights follow; None for a stream, which has no sample numbers.
        weights: (K,) shares of tokens from batch 0 on, of any sum.
        batch: Sequences of a global batch.
        seed: In [0, 2^64).
        quotas: "deadline" keeps every domain within about one draw of its share at every position; "multinomial" draws
            domains independently, as most published loaders do.
        cap: Epochs that a domain may be drawn for, None for any number. A batch never takes part of what is over it.
        on_cap: What happens before a batch that would pass the cap: "mask" gives the domain weight 0 for good, "stop"
            ends the run, "error" raises, "repeat" warns and goes on.
        lengths: (K,) mean tokens of a sequence, from which shares of sequences follow; None where equal.
        keep: Batches that can be gone back to; at least what a loader reads ahead, and 2.

    Raises:
        ValueError: An argument is out of range, or an empty domain has weight.

    Cost:
        About 2 us a position on one core, and a sort of each domain in every epoch.

    Source:
        docs/algorithms/velocitune_sampler.md.
    """

    def __init__(
        self,
        sizes: Mapping[str, int | None],
        weights: ArrayLike,
        batch: int,
        *,
        seed: int = 0,
        quotas: str = "deadline",
        cap: float | None = None,
        on_cap: str = "mask",
        lengths: ArrayLike | None = None,
        keep: int = 2,
    ) -> None:
        _one_of("quotas", quotas, QUOTAS)
        _one_of("on_cap", on_cap, ON_CAP)
        if cap is not None and not (math.isfinite(cap) and cap > 0):
            raise ValueError(f"cap: expected a number of epochs > 0 or None, got {cap}")
        self.domains, self.sizes = tuple(sizes), tuple(sizes.values())
        if any(size is not None and size < 0 for size in self.sizes):
            raise ValueError(f"sizes: expected at least 0 of each domain, got {dict(sizes)}")
        self.seed, self.quotas, self.cap, self.on_cap = seed, quotas, cap, on_cap
        cut = None if cap is None else Fraction(str(cap))  # as it is written: 0.1 epochs of 10 are 1
        self._most = [math.inf if cut is None or not size else math.floor(cut * size) for size in self.sizes]
        self._draws = Draws(seed, [size or 0 for size in self.sizes])
        self._requests = [self._request(0, weights, batch, lengths, "start")]
        self._history: list[Version] = []
        none = (0,) * len(self.sizes)
        self._place = Place(0, 0, 0, EarliestDeadline(self._requests[0].weights), none, frozenset())
        self._before: deque[Place] = deque(maxlen=keep)
        self._said: set[int] = set()  # domains whose cap was warned of

    @classmethod
    def scripted(
        cls, sizes: Mapping[str, int | None], requests: Sequence[Request], *, seed: int = 0, quotas: str = "deadline"
    ) -> Schedule:
        """A schedule of weights that are all known: a replay.

        Args:
            sizes: As for any schedule, like what follows.
            requests: From batch 0 on, by first batch; the last one governs without end.
            seed: In [0, 2^64).
            quotas: "deadline" or "multinomial".
        """
        schedule = cls(sizes, requests[0].weights, requests[0].batch, seed=seed, quotas=quotas)
        schedule._requests = list(requests)
        return schedule

    @property
    def next(self) -> int:
        """The number of the next batch."""
        return self._place.batch

    @property
    def history(self) -> tuple[Version, ...]:
        """The versions that have governed batches, forced ones included."""
        return tuple(self._history[: self._place.versions])

    @property
    def cursors(self) -> I64:
        """(K,) draws of each domain so far."""
        return np.array(self._place.cursors, np.int64)

    @property
    def asked(self) -> tuple[Request, ...]:
        """Weights that were asked for and do not govern yet."""
        return tuple(self._requests[self._place.requests :])

    @property
    def current(self) -> Request:
        """The last weights asked for, whether they govern yet or not."""
        return self._requests[-1]

    def keep(self, batches: int) -> None:
        """How many batches can be gone back to from now on; never fewer than now."""
        if batches > (self._before.maxlen or 0):
            self._before = deque(self._before, maxlen=batches)

    def switch(
        self, weights: ArrayLike, first: int, *, batch: int | None = None, lengths: ArrayLike | None = None
    ) -> Request:
        """Has other weights govern batches from `first` on.

        Args:
            weights: (K,) shares of tokens, of any sum.
            first: A batch that has not been made, not before that of weights asked for earlier.
            batch: Sequences of a global batch from then on; None as before.
            lengths: (K,) mean tokens of a sequence from then on; None as before.

        Raises:
            ValueError: The batch has been made, or weights do not fit.
        """
        before = self.current
        if first < max(self.next, before.first):
            raise ValueError(
                f"first: expected batch {max(self.next, before.first)} or a later one, got {first}: batches up to "
                f"{self.next - 1} are made, and weights are asked for from batch {before.first} on"
            )
        asked = self._request(
            first, weights, before.batch if batch is None else batch, before.lengths if lengths is None else lengths
        )
        self._requests.append(asked)
        return asked

    def ask(self, request: Request) -> None:
        """Takes in a request that another schedule of the same run has made.

        Raises:
            ValueError: Its first batch has been made here.
        """
        if request.first < self.next:
            raise ValueError(f"request: expected batch {self.next} or a later one, got {request.first}")
        insort(self._requests, request, lo=self._place.requests, key=lambda each: each.first)

    def advance(self) -> Slots:
        """Makes the next batch.

        Raises:
            Exhausted: No domain is left, or one would pass the cap and that is the end.
            ValueError: One would pass the cap, and that is an error.
        """
        place, opened = self._place, self._history[: self._place.versions]
        while place.requests < len(self._requests) and self._requests[place.requests].first <= place.batch:
            place = replace(self._opened(place, opened, self._requests[place.requests]), requests=place.requests + 1)
        turn, sequence, counts, over = self._drawn(place, opened[-1])
        while over:
            self._refuse(over, place.batch)
            if self.on_cap == "repeat":
                break
            forced = self._forced(place, opened[-1], over)
            place = self._opened(replace(place, masked=place.masked | set(over)), opened, forced)
            turn, sequence, counts, over = self._drawn(place, opened[-1])
        slots = self._slots(place, opened[-1].number, sequence)
        cursors = tuple((np.array(place.cursors) + counts).tolist())
        self._before.append(self._place)
        self._history = opened
        self._place = replace(place, batch=place.batch + 1, versions=len(opened), turn=turn, cursors=cursors)
        return slots

    def samples(self, slots: Slots) -> I64:
        """Which samples of their domains the positions of a batch are, or of a part of one.

        Raises:
            ValueError: A domain is a stream.
        """
        found = np.empty(len(slots.domains), np.int64)
        for k in np.unique(slots.domains).tolist():
            if self.sizes[k] is None:
                raise ValueError(f"domain {self.domains[k]!r} is a stream: expected one of known size")
            here = slots.domains == k
            found[here] = self._draws.samples(k, slots.draws[here])
        return found

    def version_of(self, batch: int) -> int:
        """The number of the version that governs a batch that has been made."""
        if not 0 <= batch < self.next:
            raise ValueError(f"batch: expected one that has been made, 0 to {self.next - 1}, got {batch}")
        return next(version.number for version in reversed(self._history) if version.first <= batch)

    def state_dict(self, at_batch: int | None = None) -> dict[str, Any]:
        """What to go on from once batch `at_batch` has been trained on; JSON can hold it.

        Batches after it that have been made count as not made: a loader's read-ahead is made again.

        Args:
            at_batch: The last batch trained on, -1 for none; None for the last one made.

        Raises:
            ValueError: That batch has not been made, or is too far back.
        """
        place = self._place if at_batch is None else self._after(at_batch)
        return {
            "format": FORMAT,
            "seed": self.seed,
            "quotas": self.quotas,
            "domains": list(self.domains),
            "sizes": list(self.sizes),
            **to_json(place, self._history, self._requests),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state, with weights and batch size as they are in it; another cap may be set.

        Raises:
            ValueError: The state is of another run: domains, their order or sizes, seed or kind of quotas.
        """
        mine = {"format": FORMAT, "seed": self.seed, "quotas": self.quotas}
        mine |= {"domains": list(self.domains), "sizes": list(self.sizes)}
        for name, expected in mine.items():
            if state[name] != expected:
                raise ValueError(f"state: expected {name} {expected} as here, got {state[name]}")
        self._place, self._history, self._requests = of_json(state)
        self._before.clear()

    def rewind(self, at_batch: int) -> None:
        """Makes the batches after `at_batch` again.

        Raises:
            ValueError: That batch has not been made, or is too far back.
        """
        self._place = self._after(at_batch)
        self._history = self._history[: self._place.versions]
        while self._before and self._before[-1].batch >= self.next:
            self._before.pop()

    def copy(self, at_batch: int | None = None) -> Schedule:
        """Another schedule that goes on from a batch by itself."""
        other = Schedule(
            dict(zip(self.domains, self.sizes, strict=True)),
            self.current.weights,
            self.current.batch,
            seed=self.seed,
            quotas=self.quotas,
            cap=self.cap,
            on_cap=self.on_cap,
            keep=self._before.maxlen or 0,
        )
        other.load_state_dict(self.state_dict(at_batch))
        other._draws = self._draws  # they are the same, and sorted already
        return other

    def _request(
        self, first: int, weights: ArrayLike, batch: int, lengths: ArrayLike | None, reason: str = "asked"
    ) -> Request:
        shares = np.asarray(weights, np.float64)
        if shares.shape != (len(self.sizes),):
            raise ValueError(f"weights: expected one of each of {len(self.sizes)} domains, got shape {shares.shape}")
        if batch < 1:
            raise ValueError(f"batch: expected at least one sequence, got {batch}")
        whole = integer_weights(sequence_weights(shares, lengths))
        for k, weight in enumerate(whole):
            if weight and self.sizes[k] == 0:
                raise ValueError(f"weights: expected 0 for {self.domains[k]!r}, which is empty, got {shares[k]}")
        tokens = None if lengths is None else tuple(np.asarray(lengths, np.float64).tolist())
        return Request(first, whole, batch, tokens, reason)

    def _opened(self, place: Place, opened: list[Version], request: Request) -> Place:
        """The place under the weights asked for, without domains that are masked; enters the version."""
        weights = request.weights
        if any(weights[k] for k in place.masked):
            weights = tuple(0 if k in place.masked else weight for k, weight in enumerate(weights))
            if not any(weights):
                raise Exhausted(f"batch {place.batch}: every domain with weight has been drawn for {self.cap} epochs")
            weights = integer_weights(weights)
        carry = carried(place.turn.owed(), weights) if request.carry is None else request.carry
        origin = place.batch if request.origin is None else request.origin
        opened.append(
            Version(len(opened), place.batch, weights, request.batch, request.lengths, request.reason, carry, origin)
        )
        return replace(place, turn=EarliestDeadline(weights, carry))

    def _drawn(self, place: Place, version: Version) -> tuple[EarliestDeadline, list[int], I64, list[int]]:
        """The domains of the next batch, how often each is drawn, and those that would pass the cap by it."""
        turn = place.turn.copy()
        if self.quotas == "deadline":
            sequence = turn.take(version.batch)
        else:
            source = version.origin + place.batch - version.first
            sequence = multinomial(version.weights, self.seed, source, version.batch)
        counts = np.bincount(sequence, minlength=len(self.sizes))
        over = [k for k, most in enumerate(self._most) if counts[k] and place.cursors[k] + counts[k] > most]
        return turn, sequence, counts, over

    def _refuse(self, over: Sequence[int], batch: int) -> None:
        """Says that a cap is reached, in the way that was chosen; returns where the run goes on."""
        message = f"batch {batch} would draw from {self._names(over)} for more than {self.cap} epochs"
        if self.on_cap == "error":
            raise ValueError(message)
        if self.on_cap == "stop":
            raise Exhausted(message)
        if not self._said.issuperset(over):
            verb = "they go on" if self.on_cap == "repeat" else "they have weight 0 from here on"
            warnings.warn(f"{message}: {verb}", stacklevel=3)
        self._said.update(over)

    def _forced(self, place: Place, version: Version, over: Sequence[int]) -> Request:
        reason = f"{self.cap} epochs of {self._names(over)}"
        return Request(place.batch, version.weights, version.batch, version.lengths, reason)

    def _names(self, domains: Sequence[int]) -> str:
        return ", ".join(self.domains[k] for k in domains)

    def _slots(self, place: Place, version: int, sequence: Sequence[int]) -> Slots:
        domains = np.array(sequence, np.int64)[shuffled(self.seed, BATCH, place.batch, 0, len(sequence))]
        draws = np.empty(len(domains), np.int64)
        for k, cursor in enumerate(place.cursors):
            here = np.flatnonzero(domains == k)
            draws[here] = cursor + np.arange(len(here))
        return Slots(place.batch, version, domains, draws)

    def _after(self, batch: int) -> Place:
        """The place once a batch is done."""
        for place in (self._place, *self._before):
            if place.batch == batch + 1:
                return place
        oldest = min(place.batch for place in (self._place, *self._before)) - 1
        raise ValueError(f"at_batch: expected {oldest} to {self.next - 1}, got {batch}")


def _one_of(name: str, given: str, words: Sequence[str]) -> None:
    if given not in words:
        raise ValueError(f"{name}: expected one of {list(words)}, got {given!r}")
