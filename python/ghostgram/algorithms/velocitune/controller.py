"""What owns the weights of a run: it counts what is trained on, updates them when it is time, and tells the sampler."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ghostgram.algorithms.velocitune.agreement import require_same
from ghostgram.algorithms.velocitune.alarms import Alarm
from ghostgram.algorithms.velocitune.counts import Counts
from ghostgram.algorithms.velocitune.export import Asked, Mixture
from ghostgram.algorithms.velocitune.journal import Entry, Journal
from ghostgram.algorithms.velocitune.ledger import Ledger
from ghostgram.algorithms.velocitune.prior import prior_weights
from ghostgram.algorithms.velocitune.rules.base import Reweighter
from ghostgram.algorithms.velocitune.rules.doremi import loss_weights
from ghostgram.algorithms.velocitune.rules.observation import Observation
from ghostgram.algorithms.velocitune.simplex import F64, normalised

if TYPE_CHECKING:
    from ghostgram.algorithms.velocitune.evaluate import DomainLosses
    from ghostgram.algorithms.velocitune.loader import DynamicMixture

logger = logging.getLogger(__name__)

FORMAT = 1
"""Of states; it changes when one would be read as another run."""

FOR_LOSSES = frozenset({"doremi", "doge"})
"""Rules whose weights are for losses, while samples of the proxy model's training are drawn by the prior."""


class Update(NamedTuple):
    """What an update decided."""

    weights: F64
    """(K,) the rule's: shares of tokens, or in mode "loss" of the loss."""
    b_eff: int
    """The first batch that they govern."""
    alarms: tuple[Alarm, ...]


class MixtureController:
    """Moves the weights of domains by a rule, in any training loop.

    Examples:
        >>> ctl = MixtureController(sizes, rule, interval_tokens=10**7, log="run/mixture")  # doctest: +SKIP
        >>> data = DynamicMixture(datasets, ctl, global_batch=64, rank=rank, world=world)
        >>> for batch in data.loader():
        ...     train(batch)
        ...     ctl.observe(batch.domain_ids, batch.tokens)
        ...     if ctl.due(batch.number):
        ...         ctl.update(evaluate_domains(model, held_out), after_batch=batch.number)

    `due` and `update` are collectives: every rank calls them alike, after the same batch.

    Args:
        sizes: Samples by domain; the order is part of the run.
        rule: What moves the weights, with its guards.
        prior: w_0, as in `prior_weights`; shares of tokens.
        interval_tokens: Tokens between updates; None for a rule that is updated after every step.
        lengths: (K,) mean tokens of a sample; None where equal.
        mode: "sample": weights are those that domains are drawn by; "loss": those of their losses, see `loss_weights`.
        budget: Tokens of the run, if known: a domain past its target before half of them is an alarm, and evaluations
            that cost more than 2 % of training are warned of.
        parameters: Weights of the model, embeddings aside, to log FLOPs by.
        log: A folder for the rows of every update, which the first rank writes; None keeps none.

    Raises:
        ImportError: There is a log, and pyarrow is missing.
        ValueError: An argument is out of range, or does not go with the rule.

    Cost:
        32 K bytes sent a batch, and 16 an update; the evaluations are the caller's.

    Source:
        arXiv 2411.14318, algorithm 1, for the loop.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        rule: Reweighter,
        *,
        prior: str | float | ArrayLike = "proportional",
        interval_tokens: float | None = None,
        lengths: ArrayLike | None = None,
        mode: str = "sample",
        budget: float | None = None,
        parameters: int | None = None,
        log: str | Path | None = None,
    ) -> None:
        _check_cadence(rule, interval_tokens)
        _check_mode(rule, mode)
        self.domains, self.sizes = tuple(sizes), np.array(list(sizes.values()), np.float64)
        self.lengths = None if lengths is None else np.array(lengths, np.float64)
        if self.lengths is not None and (self.lengths.shape != self.sizes.shape or not (self.lengths > 0).all()):
            raise ValueError(f"lengths: expected {len(sizes)} positive numbers, got {self.lengths.tolist()}")
        self.rule, self.interval, self.mode = rule, interval_tokens, mode
        tokens = self.sizes * (1.0 if self.lengths is None else self.lengths)
        rule.init(prior_weights(prior, tokens), self.domains)
        self.counts, self.asked = Counts(len(self.domains)), Asked(len(self.domains))
        self.l_init: DomainLosses | None = None
        """Losses before the first step, as `begin` was told."""
        self.ledger = Ledger(1.0 if parameters is None else parameters, budget)
        """FLOPs and seconds so far; proxy runs are the caller's to book. Without `parameters`, FLOPs a weight."""
        self._journal = Journal(sizes, rule, self.ledger, parameters is not None, None if log is None else Path(log))
        self._mixture: DynamicMixture | None = None
        self._updated_at = 0.0  # tokens
        logger.info("%s", rule.describe())

    # In a training loop ----------------------------------------------------------------------------------------------

    def attach(self, mixture: DynamicMixture) -> None:
        """Takes the mixture that weights are for: `DynamicMixture` calls this.

        Raises:
            ValueError: It is of other domains, sizes or lengths.
        """
        schedule = mixture.schedule
        for name, given, expected in (
            ("domains", schedule.domains, self.domains),
            ("sizes", tuple(float(size or 0) for size in schedule.sizes), tuple(self.sizes.tolist())),
            ("lengths", schedule.current.lengths, None if self.lengths is None else tuple(self.lengths.tolist())),
        ):
            if given != expected:
                raise ValueError(f"mixture: expected the {name} {expected}, got {given}")
        self._mixture = mixture

    def begin(self, losses: DomainLosses, seconds: float = 0.0) -> None:
        """Takes the losses before the first step, which are kept in the state.

        The targets of the rule say what they were when targets were estimated: a difference beyond three standard
        errors is warned of, because velocities are then of another model or of other sequences.

        Args:
            losses: Of the domains.
            seconds: That evaluation took.
        """
        self.l_init = losses
        self.ledger.evaluate(float(losses.tokens.sum()), seconds)
        targets = self.rule.targets
        if targets is None:
            return
        wrong = np.abs(losses.loss - targets.l_init) > 3 * np.hypot(losses.se, targets.se_init) + 1e-6
        for k in np.flatnonzero(wrong).tolist():
            logger.warning(
                "l_init: expected %.4f nats of %s, as the targets have it, got %.4f: is it the same model on the same "
                "sequences?", targets.l_init[k], self.domains[k], losses.loss[k],
            )  # fmt: skip

    def observe(self, domain_ids: ArrayLike, tokens: ArrayLike | None = None, nll: ArrayLike | None = None) -> None:
        """Counts samples that this rank has trained on, once each; no rank waits for another.

        Args:
            domain_ids: (n,) numbers of their domains.
            tokens: (n,) tokens of each; None for the mean lengths of their domains.
            nll: (n,) summed token losses of each, nats; for rules that read training losses.

        Raises:
            FileExistsError: The log holds another run's rows.
            ValueError: Shapes differ, or there are neither tokens nor lengths.
        """
        if self.mixture.rank == 0:
            self._journal.begin(self._metadata)
        if tokens is None:
            if self.lengths is None:
                raise ValueError("tokens: expected those of every sample, or lengths of the domains, got neither")
            tokens = self.lengths[np.asarray(domain_ids)]
        self.counts.add(domain_ids, tokens, nll)

    def due(self, after_batch: int) -> bool:
        """Adds up what all ranks observed, and says whether it is time for an update; collective.

        An update is due after the first batch past each multiple of the interval: batches that do not divide it make
        updates no rarer.

        Args:
            after_batch: The last batch trained on.
        """
        self.counts.gather()
        self.asked.through(after_batch, self.mixture.schedule.history)
        return self.interval is None or self.tokens // self.interval > self._updated_at // self.interval

    def update(
        self, losses: DomainLosses | None = None, *, after_batch: int, seconds: float = 0.0, **observed: Any
    ) -> Update:
        """Moves the weights and tells the sampler; collective.

        Args:
            losses: Of the domains now; None for rules that read none.
            after_batch: The last batch trained on.
            seconds: That evaluation took, for the log.
            **observed: What else the rule reads of an `Observation`: lr, excess_sum, excess_tokens, align, grad_norm,
                probe; of all ranks.

        Raises:
            RuntimeError: Ranks came to different weights.
            ValueError: The rule lacks what it reads.
        """
        self.due(after_batch)
        before, counts = self.rule.weights, self.counts
        if counts.loss_tokens.any():
            observed |= {"train_loss_sum": counts.loss, "train_tokens": counts.loss_tokens}
        if losses is not None:
            observed |= {"eval_loss": losses.loss, "eval_se": losses.se}
        weights = self.rule.update(
            Observation(after_batch + 1, int(self.tokens), seen=counts.draws, avail=self.sizes, **observed)
        )
        b_eff = after_batch + 1 + self.mixture.lag
        if self.mode == "sample" and not np.array_equal(weights, before):
            b_eff = self.mixture.switch(weights, after_batch)
        require_same("weights", weights.tobytes() + f"{self.rule.updates} {b_eff}".encode())
        self.ledger.train(self.tokens - self._updated_at)
        if losses is not None:
            self.ledger.evaluate(float(losses.tokens.sum()), seconds)
        self._updated_at = self.tokens
        entry = Entry(after_batch, b_eff, before, self.mean_weights, losses, counts, self.asked)
        alarms = self._journal.enter(entry, self.mixture.schedule)
        counts.forget_losses()
        return Update(weights, b_eff, alarms)

    # What it knows ---------------------------------------------------------------------------------------------------

    @property
    def mixture(self) -> DynamicMixture:
        """The mixture attached.

        Raises:
            RuntimeError: There is none.
        """
        if self._mixture is None:
            raise RuntimeError("mixture: expected a DynamicMixture made with this controller, got none yet")
        return self._mixture

    @property
    def weights(self) -> F64:
        """(K,) shares of tokens that domains are to be drawn by: the rule's, or in mode "loss" the prior."""
        return self.rule.weights if self.mode == "sample" else self.rule.prior

    @property
    def tokens(self) -> float:
        """Trained on so far by all ranks, as of the last `due` or `update`."""
        return float(self.counts.tokens.sum())

    @property
    def loss_weights(self) -> F64:
        """(K,) factors of the domains' token losses in mode "loss": `(w / p) / sum_j (w_j / p_j)`, p the prior.

        Raises:
            ValueError: The mode is another.
        """
        if self.mode != "loss":
            raise ValueError(f'mode: expected "loss" for weights of losses, got {self.mode!r}')
        return loss_weights(self.rule.weights, self.rule.prior)

    @property
    def mean_weights(self) -> F64:
        """(K,) shares of tokens that samplers were asked for over all batches trained on; w_0 before the first."""
        asked = self.asked.draws * (1.0 if self.lengths is None else self.lengths)
        return normalised(asked) if asked.any() else self.weights.copy()

    def export(self) -> Mixture:
        """The final and mean weights, and the schedule so far. Flushes the log."""
        self._journal.flush()
        run = self.mixture.state_dict(self.asked.batches - 1)["schedule"]
        return Mixture(self.domains, self.rule.weights.copy(), self.mean_weights, run, self._metadata())

    def state_dict(self) -> dict[str, Any]:
        """What to go on from after the last batch that `due` was asked about; JSON can hold it. Flushes the log.

        Raises:
            ValueError: Samples were observed since then.
        """
        if not self.counts.gathered:
            raise ValueError("state: expected due(after_batch) on every rank before it, got samples not yet added up")
        self._journal.flush()
        return self._settings() | {
            "rule": self.rule.state_dict(),
            "counts": self.counts.state_dict(),
            "asked": self.asked.state_dict(),
            "journal": self._journal.state_dict(),
            "ledger": self.ledger.state_dict(),
            "updated_at": self._updated_at,
            "l_init": None if self.l_init is None else [values.tolist() for values in self.l_init],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state, and drops what the log holds of later batches.

        Raises:
            ValueError: It is of other domains or another order of them, or of another rule, settings, interval or mode;
                or the log holds some of the run's updates and not all.
        """
        for name, value in self._settings().items():
            if state[name] != value:
                raise ValueError(f"state: expected the {name} {value}, got {state[name]}")
        self.rule.load_state_dict(state["rule"])
        self.counts.load_state_dict(state["counts"])
        self.asked.load_state_dict(state["asked"])
        self._journal.load_state_dict(state["journal"])
        self.ledger.load_state_dict(state["ledger"])
        self._updated_at = float(state["updated_at"])
        if state["l_init"] is not None:
            from ghostgram.algorithms.velocitune.evaluate import DomainLosses  # which needs torch

            self.l_init = DomainLosses(*map(np.array, state["l_init"]))
        if self.mixture.rank == 0:
            self._journal.resume(self._metadata(), self.asked.batches)

    def _settings(self) -> dict[str, Any]:
        """What a state must have in common with the controller that takes it."""
        return {
            "format": FORMAT,
            "domains": list(self.domains),
            "sizes": self.sizes.tolist(),
            "lengths": None if self.lengths is None else self.lengths.tolist(),
            "interval": self.interval,
            "mode": self.mode,
        }

    def _metadata(self) -> dict[str, str]:
        names, seed = json.dumps(self.domains), json.dumps(self.mixture.schedule.seed)
        return {"rule": self.rule.describe(), "domains": names, "seed": seed}


def _check_cadence(rule: Reweighter, interval: float | None) -> None:
    if rule.cadence == "every_step" and interval is not None:
        raise ValueError(f"interval_tokens: expected None, {rule.name} is updated after every step, got {interval}")
    if rule.cadence == "tokens" and not (interval is not None and interval > 0):
        raise ValueError(f"interval_tokens: expected a positive number of tokens for {rule.name}, got {interval}")


def _check_mode(rule: Reweighter, mode: str) -> None:
    if mode not in ("sample", "loss"):
        raise ValueError(f'mode: expected "sample" or "loss", got {mode!r}')
    expected = "loss" if rule.name in FOR_LOSSES else "sample"
    if rule.name != "custom" and mode != expected:
        raise ValueError(f'mode: expected "{expected}", which the weights of {rule.name} are for, got {mode!r}')
