"""What a run shows its rule at an update, and the check of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ghostgram.algorithms.velocitune.simplex import F64

Probe = Callable[[F64, int], ArrayLike]

_VECTORS = (
    *("train_loss_sum", "train_tokens", "seen", "avail", "eval_loss", "eval_se"),
    *("excess_sum", "excess_tokens", "align", "grad_norm"),
)


@dataclass(frozen=True)
class Observation:
    """What a run has seen since the last update, reduced over all ranks; (K,) fields in the order of the domains.

    Args:
        step: Optimizer steps done.
        tokens: Trained on so far.
        lr: Learning rate in force.
        train_loss_sum: Summed token losses of the training batch (nats), by domain.
        train_tokens: Tokens they are of; 0 for a domain that was absent.
        seen: Samples drawn of each domain since the start.
        avail: Samples that each domain has.
        eval_loss: Mean token loss of each domain's evaluation set (nats).
        eval_se: Standard errors of `eval_loss`.
        excess_sum: Summed `max(l - l_reference, 0)` of the batch's tokens (nats).
        excess_tokens: Tokens they are of.
        align: `<g_i, g_val>`: a domain's gradient with that of the validation loss.
        grad_norm: `|g_i|`.
        probe: Trains for so many steps on a mixture, and returns the evaluation losses after them.
    """

    step: int
    tokens: float
    lr: float | None = None
    train_loss_sum: ArrayLike | None = None
    train_tokens: ArrayLike | None = None
    seen: ArrayLike | None = None
    avail: ArrayLike | None = None
    eval_loss: ArrayLike | None = None
    eval_se: ArrayLike | None = None
    excess_sum: ArrayLike | None = None
    excess_tokens: ArrayLike | None = None
    align: ArrayLike | None = None
    grad_norm: ArrayLike | None = None
    probe: Probe | None = None


class Seen:
    """An observation whose fields have been checked: arrays are (K,) float64 and finite."""

    def __init__(self, obs: Observation, needs: frozenset[str], domains: int, rule: str) -> None:
        for name in sorted(needs):
            if getattr(obs, name) is None:
                raise ValueError(f"{name}: {rule} needs it in every observation, got None at step {obs.step}")
        self.step, self.tokens, self.observation = obs.step, obs.tokens, obs
        self._arrays = {
            name: _vector(getattr(obs, name), name, domains) for name in _VECTORS if getattr(obs, name) is not None
        }

    def __getitem__(self, name: str) -> F64:
        return self._arrays[name]

    @property
    def lr(self) -> float:
        """The learning rate.

        Raises:
            ValueError: It is not a number of at least 0.
        """
        if self.observation.lr is None or not 0 <= self.observation.lr < np.inf:
            raise ValueError(f"lr: expected a number of at least 0, got {self.observation.lr}")
        return self.observation.lr

    def probe(self, mixture: F64, steps: int) -> F64:
        """Evaluation losses after `steps` training steps on a mixture."""
        assert self.observation.probe is not None  # checked with the needs
        return _vector(self.observation.probe(mixture.copy(), steps), "probe", len(mixture))


def _vector(values: ArrayLike, name: str, domains: int) -> F64:
    x = np.array(values, np.float64)
    if x.shape != (domains,) or not np.isfinite(x).all():
        raise ValueError(f"{name}: expected ({domains},) finite numbers, got {x.tolist()}")
    if name not in ("eval_loss", "align", "probe") and (x < 0).any():
        raise ValueError(f"{name}: expected numbers of at least 0, got {x.tolist()}")
    return x
