"""Losses of training batches by domain, added up over micro-batches and processes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

F64 = NDArray[np.float64]


class DomainSums(NamedTuple):
    """Of everything since the last reduction, over all processes."""

    losses: F64
    """(K,) summed token losses."""
    tokens: F64
    """(K,) tokens counted."""


class TrainLosses:
    """Sums of training losses by domain, kept where the losses are until they are asked for.

    Sums are in float64 and in a fixed order, so that a run that is repeated finds the same.

    Args:
        domains: K.
    """

    def __init__(self, domains: int) -> None:
        self.domains = domains
        self._sums: Tensor | None = None

    def add(self, domain_ids: Tensor, losses: Tensor, tokens: Tensor) -> None:
        """Takes in a micro-batch.

        Args:
            domain_ids: Any shape, integers in [0, K): a domain for each sequence, or for each token.
            losses: That shape: summed losses of a sequence, or the loss of a token.
            tokens: That shape: tokens counted of a sequence, or whether a token counts.

        Raises:
            ValueError: Shapes differ.

        Cost:
            K masked sums, without waiting for a GPU.
        """
        if not domain_ids.shape == losses.shape == tokens.shape:
            shapes = [tuple(each.shape) for each in (domain_ids, losses, tokens)]
            raise ValueError(f"domain_ids, losses, tokens: expected equal shapes, got {shapes}")
        ids = domain_ids.to(losses.device)
        values = torch.stack([losses.detach().double(), tokens.to(losses.device).double()])
        sums = torch.stack([torch.where(ids == k, values, 0.0).flatten(1).sum(1) for k in range(self.domains)], dim=1)
        self._sums = sums if self._sums is None else self._sums + sums

    def reduce(self, group: dist.ProcessGroup | None = None) -> DomainSums:
        """The sums over all processes, which must call this alike; then begins anew.

        Args:
            group: The processes; None for all of them.

        Raises:
            FloatingPointError: A sum is not finite.
            RuntimeError: Nothing was added here.
        """
        if self._sums is None:
            raise RuntimeError("reduce: expected at least one micro-batch since the last one, got none")
        sums, self._sums = self._sums, None
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums, group=group)
        losses, tokens = sums.cpu().numpy()
        if not np.isfinite(losses).all():
            raise FloatingPointError(f"losses: expected finite sums, got {losses.tolist()}")
        return DomainSums(losses, tokens)
