"""Weights as they are asked for and as they come to govern batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ghostgram.algorithms.velocitune.quotas import Q

I64 = NDArray[np.int64]
F64 = NDArray[np.float64]


class Exhausted(RuntimeError):
    """The epoch cap leaves no domain to draw from, or is the end of the run."""


class Request(NamedTuple):
    """Weights that are to govern batches from `first` on."""

    first: int
    weights: tuple[int, ...]
    batch: int
    lengths: tuple[float, ...] | None = None
    reason: str = "asked"
    carry: tuple[int, ...] | None = None
    """What domains are owed at the start, if it is not what earlier weights leave: replays say it."""
    origin: int | None = None
    """The batch whose multinomial quotas the first one takes, if it is not its own."""


class Version(NamedTuple):
    """Weights that govern batches from `first` up to the next version's first."""

    number: int
    first: int
    weights: tuple[int, ...]
    """(K,) of sequences; they add up to 2^30."""
    batch: int
    """Sequences of a global batch."""
    lengths: tuple[float, ...] | None
    """(K,) mean tokens of a sequence, None where equal."""
    reason: str
    carry: tuple[int, ...]
    origin: int

    @property
    def shares(self) -> F64:
        """(K,) shares of sequences."""
        return np.array(self.weights) / Q

    @property
    def token_shares(self) -> F64:
        """(K,) shares of tokens that are expected of the shares of sequences."""
        tokens = self.shares * np.array(self.lengths or 1.0)
        shares: F64 = tokens / tokens.sum()
        return shares


class Slots(NamedTuple):
    """One global batch before its samples are looked up, in the order in which ranks take turns."""

    number: int
    version: int
    domains: I64
    """(B,) number of the domain of each position."""
    draws: I64
    """(B,) the how-manieth draw of its domain it is, from 0 and over the whole run."""

    def part(self, rank: int, world: int) -> Slots:
        """Positions rank, rank + world, ... of it."""
        return self._replace(domains=self.domains[rank::world], draws=self.draws[rank::world])


def as_json(entry: Request | Version) -> dict[str, Any]:
    """What can be written as JSON and read back by the class's keyword arguments."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in entry._asdict().items()}


def from_json(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a `Request` or `Version` from what `as_json` gave."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
