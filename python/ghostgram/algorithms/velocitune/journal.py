"""What is written down of every update, and what is said aloud."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ghostgram.algorithms.velocitune.alarms import Alarm, Sight, Watch
from ghostgram.algorithms.velocitune.counts import Counts
from ghostgram.algorithms.velocitune.export import Asked
from ghostgram.algorithms.velocitune.ledger import Ledger
from ghostgram.algorithms.velocitune.record import MixtureRecord, require_pyarrow
from ghostgram.algorithms.velocitune.rules.base import Reweighter
from ghostgram.algorithms.velocitune.sampler import Schedule
from ghostgram.algorithms.velocitune.simplex import F64, uniform
from ghostgram.algorithms.velocitune.targets import Targets

if TYPE_CHECKING:
    from ghostgram.algorithms.velocitune.evaluate import DomainLosses

logger = logging.getLogger(__name__)

EARLY = 0.5
"""Share of the run's tokens before which a domain is not expected at its target."""


@dataclass(frozen=True)
class Entry:
    """An update and what it was made from."""

    after_batch: int
    b_eff: int
    before: F64
    """(K,) weights until then."""
    mean: F64
    """(K,) over all tokens so far."""
    losses: DomainLosses | None
    counts: Counts
    asked: Asked


class Journal:
    """Rows in a log, and alarms: each once in a process, every time in the log.

    Args:
        sizes: Samples by domain.
        rule: Whose updates they are.
        ledger: Of FLOPs and seconds.
        counts_flops: Whether it knows the size of the model, so that FLOPs are written down.
        log: A folder for the rows; None keeps none.

    Raises:
        ImportError: There is a log, and pyarrow is missing.
    """

    def __init__(
        self, sizes: Mapping[str, int], rule: Reweighter, ledger: Ledger, counts_flops: bool, log: Path | None
    ) -> None:
        if log is not None:
            require_pyarrow()
        self.domains, self._samples = tuple(sizes), np.maximum(list(sizes.values()), 1).astype(np.float64)
        self._rule, self._ledger, self._counts_flops, self._log = rule, ledger, counts_flops, log
        self._watch, self._said = Watch(self.domains), set[tuple[str, str]]()
        self._record: MixtureRecord | None = None

    def begin(self, metadata: Callable[[], Mapping[str, str]]) -> None:
        """Begins the log, if that was not done.

        Raises:
            FileExistsError: The folder holds the rows of a run.
        """
        if self._log is not None and self._record is None:
            self._record = MixtureRecord(self._log, self.domains, metadata(), resume=False)

    def resume(self, metadata: Mapping[str, str], step: int) -> None:
        """Goes on with the log of a run that has come to a step.

        Raises:
            ValueError: The log lacks updates of the run.
        """
        if self._log is not None:
            self._record = MixtureRecord(self._log, self.domains, metadata, resume=True)
            self._record.rewind(step, self._rule.updates)

    def enter(self, entry: Entry, schedule: Schedule) -> tuple[Alarm, ...]:
        """Writes an update down, and says what is alarming about it."""
        alarms = self._watch.look(self._sight(entry, schedule))
        for alarm in alarms:
            if (alarm.name, alarm.domain) not in self._said:
                logger.warning("update %d: %s", self._rule.updates, alarm.text)
                self._said.add((alarm.name, alarm.domain))
        if self._record is not None:
            self._record.add(self._shared(entry, schedule), self._by_domain(entry, alarms))
            if self._rule.cadence == "tokens":  # a part for each step would be too many files
                self._record.flush()
        return tuple(alarms)

    def flush(self) -> None:
        """Puts on disk what is not there yet."""
        if self._record is not None:
            self._record.flush()

    def state_dict(self) -> dict[str, Any]:
        """What alarms remember."""
        return self._watch.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state."""
        self._watch.load_state_dict(state)

    def _sight(self, entry: Entry, schedule: Schedule) -> Sight:
        rule, losses, budget = self._rule, entry.losses, self._ledger.budget_tokens
        targets, shown, guards = rule.targets, rule.shown, rule.guards
        # Multinomial quotas stray by their own standard deviation; six of them are beyond chance.
        chance = 6 * np.sqrt(entry.asked.draws.max()) if schedule.quotas == "multinomial" else 0.0
        return Sight(
            weights=rule.weights,
            floor=guards.floor * (rule.prior if guards.floor_to == "prior" else uniform(len(self.domains))),
            loss=None if losses is None else losses.loss,
            se=None if losses is None else losses.se,
            velocity=shown.get("V_raw"),
            gap=shown.get("gap"),
            low=None if targets is None else _each(targets, "low"),
            early=budget is None or float(entry.counts.tokens.sum()) < EARLY * budget,
            off=entry.counts.draws - entry.asked.draws,
            bound=entry.asked.versions + float(chance),
            epochs=entry.counts.draws / self._samples,
            cap=guards.max_epochs if schedule.cap is None else schedule.cap,
        )

    def _shared(self, entry: Entry, schedule: Schedule) -> dict[str, Any]:
        return {
            "update": self._rule.updates,
            "step": entry.after_batch + 1,
            "tokens": int(entry.counts.tokens.sum()),
            "version": schedule.version_of(entry.after_batch),
            "b_eff": entry.b_eff,
            "eval_seconds": self._ledger.seconds["evaluate"],
            "flops": self._ledger.total if self._counts_flops else None,
        }

    def _by_domain(self, entry: Entry, alarms: Sequence[Alarm]) -> dict[str, Any]:
        rule, losses, draws = self._rule, entry.losses, entry.counts.draws
        targets, shown = rule.targets, rule.shown
        of_targets = {"target_low": "low", "target_high": "high", "l_init": "l_init"}
        fired = [sorted({one.guard for one in rule.fired if one.domain == name}) for name in self.domains]
        heard = [[one.name for one in alarms if one.domain in ("", name)] for name in self.domains]
        return {
            "w_before": entry.before,
            "w_after": rule.weights,
            "w_mean": entry.mean,
            "loss": None if losses is None else losses.loss,
            "se": None if losses is None else losses.se,
            "target": shown.get("target", None if targets is None else targets.loss),
            **{name: None if targets is None else _each(targets, field) for name, field in of_targets.items()},
            **{name: shown.get(name) for name in ("V_raw", "V", "gap", "degenerate")},
            "draws": draws,
            "tokens_seen": entry.counts.tokens,
            "epochs": draws / self._samples,
            "requested": entry.asked.draws / entry.asked.draws.sum(),
            "realised": draws / max(float(draws.sum()), 1.0),
            "guards": [",".join(names) for names in fired],
            "alarms": [",".join(names) for names in heard],
        }


def _each(targets: Targets, field: str) -> F64:
    return np.array([getattr(one, field) for one in targets.by_domain.values()], np.float64)
