"""Several datasets as one, whose samples say which domain and version they come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

Collate = Callable[[list[Any]], Any]


class Key(NamedTuple):
    """Which sample, and the batch that it is for."""

    domain: int
    sample: int
    batch: int
    micro: int
    version: int


class MixtureBatch(NamedTuple):
    """What a loader gives: one rank's part of a global batch, or one of its micro-batches."""

    number: int
    """Of the global batch, from 0."""
    micro: int
    """Which micro-batch of it, from 0."""
    version: int
    """The weights that it was drawn by."""
    domain_ids: Tensor
    """(n,) int64."""
    sample_ids: Tensor
    """(n,) int64, numbers inside the domain."""
    tokens: Tensor | None
    """(n,) int64, the length of each sample that is a row of tokens or has `input_ids`; None for other samples."""
    data: Any
    """The n samples, collated."""


class MixedDataset(Dataset[tuple[Key, Any]]):
    """Samples by `Key`, from the dataset of the key's domain.

    Args:
        datasets: Map-style, in the order of domains.
    """

    def __init__(self, datasets: Sequence[Dataset[Any]]) -> None:
        self.datasets = list(datasets)

    def __getitem__(self, key: Key) -> tuple[Key, Any]:
        return key, self.datasets[key.domain][key.sample]

    def __getitems__(self, keys: Sequence[Key]) -> list[tuple[Key, Any]]:
        """Samples of a batch; each domain's are read together where its dataset can do that."""
        found: list[Any] = [None] * len(keys)
        for domain in sorted({key.domain for key in keys}):
            places = [place for place, key in enumerate(keys) if key.domain == domain]
            for place, item in zip(places, self._read(domain, [keys[p].sample for p in places]), strict=True):
                found[place] = item
        return list(zip(keys, found, strict=True))

    def _read(self, domain: int, samples: list[int]) -> Sequence[Any]:
        dataset = self.datasets[domain]
        together = getattr(dataset, "__getitems__", None)
        read: Sequence[Any] = together(samples) if together else [dataset[sample] for sample in samples]
        return read


class CollateMixture:
    """Makes a `MixtureBatch` of keyed samples, by a collate function of the samples alone.

    Args:
        collate: From a list of samples to what the model takes; None for torch's default.
    """

    def __init__(self, collate: Collate | None = None) -> None:
        self.collate = default_collate if collate is None else collate

    def __call__(self, keyed: Sequence[tuple[Key, Any]]) -> MixtureBatch:
        """The batch of these samples."""
        first, items = keyed[0][0], [item for _, item in keyed]
        lengths = [length_of(item) for item in items]
        return MixtureBatch(
            first.batch,
            first.micro,
            first.version,
            torch.tensor([key.domain for key, _ in keyed]),
            torch.tensor([key.sample for key, _ in keyed]),
            None if None in lengths else torch.tensor(lengths),
            self.collate(items),
        )


def length_of(item: Any) -> int | None:
    """Tokens of a sample: of a row of them, or of its `input_ids`; None if it is neither."""
    row: Any = item.get("input_ids") if isinstance(item, Mapping) else item
    if isinstance(row, list):
        return len(row)
    return int(row.shape[0]) if getattr(row, "ndim", None) == 1 else None
