"""The numbers of a report, computed from the tables of a run.

Everything here speaks in values, `value = -phi`: positive means that the document lowered the validation loss.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from .roc import Roc, roc

Floats = NDArray[np.float64]
CORRUPTED = "corrupted"


@dataclass(frozen=True)
class LedgerSeries:
    """One validation set's ledger, one entry per step whose change of loss was measured."""

    step: NDArray[np.int64]
    measured: Floats
    predicted: Floats
    sum_phi: Floats
    history: Floats
    uncovered: Floats

    @property
    def relative_error(self) -> float:
        """RMS of the per-step residual over the RMS of the measured change."""
        return float(np.sqrt(np.mean((self.measured - self.predicted) ** 2) / np.mean(self.measured**2)))


@dataclass(frozen=True)
class Summary:
    """What a run found.

    Attributes:
        sets: Names of the validation sets.
        value: Per set, every document's value over the run, in the order of the documents.
        mean_value: Their mean over the sets.
        detection: ROC of finding corrupted documents by a low mean value; `detection_by_set` by each set's alone.
        detection_by_stage: AUROC from the values earned in each equal part of the run; NaN where a part lacks a class.
        growth: Per set and group (a domain's clean documents, or all corrupted ones), the mean value per document
            accumulated up to and including each step.
        ledger: Per set.
        step_seconds: Per kind of step ("plain", "instrumented"), the seconds of each.
    """

    sets: tuple[str, ...]
    value: dict[str, Floats]
    mean_value: Floats
    detection: Roc
    detection_by_set: dict[str, Roc]
    detection_by_stage: list[float]
    growth: dict[str, dict[str, Floats]]
    ledger: dict[str, LedgerSeries]
    step_seconds: dict[str, Floats]

    @property
    def step_time_ratio(self) -> float:
        """Median instrumented step over median plain step."""
        return float(np.median(self.step_seconds["instrumented"]) / np.median(self.step_seconds["plain"]))

    @property
    def predicted(self) -> float:
        """Predicted change of validation loss over the run, summed over the sets."""
        return float(sum(series.predicted.sum() for series in self.ledger.values()))

    @property
    def measured(self) -> float:
        """Measured change of validation loss over the run, summed over the sets."""
        return float(sum(series.measured.sum() for series in self.ledger.values()))


def summarise(
    *,
    values: pa.Table,
    steps: pa.Table,
    ledger: pa.Table,
    documents: Mapping[str, Any],
    corrupted: ArrayLike,
    timings: Mapping[str, Sequence[float]],
    stages: int = 4,
) -> Summary:
    """Computes a report's numbers.

    Args:
        values: One row per document and validation set: id, set, value (= -phi), steps.
        steps: The step log: step, sample_id, and phi_<set> for every set (raw: negative = helped).
        ledger: One row per step and set: step, set, measured, predicted, sum_phi, history, uncovered.
        documents: Arrays of one length under "id" and "domain".
        corrupted: (n,) whether each document was spoiled.
        timings: Seconds of every timed "plain" and "instrumented" step.
        stages: Parts of the run to report detection for.

    Returns:
        The summary.

    Raises:
        ValueError: A document has no value, or no document is corrupted, or all are.
    """
    ids, spoiled = np.asarray(documents["id"], np.int64), np.asarray(corrupted, np.bool_)
    groups = np.where(spoiled, CORRUPTED, np.asarray(documents["domain"], dtype=object))
    value = _values_by_set(values, ids)
    mean_value = np.mean(list(value.values()), axis=0)

    step, row = _floats(steps, "step").astype(np.int64), _positions(_floats(steps, "sample_id").astype(np.int64), ids)
    earned = {name: -np.nan_to_num(_floats(steps, f"phi_{name}")) for name in value}
    return Summary(
        sets=tuple(value),
        value=value,
        mean_value=mean_value,
        detection=roc(-mean_value, spoiled),
        detection_by_set={name: roc(-value[name], spoiled) for name in value},
        detection_by_stage=_by_stage(np.mean(list(earned.values()), axis=0), step, spoiled[row], stages),
        growth={name: _growth(earned[name], step, groups, row) for name in value},
        ledger={name: _ledger_series(ledger, name) for name in value},
        step_seconds={kind: np.asarray(seconds, np.float64) for kind, seconds in timings.items()},
    )


def _values_by_set(values: pa.Table, ids: NDArray[np.int64]) -> dict[str, Floats]:
    names, owner = values["set"].to_numpy(), _floats(values, "id").astype(np.int64)
    value = _floats(values, "value")
    by_set = {}
    for name in dict.fromkeys(names):
        found = np.full(len(ids), np.nan)
        found[_positions(owner[names == name], ids)] = value[names == name]
        if missing := int(np.isnan(found).sum()):
            raise ValueError(f"{missing} of {len(ids)} documents have no value for {name}")
        by_set[str(name)] = found
    return by_set


def _growth(
    earned: Floats, step: NDArray[np.int64], groups: NDArray[np.object_], row: NDArray[np.int64]
) -> dict[str, Floats]:
    names = [name for name in dict.fromkeys(groups) if name != CORRUPTED] + [CORRUPTED]
    growth = {}
    for name in names:
        mine = groups[row] == name
        per_step = np.bincount(step[mine], weights=earned[mine], minlength=int(step.max()) + 1)
        growth[str(name)] = np.cumsum(per_step) / (groups == name).sum()
    return growth


def _by_stage(earned: Floats, step: NDArray[np.int64], spoiled: NDArray[np.bool_], stages: int) -> list[float]:
    stage = step * stages // (step.max() + 1)
    both = [np.unique(spoiled[stage == s]).size == 2 for s in range(stages)]
    return [roc(-earned[stage == s], spoiled[stage == s]).auroc if both[s] else np.nan for s in range(stages)]


def _ledger_series(ledger: pa.Table, name: str) -> LedgerSeries:
    columns = {c: _floats(ledger, c) for c in ("step", "measured", "predicted", "sum_phi", "history", "uncovered")}
    # The last step's change is unknown until its validation loss is read: such a row has no measurement.
    known = (ledger["set"].to_numpy() == name) & ~np.isnan(columns["measured"])
    step = columns.pop("step")[known].astype(np.int64)
    return LedgerSeries(step=step, **{c: np.nan_to_num(column[known]) for c, column in columns.items()})


def _positions(wanted: NDArray[np.int64], ids: NDArray[np.int64]) -> NDArray[np.int64]:
    order = np.argsort(ids)
    place = order[np.minimum(np.searchsorted(ids, wanted, sorter=order), len(ids) - 1)]
    if (ids[place] != wanted).any():
        raise ValueError(f"sample {wanted[ids[place] != wanted][0]} is not among the documents")
    return place


def _floats(table: pa.Table, column: str) -> Floats:
    return np.asarray(table[column].to_numpy(), np.float64)  # nulls become NaN
