"""What a run has trained on, by domain and over all processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ghostgram.algorithms.velocitune.agreement import summed
from ghostgram.algorithms.velocitune.simplex import F64

_ROWS = ("draws", "tokens", "loss", "loss_tokens")


class Counts:
    """Samples, tokens and summed losses; float64, whose integers are exact to 2^53.

    Args:
        domains: K.
    """

    def __init__(self, domains: int) -> None:
        self._all, self._here = np.zeros((4, domains)), np.zeros((4, domains))

    @property
    def draws(self) -> F64:
        """(K,) samples since the start."""
        row: F64 = self._all[0]
        return row

    @property
    def tokens(self) -> F64:
        """(K,) tokens since the start."""
        row: F64 = self._all[1]
        return row

    @property
    def loss(self) -> F64:
        """(K,) summed token losses since the last `forget_losses`, nats."""
        row: F64 = self._all[2]
        return row

    @property
    def loss_tokens(self) -> F64:
        """(K,) tokens that they are of."""
        row: F64 = self._all[3]
        return row

    @property
    def gathered(self) -> bool:
        """Whether nothing has been added here since the last `gather`."""
        return not self._here.any()

    def add(self, domain_ids: ArrayLike, tokens: ArrayLike, nll: ArrayLike | None = None) -> None:
        """Adds samples that this process has trained on.

        Args:
            domain_ids: (n,) numbers of domains.
            tokens: (n,) tokens of each sample.
            nll: (n,) summed token losses of each sample, nats.

        Raises:
            ValueError: Shapes differ, a domain is unknown, or a loss is not finite.
        """
        of, count = _numbers(domain_ids).astype(np.int64), _numbers(tokens)
        domains = self._all.shape[1]
        if of.ndim != 1 or count.shape != of.shape:
            raise ValueError(f"tokens: expected one number for each domain id, got {count.shape} for {of.shape}")
        if ((of < 0) | (of >= domains)).any() or (count < 0).any():
            raise ValueError(
                f"domain_ids, tokens: expected ids below {domains} and counts of at least 0, got {of}, {count}"
            )
        if nll is not None:
            losses = _numbers(nll)
            if losses.shape != of.shape or not np.isfinite(losses).all():
                raise ValueError(f"nll: expected {of.shape} finite numbers, got {losses}")
            self._here[2] += np.bincount(of, losses, domains)
            self._here[3] += np.bincount(of, count, domains)
        self._here[0] += np.bincount(of, minlength=domains)
        self._here[1] += np.bincount(of, count, domains)

    def gather(self) -> None:
        """Takes in what all processes have added; collective.

        Cost:
            An all-reduce of 32 K bytes.
        """
        self._all += summed(self._here)
        self._here[:] = 0

    def forget_losses(self) -> None:
        """Begins the sums of losses anew: rules read those since the last update."""
        self._all[2:] = 0

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes."""
        return dict(zip(_ROWS, self._all.tolist(), strict=True))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state; what was added here since is forgotten."""
        self._all, self._here = np.array([state[name] for name in _ROWS]), np.zeros_like(self._here)


def _numbers(values: Any) -> F64:
    """Of an array, or of a tensor on any device."""
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values, np.float64)
