"""DoReMi: domains whose loss exceeds a reference model's gain weight, after every step of a proxy run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from ghostgram.algorithms.velocitune.guards import OFF, Guards
from ghostgram.algorithms.velocitune.rules.base import chosen
from ghostgram.algorithms.velocitune.rules.exponentiated import ExponentiatedGradient
from ghostgram.algorithms.velocitune.rules.observation import Seen
from ghostgram.algorithms.velocitune.simplex import F64, normalised


@dataclass(frozen=True)
class DoReMiSettings:
    """Of `DoReMi`.

    Args:
        eta: Size of a step.
        c: Share of uniform weights.
        unseen: Score of a domain that no batch has held yet. The release has ln(vocabulary size), a strong push.
    """

    eta: float = 1.0
    c: float = 1e-3
    unseen: float = 0.0


class DoReMi(ExponentiatedGradient):
    """`w <- (1 - c) softmax(log w + eta s) + c / K`, with s the mean excess loss of a domain's tokens in the batch.

    A domain that is absent from the batch has its last score again. The result of a run is `mean_weights`. The proxy
    model samples by the prior p and weights its losses: see `loss_weights`.

    Args:
        preset: "paper" (c = 1e-3), "code" (c = 1e-4), or settings.
        guards: Composed with the rule.

    Source:
        arXiv 2305.10429, algorithm 1.
    """

    name = "doremi"
    reads = frozenset({"excess_sum", "excess_tokens"})
    cadence = "every_step"
    presets: ClassVar[dict[str, DoReMiSettings]] = {"paper": DoReMiSettings(), "code": DoReMiSettings(c=1e-4)}

    def __init__(self, preset: str | DoReMiSettings = "paper", *, guards: Guards = OFF) -> None:
        super().__init__(*chosen(self.presets, preset, self.name), guards)

    def score(self, seen: Seen) -> tuple[F64, dict[str, F64]]:
        """Mean excess, or the last one."""
        tokens = seen["excess_tokens"]
        last = self.memory.get("last", np.full(len(tokens), self.settings.unseen))
        s = np.where(tokens > 0, seen["excess_sum"] / np.maximum(tokens, 1), last)
        return s, {"last": s}


def excess(loss: ArrayLike, reference: ArrayLike, domain: ArrayLike, domains: int) -> tuple[F64, F64]:
    """Summed `max(l - l_reference, 0)` and tokens of each domain: the fields `excess_sum` and `excess_tokens`.

    Args:
        loss: (n,) token losses of the batch, nats.
        reference: (n,) the reference model's.
        domain: (n,) numbers of domains.
        domains: K.

    Returns:
        Two (K,) float64 vectors; those of ranks and micro-batches add up.
    """
    more = np.maximum(np.asarray(loss, np.float64) - np.asarray(reference, np.float64), 0.0)
    of = np.asarray(domain, np.int64)
    sums: F64 = np.bincount(of, weights=more, minlength=domains).astype(np.float64)
    return sums, np.bincount(of, minlength=domains).astype(np.float64)


def loss_weights(weights: F64, sampling: ArrayLike) -> F64:
    """`v_i = (w_i / p_i) / sum_j (w_j / p_j)`, for a loss of `sum v l / sum v` over the global batch's tokens.

    Args:
        weights: (K,) just updated.
        sampling: (K,) p, what domains are drawn by; positive.

    Raises:
        ValueError: A sampling weight is not positive.
    """
    p = np.asarray(sampling, np.float64)
    if p.shape != weights.shape or not (p > 0).all():
        raise ValueError(f"sampling: expected ({len(weights)},) positive weights, got {p.tolist()}")
    return normalised(weights / p)
